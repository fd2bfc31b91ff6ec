"""caption.py captions photos, folders and patterns: on the screen, as a table, as JSON, as a page."""

import base64
import csv
import dataclasses
import functools
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORD_MAP
from PIL import Image

import train
from caption import Config, main
from captioning.command_line import parse_args
from captioning.inference.trained_model import load_captioner
from captioning.networks.registry import build_decoder
from captioning.preparation.photo_batches import find_photos
from captioning.preparation.photos import read_photo
from captioning.storage.tensors import load_checkpoint, save_checkpoint
from models import Encoder
from utils import UserError

SIDE = 64
load = functools.cache(load_captioner)  # for what the script's answers are compared with


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints of two small models with random weights, as train.py writes them."""
    folder = tmp_path_factory.mktemp("runs")
    paths = []
    for seed, name in enumerate(("soft", "other")):
        torch.manual_seed(seed)
        config = dataclasses.asdict(
            train.Config(
                encoder="shufflenet_v2_x0_5", encoder_weights="none", encoded_image_size=3, embed_dim=8, decoder_dim=8,
                attention_dim=8,
            )
        )  # fmt: skip
        encoder = Encoder("shufflenet_v2_x0_5", "none", 3)
        decoder = build_decoder(config, len(WORD_MAP), encoder.encoder_dim)
        for module in encoder.modules():  # without this a random network gives all photos the same features
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train()
                module.momentum = 1.0
        with torch.no_grad():
            encoder.features(torch.nn.functional.interpolate(torch.randint(256, (16, 3, 2, 2)).float(), SIDE).byte())
            for parameter in decoder.parameters():
                parameter.normal_(0, 0.6)
        content = {
            "config": config, "word_map": WORD_MAP, "progress": {"epoch": 7}, "image_size": SIDE,
            "encoder": encoder.state_dict(), "decoder": decoder.state_dict(),
        }  # fmt: skip
        paths.append(str(folder / name / "best.pth"))
        save_checkpoint(content, paths[-1])
    return paths


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of five good photos, two broken ones and a note; the working directory lies beside it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i, name in enumerate(("e.png", "b, 2.jpg", "a.jpg", "d.JPG", "c.webp")):
        coarse = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40 + i, 30)).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:100])
    (folder / "text.png").write_text("no photo")
    (folder / "note.txt").write_text("no photo either")
    (folder / "._a.jpg").write_text("what a Mac leaves")
    monkeypatch.chdir(tmp_path)
    return folder


GOOD = ["a.jpg", "b, 2.jpg", "c.webp", "d.JPG", "e.png"]


def caption(model, *img, **options):
    main(Config(tuple(map(str, img)), (model,), device="cpu", **{"max_length": 6, "min_length": 2} | options))


def expected(model, path, beam_size=5, **options):
    """The search's answer for one photo alone: its best hypothesis and its words."""
    captioner, _, _ = load(model)
    photo = torch.from_numpy(read_photo(path, SIDE))[None]
    [[best, *_]] = captioner.search(photo, beam_size, 6, **{"min_length": 2} | options)
    return best, captioner.sentence(best)


