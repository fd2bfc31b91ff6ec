"""A training step as the benchmarks time it, and captions as long as COCO's to take it with."""

import contextlib
import itertools
import sys
from pathlib import Path

import torch
from measure import seconds

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from models import Encoder

CAPTIONS = 5  # per photo
VOCAB_SIZE = 9490  # COCO's, words seen more than 5 times


def make_captions(size, device):
    """:return: captions (N, 52) ids, lengths (N,) with <start> and <end>"""
    lengths = torch.randn(size).mul(2.4).add(10.5).round().clamp(7, 25).long() + 2  # COCO's captions: 10.5 words
    captions = torch.randint(1, VOCAB_SIZE, (size, 52), device=device)
    captions[torch.arange(52) >= lengths.unsqueeze(1)] = 0
    return captions, lengths


def precisions(device):
    yield torch.float32, contextlib.nullcontext()
    yield torch.bfloat16, torch.autocast(device.type, dtype=torch.bfloat16)


def time_step(modules, loss_of, batches, autocast=None, warm_up=1):
    """
    :param loss_of: function of a batch's captions and lengths
    :param warm_up: steps before those that count
    :return: median seconds of forward, backward, clipping, Adam's step, and of the readings that each loop takes
    """
    ours = autocast is not None
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=ours)
    for module in modules:
        module.train()
        if isinstance(module, Encoder) and ours:
            module.backbone.to(memory_format=torch.channels_last)

    readings = []
    batches_in_turn = itertools.cycle(batches)

    def step():
        with autocast or contextlib.nullcontext():
            loss, accuracy = loss_of(*next(batches_in_turn))
        optimizer.zero_grad()
        loss.backward()
        readings.append((loss.detach(), accuracy))
        if ours:  # train.py looks at the gradients too, whether they are finite
            readings.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        torch.nn.utils.clip_grad_value_(parameters, 5.0)
        optimizer.step()

    return seconds(step, parameters[0].device, len(batches), warm_up)
