"""What an encoder's network is made of, and which of its layers belong together."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from utils import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB from 0 to 1, what torchvision's weights were trained with
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 256  # pixels of a side; only networks that take photos of one size have to know


class Backbone(NamedTuple):
    """A network without its pooling and classifier, ready for `models.Encoder`."""

    network: nn.Module  # (N, 3, side, side) -> (N, dim, height, width)
    dim: int  # of a location's features
    blocks: list  # of pairs: a layer, and the number of its block, from 1; together they are the whole network
    mean: tuple = IMAGENET_MEAN  # of the pixels that the weights were trained with
    std: tuple = IMAGENET_STD


@torch.no_grad()
def measure(network, side=64, holders=()):
    """
    Send one grey image through a network, and see what its layers make of it.

    A convolutional network's block is what works at one resolution: block 1 down to a quarter of the image's side, then
    one more each time the side is halved. A network of a single resolution, a vision transformer, is four blocks of
    about as many layers each.

    :param side: of the image, in pixels
    :param holders: modules that only hold layers, which are then looked at one by one
    :return: dimension of the features, and the blocks of `Backbone`
    """
    layers, sides = list(outer_layers(network, holders)), {}  # layer -> side of what it gives

    def note(layer, _, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            sides[layer] = output.shape[2]

    hooks = [layer.register_forward_hook(note) for layer in layers]
    was_training = network.training
    device = next(network.parameters()).device
    dim = network.eval()(torch.zeros(1, 3, side, side, device=device)).shape[1]
    network.train(was_training)
    for hook in hooks:
        hook.remove()

    blocks, number = [], 1
    for i, layer in enumerate(layers):
        if len(set(sides.values())) == 1:
            number = 1 + 4 * i // len(layers)
        elif layer in sides:
            number = max(1, round(side / sides[layer]).bit_length() - 2)
        blocks.append((layer, number))
    of_layers = {parameter for layer in layers for parameter in layer.parameters()}
    if own := [parameter for parameter in network.parameters() if parameter not in of_layers]:  # such as positions
        blocks.append((nn.ParameterList(own), 1))
    return dim, blocks


def outer_layers(network, holders=()):
    """Yield the layers of a network; those of its sequences and of `holders` one by one."""
    for child in network.children():
        if child in holders:
            yield from outer_layers(child)
        else:
            yield from child if isinstance(child, nn.Sequential | nn.ModuleList) else [child]


def tokens_to_grid(tokens):
    """:return: (N, dim, side, side) of a square photo's tokens (N, side * side, dim), each put back at its place"""
    return tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))


class WithoutRandomWeights(TorchFunctionMode):
    """
    Within this block new layers keep whatever stands in their memory, as their weights are loaded next.

    It saves the time of drawing them; and drawing on the meta device would import PyTorch's compiler, a second.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def no_download(weights, reason):
    """:return: `UserError` for weights, such as "the weights of timm/resnet18", that could not be downloaded"""
    return UserError(
        f"encoder_weights: {weights} could not be downloaded ({reason}); connect to the network, or give a local state "
        "dict with --encoder_weights FILE, or --encoder_weights none"
    )


def channels_last(network):
    """:return: the network, its memory in the order that convolutions read fastest, twice as fast on a CPU"""
    return network.to(memory_format=torch.channels_last)
