"""timm's networks, any of them by timm's own name."""

import math

import timm
from torch import nn

from captioning.networks.network_parts import IMAGE_SIZE, Backbone, measure, no_download, tokens_to_grid
from utils import UserError, short

# What lets a network of timm's take photos of our size; the first that it understands.
SIZE_OPTIONS = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},  # vision transformers
    {"img_size": IMAGE_SIZE},  # Swin and others with windows
    {},  # convolutions, which take any size
)


def build(name, weights):
    """
    Any of timm's networks, CLIP's and DINOv2's image towers among them.

    :param name: timm/<timm's name>, such as timm/convnext_nano.in12k_ft_in1k or timm/vit_base_patch16_clip_224.openai
    :param weights: 'imagenet' (those that timm gives under this name, downloaded once) or 'none'
    :return: `Backbone`
    :raises UserError: if timm has no such network, cannot download its weights, or it gives no grid
    """
    own_name = name.removeprefix("timm/")
    if not timm.is_model(own_name):
        near = ", ".join(f"timm/{one}" for one in timm.list_models(f"*{own_name[:12]}*")[:3])
        raise UserError(f"encoder: timm has no {short(own_name)}; {near or 'see timm.list_models()'}")
    grid = Grid(create(own_name, weights))
    try:
        parts = measure(grid, IMAGE_SIZE, holders=[grid.network])
    except (RuntimeError, AssertionError, AttributeError, IndexError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"encoder: {name} gives no grid of features for {IMAGE_SIZE} pixels ({reason})") from error
    config = grid.network.pretrained_cfg
    return Backbone(grid, *parts, tuple(config["mean"]), tuple(config["std"]))


def create(own_name, weights):
    """:return: timm's network, with the first of `SIZE_OPTIONS` that it takes"""
    for options in SIZE_OPTIONS:
        try:
            return timm.create_model(own_name, pretrained=weights == "imagenet", num_classes=0, **options)
        except TypeError as error:  # it has no such option
            if not options:
                raise UserError(f"encoder: timm/{own_name} cannot be built ({error})") from error
        except Exception as error:  # a download fails in many ways, by the library that timm has it done by
            if weights != "imagenet":
                raise
            raise no_download(f"the weights of timm/{own_name}", str(error).splitlines()[0]) from error
    return None


class Grid(nn.Module):
    """A network of timm's, whatever it gives put into a grid."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        """:return: (N, dim, height, width) of images (N, 3, side, side)"""
        features = self.network.forward_features(images)
        if features.ndim == 3:  # tokens; those of no place, such as a class token, stand first
            beyond_square = features.shape[1] - math.isqrt(features.shape[1]) ** 2
            first = getattr(self.network, "num_prefix_tokens", beyond_square)  # not all of timm's say how many
            return tokens_to_grid(features[:, first:])  # of (N, height * width, dim)
        if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2)
        return features
