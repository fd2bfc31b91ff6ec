"""eval.py's files and numbers, with two small random models on random photos; METEOR's Java is left out."""

import contextlib
import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import WORD_MAP
from saved_model import save_model

from captioning.evaluation import metrics
from captioning.evaluation.calibration import collect_outputs, measure
from captioning.evaluation.split_scores import describe_statistics
from captioning.features import build_loader
from captioning.inference.trained_model import load_captioner
from captioning.training.data_identity import describe_data
from datasets import CaptionDataset
from eval import Config, main
from utils import UserError


@pytest.fixture(autouse=True)
def meteor_starts(monkeypatch):
    """A stand-in for METEOR, and a list that is one longer for each time it was started."""
    starts = []

    class SharedWords(contextlib.nullcontext):
        def __init__(self):
            super().__init__()
            starts.append(self)

        def compute_score(self, truth, guess):
            each = [len(set(guess[i][0].split()) & set(" ".join(truth[i]).split())) / 10 for i in truth]
            return max(each), each

    monkeypatch.setattr(metrics, "ClosingMeteor", SharedWords)
    return starts


@pytest.fixture
def options(make_files, tmp_path):
    """Options to evaluate on 3 test photos, with TRAIN and VAL files beside them; models are in a.pth and b.pth."""
    for split in ("TRAIN", "VAL", "TEST"):
        made = make_files(split, photos=3, side=64, seed=len(split))
    save_model(tmp_path / "a.pth", 1)
    save_model(tmp_path / "b.pth", 2)
    return {
        "model": (str(tmp_path / "a.pth"),), "data_folder": str(made.folder), "data_name": made.name,
        "output_folder": str(tmp_path / "out"), "beam_sizes": (1, 2), "max_length": 5, "device": "cpu",
    }  # fmt: skip


def load(options, name):
    return json.loads((Path(options["output_folder"]) / name).read_text())


def test_totals_and_each_photos_scores_are_those_of_metrics_and_meteor_starts_once(meteor_starts):
    references = [[["a", "red", "cat", "sat"], ["a", "cat"]], [["the", "dog", "ran"]], [["two", "dogs"]]]
    hypotheses = [["a", "red", "cat", "ran"], ["the", "dog", "ran"], []]
    total, each = metrics.all_scores(references, hypotheses)
    assert len(meteor_starts) == 1
    assert total == metrics.score(references, hypotheses) and list(total) == list(metrics.ALL)
    assert each == metrics.per_photo_scores(references, hypotheses)


