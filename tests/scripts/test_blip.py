"""blip.py with a small BLIP of random weights: it learns, writes, is scored, saved and taken up again."""

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import blip
import create_input_files
import view_captions
from blip import Caption, Eval, Finetune, New, main
from captioning.blip import fine_tuning as blip_training
from captioning.blip import transformer as blip_model
from captioning.blip.transformer import load_blip
from captioning.evaluation import metrics
from captioning.preparation.photos import read_photo
from captioning.preparation.shapes import create_shapes
from captioning.storage.folder_lock import sole_writer
from captioning.storage.tensors import load_tensors
from datasets import CaptionDataset
from utils import Stopped, UserError

pytestmark = pytest.mark.slow

NAME = "shapes_5_cap_per_img_0_min_word_freq"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of 24 + 6 + 6 drawn scenes of 64 pixels; :return: the options that name them"""
    folder = tmp_path_factory.mktemp("data")
    annotations = create_shapes(folder / "drawn", num_train=24, num_val=6, num_test=6, seed=1)
    create_input_files.main(
        create_input_files.Config(
            dataset="shapes", annotations=(str(annotations),), image_folder=str(folder / "drawn/images"),
            output_folder=str(folder), min_word_freq=0, image_size=64, workers=0,
        )
    )  # fmt: skip
    return {"data_folder": str(folder), "data_name": NAME}


@pytest.fixture(scope="module")
def untrained(data, tmp_path_factory):
    """The folder of a new, small BLIP."""
    folder = str(tmp_path_factory.mktemp("models") / "untrained")
    main(New(**data, output_folder=folder, image_size=64, patch_size=16, dim=64, layers=2, heads=4))
    return folder


@pytest.fixture(scope="module")
def trained(data, untrained, tmp_path_factory):
    """The folder of that BLIP when it has learned its 24 photos by heart, which validation on others would not keep."""
    folder = tmp_path_factory.mktemp("models") / "trained"
    main(quick(data, untrained, folder, epochs=60, stop_patience=60))
    learned = load_blip(untrained)
    learned.model.load_state_dict(load_tensors(folder / "training.pth")["model"])
    learned.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole_run(data, untrained, tmp_path_factory):
    """The folder of a training of two epochs that nothing stopped, and its options."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    options = {"epochs": 2, "save_minutes": 1e-9, "stop_metric": "CIDEr", "val_share": 1.0}
    main(quick(data, untrained, folder, **options))
    return folder, options


def quick(data, model, folder, **options):
    """Settings with which a new small BLIP learns quickly."""
    return Finetune(
        **{
            "model": model, "output_folder": str(folder), "batch_size": 8, "accumulate": 1, "lr": 4e-3,
            "captions_per_photo": 2, "label_smoothing": 0.0, "val_beam_size": 1, "val_share": 0.1, "device": "cpu",
        } | data | options
    )  # fmt: skip


def without_meteor(monkeypatch):
    """METEOR's Java takes seconds to start and a GB of memory."""
    monkeypatch.setattr(metrics, "meteor_scores", lambda truth, guess, meteor=None: (0.5, [0.5 for _ in guess]))


def test_fine_tuning_learns_what_is_on_each_photo(data, untrained, trained):
    """24 photos are learned by heart. Chance is what a caption of another photo scores."""
    split = CaptionDataset(*data.values(), "TRAIN", image_major=True)
    references = [photo["captions"] for photo in split.references]
    photos = torch.stack([torch.from_numpy(np.array(split[i][1])) for i in range(len(split))])

    def bleu4(model):
        return metrics.bleu4(references, [found.words for found in load_blip(model).search(photos, beam_size=3)])

    chance = metrics.bleu4(references, [captions[0] for captions in references[1:] + references[:1]])
    assert bleu4(untrained) < 0.05 < chance < 0.6
    assert bleu4(trained) > chance + 0.25


def test_fine_tuning_lowers_the_loss(data, untrained, trained):
    def perplexity(model):
        split = CaptionDataset(*data.values(), "TRAIN", image_major=True)
        split.with_references = True
        return load_blip(model).perplexity([split.collate([split[i] for i in range(len(split))])])

    before, after = perplexity(untrained), perplexity(trained)
    assert before > 30 and after < 4


