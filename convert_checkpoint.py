"""
Bring a model from the field's tutorial: `python convert_checkpoint.py --checkpoint BEST_checkpoint_....pth.tar
--word_map WORDMAP_....json --output runs/tutorial/best.pth` makes a checkpoint that eval.py, caption.py and
view_captions.py read.

The tutorial pickles its modules as they are, so that torch.load would import and run what the file names. Here only
the tensors are taken out of it (unpickling.py), whichever PyTorch wrote it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from captioning.inference.captioner import build_captioner
from captioning.networks.backbones import CONVOLUTIONS, FAMILY, IMAGENET_MEAN, IMAGENET_STD, build_backbone
from captioning.storage.tensors import save_checkpoint
from captioning.storage.unpickling import load_pickled_modules
from datasets import load_word_map
from utils import UserError, run_script


@dataclass
class Config:
    checkpoint: str  # the tutorial's file, such as BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar
    word_map: str  # the word map of its training, such as WORDMAP_coco_5_cap_per_img_5_min_word_freq.json
    output: str  # checkpoint to write, such as runs/tutorial/best.pth


def main(config):
    content, tensors = load_pickled_modules(config.checkpoint, ("encoder", "decoder"))
    word_map = load_word_map(config.word_map)
    encoder = rename_encoder(tensors["encoder"], config.checkpoint)
    decoder = rename_decoder(tensors["decoder"], config.checkpoint)
    check_numbers(encoder | decoder, config.checkpoint)
    words, embed_dim = decoder["embedding.weight"].shape
    if words != len(word_map):
        raise UserError(
            f"{config.word_map}: {len(word_map)} words found, {words} expected by the decoder of {config.checkpoint}; "
            "give the word map of its training"
        )
    data = Path(config.word_map)
    checkpoint = {
        "config": {
            "encoder": find_network(encoder, config.checkpoint),
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
        "image_size": 256,
        "encoder": encoder,
        "decoder": decoder,
        "progress": {"epoch": epochs_done(content)},
    }
    build_captioner(checkpoint, config.checkpoint)  # does all fit together?
    save_checkpoint(checkpoint, config.output)
    settings = checkpoint["config"]
    print(f"{settings['encoder']}, {len(word_map)} words, {checkpoint['progress']['epoch']} epochs: {config.output}")


def rename_encoder(tensors, source):
    """
    :param tensors: state dict of the tutorial's Encoder: a ResNet's layers by number, `resnet.4.0.conv1.weight`
    :return: state dict of `encoders.Encoder`: the same by torchvision's names, `backbone.layer1.0.conv1.weight`
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
            raise UserError(f"{source}: '{name}' found in its encoder; the layers of a ResNet expected")
        renamed[f"backbone.{layers[int(place[1])]}.{place[2]}"] = tensor
    for name in [name for name in renamed if name.endswith(".running_mean")]:  # PyTorch before 0.4.1 did not count
        renamed.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return renamed


def rename_decoder(tensors, source):
    """
    :param tensors: state dict of the tutorial's DecoderWithAttention
    :return: state dict of `models.DecoderWithAttention`, where LSTM cells have numbers
    :raises UserError: if a part is missing
    """
    for name in ("embedding.weight", "fc.weight", "attention.full_att.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise UserError(f"{source}: its decoder has no matrix '{name}'; the tutorial's decoder expected")
    return {name.replace("decode_step.", "decode_step.0."): tensor for name, tensor in tensors.items()}


def check_numbers(tensors, source):
    """:raises UserError: if a weight is no number or infinite: nothing that is made of it would mean anything"""
    for name, tensor in tensors.items():
        if not name.endswith("num_batches_tracked") and not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise UserError(f"{source}: '{name}' has values that are no finite numbers; the file is damaged")


def find_network(encoder, source):
    """
    :param encoder: state dict of `encoders.Encoder`
    :return: name of the ResNet that has these layers, such as resnet101
    :raises UserError: if there is none
    """
    shapes = {name: tensor.shape for name, tensor in encoder.items() if name.startswith("backbone.")}
    for network in (name for name, family in FAMILY.items() if family == "resnet"):
        with torch.device("meta"):  # shapes only
            backbone = build_backbone(network, "none")
        if shapes == {f"backbone.{name}": tensor.shape for name, tensor in backbone.state_dict().items()}:
            return network
    raise UserError(f"{source}: its encoder has the layers of no ResNet of torchvision; the tutorial's expected")


def grid_size(encoder):
    """:return: side of the grid that attention sees, in cells; 14 unless the pickled Encoder says otherwise"""
    size = encoder.state.get("enc_image_size", 14)
    return size if type(size) is int else 14


def epochs_done(content):
    """:return: number of epochs of the training, 0 if the file does not say"""
    epoch = content.get("epoch")
    return epoch + 1 if type(epoch) is int and epoch >= 0 else 0


if __name__ == "__main__":
    run_script(main, Config)