def test_every_photo_has_a_row_with_its_caption_and_the_last_beam_sizes_scores(options, meteor_starts):
    main(Config(**options))
    assert len(meteor_starts) == 1  # for both beam sizes
    results = load(options, "captions_TEST_beam2_results.json")
    with (Path(options["output_folder"]) / "scores_TEST_beam2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "caption", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    assert [row["image"] for row in rows] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [row["caption"] for row in rows] == [result["caption"] for result in results]
    mean = sum(float(row["ROUGE-L"]) for row in rows) / 3
    assert mean == pytest.approx(load(options, "scores_TEST.json")["2"]["ROUGE-L"], abs=1e-4)


def test_statistics_hold_the_perplexity_and_what_the_captions_are_like(options):
    main(Config(**options))
    assert set(load(options, "scores_TEST.json")["1"]) == set(metrics.ALL)
    found = load(options, "statistics_TEST.json")
    assert set(found) == {"perplexity", "captions", "settings"} and set(found["captions"]) == {"1", "2"}
    captioner, _, _ = load_captioner(options["model"])
    loader, _ = build_loader(options["data_folder"], options["data_name"], "TEST", captioner.encoder, captioner.device)
    assert found["perplexity"] == pytest.approx(captioner.perplexity(loader), rel=1e-5)
    hypotheses, _, cut_off, _ = captioner.caption_split(loader, 2, 5)
    known = [caption for i in range(3) for caption in (["a", "cat", str(i)], ["one", "more"])]
    expected = metrics.caption_statistics(hypotheses, known) | {"cut_off": cut_off}
    assert found["captions"]["2"] == pytest.approx(expected)

    (Path(options["data_folder"]) / f"TRAIN_REFERENCES_{options['data_name']}.json").unlink()
    main(Config(**options))
    assert "in_training_set" not in load(options, "statistics_TEST.json")["captions"]["2"]


def test_each_split_has_files_of_its_own(options):
    main(Config(**options))
    folder = Path(options["output_folder"])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    main(Config(**options | {"split": ("VAL", "TRAIN")}))
    assert all(path.read_bytes() == content for path, content in before.items())
    for split in ("VAL", "TRAIN"):
        assert load(options, f"scores_{split}.json")["2"].keys() == load(options, "scores_TEST.json")["2"].keys()
        assert load(options, f"statistics_{split}.json")["settings"]["split"] == ["VAL", "TRAIN"]


def test_scores_of_few_photos_are_called_coarse(options, capsys):
    main(Config(**options))
    assert "Only 3 photos: scores are coarse" in capsys.readouterr().out


def test_data_that_were_made_again_since_the_training_are_told(options, make_files, capsys):
    [path], folder, name = options["model"], options.pop("data_folder"), options.pop("data_name")
    content = torch.load(path)
    content["config"] |= {"data_folder": folder, "data_name": name}
    content["data"] = {"TRAIN": describe_data(CaptionDataset(folder, name, "TRAIN"))}
    torch.save(content, path)
    main(Config(**options))
    assert "made again" not in capsys.readouterr().out
    make_files("TRAIN", photos=4, side=64)
    main(Config(**options))
    assert f"{folder}: the files of {name} were made again" in capsys.readouterr().out


def test_statistics_say_which_model_and_which_settings_gave_the_scores(options):
    main(Config(**options | {"beam_sizes": (2,), "normalisation": "length", "no_unk": True}))
    found = load(options, "statistics_TEST.json")["settings"]
    assert set(found) == set(vars(Config()))
    assert found["model"] == list(options["model"]) and found["beam_sizes"] == [2]
    assert (found["normalisation"], found["no_unk"], found["tokenizer"]) == ("length", True, "ours")


def test_decoding_options_reach_the_captions(options):
    main(Config(**options | {"min_length": 3, "no_repeat_ngram": 1, "no_unk": True, "split": ("val",)}))
    for result in load(options, "captions_VAL_beam2_results.json"):
        words = result["caption"].split()
        assert 3 <= len(words) == len(set(words)) and "<unk>" not in words


def test_n_best_captions_are_written_and_described_and_the_best_is_scored(options, capsys):
    main(Config(**options | {"beam_sizes": (4,)}))
    plain = load(options, "captions_TEST_beam4_results.json")
    main(Config(**options | {"beam_sizes": (4,), "n_best": 3}))
    lists = load(options, "captions_TEST_beam4_n_best.json")
    assert [row["captions"][0] for row in lists] == [row["caption"] for row in plain]
    found = load(options, "statistics_TEST.json")["captions"]["4"]
    n_best = [[caption.split() for caption in row["captions"]] for row in lists]
    assert {name: found[name] for name in found if "n_best" in name} == metrics.n_best_statistics(n_best)
    assert "captions per photo, of whose words" in capsys.readouterr().out
    for diversity, captions in ((0.0, 1), (20.0, 3)):  # without a cost all groups write the same
        main(Config(**options | {"beam_sizes": (4,), "n_best": 3, "beam_groups": 4, "diversity": diversity}))
        assert load(options, "statistics_TEST.json")["captions"]["4"]["n_best"] == captions


@pytest.mark.parametrize(
    "setting, expected",
    [
        ({"beam_groups": 2, "beam_sizes": (1, 4)}, r"beam_groups: 2 found, a number that divides .* \(1, 4\)"),
        ({"diversity": 1.0}, "diversity: 1.0 found, but it is between groups"),
    ],
)
def test_groups_that_cannot_be_are_refused_before_the_work(options, setting, expected):
    with pytest.raises(UserError, match=expected):
        main(Config(**options | setting))


def test_calibration_is_fitted_on_val_and_lowers_its_loss(options):
    main(Config(**options | {"calibrate": True, "beam_sizes": (1,)}))
    found = load(options, "statistics_TEST.json")["calibration"]
    assert list(found) == ["temperature", "VAL", "TEST"]
    assert found["VAL"]["after"]["loss"] < found["VAL"]["before"]["loss"]
    captioner, _, _ = load_captioner(options["model"])
    loader, _ = build_loader(options["data_folder"], options["data_name"], "VAL", captioner.encoder, captioner.device)
    expected = measure(captioner.decoder.scores, *collect_outputs(captioner, loader), found["temperature"])
    assert found["VAL"]["after"]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    for name in ("VAL_before", "VAL_after", "TEST_before", "TEST_after"):
        path = Path(options["output_folder"]) / f"calibration_{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")


def test_several_checkpoints_are_scored_as_one_ensemble(options, tmp_path, capsys):
    paths = (str(tmp_path / "a.pth"), str(tmp_path / "b.pth"))
    main(Config(**options | {"model": paths, "calibrate": True, "output_folder": None}))
    assert "ensemble of " in capsys.readouterr().out
    captioner, _, _ = load_captioner(paths)
    loader, _ = build_loader(
        options["data_folder"], options["data_name"], "TEST", captioner.encoder, captioner.device, cached=False
    )
    found = json.loads((tmp_path / "statistics_TEST.json").read_text())  # beside the first checkpoint
    assert found["perplexity"] == pytest.approx(captioner.perplexity(loader), rel=1e-4)
    assert found["calibration"]["temperature"] > 0


