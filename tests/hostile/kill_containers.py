"""
Two containers compute the feature cache of the same data at once, and one is killed: is the cache whole, or not there?

    python tests/hostile/kill_containers.py --rounds 10

Each container is a process that believes to be process 1, as in Docker: process ids do not tell them apart. It needs
Linux's `unshare` and the right to use it.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # when it is run as a script

from captioning.command_line import run_script
from captioning.features import cache_features
from models import Encoder
from utils import UserError

CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
IMAGES = "TRAIN_IMAGES_tiny.hdf5"


@dataclass
class Config:
    rounds: int = 10  # pairs of containers
    photos: int = 200  # whose features they compute
    seed: int = 0  # of the moments
    build: str | None = None  # folder whose cache is to be computed: what runs within a container


def main(config):
    if config.build:
        build(Path(config.build))
        return
    rng = random.Random(config.seed)
    whole = sum(one_round(i, config.photos, rng) for i in range(config.rounds))
    print(f"{whole} of {config.rounds} rounds left a whole cache", flush=True)
    if whole < config.rounds:
        raise UserError("features: a killed container left a cache that is not whole")


def may_unshare():
    """:return: whether this machine lets us make containers"""
    try:
        return subprocess.run([*CONTAINER, "true"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def build(folder):
    """Compute the cache; the first line that is printed says which process this is."""
    print(Path("/proc/self/stat").read_text().split()[0], flush=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = cache_features(Encoder("squeezenet1_1").eval(), folder / IMAGES, torch.device("cpu"), batch_size=1)
    print(path)


def one_round(i, num_photos, rng):
    """:return: whether all was well: no cache or a whole one after the kill, and a whole one in the end"""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with h5py.File(folder / IMAGES, "w") as file:
            file["images"] = np.random.default_rng(i).integers(0, 256, (num_photos, 3, 64, 64), dtype=np.uint8)
        containers = [start(folder) for _ in range(2)]
        numbers = [container.stdout.readline().strip() for container in containers]
        moment = rng.uniform(0, 3)
        time.sleep(moment)
        caches_at_kill = caches(folder)
        containers[0].send_signal(signal.SIGKILL)
        fates = [container.wait(timeout=300) for container in containers]
        after = caches(folder)
        build_alone(folder)
        [path] = caches(folder)
        same = all(np.array_equal(features_of(one), features_of(path)) for one in after)
        zeros = int((np.abs(features_of(path)).sum(axis=(1, 2, 3)) == 0).sum())
        left = [one.name for one in folder.glob(".*.tmp")]
        print(
            f"round {i + 1}: process {' and '.join(numbers)}, killed after {moment:.2f} s with {len(caches_at_kill)} "
            f"caches there; ended with {fates}; then {len(after)} caches, {zeros} rows of zeros, {len(left)} leftovers",
            flush=True,
        )
        return numbers == ["1", "1"] and same and zeros == 0 and not left and fates[1] == 0 and len(after) == 1


def start(folder):
    """:return: process of a container that computes the cache of the folder"""
    command = [*CONTAINER, sys.executable, __file__, "--build", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def build_alone(folder):
    """Use the cache, or compute it again, as the next run would."""
    container = start(folder)
    printed, _ = container.communicate(timeout=300)
    if container.returncode:
        raise UserError(f"features: the run after the kill failed: {printed.strip()[-300:]}")


def caches(folder):
    return sorted(folder.glob("TRAIN_FEATURES_*.hdf5"))


def features_of(path):
    with h5py.File(path, "r") as file:
        return file["features"][:].astype(np.float32)


if __name__ == "__main__":
    run_script(main, Config)
