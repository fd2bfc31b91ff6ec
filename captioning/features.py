"""
Features of a frozen encoder, computed once for each photo and kept in a file beside the data.

A frozen encoder gives the same features for a photo in every epoch, for every one of its captions. They are kept on
the encoder's own grid in half precision (256 KB per photo for a ResNet; about 30 GB for COCO) and read as needed. The
file's name holds a key of the encoder's weights and the photos, so that features of another encoder are never used.
"""

import hashlib
import math
import os
import shutil
import signal
import socket
import tempfile
import zlib
from multiprocessing.connection import Listener
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from captioning.distributed import from_first, gather_at_first, get_rank, get_world_size, is_first, own_share
from captioning.storage.files import atomic_path, remove_leftovers
from captioning.storage.hdf5 import map_rows, new_hdf5, open_hdf5
from captioning.storage.open_files import allow_open_files
from datasets import CaptionDataset
from utils import UserError

MOST_BLOCKS = 1000  # of photos, that a cache has checksums of
MOST_CHECKED = 1 << 30  # bytes of a cache whose checksums are compared before it is used: about half a second
PATIENCE = 600  # seconds without a batch, after which no worker is waited for any more
FILES_OF_WORKER = 16  # open ones: its pipes, and one for each tensor that it hands over
BATCHES_AHEAD = 2  # that each worker reads, as DataLoader does it by default
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps what processes share


@torch.no_grad()
def cache_features(encoder, image_file, device, batch_size=32, autocast=None, view=None):
    """
    Compute the features of all photos of a split, or of a changed copy of each, unless a file of them is already there.

    :param encoder: a frozen `Encoder`, on `device`
    :param image_file: HDF5 file of the split's images
    :param autocast: a context manager to compute within, such as torch.autocast("cuda"); None for full precision
    :param view: an `augmentation.View`, how the photos are changed; None for the photos themselves
    :return: path of an HDF5 file, `features` (I, height, width, native_dim) float16 in the order of the images
    :raises UserError: if the disk is too small
    """
    image_file = Path(image_file)
    with open_hdf5(image_file, "images") as file:
        images = file["images"]
        key = cache_key(encoder, image_file, images, autocast, view)
        name = image_file.stem.replace("_IMAGES_", "_FEATURES_")
        which = f"_view{view.number}" if view else ""
        network = encoder.name.replace("/", "_")  # of timm/<name>
        path = image_file.with_name(f"{name}_{network}{which}_{key}.hdf5")
        if is_first():
            remove_leftovers(path.parent, r"[A-Z]+_FEATURES_.+\.hdf5")
        there = path.exists() or path.is_symlink()
        fault = from_first(find_fault(path, len(images), encoder.native_dim, key) if there and is_first() else None)
        if there and not fault:
            print(f"Using the cached features of {path}")
            return path
        if there:
            print(f"{path}: {fault}; the features are computed again")

        shape = (len(images), *encoder.grid(torch.from_numpy(read_images(images, 0, 1)).to(device)).shape[1:])
        size = 2 * torch.Size(shape).numel()  # bytes
        free = shutil.disk_usage(path.parent).free
        print(f"Caching the features of {len(images)} photos: {size / 1e9:.2f} GB in {path}")
        if size > 0.98 * free:
            raise UserError(
                f"{path.parent}: {free / 1e9:.2f} GB are free, the feature cache needs {size / 1e9:.2f} GB; make room, "
                "or go without it: --no_cache_features"
            )
        batches = compute_features(encoder, images, device, batch_size, autocast, view)
        if is_first():
            try:
                write_features(path, key, shape, batches)
            except UserError as error:  # the disk is full, or nothing may be written here
                raise UserError(f"{error}; or go without the cache: --no_cache_features") from error
        else:
            list(batches)  # empty: the first process gets them all
        from_first("the file is there")
    return path


def compute_features(encoder, images, device, batch_size, autocast, view):
    """
    Compute the features of all photos; several processes share them out, and the first gets them all.

    :return: yields arrays (n, height, width, native_dim) float16 in the order of the images, in the first process only
    """
    first, step = get_rank() * batch_size, get_world_size() * batch_size
    for start in range(first, first + len(images), step):  # as many rounds in every process
        batch = torch.from_numpy(read_images(images, start, start + batch_size))  # (n, 3, S, S)
        batch = (view.change(batch, start) if view and len(batch) else batch).to(device)
        with autocast or torch.no_grad():
            features = encoder.grid(batch).cpu().numpy() if len(batch) else None  # in the last round, some have none
        yield from filter(lambda part: part is not None, gather_at_first(features) or ())


