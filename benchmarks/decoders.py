"""
What each decoder costs: a training step and a beam search, on cached features of a frozen encoder, as train.py and
eval.py do them, image-major; each decoder in a process of its own, with random weights.

The captions are as long as COCO's, those that are searched 10 words long. The memory is the most that a process held
more in its training steps than before the decoder was built: weights, gradients, Adam's two averages, and the step.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import in_own_process, peak_bytes, seconds
from timed_step import CAPTIONS, VOCAB_SIZE, make_captions, precisions, time_step

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from captioning.command_line import run_script
from captioning.inference.search import Rules, beam_search
from captioning.networks.registry import DECODERS, build_decoder
from captioning.training.losses import CaptionLoss, top_k_accuracy
from utils import Count, Dimension, GridSide, choose_device

RULES = Rules(start=1, end=2, min_length=10, max_length=10)
COLUMNS = "decoder", "million weights", "step, float32", "step, bf16", "beam search, a photo", "memory of a step"


@dataclass
class Config:
    decoders: tuple[str, ...] = tuple(DECODERS)  # which to measure
    device: str = "cpu"  # 'cpu' or 'cuda'
    photos: Count = 13  # in a step, with five captions each; and in a search
    grid: GridSide = 8  # side of the encoder's own grid, in locations
    encoded_image_size: GridSide = 8  # side of the grid that attention sees
    encoder_dim: Dimension = 1280  # of a location; EfficientNet-Lite has 1280, ResNet-101 2048
    beam_size: Count = 5
    repeats: Count = 6  # timed steps, each with captions of its own; the median counts


def main(config):
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}")
    rows = []
    for name in config.decoders:
        row = {"weights": count_weights(name, config)}
        row |= in_own_process(time_training, name, config)
        row |= {"search": in_own_process(time_search, name, config)}
        row |= {"memory": in_own_process(measure_memory, name, config)}
        weights, *times, memory = row.values()
        print(f"| `{name}` | {weights / 1e6:.1f} | {' | '.join(f'{1000 * time:.0f} ms' for time in times)} "
              f"| {memory / 1e6:.0f} MB |", flush=True)  # fmt: skip
        rows.append({"benchmark": "decoders", "case": name, **row})
    print("\n".join(json.dumps(row) for row in rows))


def count_weights(name, config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(name, config).parameters())


def build(name, config):
    """:return: a decoder of the default sizes, whose sizes of the grid are the config's"""
    return build_decoder({**asdict(config), "decoder": name}, VOCAB_SIZE, config.encoder_dim)


def draw(config, device):
    """:return: features as the cache keeps them (B, grid, grid, encoder_dim), `repeats` batches of captions"""
    torch.manual_seed(0)
    features = torch.rand(config.photos, config.grid, config.grid, config.encoder_dim, device=device).half()
    image_rows = torch.arange(config.photos).repeat_interleave(CAPTIONS)  # (N,)
    return features, [(*make_captions(len(image_rows), device), image_rows) for _ in range(config.repeats)]


def time_training(name, config):
    """:return: dict of type -> seconds of a step"""
    device = choose_device(config.device)
    features, batches = draw(config, device)
    decoder = build(name, config).to(device)
    return {
        str(kind): time_step([decoder], loss_of(decoder, features), batches, autocast, warm_up=len(batches))
        for kind, autocast in precisions(device)
    }


def loss_of(decoder, features):
    """:return: function of a batch of captions, which gives the loss and the accuracy that training would print"""
    loss_function = CaptionLoss()

    def loss_of_batch(captions, lengths, image_rows):
        decoded = decoder(features, captions, lengths, image_rows)
        return loss_function(decoded)[0], top_k_accuracy(decoded.logits.detach(), decoded.targets, 5)

    return loss_of_batch


def time_search(name, config):
    """:return: seconds of a beam search for one photo of a batch"""
    device = choose_device(config.device)
    features, _ = draw(config, device)
    decoder = build(name, config).to(device).eval()
    search = seconds(lambda: beam_search(decoder, features.float(), RULES, config.beam_size), device, config.repeats)
    return search / config.photos


def measure_memory(name, config):
    """:return: bytes that float32 steps take at most, with all that is kept between them"""
    device = choose_device(config.device)
    features, batches = draw(config, device)
    before = peak_bytes(device)
    decoder = build(name, config).to(device)
    _, autocast = next(precisions(device))
    time_step([decoder], loss_of(decoder, features), batches, autocast)
    return peak_bytes(device) - before


if __name__ == "__main__":
    run_script(main, Config)