@pytest.mark.parametrize(
    "wrong, expected",
    [
        ({"beam_sizes": (0,)}, "beam_sizes"),
        ({"split": ("dev",)}, "split: 'dev'"),
        ({"max_length": 0}, "max_length"),
        ({"min_length": 9}, "min_length: 9"),
        ({"reward": 1.0}, "reward: 1.0"),
        ({"temperature": 0.0}, "temperature"),
        ({"normalisation": "best"}, "normalisation: 'best'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(options, wrong, expected):
    with pytest.raises(UserError, match=expected):
        main(Config(**options | wrong))
    assert not Path(options["output_folder"]).exists()


def test_photos_of_another_size_than_the_models_are_refused(options, make_files, tmp_path):
    (tmp_path / "small").mkdir()
    make_files("TEST", photos=3, side=32, folder=tmp_path / "small")
    with pytest.raises(UserError, match="TEST_IMAGES_tiny.hdf5: photos of 32 px found, 64 px expected by the model"):
        main(Config(**options | {"data_folder": str(tmp_path / "small")}))


def test_perplexity_on_data_of_other_ids_is_that_of_the_models_own(options, make_files, tmp_path):
    main(Config(**options))
    expected = load(options, "statistics_TEST.json")["perplexity"]
    made = make_files("TEST", photos=3, side=64, seed=len("TEST"))
    last = len(WORD_MAP) - 1
    turned = {"word_map": {word: last - i for word, i in WORD_MAP.items()},
              "captions": [[last - i for i in row] for row in made.captions]}  # fmt: skip
    (tmp_path / "turned").mkdir()
    make_files("TEST", photos=3, side=64, seed=len("TEST"), folder=tmp_path / "turned", **turned)
    main(Config(**options | {"data_folder": str(tmp_path / "turned")}))
    assert load(options, "statistics_TEST.json")["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_the_longest_length_is_the_checkpoints_or_that_of_the_data_and_cut_captions_are_counted(options, capsys):
    path, longest = options["model"][0], {}
    del options["max_length"]
    for words in (3, None):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["decoder"]["fc.bias"][WORD_MAP["<end>"]] = -50.0
        checkpoint |= {"max_length": words} if words else {}
        torch.save(checkpoint, path)
        main(Config(**options | {"beam_sizes": (1,)}))
        longest[words] = max(len(row["caption"].split()) for row in load(options, "captions_TEST_beam1_results.json"))
        assert load(options, "statistics_TEST.json")["captions"]["1"]["cut_off"] == 3
        assert "3 cut off at the longest length (--max_length)" in capsys.readouterr().out
    assert longest[3] == 3


def test_the_captions_are_saved_before_they_are_scored(options, monkeypatch):
    def broken(*_):
        raise UserError("METEOR: Java failed")

    monkeypatch.setattr(metrics, "meteor_scores", broken)
    with pytest.raises(UserError, match="Java failed"):
        main(Config(**options | {"beam_sizes": (2,)}))
    assert len(load(options, "captions_TEST_beam2_results.json")) == 3


@pytest.mark.parametrize("wanted", ["calibrate", "pointing"])
def test_what_the_data_cannot_give_is_refused_before_the_work(options, wanted):
    for path in Path(options["data_folder"]).glob("VAL_IMAGES_*.hdf5"):
        path.unlink()
    with pytest.raises(UserError, match=f"{wanted}: "):
        main(Config(**options | {wanted: True}))
    assert not Path(options["output_folder"]).exists()


def test_a_runs_folder_is_its_best_checkpoint_and_one_dataset_needs_no_name(options, tmp_path, make_files, capsys):
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run" / "best.pth", 1)
    del options["data_name"]
    main(Config(**options | {"model": (str(tmp_path / "run"),), "beam_sizes": (1,)}))
    assert f"Model: {tmp_path / 'run' / 'best.pth'} (soft decoder on " in capsys.readouterr().out
    make_files("TEST", photos=3, side=64, name="another")
    with pytest.raises(UserError, match="data_name: .* has several datasets; .* one of another, tiny"):
        main(Config(**options))


def test_statistics_are_printed_in_words():
    values = {"mean_length": 9.04, "vocabulary": 12, "distinct_1": 0.5, "distinct_2": 0.25, "in_training_set": 0.1}
    assert describe_statistics(values) == (
        "9.0 words per caption, 12 different words, 50.0% of the words and 25.0% of the word pairs are distinct, "
        "10.0% of the captions are in the training set, word for word"
    )
