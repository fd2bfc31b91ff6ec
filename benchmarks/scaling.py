"""
Does an epoch grow in step with the data, and memory not at all? An epoch on 1,000 to 100,000 made-up photos.

Everything a real epoch touches is there: the caption files, the feature cache on disk, the shuffled batches, the loader
and a small decoder's training steps. Plain is the rate a photo of the smallest dataset: a ratio of 1 is linear growth.
Memory is what the process holds at the end of each epoch (resident, without the pages of mapped files).
"""

import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from measure import report
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from datasets import BatchOrder, CaptionDataset
from losses import CaptionLoss
from models import DecoderWithAttention
from utils import choose_device, run_script

VOCAB_SIZE, LONGEST, CAPTIONS = 1000, 22, 5


@dataclass
class Config:
    device: str = "cpu"  # 'cpu' or 'cuda'
    photos: tuple[int, ...] = (1_000, 10_000, 100_000)  # sizes of the datasets
    batch_size: int = 500  # captions a step
    grid: int = 2  # side of the features' grid, in cells
    channels: int = 64  # numbers in each cell


def main(config):
    device = choose_device(config.device)
    run_epoch(config, min(config.photos), device)  # the first steps of a process are slow
    rows, memory = [], []
    for photos in config.photos:
        took, resident = run_epoch(config, photos, device)
        rows.append((f"{photos} photos", "photos/s", photos / took))
        memory.append(resident)
        print(f"{photos:>8} photos: {took:7.2f} s an epoch, {resident / 1e6:7.0f} MB resident", flush=True)
    smallest = rows[0][2]
    print(
        f"memory grows by {(memory[-1] - memory[0]) / 1e6:.0f} MB from {config.photos[0]} to {config.photos[-1]} photos"
    )
    report("scaling", [(case, unit, smallest, rate, None) for case, unit, rate in rows])


def run_epoch(config, photos, device):
    """:return: seconds of one epoch, bytes that the process holds at its end"""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        made = spawn.Process(target=make_files, args=(Path(folder), photos, config))  # its memory is not training's
        made.start()
        made.join()
        dataset = CaptionDataset(folder, "made_up", "TRAIN")
        dataset.use_features(Path(folder) / "features.hdf5")
        loader = DataLoader(
            dataset, batch_sampler=BatchOrder(dataset.lengths, config.batch_size), collate_fn=dataset.collate
        )
        decoder = DecoderWithAttention(VOCAB_SIZE, config.channels, 32, 32, 32, config.grid).to(device)
        optimizer, loss_function = torch.optim.Adam(decoder.parameters(), fused=True), CaptionLoss().to(device)
        start = time.perf_counter()
        for batch in loader:
            batch = batch.to(device)
            loss, _ = loss_function(decoder(batch.images.float(), batch.captions, batch.lengths))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - start, resident_bytes()


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


def resident_bytes():
    """:return: memory that this process holds now, without the pages of mapped files, which the system can drop"""
    status = Path("/proc/self/status").read_text()  # Linux
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


if __name__ == "__main__":
    run_script(main, Config)