def test_one_photo_gives_its_caption_first_and_its_attention_figure(models, folder, capsys):
    caption(models[0], folder / "a.jpg")
    first, numbers, figure = capsys.readouterr().out.splitlines()
    best, words = expected(models[0], folder / "a.jpg")
    assert first == " ".join(words)
    perplexity = math.exp(-best.log_prob / (len(words) + best.ended))
    assert numbers == f"log-probability {best.log_prob:.2f}, perplexity {perplexity:.2f} per word"
    assert figure == "Attention figure: outputs/photos/a.jpg_attention.png"
    assert (folder.parent / "outputs/photos/a.jpg_attention.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_goes_where_it_is_asked_for_beside_a_file_of_captions(models, folder):
    caption(models[0], folder / "a.jpg", figure="where.png", output="captions.csv", dont_smooth=True)
    assert (folder.parent / "where.png").read_bytes().startswith(b"\x89PNG")
    caption(models[0], folder / "a.jpg", output="more.csv")
    assert not (folder.parent / "outputs").exists()


def test_a_folder_gives_a_line_per_photo_in_order_and_names_what_cannot_be_read(models, folder, capsys):
    caption(models[0], folder, beam_size=2)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == len(GOOD)
    for line, name in zip(lines, GOOD, strict=True):
        _, words = expected(models[0], folder / name, beam_size=2)
        assert line.startswith(f"{folder / name}: {' '.join(words)}  # log-probability -")
    no_photos, model, *complaints = err.splitlines()
    assert "not photos" in no_photos
    assert model == f"Model: {models[0]} (soft decoder on shufflenet_v2_x0_5, 7 epochs)"
    assert [line.endswith("cut off after 6 words (--max_length)") for line in complaints] == [False, False, True]
    for line, name in zip(complaints, ("broken.jpg", "text.png"), strict=False):
        assert line.startswith(f"{folder / name}: skipped, cannot be read as a photo (")


def test_a_table_has_one_caption_per_photo(models, folder):
    caption(models[0], folder, output="captions.csv", batch_size=2)
    with open("captions.csv", newline="", encoding="utf-8") as file:  # noqa: PTH123
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "caption"]
    assert rows[1:] == [[str(folder / name), " ".join(expected(models[0], folder / name)[1])] for name in GOOD]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_json_has_everything_and_batches_do_not_change_it(models, folder, batch_size):
    caption(models[0], folder, output="all.json", batch_size=batch_size, alphas=True, beam_size=3, n_best=3,
            normalisation="length")  # fmt: skip
    content = json.loads((folder.parent / "all.json").read_text())
    assert content["models"] == [models[0]]
    assert content["options"]["beam_size"] == 3
    assert [row["file"] for row in content["photos"]] == [str(folder / name) for name in GOOD]
    assert len({row["caption"] for row in content["photos"]}) > 1
    for row in content["photos"]:
        best, words = expected(models[0], row["file"], 3, normalisation="length", n_best=3, keep_alphas=True)
        assert row["words"] == words and row["caption"] == " ".join(words)
        assert row["log_prob"] == pytest.approx(best.log_prob, abs=1e-4)
        assert row["score"] == pytest.approx(best.score, abs=1e-4)
        assert row["perplexity"] == pytest.approx(math.exp(-best.log_prob / (len(words) + best.ended)), rel=1e-3)
        np.testing.assert_allclose(row["alphas"], best.alphas[: len(words)], atol=1e-5)
        [others] = load(models[0])[0].search(
            torch.from_numpy(read_photo(row["file"], SIDE))[None], 3, 6, normalisation="length", n_best=3, min_length=2
        )
        assert [each["score"] for each in row["n_best"]] == pytest.approx([each.score for each in others], abs=1e-4)
        assert len(others) > 1
        assert row["n_best"][0] == {name: row[name] for name in row["n_best"][0]}


def test_json_has_attention_only_if_it_is_asked_for(models, folder):
    caption(models[0], folder / "a.jpg", output="one.json")
    [row] = json.loads((folder.parent / "one.json").read_text())["photos"]
    assert "alphas" not in row


