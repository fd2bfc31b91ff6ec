"""
The encoder: a torchvision network that turns a photo into a grid of features (paper, section 3.1.1).

It has no pooling and no classifier, so each cell of the grid still tells what is at its place in the photo.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from captioning.speed.shared_products import matmul_dtype
from captioning.storage.tensors import check_weights
from utils import UserError, short

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB from 0 to 1, what torchvision's weights were trained with
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF_MAX = torch.finfo(torch.float16).max  # only random, untrained networks give features beyond it

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


def resize_grid(features, size):
    """
    Average a grid of features to another number of cells; each new cell is the mean of the old ones it overlaps.

    :param features: (N, height, width, encoder_dim)
    :param size: side of the new grid, in cells, larger or smaller than the old one
    :return: (N, size, size, encoder_dim)
    """
    if features.is_cuda and torch.are_deterministic_algorithms_enabled():
        return resize_by_products(features, size)
    return F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def resize_by_products(features, size):
    """The same as `resize_grid`, for GPUs: the other's gradient has no fixed order of its sums there."""
    height, width = (
        F.adaptive_avg_pool1d(torch.eye(side, device=features.device), size).to(features)  # (side, size)
        for side in features.shape[1:3]
    )
    return torch.einsum("nhwd,hi,wj->nijd", features, height, width)


class Encoder(nn.Module):
    """A torchvision network without its pooling and classifier."""

    def __init__(self, name="resnet101", weights="none", encoded_image_size=14, encoder_dim=None):
        """
        :param name: one of `FAMILY`, torchvision's name of the network
        :param weights: 'imagenet' (torchvision's best, downloaded once) or 'none' (random, to be trained)
        :param encoded_image_size: side of the grid of features, in cells
        :param encoder_dim: numbers in each cell, through a 1 x 1 convolution; None keeps the network's own
        :raises UserError: if the name is unknown or the weights cannot be downloaded
        """
        super().__init__()
        if encoder_dim is not None and not (type(encoder_dim) is int and 1 <= encoder_dim <= 100_000):
            raise UserError(f"encoder_dim: {short(encoder_dim)} found, None, or a number from 1 to 100,000 expected")
        self.name, self.encoded_image_size = name, encoded_image_size
        self.pretrained = weights != "none"
        self.backbone = build_backbone(name, weights)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

        self.native_dim, self.blocks = measure_backbone(self.backbone)
        self.encoder_dim = encoder_dim or self.native_dim
        # The 1 x 1 convolution.
        self.project = nn.Linear(self.native_dim, encoder_dim) if encoder_dim else nn.Identity()
        self.fine_tune(False)

    def forward(self, images):
        """
        :param images: (N, 3, 256, 256), RGB, uint8 or float from 0 to 1
        :return: features (N, encoded_image_size, encoded_image_size, encoder_dim)
        """
        return resize_grid(self.features(images), self.encoded_image_size)

    def features(self, images):
        """
        What the loops give a decoder: the features before they are resized, which the decoder does as it needs.

        :param images: photos as for `forward`, or what `grid` made of them earlier, float16 from the feature cache
        :return: (N, height, width, encoder_dim), in the type in which a decoder multiplies them
        """
        grid = images if images.dtype == torch.float16 else self.grid(images)
        return self.project(grid.to(matmul_dtype(self.mean)))

    def grid(self, images):
        """
        The photos through the convolutions, on the network's own grid (8 x 8 for a ResNet at 256 px).

        Where no gradient is needed they are rounded to half precision, as the feature cache keeps them, so that a run
        with the cache and one without see the same numbers.
        :param images: (N, 3, 256, 256), RGB, uint8 or float from 0 to 1
        :return: (N, height, width, native_dim); float16 unless the convolutions are being trained
        """
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = ((images - self.mean) / self.std).to(memory_format=torch.channels_last)
        features = self.backbone(images).permute(0, 2, 3, 1)  # (N, height, width, native_dim)
        return features if features.requires_grad else features.clamp(-HALF_MAX, HALF_MAX).half()

    @property
    def frozen(self):
        """Whether none of the convolutions is trained, so that a photo's features never change."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def fine_tune(self, fine_tune=True, first_block=2):
        """
        Choose what is trained: nothing of the convolutions; of a pretrained network the blocks from `first_block`
        (2 to 4 as in the tutorial), which leaves the first, general filters alone; all of one without weights.

        A block is what works at one resolution: block 1 at a quarter of the photo's side, block 2 at an eighth ...
        """
        for layer, block in self.blocks:
            layer.requires_grad_(fine_tune and (block >= first_block or not self.pretrained))
        self.train(self.training)

    def train(self, mode=True):
        """Frozen blocks stay in eval mode: the statistics of their batch normalisation must not drift."""
        super().train(mode)
        for layer, _ in self.blocks:
            layer.train(mode and any(parameter.requires_grad for parameter in layer.parameters()))
        return self

    def load_backbone(self, state_dict, source="state dict"):
        """
        Take a network's weights from a state dict under torchvision's names; its classifier's may be absent.

        :raises UserError: if a key of the convolutions is missing or of another shape
        """
        own = self.backbone.state_dict()
        for key in own:
            if key not in state_dict and not key.endswith("num_batches_tracked"):
                raise UserError(f"{source}: has no '{key}', which {self.name} needs; give the weights of a {self.name}")
        taken = {key: state_dict.get(key, tensor) for key, tensor in own.items()}
        check_weights(self.backbone, taken, f"{source}: not the weights of {self.name}")
        self.backbone.load_state_dict(taken)
        self.pretrained = True


def build_backbone(name, weights):
    """:return: the convolutions of a torchvision network, its layers under torchvision's own names"""
    if not isinstance(name, str) or name not in FAMILY:
        raise UserError(f"encoder: {short(name)} is unknown; choose one of {', '.join(FAMILY)}")
    if weights not in ("imagenet", "none"):
        raise UserError(f"encoder_weights: '{weights}' found, 'imagenet' or 'none' expected (or a file's path)")
    try:
        # V1 are the weights of the tutorial and of the papers' time; V2 were trained with recipes for classification.
        network = torchvision.models.get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
    except (OSError, RuntimeError) as error:  # no network; a download that broke off
        raise UserError(
            f"encoder_weights: the ImageNet weights of {name} could not be downloaded ({error}); connect to the "
            "network, or give a local state dict with --encoder_weights FILE, or --encoder_weights none"
        ) from error
    except ValueError as error:  # torchvision has no weights for this one
        raise UserError(f"encoder_weights: torchvision has no ImageNet weights for {name} ({error})") from error

    layers = {layer: getattr(network, layer) for layer in CONVOLUTIONS[FAMILY[name]]}
    if FAMILY[name] == "vgg":
        layers["features"] = layers["features"][:-1]  # the last convolution before its pooling, as in the paper
    if FAMILY[name] == "densenet":
        layers["relu"] = nn.ReLU()  # in torchvision's own forward
    backbone = nn.Sequential()
    for layer_name, layer in layers.items():
        backbone.add_module(layer_name, layer)
    return backbone.to(memory_format=torch.channels_last)  # about twice as fast on a CPU, faster on a GPU too


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
