"""
Which batches a loop reads: photos, or a frozen encoder's features from the cache; where they are kept.
"""

import signal

import torch
from torch.utils.data import DataLoader

from captioning.distributed import own_share
from captioning.features import cache_features, load_on_gpu
from datasets import CaptionDataset


def build_loader(
    data_folder, data_name, split, encoder, device, *, order=None, batch_size=32, share=1.0, image_major=True,
    cached=True, autocast=None, workers=0,
):  # fmt: skip
    """
    :param split: 'TRAIN', 'VAL' or 'TEST'
    :param encoder: on `device`; its features are computed now if they are to be cached and are not yet
    :param order: a `BatchOrder`; None for the photos as they come, `batch_size` at a time, up to a `share` of them (of
        several processes, each gets every so-manieth photo)
    :param image_major: batches of photos with all their captions, not of captions with their photo
    :param cached: read features from the cache; False for the photos themselves
    :param autocast: precision in which the features are computed
    :return: DataLoader of `datasets.Batch`, and the features of the whole split if they fit on the GPU, else None
    """
    dataset = CaptionDataset(data_folder, data_name, split, image_major)
    dataset.with_references = order is None
    if dataset.with_references:
        dataset.references  # noqa: B018  read now: a broken file should end the run before it begins
    resident = None
    if cached:
        path = cache_features(encoder, dataset.image_file, device, autocast=autocast)
        resident = load_on_gpu(path, device)
        dataset.use_features(path, read=resident is None)
    if order is not None:
        batches = {"batch_sampler": order}
    else:
        batches = {"batch_size": batch_size, "sampler": own_share(range(max(1, round(share * len(dataset)))))}
    loader = DataLoader(
        dataset, **batches, collate_fn=dataset.collate, num_workers=workers, pin_memory=device.type == "cuda",
        persistent_workers=workers > 0, worker_init_fn=leave_signals,
        generator=torch.Generator(),  # of its own: a resumed run draws the same dropout
    )  # fmt: skip
    return loader, resident


def leave_signals(_):
    """In a worker: the main process decides what Ctrl-C and SIGTERM mean; its workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
