"""view_captions.py puts a model's own captions, attention and scores on a page, for one model or several."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

import train
from captioning.evaluation import metrics
from captioning.inference.trained_model import load_captioner
from captioning.networks.registry import build_decoder
from captioning.storage.tensors import save_checkpoint
from models import Encoder
from utils import UserError
from view_captions import Config, main, model_names, spread

WORD_MAP = {"<pad>": 0, "a": 1, "red": 2, "cat": 3, "dog": 4, "sat": 5, "ran": 6, "<unk>": 7, "<start>": 8, "<end>": 9}


@pytest.fixture
def make_run(tmp_path):
    """A function that writes the checkpoint of a small model with random weights, as train.py does."""

    def write(name, seed):
        torch.manual_seed(seed)
        config = train.Config(
            data_folder=str(tmp_path), data_name="tiny", encoder="resnet18", encoder_weights="none",
            encoded_image_size=3, embed_dim=8, decoder_dim=8, attention_dim=8,
        )  # fmt: skip
        config = dataclasses.asdict(config)
        encoder = Encoder("resnet18", "none", 3)
        decoder = build_decoder(config, len(WORD_MAP), encoder.encoder_dim)
        content = {
            "config": config, "word_map": WORD_MAP, "progress": {"epoch": 7}, "image_size": 32,
            "encoder": encoder.state_dict(), "decoder": decoder.state_dict(),
        }  # fmt: skip
        save_checkpoint(content, tmp_path / "runs" / name / "best.pth")
        return tmp_path / "runs" / name / "best.pth"

    return write


def content(path):
    """What the page's script will read."""
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_shows_what_each_model_says_and_how_good_it_is(make_files, make_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "meteor_scores", fake_meteor)
    made = make_files("VAL", photos=5, side=32)
    runs = [make_run("soft", 0), make_run("other", 1)]
    output = tmp_path / "page.html"
    main(Config(tuple(map(str, runs)), beam_size=2, max_length=6, batch_size=2, output=str(output), device="cpu"))
    assert str(output) in capsys.readouterr().out

    data = content(output)
    assert data["models"] == ["soft", "other"]
    assert [photo["name"] for photo in data["photos"]] == [f"{i}.jpg" for i in range(5)]
    assert data["photos"][1]["references"] == ["a cat 1", "one more"]
    references = [photo["captions"] for photo in made.references]
    for model, run in enumerate(runs):
        captioner, _, _ = load_captioner(run)
        found = captioner.search(torch.from_numpy(made.images), 2, 6, keep_alphas=True)
        said = [captioner.sentence(best) for best, *_ in found]
        scores = metrics.per_photo_scores(references, said)
        for i, photo in enumerate(data["photos"]):
            told = photo["captions"][model]
            assert told["words"] == said[i]
            assert told["logProb"] == pytest.approx(found[i][0].log_prob, abs=1e-3)
            assert told["attention"]["side"] == 3
            peaks = found[i][0].alphas.max(dim=1).values[: len(said[i])]
            assert told["attention"]["peaks"] == pytest.approx(peaks.tolist(), abs=1e-3)
            assert dict(zip(data["metrics"], told["scores"], strict=True)) == pytest.approx(scores[i], abs=1e-4)


def fake_meteor(truth, guess, meteor=None):
    """METEOR without its Java, which test_metrics.py starts."""
    each = [len(guess[i][0]) / 100 for i in truth]
    return np.mean(each), each


def test_photos_are_spread_over_the_split_and_scores_can_be_left_out(make_files, make_run, tmp_path):
    make_files("TEST", photos=5, side=32)
    output = tmp_path / "page.html"
    run = make_run("soft", 0)
    main(Config((str(run),), split="test", num_photos=3, max_length=4, scores=False, output=str(output), device="cpu"))
    data = content(output)
    assert [photo["name"] for photo in data["photos"]] == ["0.jpg", "2.jpg", "4.jpg"]
    assert data["metrics"] == []
    assert "3 of 5 photos of TEST" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(5, 5, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (7, 1, [0]), (1, 1, [0])],
)
def test_a_spread_is_even_and_holds_no_photo_twice(total, count, expected):
    assert spread(total, count) == expected
    assert len(set(spread(1000, 777))) == 777


def test_models_are_named_by_the_shortest_names_that_tell_them_apart(tmp_path):
    assert model_names(["runs/soft/best.pth", "runs/hard/best.pth"]) == ["soft", "hard"]
    assert model_names(["runs/soft/best.pth", "runs/soft/last.pth"]) == ["soft/best", "soft/last"]
    one, two = tmp_path / "a" / "x" / "best.pth", tmp_path / "b" / "x" / "best.pth"
    assert model_names([one, two]) == [str(one), str(two)]
    with pytest.raises(UserError, match="named twice"):
        model_names(["runs/soft/best.pth", "runs/../runs/soft/best.pth"])


