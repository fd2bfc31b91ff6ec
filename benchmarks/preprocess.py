"""
How fast photos are read: the tutorial's way (one process, whole photo, then resize) against `photos.py`, in one run.

    python benchmarks/preprocess.py

Both read the same JPEGs from disk and write (3, 256, 256) bytes into an HDF5 file. The photos are scikit-image's
samples, cropped at random, enlarged, and given the noise of a camera, so that their files are as large as real ones.
The last lines are JSON, one a case. `limit_fraction` is our rate over what decoding alone (no resize, no HDF5, no
traffic between processes) would give on all workers, measured in the same run: libjpeg's work cannot be avoided.
Starting the workers is paid once a run, not once a photo: it has a line of its own.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import skimage.data
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from captioning.command_line import run_script
from captioning.preparation.photos import DRAFT_GAP, num_cores, photo_reader, read_photo
from utils import UserError


@dataclass
class Config:
    photos: tuple[int, ...] = (300, 60)  # how many at 640 x 480, and at 2048 x 1536
    image_size: int = 256  # width and height of the result, in pixels
    workers: int | None = None  # processes; default one per core
    repeats: int = 8  # each way is timed this often, in turns; its best time counts
    noise: float = 3.0  # standard deviation of the noise that is put on the photos, of 255
    seed: int = 0  # of crops and noise


def main(config):
    if len(config.photos) != 2:
        raise UserError(f"photos: {len(config.photos)} numbers found, two expected: of small and of large photos")
    if min(*config.photos, config.repeats, config.image_size) < 1 or (config.workers or 1) < 1:
        raise UserError("photos, repeats, image_size, workers: expected 1 or more of each")
    workers = num_cores() if config.workers is None else config.workers
    cases = dict(zip([(640, 480), (2048, 1536)], config.photos, strict=True))
    lines = []
    print(f"{workers} workers; photos a second, best of {config.repeats}")
    print(
        f"{'case':12}{'MB a photo':>11}{'plain':>8}{'ours':>8}{'ratio':>7}{'of decoding':>12}{'pixel difference':>17}"
    )
    with tempfile.TemporaryDirectory() as folder, photo_reader(workers) as read_photos:
        warm_up = make_photos(Path(folder), (64, 64), 64 * workers, config)
        start = time.perf_counter()
        list(read_photos(warm_up, config.image_size))
        start_time = time.perf_counter() - start
        for (width, height), count in cases.items():
            paths = make_photos(Path(folder), (width, height), count, config)
            ways = {"plain": plain, "ours": lambda paths, size: read_photos(paths, size), "decode": decode_only}
            rates = measure(ways, paths, Path(folder), config)
            case, limit = f"{width}x{height}", rates["decode"] * workers
            difference = mean_pixel_difference(paths[:30], config.image_size)
            size = np.mean([path.stat().st_size for path in paths]) / 1e6
            ratio, fraction = rates["ours"] / rates["plain"], rates["ours"] / limit
            print(
                f"{case:12}{size:11.2f}{rates['plain']:8.0f}{rates['ours']:8.0f}{ratio:7.2f}{fraction:12.2f}"
                f"{difference:9.3f} of 255"
            )
            lines.append(
                {
                    "benchmark": "preprocess",
                    "case": case,
                    "unit": "photos/s",
                    "plain": round(rates["plain"], 1),
                    "ours": round(rates["ours"], 1),
                    "ratio": round(ratio, 2),
                    "limit_fraction": round(fraction, 3),
                }
            )
    print(f"Starting the workers, once a run: {start_time:.1f} s")
    for line in lines:
        print(json.dumps(line))


def make_photos(folder, size, count, config):
    """
    Write JPEGs of quality 90.

    :param size: width and height, in pixels
    :return: list of `count` paths
    """
    rng = np.random.default_rng(config.seed)
    samples = [
        Image.fromarray(sample()) for sample in (skimage.data.astronaut, skimage.data.coffee, skimage.data.chelsea)
    ]
    paths = []
    for i in tqdm(range(count), f"making {size[0]} x {size[1]}", leave=False):
        sample = samples[i % len(samples)]
        width, height = (int(side * rng.uniform(0.7, 1.0)) for side in sample.size)
        left, top = rng.integers(sample.width - width + 1), rng.integers(sample.height - height + 1)
        photo = sample.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        pixels = np.asarray(photo) + config.noise * rng.standard_normal((*size[::-1], 1), dtype=np.float32)
        paths.append(folder / f"{size[0]}_{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def plain(paths, size):
    """Read and resize as the tutorial does: one photo after the other, decoded whole."""
    for path in paths:
        image = np.array(Image.open(path))  # (H, W, 3)
        if image.ndim == 2:
            image = np.stack([image] * 3, axis=2)
        image = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        yield image.transpose(2, 0, 1)  # (3, size, size)


def decode_only(paths, size):
    """Decode no more than `read_photo` does, and do nothing with the pixels."""
    nothing = np.zeros((3, size, size), np.uint8)
    for path in paths:
        with Image.open(path) as photo:
            photo.draft(None, (DRAFT_GAP * size, DRAFT_GAP * size))
            photo.load()
        yield nothing


def measure(ways, paths, folder, config):
    """
    :param ways: dict from name to a generator function of (paths, size)
    :return: dict from name to photos a second, the best of several turns
    """
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(config.repeats):
        for name, read in ways.items():
            start = time.perf_counter()
            with h5py.File(folder / "photos.hdf5", "w") as file:
                shape = (len(paths), 3, config.image_size, config.image_size)
                images = file.create_dataset("images", shape, dtype=np.uint8)
                for i, pixels in enumerate(read(paths, config.image_size)):
                    if name != "decode":
                        images[i] = pixels
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(paths) / seconds for name, seconds in best.items()}


def mean_pixel_difference(paths, size):
    """
    :return: mean absolute difference between our pixels and the plain version's, of 255
    """
    pairs = zip(paths, plain(paths, size), strict=True)
    return np.mean([np.abs(read_photo(path, size).astype(int) - pixels).mean() for path, pixels in pairs])


if __name__ == "__main__":
    run_script(main, Config)
