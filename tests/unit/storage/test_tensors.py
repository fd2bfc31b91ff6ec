"""Checkpoints say which format they have, and files of tensors hold nothing but what was promised."""

import pytest
import torch

from captioning.storage.tensors import load_checkpoint, save_checkpoint
from utils import UserError


@pytest.fixture
def content():
    """What every checkpoint has."""
    weights = {"encoder": {"w": torch.ones(2)}, "decoder": {"w": torch.zeros(3)}}
    return {"config": {}, "word_map": {"a": 0}, "image_size": 8, "progress": {"epoch": 3}} | weights


def test_a_checkpoint_says_which_format_it_has(content, tmp_path):
    save_checkpoint(content, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True)["format"] == 1
    assert load_checkpoint(tmp_path / "a.pth")["progress"] == {"epoch": 3}


def test_a_checkpoint_from_before_there_were_formats_is_read(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth")["progress"] == {"epoch": 3}


@pytest.mark.parametrize("version", [2, 0, "1", 1.0, None, True])
def test_a_checkpoint_of_an_unknown_format_is_refused(content, tmp_path, version):
    torch.save(content | {"format": version}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth: format .* found, 1 to 1 expected"):
        load_checkpoint(tmp_path / "a.pth")
