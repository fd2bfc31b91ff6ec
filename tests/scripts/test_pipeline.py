"""End to end, as a user would run it: the scripts as commands, on a small built-in dataset."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioning.preparation.shapes import create_shapes

ROOT = Path(__file__).parents[2]
TINY = [
    "--encoder", "shufflenet_v2_x0_5", "--encoder_weights", "none", "--fine_tune_encoder", "--image_major",
    "--batch_size", "4", "--encoded_image_size", "4", "--embed_dim", "16", "--decoder_dim", "16",
    "--attention_dim", "16", "--device", "cpu",
]  # fmt: skip


def run(folder, script, *arguments, code=0):
    """Run a script in `folder`; :return: what it printed (the errors, if it should fail)"""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a preprocessed dataset of 16 + 4 + 4 drawn scenes, and a model trained on it for two epochs."""
    folder = tmp_path_factory.mktemp("pipeline")
    annotations = create_shapes(folder / "drawn", num_train=16, num_val=4, num_test=4, seed=1)
    run(
        folder, "create_input_files.py", "--dataset", "shapes", "--annotations", annotations, "--workers", "0",
        "--min_word_freq", "0",
    )  # fmt: skip
    data = ["--data_name", "shapes_5_cap_per_img_0_min_word_freq", "--run_folder", "runs/tiny"]
    run(folder, "train.py", *data, *TINY, "--epochs", 2)
    return folder


def test_training_leaves_a_last_and_a_best_checkpoint_and_curves(folder):
    names = {path.name for path in (folder / "runs/tiny").iterdir()}
    assert {"last.pth", "best.pth"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_the_curves_hold_every_epochs_score(folder):
    events = EventAccumulator(str(folder / "runs/tiny")).Reload()
    assert [event.step for event in events.Scalars("val/BLEU-4")] == [1, 2]


def test_eval_writes_scores_and_results_for_each_beam_size_of_the_newest_best_checkpoint(folder):
    printed = run(folder, "eval.py", "--beam_sizes", 1, 2, "--output_folder", "scores", "--device", "cpu")
    scores = json.loads((folder / "scores/scores.json").read_text())
    assert list(scores) == ["TEST"] and list(scores["TEST"]) == ["1", "2"]
    assert set(scores["TEST"]["2"]) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    assert f"{scores['TEST']['2']['BLEU-1']:.4f}" in printed
    results = json.loads((folder / "scores/captions_TEST_beam2_results.json").read_text())
    assert len(results) == 4 and all(set(row) == {"image_id", "caption"} for row in results)


def test_caption_needs_nothing_but_a_photo_and_draws_its_figure_without_a_display(folder):
    photo = next((folder / "drawn/images").glob("test*"))
    printed = run(folder, "caption.py", "--img", photo, "--beam_size", 5, "--device", "cpu")
    path = folder / printed.strip().split("Attention figure: ")[1]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_pipeline_runs_on_own_photos_beside_their_annotations(folder, tmp_path):
    annotations = folder / "drawn/dataset_shapes.json"
    options = ["--min_word_freq", 0, f"--train_options={shlex.join([*TINY, '--epochs', '1'])}"]
    printed = run(tmp_path, "run_pipeline.py", "--dataset", "own", "--annotations", annotations, *options)
    assert "TEST (4 photos)" in printed and "log-probability" in printed
    assert (tmp_path / "runs/own/attention.png").exists()


def test_a_resumed_run_goes_on_where_the_last_ended(folder):
    options = ["--data_name", "shapes_5_cap_per_img_0_min_word_freq", *TINY, "--run_folder", "runs/resumed"]
    printed = run(folder, "train.py", *options, "--resume", "runs/tiny/last.pth", "--epochs", 3)
    assert "epoch 3" in printed and "epoch 2" not in printed and "epoch 1:" not in printed


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--epohcs", "3"], "epohcs"),
        (["--epochs", "three"], "three"),
        (["--data_folder", "nowhere"], "no such file"),
        (["--encoder", "resnet1000"], "resnet1000"),
        (["--encoder_weights", "missing.pth"], "no such file"),
        (["--precision", "float8"], "float8"),
        (["--resume", "missing.pth"], "no such file"),
    ],
)
def test_a_wrong_option_gives_one_clear_line_and_exit_code_2(folder, arguments, expected):
    given = ["--data_name", "shapes_5_cap_per_img_0_min_word_freq", *TINY, *arguments]
    error = run(folder, "train.py", *given, code=2)
    lines = [line for line in error.strip().split("\n") if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]


def test_a_truncated_hdf5_file_gives_one_clear_line_and_exit_code_2(folder, tmp_path):
    for path in (folder / "data/shapes").glob("*_min_word_freq.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = tmp_path / "TRAIN_IMAGES_shapes_5_cap_per_img_0_min_word_freq.hdf5"
    images.write_bytes(images.read_bytes()[:100_000])
    given = ["--data_folder", tmp_path, "--data_name", "shapes_5_cap_per_img_0_min_word_freq", *TINY]
    error = run(folder, "train.py", *given, code=2)
    assert error.count("\n") == 1 and "TRAIN_IMAGES" in error and "HDF5" in error


def test_help_says_what_every_hyperparameter_means(folder):
    printed = run(folder, "train.py", "--help")
    for name in ("--encoder", "--decoder-lr".replace("-lr", "_lr"), "--doubly_stochastic_weight", "--stop_patience"):
        assert name in printed
    assert "learning rate of the decoder" in printed
