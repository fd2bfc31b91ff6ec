"""The tutorial's way with our weights, for the benchmarks to compare with: same numbers, nothing computed ahead."""

import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = str(ROOT), str(ROOT / "tests/helpers")  # a benchmark is run from anywhere

import tutorial_models

from models import resize_grid


def tutorial_decoder(ours):
    """:return: the tutorial's decoder with the weights of a `models.DecoderWithAttention`"""
    attention_dim, encoder_dim = ours.attention.encoder_att.weight.shape
    decoder = tutorial_models.DecoderWithAttention(
        attention_dim, ours.embedding.embedding_dim, ours.fc.in_features, ours.vocab_size, encoder_dim
    )
    weights = {name.replace("decode_step.0.", "decode_step."): tensor for name, tensor in ours.state_dict().items()}
    decoder.load_state_dict(weights)
    return decoder.to(ours.fc.weight.device)


def tutorial_encode(encoder, images):
    """:return: features (N, 14, 14, encoder_dim) of uint8 images, the memory in PyTorch's usual order"""
    images = ((images.float() / 255 - encoder.mean) / encoder.std).contiguous()
    return resize_grid(encoder.backbone(images).permute(0, 2, 3, 1), 14)


@torch.no_grad()
def settle(encoder, images):
    """Give a random network's batch normalisation the statistics of these photos, so that features stay moderate."""
    layers = [layer for layer in encoder.backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0  # nothing of the old ones stays
    encoder.backbone.train()((images.float() / 255 - encoder.mean) / encoder.std)
    for layer in layers:
        layer.momentum = 0.1
    encoder.eval()
