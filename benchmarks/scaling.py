"""
Does an epoch grow in step with the data, and memory not at all? An epoch on 1,000 to 100,000 made-up photos.

Everything a real epoch touches is there: the caption files, the feature cache on disk, the shuffled batches, the loader
and a small decoder's training steps. Each epoch has a process of its own. Plain is the rate a photo of the smallest
dataset: a ratio of 1 is linear growth.

Memory is what the process holds after its epoch (resident, without the pages of mapped files, which the system can
drop, and without what the C library keeps for later). The encoded captions are part of it, and all that grows.
"""

import ctypes
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from measure import in_own_process, report
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from captioning.command_line import run_script
from captioning.training.losses import CaptionLoss
from datasets import BatchOrder, CaptionDataset
from models import DecoderWithAttention
from utils import choose_device

VOCAB_SIZE, LONGEST, CAPTIONS = 200, 22, 5


@dataclass
class Config:
    device: str = "cpu"  # 'cpu' or 'cuda'
    photos: tuple[int, ...] = (1_000, 10_000, 100_000)  # sizes of the datasets
    batch_size: int = 1000  # captions per step
    grid: int = 2  # side of the features' grid, in locations
    channels: int = 64  # dimension of a location's features


def main(config):
    rows, held = [], []
    for photos in config.photos:
        with tempfile.TemporaryDirectory() as folder:
            in_own_process(make_files, Path(folder), photos, config)
            took, memory, captions = in_own_process(run_epoch, folder, config)
        rows.append((f"{photos} photos", "photos/s", photos / took))
        held.append(memory)
        print(f"{photos:>8} photos: {took:7.2f} s an epoch, {memory / 1e6:6.0f} MB held, "
              f"of them captions {captions / 1e6:5.1f} MB", flush=True)  # fmt: skip
    smallest = rows[0][2]
    print(f"memory grows by {(held[-1] - held[0]) / 1e6:.0f} MB from {config.photos[0]} to {config.photos[-1]} photos")
    report("scaling", [(case, unit, smallest, rate, None) for case, unit, rate in rows])


def run_epoch(folder, config):
    """:return: seconds of one epoch, bytes that the process holds after it, bytes of the captions among them"""
    device = choose_device(config.device)
    dataset = CaptionDataset(folder, "made_up", "TRAIN")
    dataset.use_features(Path(folder) / "features.hdf5")
    order = BatchOrder(dataset.lengths, config.batch_size)
    loader = DataLoader(dataset, batch_sampler=order, collate_fn=dataset.collate)
    decoder = DecoderWithAttention(VOCAB_SIZE, config.channels, 32, 32, 32, config.grid).to(device)
    optimizer, loss_function = torch.optim.Adam(decoder.parameters(), fused=True), CaptionLoss().to(device)

    def train_one_epoch():
        for batch in loader:
            batch = batch.to(device)
            loss, _ = loss_function(decoder(batch.images.float(), batch.captions, batch.lengths))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    order.set_epoch(0, start=max(0, len(order) - 10))
    train_one_epoch()  # the first steps of a process are slow
    order.set_epoch(1)
    start = time.perf_counter()
    train_one_epoch()
    took = time.perf_counter() - start
    return took, held_bytes(), dataset.captions.nbytes + dataset.lengths.nbytes


def make_files(folder, photos, config):
    """Write a dataset as create_input_files.py and the feature cache do, but for the images, which are never read."""
    random = np.random.default_rng(0)
    lengths = random.integers(8, LONGEST, photos * CAPTIONS)
    captions = random.integers(1, VOCAB_SIZE - 4, (photos * CAPTIONS, LONGEST))
    captions[np.arange(LONGEST) >= lengths[:, None]] = 0
    captions[:, 0] = VOCAB_SIZE - 2
    captions[np.arange(len(captions)), lengths - 1] = VOCAB_SIZE - 1
    words = {f"word{i}": i for i in range(1, VOCAB_SIZE - 3)}
    words |= {"<pad>": 0, "<unk>": VOCAB_SIZE - 3, "<start>": VOCAB_SIZE - 2, "<end>": VOCAB_SIZE - 1}
    for name, content in (
        ("TRAIN_CAPTIONS", captions.tolist()),
        ("TRAIN_CAPLENS", lengths.tolist()),
        ("WORDMAP", words),
    ):
        (folder / f"{name}_made_up.json").write_text(json.dumps(content))
    with h5py.File(folder / "TRAIN_IMAGES_made_up.hdf5", "w") as file:
        file.create_dataset("images", (photos, 3, 8, 8), dtype="uint8")
        file.attrs["captions_per_image"] = CAPTIONS
    with h5py.File(folder / "features.hdf5", "w") as file:
        features = file.create_dataset("features", (photos, config.grid, config.grid, config.channels), dtype="float16")
        for i in range(0, photos, 10_000):
            features[i : i + 10_000] = random.standard_normal(features[i : i + 10_000].shape).astype(np.float16)


def held_bytes():
    """:return: memory that this process holds now"""
    ctypes.CDLL(None).malloc_trim(0)  # Linux, glibc
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


if __name__ == "__main__":
    run_script(main, Config)