@pytest.mark.parametrize("how", ["killed at step 2", "killed after an epoch", "asked by a signal at step 2"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(data, untrained, whole_run, tmp_path, monkeypatch, how):
    whole, options = whole_run
    saves, save, draw = [], blip_training.save_checkpoint, blip_training.FineTuning.draw_captions

    def save_and_die(content, path):
        save(content, path)
        saves.append(path)
        if len(saves) == {"killed at step 2": 2, "killed after an epoch": 4}.get(how):  # an epoch has 3, and its own
            raise KeyboardInterrupt

    def draw_and_signal(run, references, photos, batch):
        if how.startswith("asked") and batch == 1:
            signal.raise_signal(signal.SIGTERM)
        return draw(run, references, photos, batch)

    monkeypatch.setattr(blip_training, "save_checkpoint", save_and_die)
    monkeypatch.setattr(blip_training.FineTuning, "draw_captions", draw_and_signal)
    with pytest.raises(KeyboardInterrupt):  # `Stopped` is one
        main(quick(data, untrained, tmp_path, **options))
    monkeypatch.undo()
    with pytest.raises(UserError, match="batch_size: 4 found, but the resumed run has 8"):
        main(quick(data, untrained, tmp_path, resume=True, **options | {"batch_size": 4}))
    assert load_tensors(tmp_path / "training.pth")["progress"]["step"] == (3 if "epoch" in how else 2)
    main(quick(data, untrained, tmp_path, resume=True, **options))
    states = [load_tensors(folder / "training.pth") for folder in (whole, tmp_path)]
    assert states[0]["best"] == states[1]["best"] and states[0]["progress"] == states[1]["progress"]
    assert states[0]["progress"]["step"] == 6
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])
    best = [load_file(folder / "model.safetensors") for folder in (whole, tmp_path)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_a_frozen_vision_transformer_stays_as_it_is_and_accumulation_takes_fewer_steps(data, untrained, tmp_path):
    main(quick(data, untrained, tmp_path, freeze_vision=True, accumulate=2, epochs=1))
    state, before = load_tensors(tmp_path / "training.pth"), load_blip(untrained).model.state_dict()
    assert state["progress"]["step"] == 2  # of 3 batches
    for name, weights in state["model"].items():
        if name.startswith("vision_model") or name.endswith("position_embeddings.weight"):
            assert torch.equal(weights, before[name]) == name.startswith("vision_model")


def test_training_stops_when_captions_get_no_better(data, untrained, tmp_path, monkeypatch, capsys):
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(blip, "validate", lambda run, loader: {"BLEU-4": next(scores), "val_loss": 1.0})
    main(quick(data, untrained, tmp_path, epochs=9, stop_patience=2))
    assert re.findall(r"epoch (\d)", capsys.readouterr().out) == ["1", "2", "3", "4"]
    assert load_tensors(tmp_path / "training.pth")["best"]["BLEU-4"] == 0.3


def test_of_epochs_without_a_common_phrase_the_better_one_is_kept_and_the_run_goes_on(
    data, untrained, tmp_path, monkeypatch
):
    words = iter([0.0, 0.2, 0.2, 0.1])
    losses = iter([3.0, 2.0, 1.0, 0.5])

    def without_phrases(run, loader):
        return {"BLEU-1": next(words), "BLEU-2": 0.0, "BLEU-3": 0.0, "BLEU-4": 0.0, "val_loss": next(losses)}

    saved = []
    monkeypatch.setattr(blip, "validate", without_phrases)
    monkeypatch.setattr(blip_model.Blip, "save", lambda blip, folder: saved.append(folder))
    main(quick(data, untrained, tmp_path, epochs=4, stop_patience=1))
    state = load_tensors(tmp_path / "training.pth")
    assert state["best"]["epoch"] == 3 and len(saved) == 3
    assert state["progress"]["epoch"] == 4  # an epoch at 0 is none without progress


def test_another_metric_begins_the_comparison_anew(data, untrained, whole_run, tmp_path, capsys):
    whole, options = whole_run
    shutil.copytree(whole, tmp_path / "run")
    main(quick(data, untrained, tmp_path / "run", resume=True, **options | {"stop_metric": "BLEU-1"}))
    assert "Changed since the checkpoint: stop_metric" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_validation_loses_no_step(data, untrained, tmp_path, monkeypatch, number):
    def stopped(run, loader):
        raise Stopped(number)

    monkeypatch.setattr(blip, "validate", stopped)
    with pytest.raises(Stopped, match="all 3 steps are saved, continue with --resume") as reason:
        main(quick(data, untrained, tmp_path, epochs=1))
    assert reason.value.number == number
    assert load_tensors(tmp_path / "training.pth")["progress"] == {
        "epoch": 0, "batch": 3, "step": 3, "epochs_since_best": 0
    }  # fmt: skip


def test_what_a_killed_fine_tuning_left_is_removed(data, untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(blip, "validate", lambda run, loader: {"BLEU-4": 0.1, "val_loss": 1.0})
    for name in ("training.pth", "model.safetensors", "tokenizer.json"):
        (tmp_path / f".{name}.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".saving_abc").mkdir()
    (tmp_path / ".saving_abc" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".mine").write_bytes(b"kept")
    main(quick(data, untrained, tmp_path, epochs=1))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".mine"]


def test_two_fine_tunings_at_once_in_one_folder_are_refused(data, untrained, tmp_path):
    with (
        sole_writer(tmp_path, "output_folder"),
        pytest.raises(UserError, match="output_folder: another run is writing to"),
    ):
        main(quick(data, untrained, tmp_path))


def test_a_model_is_not_replaced_unasked(data, untrained):
    with pytest.raises(UserError, match="output_folder: .*untrained holds a model already"):
        main(quick(data, untrained, untrained))
    with pytest.raises(UserError, match="is there already; name another file, or add --overwrite"):
        main(New(**data, output_folder=untrained))


def test_eval_prints_eval_pys_table_and_its_results_stand_in_view_captions(
    data, trained, tmp_path, capsys, monkeypatch
):
    without_meteor(monkeypatch)
    main(Eval(trained, **data, split=("test",), beam_sizes=(1, 2), output_folder=str(tmp_path), device="cpu"))
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores_TEST.json").read_text())
    assert list(scores) == ["1", "2"] and set(scores["2"]) == set(metrics.ALL)
    assert json.loads((tmp_path / "statistics_TEST.json").read_text())["settings"]["beam_sizes"] == [1, 2]
    assert "TEST (6 photos)\n beam    BLEU-1" in printed and f"{scores['2']['CIDEr']:.4f}" in printed
    results = tmp_path / "captions_TEST_beam2_results.json"
    split = CaptionDataset(*data.values(), "TEST", image_major=True)
    found = load_blip(trained).search(
        torch.stack([torch.from_numpy(np.array(split[i][1])) for i in range(6)]), beam_size=2
    )
    assert [row["caption"].split() for row in json.loads(results.read_text())] == [one.words for one in found]
    page = tmp_path / "page.html"
    view_captions.main(
        view_captions.Config(
            results=(str(results),), **data, split="TEST", scores=False, output=str(page), device="cpu"
        )
    )
    assert " ".join(found[3].words) in " ".join(re.findall(r'"([^"]*)"', page.read_text()))


def test_caption_writes_what_caption_py_writes(data, trained, tmp_path, capsys):
    folder = Path(data["data_folder"]) / "drawn" / "images"
    photos = sorted(folder.glob("test*"))
    output = tmp_path / "submission.csv"
    main(Caption((str(folder / "test*"),), trained, str(output), beam_size=2, batch_size=4, device="cpu"))
    rows = list(csv.reader(output.open(newline="")))
    pixels = torch.stack([torch.from_numpy(read_photo(path, 64)) for path in photos])
    expected = [" ".join(found.words) for found in load_blip(trained).search(pixels, beam_size=2)]
    assert rows == [["image", "caption"], *([str(path), text] for path, text in zip(photos, expected, strict=True))]
    capsys.readouterr()

    main(Caption((str(photos[0]),), trained, str(tmp_path / "one.json"), beam_size=2, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    [row] = json.loads((tmp_path / "one.json").read_text())["photos"]
    assert lines[0] == expected[0] == row["caption"] and f"log-probability {row['log_prob']:.2f}" in lines[1]
    assert set(row) == {"file", "caption", "words", "log_prob", "perplexity", "score", "n_best"}
    main(Caption((str(photos[0]),), trained, str(tmp_path / "one.html"), beam_size=2, device="cpu"))
    assert expected[0].split()[0] in (tmp_path / "one.html").read_text()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Finetune(epochs=0), "epochs: 0 found, a whole number from 1 to 1,000,000 expected"),
        (Finetune(stop_metric="SPICE"), "stop_metric: 'SPICE' found"),
        (Finetune(label_smoothing=2), "label_smoothing: 2 found, a number from 0 to 1 expected"),
        (Finetune(data_folder="nowhere"), "no such file"),
        (Finetune(resume=True, output_folder="nowhere"), "nowhere/training.pth: no such file"),
        (Eval(beam_sizes=(0,)), "beam_sizes: 0 found"),
        (Eval(split=("DEV",)), "split: 'DEV' found"),
        (Caption(("photo.jpg",), normalisation="words"), "normalisation: 'words' found"),
        (Caption(("photo.jpg",), output="captions.txt"), "output: 'captions.txt' found"),
        (New(image_size=100), "image_size: 100 found, a multiple of patch_size (16) expected"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(config)


def test_nothing_else_needs_transformers():
    root = Path(blip.__file__).parent
    for path in [*root.glob("*.py"), *root.glob("captioning/**/*.py")]:
        if path.name != "blip.py" and path.parent.name != "blip":
            imports = re.findall(
                r"^\s*(?:import|from) (?:transformers|huggingface_hub|blip|captioning.blip)", path.read_text(), re.M
            )
            assert not imports, f"{path.name}: {imports}"
