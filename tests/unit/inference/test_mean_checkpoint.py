"""The mean of checkpoints: what it is, that it captions, and what has none."""

import pytest
import torch
from conftest import WORD_MAP
from saved_model import save_model

import convert_checkpoint
from captioning.command_line import parse_args
from captioning.inference.trained_model import load_captioner
from captioning.storage.tensors import load_checkpoint, save_checkpoint
from utils import UserError


@pytest.fixture
def branches(tmp_path):
    """Paths of three checkpoints: a model, and two that went on from it, their encoders' statistics too."""
    save_model(tmp_path / "0.pth", seed=0)
    for i in (1, 2):
        checkpoint = load_checkpoint(tmp_path / "0.pth")
        generator = torch.Generator().manual_seed(i)
        for tensor in (*checkpoint["encoder"].values(), *checkpoint["decoder"].values()):
            if tensor.is_floating_point():
                tensor += 0.01 * torch.rand(tensor.shape, generator=generator)
        save_checkpoint({**checkpoint, "progress": {"epoch": i + 1}, "max_length": 10 + i}, tmp_path / f"{i}.pth")
    return [tmp_path / f"{i}.pth" for i in range(3)]


def average(paths, output):
    words = [*map(str, paths), "--output", str(output)]
    convert_checkpoint.main(parse_args(convert_checkpoint.Config, words))
    return load_checkpoint(output)


def change(path, **settings):
    checkpoint = load_checkpoint(path)
    checkpoint["config"] |= settings
    save_checkpoint(checkpoint, path)


def test_it_is_the_mean_of_each_number_and_captions_like_any_model(branches, tmp_path, capsys):
    mean, parts = average(branches, tmp_path / "mean.pth"), list(map(load_checkpoint, branches))
    for part in ("encoder", "decoder"):
        for name, tensor in mean[part].items():
            if tensor.is_floating_point():
                expected = torch.stack([one[part][name].double() for one in parts]).mean(dim=0)
                torch.testing.assert_close(tensor.double(), expected, atol=1e-7, rtol=1e-6)
            else:
                assert torch.equal(tensor, parts[0][part][name])  # a count of batches
    assert mean["max_length"] == 12 and mean["progress"] == {"epoch": 3}
    assert mean["mean_of"] == list(map(str, branches))
    captioner, _, _ = load_captioner(tmp_path / "mean.pth")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert len(captioner.search(images, 2)) == 2
    assert "Warning" not in capsys.readouterr().out


def test_what_is_the_same_in_all_stays_the_same_to_the_bit(branches, tmp_path):
    one = load_checkpoint(branches[1])
    copies = [tmp_path / f"copy{i}.pth" for i in range(3)]
    for copy in copies:
        save_checkpoint(one, copy)
    mean = average(copies, tmp_path / "mean.pth")
    for part in ("encoder", "decoder"):
        assert all(torch.equal(tensor, one[part][name]) for name, tensor in mean[part].items())


def test_a_file_that_is_named_twice_is_refused(branches, tmp_path):
    again = branches[0].parent / "." / ".." / tmp_path.name / "0.pth"
    with pytest.raises(UserError, match="checkpoint: .*0.pth is named twice; name each once"):
        average([branches[0], branches[1], again], tmp_path / "mean.pth")
    assert not (tmp_path / "mean.pth").exists()


def test_models_of_different_beginnings_are_warned_of(branches, tmp_path, capsys):
    save_model(tmp_path / "other.pth", seed=1)
    average([branches[0], tmp_path / "other.pth"], tmp_path / "mean.pth")
    assert "Warning: these models do not stem from one start" in capsys.readouterr().out


def test_other_settings_words_or_photos_have_no_mean(branches, tmp_path):
    save_model(tmp_path / "words.pth", seed=0, word_map={**WORD_MAP, "bird": len(WORD_MAP)})
    save_model(tmp_path / "photos.pth", seed=0, image_size=32)
    for name, expected in (("words", "its word map differs"), ("photos", "photos of 32 px found, 64 px expected")):
        with pytest.raises(UserError, match=f"{name}.pth: {expected}"):
            average([branches[0], tmp_path / f"{name}.pth"], tmp_path / "mean.pth")
    change(branches[1], attention_nonlinearity="tanh", state_dropout=0.5)
    with pytest.raises(UserError, match="1.pth: its attention_nonlinearity is 'tanh', 'relu' expected as in .*0.pth"):
        average(branches, tmp_path / "mean.pth")
    change(branches[1], attention_nonlinearity="relu")  # dropout is of training alone
    average(branches, tmp_path / "mean.pth")


def test_the_tutorials_checkpoints_are_converted_one_at_a_time(branches, tmp_path):
    with pytest.raises(UserError, match="checkpoint: 3 found with --word_map, one of the tutorial's"):
        average([*branches, "--word_map", "WORDMAP_tiny.json"], tmp_path / "mean.pth")
