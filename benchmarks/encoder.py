"""
An encoder on a CPU, with the memory of tensors that are done kept for the next ones (captioning/speed/memory.py) and
without (plain): photos through a frozen network, as the feature cache has them computed, and one that is trained.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import CPU, in_own_process, peak_bytes, report, seconds

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from captioning.command_line import run_script
from captioning.speed.memory import keep_freed_memory
from models import Encoder
from utils import Count


@dataclass
class Config:
    encoder: str = "efficientnet_lite2"  # torchvision's name of the network
    batch_size: Count = 32  # photos at a time
    repeats: Count = 5  # timed batches of each case; the median counts


def main(config):
    rows = []
    for case, trained in (("frozen", False), ("fine-tuned", True)):
        plain, plain_peak = in_own_process(measure, config, trained, False)
        kept, kept_peak = in_own_process(measure, config, trained, True)
        rows.append(
            (f"{config.encoder}, {case}", "photos/s", config.batch_size / plain, config.batch_size / kept, None)
        )
        print(f"{case}: peak {plain_peak / 1e6:.0f} MB without, {kept_peak / 1e6:.0f} MB with it", flush=True)
    report("encoder", rows)


def measure(config, trained, keep):
    """:return: seconds of a batch, forward and, if it is trained, backward; the most bytes that were held"""
    if keep:
        keep_freed_memory()
    torch.manual_seed(0)
    encoder = Encoder(config.encoder)
    encoder.fine_tune(trained)
    encoder.train(trained)
    images = torch.randint(256, (config.batch_size, 3, 256, 256), dtype=torch.uint8)

    def work():
        with torch.set_grad_enabled(trained):
            features = encoder(images)
            if trained:
                features.float().mean().backward()

    return seconds(work, CPU, config.repeats), peak_bytes()


if __name__ == "__main__":
    run_script(main, Config)
