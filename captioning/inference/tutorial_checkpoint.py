"""
A model that the field's tutorial trained, as a checkpoint of train.py.

The tutorial pickles its modules as they are, so that torch.load would import and run whatever the file names. Only
their tensors are taken out of it here (storage/pickled_modules.py), whichever PyTorch wrote it.
"""

import re
from pathlib import Path

import torch

from captioning.inference.trained_model import build_captioner
from captioning.networks.backbones import build_backbone
from captioning.networks.network_parts import IMAGENET_MEAN, IMAGENET_STD
from captioning.networks.torchvision_networks import CONVOLUTIONS, FAMILY
from captioning.split_files import load_word_map
from captioning.storage.pickled_modules import load_pickled_modules
from utils import UserError, short

GRID_SIZE = 14  # side of the tutorial's grid, in locations
IMAGE_SIZE = 256  # side of its photos, in pixels
MOST_EPOCHS = 10**6  # a larger number is not one of epochs


def load_tutorial_checkpoint(path, word_map_file):
    """
    Read a checkpoint of the tutorial, such as BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar.

    :param path: of the checkpoint
    :param word_map_file: of its training, such as WORDMAP_coco_5_cap_per_img_5_min_word_freq.json: the tutorial keeps
        its words in a file of their own
    :return: dict, as `storage.tensors.load_checkpoint` gives it
    :raises UserError: if a file is missing or damaged, holds another model, or the two do not belong together
    """
    content, tensors = load_pickled_modules(path, ("encoder", "decoder"))
    word_map = load_word_map(word_map_file)
    encoder = rename_encoder(tensors["encoder"], path)
    decoder = rename_decoder(tensors["decoder"], path)
    require_finite(encoder | decoder, path)
    vocab_size, embed_dim = decoder["embedding.weight"].shape
    if vocab_size != len(word_map):
        raise UserError(
            f"{word_map_file}: {len(word_map)} words found, {vocab_size} expected by the decoder of {path}; give the "
            "word map of its training"
        )
    data = Path(word_map_file)
    checkpoint = {
        "config": {
            "encoder": find_network(encoder, path),
            "encoder_dim": None,
            "encoded_image_size": grid_size(content["encoder"]),
            "decoder": "soft",
            "embed_dim": embed_dim,
            "decoder_dim": decoder["fc.weight"].shape[1],
            "attention_dim": decoder["attention.full_att.weight"].shape[1],
            "data_folder": str(data.parent),
            "data_name": data.stem.removeprefix("WORDMAP_"),
        },
        "word_map": word_map,
        "image_size": IMAGE_SIZE,
        "encoder": encoder,
        "decoder": decoder,
        "progress": {"epoch": epochs_done(content)},
    }
    build_captioner(checkpoint, path)  # refuses parts that do not fit together
    return checkpoint


def rename_encoder(tensors, source):
    """
    :param tensors: state dict of the tutorial's Encoder: a ResNet's layers by number, `resnet.4.0.conv1.weight`
    :return: state dict of `models.Encoder`: the same by torchvision's names, `backbone.layer1.0.conv1.weight`
    :raises UserError: if there is something else
    """
    renamed = {
        "mean": torch.tensor(IMAGENET_MEAN).view(3, 1, 1),
        "std": torch.tensor(IMAGENET_STD).view(3, 1, 1),
    }
    layers = CONVOLUTIONS["resnet"]
    for name, tensor in tensors.items():
        place = re.fullmatch(r"resnet\.([0-7])\.(.+)", name)
        if not place:
            raise UserError(f"{source}: {short(name)} found in its encoder; the layers of a ResNet expected")
        renamed[f"backbone.{layers[int(place[1])]}.{place[2]}"] = tensor
    for name in list(renamed):
        if name.endswith(".running_mean"):  # PyTorch before 0.4.1 did not count the batches
            renamed.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return renamed


def rename_decoder(tensors, source):
    """
    :param tensors: state dict of the tutorial's DecoderWithAttention
    :return: state dict of `models.DecoderWithAttention`, whose LSTM cells are numbered
    :raises UserError: if a part is missing
    """
    for name in ("embedding.weight", "fc.weight", "attention.full_att.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise UserError(f"{source}: its decoder has no matrix '{name}'; the tutorial's decoder expected")
    return {name.replace("decode_step.", "decode_step.0."): tensor for name, tensor in tensors.items()}


def require_finite(tensors, source):
    """:raises UserError: if a weight is infinite or not a number: nothing made of it would mean anything"""
    for name, tensor in tensors.items():
        if not name.endswith("num_batches_tracked") and not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise UserError(f"{source}: {short(name)} has values that are not finite numbers; the file is damaged")


def find_network(encoder, source):
    """
    :param encoder: state dict of `models.Encoder`
    :return: name of the ResNet that has these layers, such as resnet101
    :raises UserError: if there is none
    """
    shapes = {name: tensor.shape for name, tensor in encoder.items() if name.startswith("backbone.")}
    for network in (name for name, family in FAMILY.items() if family == "resnet"):
        with torch.device("meta"):  # shapes only
            backbone = build_backbone(network).network
        if shapes == {f"backbone.{name}": tensor.shape for name, tensor in backbone.state_dict().items()}:
            return network
    raise UserError(f"{source}: its encoder has the layers of no ResNet of torchvision; the tutorial's expected")


def grid_size(encoder):
    """:return: side of the grid that attention sees, in locations; the pickled Encoder's own, if it says one"""
    size = encoder.state.get("enc_image_size", GRID_SIZE)
    return size if type(size) is int else GRID_SIZE


def epochs_done(content):
    """:return: number of epochs of the training, 0 if the file does not say"""
    epoch = content.get("epoch")
    return epoch + 1 if type(epoch) is int and 0 <= epoch < MOST_EPOCHS else 0
