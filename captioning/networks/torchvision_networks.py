"""
torchvision's networks, each without its own pooling and classifier, so that every location of the grid still tells what
is at its place in the photo.

Importing torchvision's networks brings PyTorch's compiler along, which takes a second, so it waits until one is asked
for.
"""

import torch
from torch import nn

from captioning.networks.network_parts import IMAGE_SIZE, Backbone, channels_last, measure, no_download, tokens_to_grid
from utils import UserError

# The layers that stand before a network's own pooling and classifier, under torchvision's names.
CONVOLUTIONS = {
    "resnet": ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
    "shufflenet": ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
    "mnasnet": ("layers",),
    "densenet": ("features",),
    "squeezenet": ("features",),
    "mobilenet": ("features",),
    "vgg": ("features",),
    "efficientnet": ("features",),
    "convnext": ("features",),
    "regnet": ("stem", "trunk_output"),
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
    "efficientnet": "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 "
    "efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l",
    "convnext": "convnext_tiny convnext_small convnext_base convnext_large",
    "regnet": "regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf "
    "regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf",
    "vit": "vit_b_16 vit_b_32 vit_l_16 vit_l_32",
    "swin": "swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b",
}
FAMILY = {name: family for family, names in ENCODERS.items() for name in names.split()}


def build(name, weights):
    """
    :param name: one of `FAMILY`
    :param weights: 'imagenet' (downloaded once) or 'none'
    :return: `Backbone`; its layers have torchvision's own names
    :raises UserError: if the weights cannot be downloaded
    """
    network, family = load(name, weights), FAMILY[name]
    if family in GRIDS:
        network = GRIDS[family](network)
        return Backbone(network, *measure(network, IMAGE_SIZE, holders=[getattr(network, "encoder", None)]))
    layers = {layer: getattr(network, layer) for layer in CONVOLUTIONS[family]}
    if family == "vgg":
        layers["features"] = layers["features"][:-1]  # the last convolution before its pooling, as in the paper
    if family == "densenet":
        layers["relu"] = nn.ReLU()  # in torchvision's own forward
    backbone = nn.Sequential()
    for layer_name, layer in layers.items():
        backbone.add_module(layer_name, layer)
    return Backbone(channels_last(backbone), *measure(backbone))


def load(name, weights):
    """:return: the whole network; :raises UserError: if its weights cannot be downloaded"""
    from torchvision.models import get_model

    try:
        # V1 are the weights of the tutorial and of the papers' time; V2 were trained with recipes for classification.
        if FAMILY[name] == "vit":
            return load_vit(name, weights)
        return get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
    except (OSError, RuntimeError) as error:  # no internet; a download that broke off
        raise no_download(f"the ImageNet weights of {name}", error) from error
    except ValueError as error:  # torchvision has no weights for this one
        raise UserError(f"encoder_weights: torchvision has no ImageNet weights for {name} ({error})") from error


def load_vit(name, weights):
    """:return: a vision transformer for photos of `IMAGE_SIZE`; its pretrained positions are resized to them"""
    from torchvision.models import get_model, get_model_weights
    from torchvision.models.vision_transformer import interpolate_embeddings

    network = get_model(name, weights=None, image_size=IMAGE_SIZE)
    if weights == "imagenet":
        own = get_model_weights(name).IMAGENET1K_V1.get_state_dict(progress=True)
        network.load_state_dict(interpolate_embeddings(IMAGE_SIZE, network.patch_size, own))
    return network


class GridOfTokens(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) whose tokens are put back at their places in the photo."""

    def __init__(self, network):
        super().__init__()
        self.conv_proj, self.class_token, self.encoder = network.conv_proj, network.class_token, network.encoder

    def forward(self, images):
        """:return: (N, dim, height, width) of images (N, 3, side, side); the class token is left out"""
        tokens = self.conv_proj(images).flatten(2).transpose(1, 2)  # (N, height * width, dim)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.encoder(tokens)[:, 1:]  # (N, height * width, dim)
        return tokens_to_grid(tokens)


class GridOfWindows(nn.Module):
    """A Swin transformer (Liu et al. 2021), which keeps its channels last."""

    def __init__(self, network):
        super().__init__()
        self.features, self.norm = network.features, network.norm

    def forward(self, images):
        """:return: (N, dim, height, width) of images (N, 3, side, side)"""
        return self.norm(self.features(images)).permute(0, 3, 1, 2)


GRIDS = {"vit": GridOfTokens, "swin": GridOfWindows}
