"""
The networks that an `Encoder` can be made of, by torchvision's names: each without its own pooling and classifier, so
that every location of the grid still tells what is at its place in the photo.
"""

from typing import NamedTuple

import torch
import torchvision
from torch import nn

from captioning.storage.tensors import check_weights
from utils import UserError, short

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB from 0 to 1, what torchvision's weights were trained with
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(NamedTuple):
    """What an encoder is made of."""

    network: nn.Module  # (N, 3, side, side) -> (N, dim, height, width)
    dim: int  # of a location's features
    blocks: list  # of pairs: a layer, and the number of its block, from 1
    mean: tuple = IMAGENET_MEAN  # of the pixels that the weights were trained with
    std: tuple = IMAGENET_STD


# The layers that stand before a network's own pooling and classifier, under torchvision's names.
CONVOLUTIONS = {
    "resnet": ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
    "shufflenet": ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
    "mnasnet": ("layers",),
    "densenet": ("features",),
    "squeezenet": ("features",),
    "mobilenet": ("features",),
    "vgg": ("features",),
}
ENCODERS = {
    "resnet": "resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d "
    "wide_resnet50_2 wide_resnet101_2",
    "squeezenet": "squeezenet1_0 squeezenet1_1",
    "densenet": "densenet121 densenet161 densenet169 densenet201",
    "shufflenet": "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0",
    "mobilenet": "mobilenet_v2 mobilenet_v3_large mobilenet_v3_small",
    "mnasnet": "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
    "vgg": "vgg16 vgg19",
}
FAMILY = {name: family for family, names in ENCODERS.items() for name in names.split()}


def build_backbone(name, weights="none"):
    """
    :param name: one of `FAMILY`, torchvision's name of the network
    :param weights: 'imagenet' (torchvision's, downloaded once) or 'none' (random, to be trained)
    :return: `Backbone`; its layers have torchvision's own names
    :raises UserError: if the name is unknown or the weights cannot be downloaded
    """
    if not isinstance(name, str) or name not in FAMILY:
        raise UserError(f"encoder: {short(name)} is unknown; choose one of {', '.join(FAMILY)}")
    network = load_torchvision(name, weights)
    layers = {layer: getattr(network, layer) for layer in CONVOLUTIONS[FAMILY[name]]}
    if FAMILY[name] == "vgg":
        layers["features"] = layers["features"][:-1]  # the last convolution before its pooling, as in the paper
    if FAMILY[name] == "densenet":
        layers["relu"] = nn.ReLU()  # in torchvision's own forward
    backbone = nn.Sequential()
    for layer_name, layer in layers.items():
        backbone.add_module(layer_name, layer)
    backbone = backbone.to(memory_format=torch.channels_last)  # about twice as fast on a CPU, faster on a GPU too
    return Backbone(backbone, *measure_backbone(backbone))


def load_torchvision(name, weights):
    """:return: the network of torchvision's; see `build_backbone`"""
    if weights not in ("imagenet", "none"):
        raise UserError(f"encoder_weights: '{weights}' found, 'imagenet' or 'none' expected (or a file's path)")
    try:
        # V1 are the weights of the tutorial and of the papers' time; V2 were trained with recipes for classification.
        return torchvision.models.get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
    except (OSError, RuntimeError) as error:  # no network; a download that broke off
        raise UserError(
            f"encoder_weights: the ImageNet weights of {name} could not be downloaded ({error}); connect to the "
            "network, or give a local state dict with --encoder_weights FILE, or --encoder_weights none"
        ) from error
    except ValueError as error:  # torchvision has no weights for this one
        raise UserError(f"encoder_weights: torchvision has no ImageNet weights for {name} ({error})") from error


@torch.no_grad()
def measure_backbone(backbone, side=64):
    """
    Send one grey image through the network, layer by layer.

    :return: number of channels at the end, and a list of (layer, its block): 1 down to a quarter of the image's side,
        then one more each time the side is halved
    """
    layers = []
    for child in backbone:
        layers.extend(child if isinstance(child, nn.Sequential) else [child])
    training = backbone.training
    backbone.eval()
    x, blocks = torch.zeros(1, 3, side, side), []
    for layer in layers:
        x = layer(x)
        blocks.append((layer, max(1, round(side / x.shape[-1]).bit_length() - 2)))
    backbone.train(training)
    return x.shape[1], blocks


def load_backbone(encoder, state_dict, source="state dict"):
    """
    Give an encoder's network the weights of a state dict under its own names; the classifier's may be absent.

    :param encoder: `models.Encoder`
    :param source: of the weights, for messages
    :raises UserError: if a key of the network is missing or of another shape
    """
    own = encoder.backbone.state_dict()
    for key in own:
        if key not in state_dict and not key.endswith("num_batches_tracked"):
            raise UserError(
                f"{source}: has no '{key}', which {encoder.name} needs; give the weights of a {encoder.name}"
            )
    taken = {key: state_dict.get(key, tensor) for key, tensor in own.items()}
    check_weights(encoder.backbone, taken, f"{source}: not the weights of {encoder.name}")
    encoder.backbone.load_state_dict(taken)
    encoder.pretrained = True
