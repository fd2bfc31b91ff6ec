"""The tutorial's pickled checkpoints, of old and new PyTorch, become ours and say what they said before."""

import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import WORD_MAP
from tutorial_models import greedy_caption, make_models, save

from captioning.inference.model_files import describe_model
from captioning.inference.search import beam_search
from captioning.inference.trained_model import load_captioner
from captioning.inference.tutorial_checkpoint import find_network
from captioning.networks.backbones import build_backbone
from captioning.networks.torchvision_networks import ENCODERS
from convert_checkpoint import Config, main
from utils import UserError


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """A folder with a checkpoint of the tutorial in each format, and its word map."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "WORDMAP_tiny.json").write_text(json.dumps(WORD_MAP))
    for format in ("zip", "legacy", "oldest"):
        save(folder / f"{format}.pth.tar", *make_models(WORD_MAP, grid=6), format)
    return folder


@pytest.fixture
def folder(tutorial, tmp_path):
    """A copy of it, to convert in."""
    return shutil.copytree(tutorial, tmp_path / "tutorial", copy_function=os.link)


def convert(folder, name, **options):
    """:return: path of what became of `name`"""
    given = {"word_map": folder / "WORDMAP_tiny.json", "output": folder / f"{name}.pth"} | options
    main(Config((str(folder / f"{name}.pth.tar"),), **{key: str(value) for key, value in given.items()}))
    return folder / f"{name}.pth"


@pytest.mark.parametrize("format", ["zip", "legacy", "oldest"])
def test_captions_after_conversion_are_those_of_the_original_arithmetic(folder, format):
    captioner, checkpoint, _ = load_captioner(convert(folder, format))
    encoder, decoder = make_models(WORD_MAP, grid=6)
    photos = torch.randint(256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    photos = F.interpolate(photos.float(), 64).byte()  # (6, 3, 64, 64)
    expected = [greedy_caption(encoder, decoder, photo, WORD_MAP, 12) for photo in photos]
    assert len({tuple(words) for words, _ in expected}) > 3  # else equality would mean little

    found = captioner.search(photos, beam_size=1, max_length=12)
    assert [captioner.sentence(best) for [best] in found] == [words for words, _ in expected]
    with torch.no_grad():  # `search` rounds features to half precision, as the feature cache does; this does not
        features = captioner.encoder.backbone((photos / 255 - captioner.encoder.mean) / captioner.encoder.std)
        exact = beam_search(captioner.decoder, features.permute(0, 2, 3, 1), captioner.rules(12, {})[0], 1)
    assert [best.log_prob for [best] in exact] == pytest.approx([total for _, total in expected], abs=2e-3)


def test_the_checkpoint_says_what_it_was_and_which_data_it_saw(folder):
    _, checkpoint, _ = load_captioner(convert(folder, "legacy"))
    settings = checkpoint["config"]
    assert (settings["encoder"], settings["encoded_image_size"], settings["decoder"]) == ("resnet18", 6, "soft")
    assert (settings["attention_dim"], settings["embed_dim"], settings["decoder_dim"]) == (6, 7, 8)
    assert settings["data_folder"] == str(folder) and settings["data_name"] == "tiny"
    assert checkpoint["word_map"] == WORD_MAP and checkpoint["image_size"] == 256
    assert describe_model(checkpoint) == "soft decoder on resnet18, 12 epochs"


def test_models_that_were_put_into_data_parallel_are_taken_out_of_it(folder):
    save(folder / "parallel.pth.tar", *map(torch.nn.DataParallel, make_models(WORD_MAP, grid=6)), "zip")
    captioner, checkpoint, _ = load_captioner(convert(folder, "parallel"))
    assert checkpoint["config"]["encoded_image_size"] == 6
    torch.testing.assert_close(captioner.decoder.fc.weight, make_models(WORD_MAP, grid=6)[1].fc.weight)


@pytest.mark.parametrize("network", ENCODERS["resnet"].split())
def test_which_resnet_it_is_follows_from_its_layers(network):
    with torch.device("meta"):
        layers = build_backbone(network).network.state_dict()
    assert find_network({f"backbone.{name}": tensor for name, tensor in layers.items()}, "file") == network


def test_a_word_map_of_other_data_is_refused(folder, tmp_path):
    (tmp_path / "WORDMAP_other.json").write_text(json.dumps(WORD_MAP | {"bird": len(WORD_MAP)}))
    with pytest.raises(UserError, match="WORDMAP_other.json: 11 words found, 10 expected by the decoder of .*zip"):
        convert(folder, "zip", word_map=tmp_path / "WORDMAP_other.json", output=tmp_path / "best.pth")
    assert not (tmp_path / "best.pth").exists()


def change(encoder, decoder, what):
    """Make a model that is not the tutorial's; :return: what the message says"""
    if what == "no embedding":
        del decoder.embedding
        return "its decoder has no matrix 'embedding.weight'"
    if what == "a block less":
        del encoder.resnet[4][1]
        return "its encoder has the layers of no ResNet"
    if what == "a head":
        encoder.head = torch.nn.Linear(2, 2)
        return "'head.weight' found in its encoder"
    if what == "not a number":
        decoder.fc.weight.data[2, 3] = torch.nan
        return "'fc.weight' has values that are not finite numbers"
    decoder.init_h = torch.nn.Linear(512, 9)
    return r"'init_h.weight' is float32 of shape \(9, 512\), its model needs float32 of shape \(8, 512\)"


@pytest.mark.parametrize("what", ["no embedding", "a block less", "a head", "not a number", "another width"])
def test_a_model_that_is_not_the_tutorials_is_refused(folder, tmp_path, what):
    encoder, decoder = make_models(WORD_MAP)
    expected = change(encoder, decoder, what)
    save(tmp_path / "changed.pth.tar", encoder, decoder, "zip")
    with pytest.raises(UserError, match=f"changed.pth.tar: .*{expected}"):
        convert(tmp_path, "changed", word_map=folder / "WORDMAP_tiny.json")
    assert not (tmp_path / "changed.pth").exists()


@pytest.mark.parametrize("output", ["zip.pth.tar", "WORDMAP_tiny.json", "model.pth", "link.pth"])
def test_a_file_that_is_there_is_never_replaced(folder, output):
    (folder / "model.pth").write_bytes(b"trained for days")
    (folder / "link.pth").symlink_to("zip.pth.tar")
    before = (folder / output).read_bytes()
    with pytest.raises(UserError, match=f"output: .*{output} is there already"):
        convert(folder, "zip", output=folder / output)
    assert (folder / output).read_bytes() == before


@pytest.mark.parametrize("epoch", [10**6000, -1, "11", 2.5], ids=["huge", "negative", "text", "half"])
def test_a_number_of_epochs_that_is_none_counts_as_none_done(folder, epoch):
    save(folder / "odd.pth.tar", *make_models(WORD_MAP, grid=6), "zip", epoch=epoch)
    assert load_captioner(convert(folder, "odd"))[1]["progress"] == {"epoch": 0}


def test_a_tutorials_checkpoint_is_read_on_the_fly_with_its_word_map(folder):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path, word_map = folder / "zip.pth.tar", folder / "WORDMAP_tiny.json"
    captioner, _, _ = load_captioner(path, word_map_file=word_map)
    converted, _, _ = load_captioner(convert(folder, "zip"))
    assert captioner.search(images, 2, 8) == converted.search(images, 2, 8)
    with pytest.raises(UserError, match=r"zip.pth.tar: this looks like a checkpoint of the tutorial.*--word_map"):
        load_captioner(path)