def test_a_page_shows_every_photo_with_its_attention(models, folder):
    caption(models[0], folder, output="page.html")
    page = (folder.parent / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["models"] == ["soft"]
    assert [photo["name"] for photo in data["photos"]] == [str(folder / name) for name in GOOD]
    for photo in data["photos"]:
        jpeg = Image.open(io.BytesIO(base64.b64decode(photo["jpeg"])))
        with Image.open(photo["name"]) as original:  # the model saw a square
            assert jpeg.width / jpeg.height == pytest.approx(original.width / original.height, rel=0.05)
        best, words = expected(models[0], photo["name"])
        assert photo["captions"][0]["words"] == words
        assert photo["captions"][0]["logProb"] == pytest.approx(best.log_prob, abs=1e-3)
        assert photo["captions"][0]["attention"]["side"] == 3


def test_photos_that_worker_processes_read_give_the_same_lines(models, folder, capsys):
    caption(models[0], folder, workers=0)
    alone = capsys.readouterr()
    caption(models[0], folder, workers=1)
    assert capsys.readouterr() == alone


def captions(capsys):
    return [line.split("  # ")[0] for line in capsys.readouterr().out.splitlines()]


def test_a_seed_repeats_its_samples_and_another_does_not(models, folder, capsys):
    drawn = []
    for seed in (1, 1, 2):
        caption(models[0], folder, sample=True, seed=seed)
        drawn.append(captions(capsys))
    assert drawn[0] == drawn[1] != drawn[2]
    caption(models[0], folder, sample=True, top_k=1)
    sampled = captions(capsys)
    caption(models[0], folder, sample=True, top_p=1e-6)
    assert captions(capsys) == sampled
    caption(models[0], folder, beam_size=1)
    assert captions(capsys) == sampled


def test_rules_of_length_and_repetition_hold(models, folder, capsys):
    caption(models[0], folder, min_length=4, max_length=5, no_repeat_ngram=1, no_unk=True, temperature=2.0)
    for line in captions(capsys):
        words = line.split(": ")[1].split()
        assert 4 <= len(words) <= 5 and len(set(words)) == len(words) and "<unk>" not in words


def test_n_best_lists_are_shown_below_each_other(models, folder, capsys):
    caption(models[0], folder / "a.jpg", folder / "c.webp", n_best=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("    ") for line in lines] == [False, True, False, True]


def test_several_models_decide_together(models, folder, tmp_path):
    main(Config((str(folder),), tuple(models), "both.json", device="cpu", max_length=6))
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["models"] == models
    captioner, _, _ = load_captioner(models)
    for row in both["photos"]:
        [[best]] = captioner.search(torch.from_numpy(read_photo(row["file"], SIDE))[None], 5, 6)
        assert row["words"] == captioner.sentence(best)
        assert row["log_prob"] == pytest.approx(best.log_prob, abs=1e-4)
        assert row["log_prob"] != pytest.approx(expected(models[0], row["file"])[0].log_prob, abs=1e-4)


def test_files_folders_and_patterns_are_found_once_and_in_order(folder):
    (folder / "below").mkdir()
    (folder / "below" / "z.jpg").write_bytes(b"")
    (folder / "odd[1].jpg").write_bytes(b"")
    everything = sorted(map(str, find_photos([str(folder)])))
    assert everything == [str(path) for path in find_photos([str(folder), str(folder / "a.jpg"), f"{folder}/*.jpg"])]
    assert str(folder / "note.txt") not in everything and str(folder / "._a.jpg") not in everything
    assert find_photos([f"{folder}/**/*.jpg"])[-1] == folder / "odd[1].jpg"
    assert folder / "below" / "z.jpg" in find_photos([f"{folder}/**/*.jpg"])
    assert folder / "below" / "z.jpg" not in find_photos([str(folder)])
    assert find_photos([str(folder / "odd[1].jpg")]) == [folder / "odd[1].jpg"]


def test_where_there_is_nothing_to_read_it_is_an_error_and_no_file_is_written(models, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for img, message in (
        ([tmp_path / "empty"], "empty: no photo found"),
        ([tmp_path / "*.gif"], r"\*.gif: no photo found"),
        ([tmp_path / "missing.jpg"], "missing.jpg: cannot be read as a photo"),
        ([folder / "broken.jpg"], "broken.jpg: cannot be read as a photo .*; give a JPEG"),
        ([folder / "broken.jpg", folder / "text.png"], "img: none of 2 photos can be read"),
        ([], "img: no photos given"),
    ):
        with pytest.raises(UserError, match=message):
            caption(models[0], *img)
    for output in ("new.csv", "new.json", "new.html"):
        with pytest.raises(UserError, match="broken.jpg: cannot be read"):
            caption(models[0], folder / "broken.jpg", output=output)
    assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".*new*"))


@pytest.mark.parametrize("output", ["captions.csv", "captions.json", "captions.html", None])
def test_a_caption_of_no_words_is_one_too(models, folder, output, capsys):
    spoken = load_checkpoint(models[0])
    spoken["decoder"]["fc.bias"][WORD_MAP["<end>"]] += 100
    save_checkpoint(spoken, "silent/best.pth")
    caption("silent/best.pth", folder / "a.jpg", min_length=0, output=output)
    assert capsys.readouterr().out.startswith("\nlog-probability ")


