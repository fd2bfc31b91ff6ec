"""
Captioning photos with beam 5 against the tutorial's evaluation: ResNet-101, 512 / 512 / 512, 14 x 14.

Plain, as the tutorial describes it: every caption row brings its photo, so each photo comes five times, alone, through
the encoder and a beam search that projects the features at every step. Ours: each photo once, in batches, over cached
features or the photos themselves. Weights are random, so captions would never end: both stop after 12 steps, as long
as COCO's captions with <end>. Both must find the same captions, which is checked. The limit is the arithmetic of our
search (and of the encoder, without the cache) at the rate of a large matrix product.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import matmul_rates, report, seconds
from torch.utils.flop_counter import FlopCounterMode
from tutorial import settle, tutorial_decoder, tutorial_encode
from tutorial_models import beam_caption

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from captioning.command_line import run_script
from captioning.inference.search import Rules, beam_search
from captioning.networks.registry import build_decoder
from models import Encoder
from utils import choose_device

VOCAB_SIZE, START, END, STEPS = 9490, 1, 2, 12


@dataclass
class Config:
    device: str = "cpu"  # 'cpu' or 'cuda'
    encoder: str = "resnet101"  # torchvision's name of the network
    photos: int = 32  # photos in our batch
    plain_photos: int = 4  # photos that the plain version captions
    beam_size: int = 5  # captions that the search keeps
    captions_per_image: int = 5  # times that the plain version meets each photo


@torch.no_grad()
def main(config):
    device = choose_device(config.device)
    torch.manual_seed(0)
    encoder = Encoder(config.encoder).to(device).eval()
    ours = build_decoder({"decoder": "soft"}, VOCAB_SIZE, encoder.encoder_dim).to(device).eval()
    ours.fc.weight.mul_(10)  # random weights: words differ clearly, so that rounding cannot swap two beams
    plain = tutorial_decoder(ours).eval()
    images = torch.randint(0, 256, (config.photos, 3, 256, 256), dtype=torch.uint8, device=device)
    settle(encoder, images[:4])
    cached = encoder.grid(images)
    rates = matmul_rates(device)

    def caption_plain():
        found = []
        encoder.backbone.to(memory_format=torch.contiguous_format)
        for photo in images[: config.plain_photos]:
            for _ in range(config.captions_per_image):
                features = tutorial_encode(encoder, photo.unsqueeze(0))
                words = beam_caption(plain, features, START, END, config.beam_size, STEPS)
            found.append(words)
        return found

    def caption_ours(photos):
        rules = Rules(start=START, end=END, max_length=STEPS)
        return [best.words for best, *_ in beam_search(ours, encoder.features(photos), rules, config.beam_size)]

    same = sum(a == b for a, b in zip(caption_plain(), caption_ours(cached), strict=False))
    assert same == config.plain_photos, f"only {same} of {config.plain_photos} captions are the same"
    print(f"{same} of {config.plain_photos} captions are the same")
    plain_rate = config.plain_photos / seconds(caption_plain, device, repeats=1, warm_up=0)

    encoder.backbone.to(memory_format=torch.channels_last)
    rows = []
    for name, photos in (("cached features", cached), ("from photos", images)):
        with FlopCounterMode(display=False) as counter:
            caption_ours(photos)
        flops = counter.get_total_flops() / config.photos
        for kind in rates:
            low = torch.autocast(device.type, dtype=kind) if kind != torch.float32 else contextlib.nullcontext()
            with low:
                rate = config.photos / seconds(lambda photos=photos: caption_ours(photos), device, repeats=3)
            rows.append((f"beam {config.beam_size}, {name}, {kind}", "photos/s", plain_rate, rate, rates[kind] / flops))
    report("evaluate", rows)


if __name__ == "__main__":
    run_script(main, Config)