def write_features(path, key, shape, batches):
    """Write the features as they come, atomically."""
    with atomic_path(path) as temporary, new_hdf5(temporary) as out:
        features = out.create_dataset("features", shape, dtype="float16")
        out.attrs["key"] = key
        checksums = np.zeros(math.ceil(len(features) / rows_per_block(len(features))), np.uint32)
        done = 0
        with tqdm(total=len(features), unit="photo", desc="features", disable=None) as bar:
            for batch in batches:
                features[done : done + len(batch)] = batch
                for i, row in enumerate(batch, start=done):
                    block = i // rows_per_block(len(features))
                    checksums[block] = zlib.crc32(np.ascontiguousarray(row), checksums[block])
                done += len(batch)
                bar.update(len(batch))
        out.attrs["checksums"] = checksums


def rows_per_block(num_photos):
    """:return: how many photos share a checksum"""
    return math.ceil(num_photos / MOST_BLOCKS)


def cache_key(encoder, image_file, images, autocast, view):
    """:return: 12 hexadecimal digits that change with the encoder's weights, the images, the precision, or the view"""
    precision = getattr(autocast, "fast_dtype", None)
    if next(encoder.parameters()).is_cuda and torch.backends.cudnn.allow_tf32:
        precision = f"{precision} TF32"
    digest = hashlib.sha256(f"{encoder.name} {precision}".encode())
    if view:
        digest.update(view.description().encode())
    for name, tensor in encoder.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy())
    status = image_file.stat()
    digest.update(f"{images.shape} {status.st_size} {status.st_mtime_ns}".encode())
    for i in range(0, len(images), 1 + len(images) // 64):  # a sample: all of COCO would take minutes to read
        digest.update(read_images(images, i, i + 1))
    return digest.hexdigest()[:12]


def read_images(images, start, end):
    """:return: some rows of an HDF5 dataset"""
    try:
        return images[start:end]
    except OSError as error:
        raise UserError(
            f"{images.file.filename}: photo {start} cannot be read ({error}); make the file again"
        ) from error


def find_fault(path, num_photos, native_dim, key):
    """
    Compare what a cache says of itself with what it should be, and its checksums: of a large one those of blocks that
    are spread over the file, for reading all of COCO's would take minutes.

    :return: why the file cannot be used, in words; None if it is sound
    """
    try:
        with open_hdf5(path, "features") as file:
            features, checksums = file["features"], file.attrs.get("checksums")
            fits = len(features) == num_photos and features.shape[3] == native_dim and features.dtype == "float16"
            if not fits or file.attrs["key"] != key:
                return "holds other features"
            if checksums is None:
                return "has no checksums, as those that older versions made"
        rows, step = map_rows(path, "features"), rows_per_block(num_photos)
        if checksums.shape != (math.ceil(num_photos / step),):
            return "is damaged: it has other checksums than photos"
        compared = math.ceil(len(checksums) * min(1, MOST_CHECKED / rows.nbytes))
        for block in np.linspace(len(checksums) - 1, 0, compared, dtype=int):  # the last one first: it was written last
            if zlib.crc32(np.ascontiguousarray(rows[block * step : (block + 1) * step])) != checksums[block]:
                return "is damaged: the features of some photos have changed since they were written"
    except Exception:  # damaged in one of many ways
        return "is damaged"
    return None


def load_on_gpu(paths, device):
    """
    :param paths: of `cache_features`, one for each view of the photos
    :return: all features (views, I, height, width, native_dim) on the GPU, if `device` is one and half of its free
        memory holds them; else None, and they are read from the files as needed
    """
    if device.type != "cuda":
        return None
    views = [map_rows(path, "features") for path in paths]
    free, _ = torch.cuda.mem_get_info(device)
    size = sum(rows.size * rows.itemsize for rows in views)  # bytes
    if size > free / 2:
        return None
    features = torch.empty((len(views), *views[0].shape), dtype=torch.float16, device=device)
    for view, rows in zip(features, views, strict=True):
        for i in range(0, len(rows), 1024):
            view[i : i + 1024] = torch.tensor(rows[i : i + 1024]).to(device)  # copied: the map is read-only
    print(f"The features are on the GPU: {size / 1e9:.2f} GB")
    return features


def build_loader(
    data_folder, data_name, split, encoder, device, *, order=None, batch_size=32, share=1.0, image_major=True,
    cached=True, autocast=None, workers=0, views=None,
):  # fmt: skip
    """
    :param split: 'TRAIN', 'VAL' or 'TEST'
    :param encoder: on `device`; its features are computed now if they are to be cached and are not yet
    :param order: a `BatchOrder`; None for the photos as they come, `batch_size` at a time
    :param share: of the photos that are read where there is no order: they are spread over the split, as its photos may
        be sorted; several processes take turns
    :param image_major: batches of photos with all their captions, not of captions with their photo
    :param cached: read features from the cache; False for the photos themselves
    :param autocast: precision in which the features are computed
    :param views: function of the dataset that lists `augmentation.View`s, whose features are cached too and read in
        turn; None for the photos alone
    :return: DataLoader of `datasets.Batch`, and the features of the whole split if they fit on the GPU, else None
    :raises UserError: if the workers could not hand over what they read
    """
    dataset = CaptionDataset(data_folder, data_name, split, image_major)
    dataset.with_references = order is None
    if dataset.with_references:
        dataset.load_references()  # now: a broken file should end the run before it begins
    resident = None
    if cached:
        copies = views(dataset) if views else []
        paths = [
            cache_features(encoder, dataset.image_file, device, autocast=autocast, view=view)
            for view in [None, *copies]
        ]
        resident = load_on_gpu(paths, device)
        dataset.use_features(*paths, read=resident is None)
    if order is not None:
        batches = {"batch_sampler": order}
    else:
        batches = {"batch_size": batch_size, "sampler": own_share(spread(len(dataset), share))}
    check_workers(dataset, order.batch_size if order else batch_size, workers)
    loader = DataLoader(
        dataset, **batches, collate_fn=dataset.collate, num_workers=workers, pin_memory=device.type == "cuda",
        persistent_workers=workers > 0, worker_init_fn=leave_signals, timeout=PATIENCE if workers else 0,
        generator=torch.Generator(),  # of its own: a resumed run draws the same dropout
    )  # fmt: skip
    return loader, resident


def spread(count, share):
    """:return: list of the places of a share of `count` items, at equal distances; at least one"""
    wanted = max(1, round(share * count))
    return [i * count // wanted for i in range(wanted)]


def check_workers(dataset, batch_size, workers):
    """
    :param batch_size: items in a batch
    :raises UserError: if the machine lacks what a DataLoader's workers hand their batches over with: they would die, or
        wait for ever
    """
    if workers == 0:
        return
    allow_open_files(workers, FILES_OF_WORKER)
    try:
        listening = Listener(family="AF_UNIX") if hasattr(socket, "AF_UNIX") else None
    except OSError as error:
        folder = tempfile.gettempdir()
        raise UserError(
            f"TMPDIR: workers cannot send their batches through {folder} ({error}); set it to a short path such as "
            "/tmp, or take --workers 0"
        ) from None
    if listening:
        listening.close()
    if SHARED_MEMORY.is_dir():
        batch = min(batch_size, len(dataset)) * bytes_per_item(dataset)
        needed = BATCHES_AHEAD * workers * batch * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free = shutil.disk_usage(SHARED_MEMORY).free
        if needed > free:
            fitting = max(0, int(workers * free / needed))
            raise UserError(
                f"workers: {workers} need {needed / 1e6:.0f} MB of shared memory for batches of {batch / 1e6:.1f} MB, "
                f"but {SHARED_MEMORY} has {free / 1e6:.0f} MB free; take --workers {fitting}, or give the container "
                "more (docker run --shm-size)"
            )


def bytes_per_item(dataset):
    """:return: how large the photo, or the features, of an item are; its captions are small"""
    if not dataset.read:
        return 0
    rows = map_rows(dataset.sources[0], dataset.source_name)
    return rows.dtype.itemsize * math.prod(rows.shape[1:])


def leave_signals(_):
    """In a worker: the main process decides what Ctrl-C and SIGTERM mean; its workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