def test_a_failure_leaves_the_old_file(models, folder, tmp_path):
    (tmp_path / "old.html").write_text("before")
    with pytest.raises(UserError):
        caption(models[0], folder / "broken.jpg", folder / "text.png", output="old.html", overwrite=True)
    assert (tmp_path / "old.html").read_text() == "before"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size: 0 found, a whole number from 1 to 1,000 expected"),
        ({"batch_size": 0}, "batch_size: 0 found, a whole number from 1 to 1,000,000 expected"),
        ({"workers": -1}, "workers: -1 found, a whole number from 0 to 1,024 or None expected"),
        ({"top_k": -1, "sample": True}, "top_k: -1 found, a whole number from 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram: -1 found"),
        ({"temperature": 0.0}, "temperature: 0.0 found"),
        ({"sample": True, "top_p": 0.0}, "top_p: 0.0 found"),
        ({"normalisation": "mean"}, "normalisation: 'mean' found"),
        ({"sample": True, "beam_size": 3, "n_best": 2}, "beam_size, n_best: found with --sample"),
        ({"top_p": 0.9, "seed": 1}, "seed, top_p: found without --sample"),
        ({"reward": 0.5}, "reward: goes with --normalisation reward"),
        ({"normalisation": "reward"}, "reward: goes with --normalisation reward"),
        ({"beam_groups": 2}, "beam_groups: 2 found, a number that divides beam_size (5)"),
        ({"diversity": 1.0}, "diversity: 1.0 found, but it is between groups"),
        ({"n_best": 6}, "n_best: 6 found, at most beam_size (5)"),
        ({"min_length": 7}, "min_length: 7 found, at most max_length (6)"),
        ({"output": "captions.txt"}, "output: 'captions.txt' found"),
        ({"output": "photos"}, "output: 'photos' found"),
        ({"n_best": 2, "output": "captions.csv"}, "n_best: 2 found, but a .csv file has one"),
        ({"n_best": 2, "output": "page.html"}, "n_best: 2 found, but a .html file has one"),
        ({"alphas": True, "output": "captions.csv"}, "alphas: are for a .json file"),
        ({"figure": "where.png"}, "figure, dont_smooth: are for one photo"),
        ({"dont_smooth": True}, "figure, dont_smooth: are for one photo"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(models, folder, options, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        caption(models[0], folder, **options)
    assert "\n" not in str(refused.value)


def test_the_command_line_takes_several_photos_and_models():
    config = parse_args(Config, ["--img", "a.jpg", "b.jpg", "--model", "x.pth", "y.pth", "--sample", "--no_unk"])
    assert config == Config(("a.jpg", "b.jpg"), ("x.pth", "y.pth"), sample=True, no_unk=True)


def test_words_without_an_option_are_photos_and_the_model(models, folder, capsys):
    run = str(Path(models[0]).parent)
    for words in ([str(folder / "a.jpg"), run], [models[0], str(folder / "a.jpg")]):
        main(parse_args(Config, [*words, "--device", "cpu", "--max_length", "6", "--min_length", "2"]))
        out, err = capsys.readouterr()
        assert out.splitlines()[0] == " ".join(expected(models[0], folder / "a.jpg")[1])
        assert f"Model: {words[0] if words[0] == models[0] else run} (soft decoder" in err


@pytest.mark.parametrize("option", ["output", "figure"])
def test_what_is_read_is_not_written_over(models, folder, option):
    photo = folder / "a.jpg"
    (folder / "page.html").write_bytes(photo.read_bytes())  # a photo under any name
    read = folder / "page.html" if option == "output" else photo
    before = read.read_bytes()
    with pytest.raises(UserError, match=f"{option}: '.*' found, but that file is read here"):
        caption(models[0], read, **{option: str(read)})
    assert read.read_bytes() == before


def test_a_file_that_is_there_such_as_the_annotations_is_replaced_only_if_that_is_asked_for(models, folder, tmp_path):
    annotations = tmp_path / "captions.csv"
    annotations.write_text("image,caption\na.jpg,a cat\n")
    for option in ("output", "figure"):
        with pytest.raises(UserError, match=f"{option}: captions.csv is there already; .* --overwrite"):
            caption(models[0], folder / "a.jpg", **{option: "captions.csv"})
    assert annotations.read_text() == "image,caption\na.jpg,a cat\n"
    caption(models[0], folder / "a.jpg", output="captions.csv", overwrite=True)
    assert "photos/a.jpg" in annotations.read_text()


def test_two_photos_of_one_name_have_two_figures(models, folder, tmp_path):
    (folder / "other").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "other" / "a.jpg")
    for photo in ("photos/a.jpg", "photos/other/a.jpg"):
        caption(models[0], photo)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("outputs/**/*.png")) == [
        "outputs/photos/a.jpg_attention.png",
        "outputs/photos/other/a.jpg_attention.png",
    ]


def test_figures_of_photos_from_elsewhere_lie_flat_and_apart(models, folder, tmp_path, monkeypatch):
    (folder / "other").mkdir()
    shutil.copy(folder / "a.jpg", folder / "other")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for photo in (folder / "a.jpg", folder / "other" / "a.jpg", Path("..", "photos", "a.jpg")):
        caption(models[0], photo)
    drawn = [str(path) for path in Path("outputs").rglob("*.png")]
    assert len(drawn) == 2 and all(re.fullmatch(r"outputs/a\.jpg_[0-9a-f]{8}_attention\.png", path) for path in drawn)
