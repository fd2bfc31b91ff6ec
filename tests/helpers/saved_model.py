"""A small random model, saved as train.py saves one."""

import torch
from conftest import WORD_MAP

from captioning.networks.registry import build_decoder
from models import Encoder


def save_model(path, seed, word_map=WORD_MAP, image_size=64, backbone=None, **settings):
    """Write the checkpoint of a model with random weights, or those of `backbone`; `settings` are of its config."""
    config = {
        "encoder": "shufflenet_v2_x0_5", "encoded_image_size": 2, "encoder_dim": 6, "decoder": "soft", "embed_dim": 8,
        "decoder_dim": 8, "attention_dim": 8, **settings,
    }  # fmt: skip
    torch.manual_seed(seed)
    encoder, decoder = Encoder(config["encoder"], "none", 2, 6), build_decoder(config, len(word_map), 6)
    if backbone:
        encoder.backbone.load_state_dict(backbone.state_dict())
    checkpoint = {
        "config": config, "word_map": word_map, "image_size": image_size, "encoder": encoder.state_dict(),
        "decoder": decoder.state_dict(), "progress": {"epoch": 1},
    }  # fmt: skip
    torch.save(checkpoint, path)
    return encoder
