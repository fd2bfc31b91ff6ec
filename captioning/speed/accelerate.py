"""
Faster ways of computing the same numbers, put behind a decoder's plain modules from outside.

The modules keep their parameters and names; only their class changes, to a subclass whose forward pass is faster on a
CPU. On a GPU they stay as they are: PyTorch's fused LSTM cell is at work there, and sharing would cost the host more
than it saves the device.
"""

import functools

import torch
from torch import nn

from captioning.speed.memory import keep_freed_memory
from captioning.speed.shared_products import (
    SharingEmbedding,
    SharingLinear,
    SharingLSTMCell,
    close_sharing,
    open_sharing,
)

# For each way to save time, which class it puts in the place of which.
FASTER = {
    "one weight gradient": {nn.Linear: SharingLinear, nn.Embedding: SharingEmbedding, nn.LSTMCell: SharingLSTMCell},
    "oneDNN's order": {},  # it needs the classes above
}


def accelerate(decoder, ways=tuple(FASTER)):
    """
    Let a decoder compute the same numbers in less time on CPUs, for training and for searches.

    :param decoder: any decoder; one that has none of `FASTER`'s modules stays as it is
    :param ways: which of `FASTER` to take; benchmarks/train_step.py measures what each gives
    :return: the same decoder
    """
    if any(parameter.is_meta for parameter in decoder.parameters()):
        return decoder  # shapes only: it computes nothing
    keep_freed_memory()
    if missing := missing_operation():
        print(f"fast_cpu: this PyTorch has no {missing}, so the decoder computes in the plain way")
        return decoder
    classes = {plain: fast for way in ways for plain, fast in FASTER[way].items()}
    for module in decoder.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    decoder.register_forward_pre_hook(functools.partial(open_sharing, with_onednn="oneDNN's order" in ways))
    decoder.register_forward_hook(close_sharing, always_call=True)
    return decoder


def missing_operation():
    """:return: name of the first private operation that is needed and not there, or None"""
    for place, name in (
        (torch.ops.mkldnn, "_linear_pointwise"),
        (torch.ops.mkldnn, "_reorder_linear_weight"),
        (torch._C, "_current_graph_task_id"),
    ):
        if not hasattr(place, name):
            return name
    return None
