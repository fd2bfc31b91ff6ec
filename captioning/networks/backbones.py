"""
The networks that an `Encoder` can be made of, by name: EfficientNet-Lite, written out in efficientnet_lite.py,
torchvision's (torchvision_networks.py) and timm's, with CLIP's and DINOv2's image towers among them (timm_networks.py).

A further one needs a function that takes 'imagenet' or 'none' and gives a `Backbone`, and a line in `build_backbone`.
"""

import difflib
import re

from captioning.networks import efficientnet_lite, torchvision_networks
from captioning.storage.tensors import check_weights
from utils import UserError, short

NAMES = (*torchvision_networks.FAMILY, *efficientnet_lite.WIDTH_AND_DEPTH)  # and timm/<name>


def build_backbone(name, weights="none"):
    """
    :param name: one of `NAMES`, or timm/<timm's name of a network>
    :param weights: 'imagenet' (those that the network's library gives, downloaded once) or 'none' (random)
    :return: `Backbone`
    :raises UserError: if the name is unknown or the weights cannot be had
    """
    if weights not in ("imagenet", "none"):
        raise UserError(f"encoder_weights: '{weights}' found, 'imagenet' or 'none' expected (or a file's path)")
    if isinstance(name, str) and name in efficientnet_lite.WIDTH_AND_DEPTH:
        return efficientnet_lite.build(name, weights)
    if isinstance(name, str) and name in torchvision_networks.FAMILY:
        return torchvision_networks.build(name, weights)
    if isinstance(name, str) and name.startswith("timm/"):
        from captioning.networks import timm_networks  # importing timm takes as long as captioning a photo

        return timm_networks.build(name, weights)
    near = difflib.get_close_matches(str(name), NAMES, n=5, cutoff=0.3) or NAMES[:5]
    raise UserError(f"encoder: {short(name)} is unknown; did you mean {', '.join(near)}? docs/recipes.md lists all")


def load_backbone(encoder, state_dict, source="state dict"):
    """
    Give an encoder's network the weights of a state dict under its own names; the classifier's may be absent.

    :param encoder: `models.Encoder`
    :param source: of the weights, for messages
    :raises UserError: if a key of the network is missing or of another shape
    """
    state_dict = with_own_names(state_dict)
    # A wrapped network's own names do not begin with the wrapper's.
    state_dict = {**state_dict, **{f"network.{key}": tensor for key, tensor in state_dict.items()}}
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


def with_own_names(state_dict):
    """
    :param state_dict: of a network; or a training's checkpoint, which holds one under 'state_dict' or 'model'
    :return: the network's, without what DataParallel puts before the names; old DenseNets' `norm.1` as `norm1`
    """
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    names = {key: str(key).removeprefix("module.") for key in state_dict}
    names = {key: re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name) for key, name in names.items()}
    return {names[key]: tensor for key, tensor in state_dict.items()}