def test_a_model_that_is_a_link_to_itself_is_one_line(tmp_path):
    loop = tmp_path / "loop.pth"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="loop.pth") as error:
        main(Config(model=(str(loop),), data_folder=str(tmp_path), device="cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("split", "DEV", "split: 'DEV' found, 'TRAIN', 'VAL' or 'TEST' expected"),
        ("num_photos", 0, "num_photos: 0 found"),
        ("beam_size", 0, "beam_size: 0 found"),
        ("output", "page.pdf", "'.pdf' found, the page is an HTML file"),
        ("model", ("nowhere/best.pth",), "nowhere/best.pth: no such file"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(field, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(Config(**{field: value}))


def test_without_checkpoints_the_newest_best_one_is_taken(make_files, make_run, tmp_path, monkeypatch):
    make_files("VAL", photos=2, side=32)
    make_run("old", 0)
    make_run("new", 1)
    monkeypatch.chdir(tmp_path)
    main(Config(max_length=3, scores=False, device="cpu"))
    assert content(tmp_path / "outputs" / "captions_VAL.html")["models"] == ["new"]


def test_a_page_is_replaced_only_if_that_is_asked_for_unless_nobody_named_it(
    make_files, make_run, tmp_path, monkeypatch
):
    make_files("VAL", photos=2, side=32)
    monkeypatch.chdir(tmp_path)
    page, options = tmp_path / "mine.html", {"max_length": 3, "scores": False, "device": "cpu"}
    page.write_text("written by hand")
    with pytest.raises(UserError, match="output: mine.html is there already; name another file, or add --overwrite"):
        main(Config((str(make_run("soft", 0)),), output="mine.html", **options))
    assert page.read_text() == "written by hand"
    main(Config(("runs/soft",), output="mine.html", overwrite=True, **options))
    assert content(page)["models"] == ["soft"]
    for _ in range(2):  # the page that no --output names is made anew
        main(Config(("runs/soft",), **options))


def test_a_model_is_shown_on_other_data_where_it_is_named(make_files, make_run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    make_files("VAL", photos=2, side=32)
    made = make_files("VAL", photos=3, side=32, folder=other, name="own", seed=9)
    output = tmp_path / "page.html"
    main(
        Config(
            (str(make_run("soft", 0)),),
            max_length=3,
            scores=False,
            output=str(output),
            device="cpu",
            data_folder=str(other),
            data_name="own",
        )  # fmt: skip
    )
    assert len(content(output)["photos"]) == 3
    assert np.asarray(made.images).shape == (3, 3, 32, 32)


def test_captions_of_another_model_stand_beside_ours_and_alone(make_files, make_run, tmp_path):
    made = make_files("VAL", photos=4, side=32)
    other = tmp_path / "blip" / "captions_VAL_beam3_results.json"
    other.parent.mkdir()
    rows = [{"image_id": row["image_id"], "caption": f"a cat {i}"} for i, row in enumerate(made.references)]
    other.write_text(json.dumps(rows[::-1]))  # in any order
    output = tmp_path / "page.html"
    common = {
        "results": (str(other),),
        "output": str(output),
        "overwrite": True,
        "scores": False,
        "max_length": 3,
        "device": "cpu",
    }
    main(Config((str(make_run("soft", 0)),), num_photos=2, **common))
    data = content(output)
    assert data["models"] == ["soft", "blip"]
    assert [photo["captions"][1]["words"] for photo in data["photos"]] == [["a", "cat", "0"], ["a", "cat", "3"]]
    main(Config(data_folder=str(tmp_path), data_name="tiny", **common))
    assert content(output)["models"] == ["blip"] and len(content(output)["photos"]) == 4

    with pytest.raises(UserError, match="data_folder: not given"):
        main(Config(**common))
    data_options = {"data_folder": str(tmp_path), "data_name": "tiny"}
    other.write_text(json.dumps(rows[1:]))
    with pytest.raises(UserError, match="has no caption for image_id 100"):
        main(Config(**common, **data_options))
    for broken in (
        {"scores": 1},
        [1],
        [{"image_id": 1}],
        [{"image_id": 1, "caption": 2}],
        [{"image_id": [], "caption": ""}],
    ):
        other.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="captions_VAL_beam3_results.json: a list of"):
            main(Config(**common, **data_options))


def test_captions_are_not_lost_if_they_cannot_be_scored(make_files, make_run, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise UserError("METEOR: Java failed")

    monkeypatch.setattr(metrics, "meteor_scores", broken)
    make_files("VAL", photos=2, side=32)
    output = tmp_path / "page.html"
    main(Config((str(make_run("soft", 0)),), output=str(output), max_length=3, device="cpu"))
    assert len(content(output)["photos"]) == 2 and content(output)["metrics"] == []
    assert "the page has no scores: METEOR: Java failed" in capsys.readouterr().err


def test_a_runs_folder_stands_for_its_best_checkpoint(make_files, make_run, tmp_path, capsys):
    make_files("VAL", photos=2, side=32)
    run = make_run("soft", 0)
    main(Config((str(run.parent),), output=str(tmp_path / "a.html"), scores=False, max_length=3, device="cpu"))
    assert content(tmp_path / "a.html")["models"] == ["soft"]
    assert f"Model: {run} (soft decoder on resnet18, 7 epochs)" in capsys.readouterr().out
