"""End to end, as a user would run it: the scripts as commands, on a small built-in dataset."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run_pipeline
from captioning.inference.model_files import PRETRAINED
from captioning.preparation.shapes import create_shapes
from utils import UserError

pytestmark = pytest.mark.slow

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
    scores = json.loads((folder / "scores/scores_TEST.json").read_text())
    assert list(scores) == ["1", "2"]
    assert set(scores["2"]) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    assert f"{scores['2']['BLEU-1']:.4f}" in printed
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
    assert printed.count("log-probability") == 4  # of the test photos
    assert (tmp_path / "runs/own/captions.html").exists()


def test_a_resumed_run_goes_on_where_the_last_ended(folder):
    options = ["--data_name", "shapes_5_cap_per_img_0_min_word_freq", *TINY, "--run_folder", "runs/resumed"]
    printed = run(folder, "train.py", *options, "--resume", "runs/tiny/last.pth", "--epochs", 3)
    _, trained = printed.split("Continuing from runs/tiny/last.pth", 1)
    assert "epoch 3: train loss" in trained and "epoch 1: train loss" not in printed
    assert trained.count("epoch 2: train loss") == 1  # what the run came to before


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


# Which commands the pipeline runs. Preprocessing is real, the steps after it are only written down.


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A function that runs the pipeline in an empty folder with these options; it gives a list of words a command."""
    monkeypatch.chdir(tmp_path)
    really_run = run_pipeline.run

    def run_with(**options):
        made = []

        def note(script, *arguments):
            made.append([script, *arguments])
            if script == "create_input_files.py":
                really_run(script, *arguments)

        monkeypatch.setattr(run_pipeline, "run", note)
        run_pipeline.main(run_pipeline.Config(dataset="own", **options))
        return made

    return run_with


def value(command, option):
    """:return: the value that counts: the last that is given"""
    return command[len(command) - 1 - command[::-1].index(option) + 1]


def draw_photos(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (10 * i, 90, 40)).save(folder / name)


def test_karpathys_coco_with_all_photos_in_one_folder_reaches_its_last_step(tmp_path, commands):
    draw_photos(tmp_path / "images", [f"{i}.jpg" for i in range(6)])
    sentences = [{"raw": "a dog"}] * 5
    photos = [
        {"filename": f"{i}.jpg", "filepath": "val2014", "cocoid": i, "split": split, "sentences": sentences}
        for i, split in enumerate(["train", "train", "restval", "train", "val", "test"])
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": photos}))
    caption = commands(annotations="dataset_coco.json")[-1]
    assert value(caption, "--img") == "images/5.jpg"


def test_cocos_two_files_are_one_dataset(tmp_path, commands):
    for split, ids in (("train2017", range(4)), ("val2017", range(4, 6))):
        draw_photos(tmp_path / "images" / split, [f"{i}.jpg" for i in ids])
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in ids],
            "annotations": [{"image_id": i, "caption": "A dog runs."} for i in ids],
        }
        (tmp_path / f"captions_{split}.json").write_text(json.dumps(content))
    made = commands(annotations=("captions_train2017.json", "captions_val2017.json"))
    assert value(made[-1], "--img") == "images/val2017/4.jpg"


def recipe_for(folder, commands, caption, **options):
    """:return: the commands of create_input_files.py and train.py for six photos with this caption each"""
    draw_photos(folder / "images", [f"{i}.jpg" for i in range(6)])
    (folder / "a.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,{caption}\n" for i in range(6)) * 2)
    return commands(annotations="a.csv", **options)[:2]


def test_train_options_are_added_to_the_recipe_which_is_printed(tmp_path, commands, capsys):
    options = {"train_options": "--epochs 5 --val_beam_size '1'"}
    create, train = recipe_for(tmp_path, commands, "ein Hund rennt", **options)
    assert (value(train, "--epochs"), value(train, "--val_beam_size")) == ("5", "1")
    assert value(train, "--encoder") == "efficientnet_lite2"  # its weights need no download
    assert value(create, "--min_word_freq") == "0" and value(create, "--val_share") == "0.2"
    assert "--words_of" not in create
    assert "Recipe for 6 photos: --encoder efficientnet_lite2" in capsys.readouterr().out


def test_a_run_is_continued_unless_it_is_to_be_overwritten(tmp_path, commands):
    _, train = recipe_for(tmp_path, commands, "a dog runs on the grass")
    assert value(train, "--resume") == "auto" and "--overwrite" not in train
    _, train = recipe_for(tmp_path, commands, "a dog runs on the grass", overwrite=True)
    assert "--overwrite" in train and "--resume" not in train


def test_data_that_a_run_learns_from_are_kept_unless_the_run_is_replaced(tmp_path, commands, capsys):
    caption = "a dog runs on the grass"
    first = [command[0] for command in recipe_for(tmp_path, commands, caption)]
    assert first == ["create_input_files.py", "train.py"]
    (tmp_path / "runs/own").mkdir(parents=True)
    (tmp_path / "runs/own/last.pth").touch()
    data = {path: path.read_bytes() for path in (tmp_path / "data/own").iterdir()}
    os.utime(tmp_path / "a.csv", (0, 0))
    assert [command[0] for command in commands(annotations="a.csv")[:2]] == ["train.py", "eval.py"]
    assert "data/own: kept as it is, for the run in runs/own learns from it" in capsys.readouterr().out
    with pytest.raises(UserError, match="annotations: a.csv is newer than data/own, which the run in runs/own learns"):
        recipe_for(tmp_path, commands, "a cat sits on the grass")
    assert data == {path: path.read_bytes() for path in (tmp_path / "data/own").iterdir()}
    create, _ = recipe_for(tmp_path, commands, "a cat sits on the grass", overwrite=True)
    assert create[0] == "create_input_files.py"


def test_few_photos_with_words_that_the_shipped_model_knows_start_from_it(tmp_path, commands):
    create, train = recipe_for(tmp_path, commands, "a dog runs on the grass")
    assert value(train, "--start_from") == str(PRETRAINED) and "--encoder" not in train
    assert value(create, "--words_of") == str(PRETRAINED)
    words = json.loads((tmp_path / "data/own/WORDMAP_own_5_cap_per_img_0_min_word_freq.json").read_text())
    assert {"dog", "skateboard"} <= set(words)  # those of the photos, and those that it knows


@pytest.mark.parametrize("option", ["--decoder hard", "--encoder=resnet18", "--embed-dim 64"])
def test_a_model_of_another_kind_starts_from_nothing(tmp_path, commands, option):
    _, train = recipe_for(tmp_path, commands, "a dog runs on the grass", train_options=option)
    assert "--start_from" not in train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img": "nosuch.jpg"}, "nosuch.jpg: no such file; give the path of a file"),
        ({"train_options": "--zzz"}, "train_options: --zzz: there is no such option; --help lists all"),
        ({"train_options": "--epochs many"}, "train_options: epochs: 'many' found"),
    ],
)
def test_what_only_the_last_steps_need_is_checked_before_the_first(tmp_path, options, message):
    draw_photos(tmp_path / "images", [f"{i}.jpg" for i in range(6)])
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,a dog runs\n" for i in range(6)))
    words = [f"--{name}={text}" for name, text in options.items()]
    error = run(tmp_path, "run_pipeline.py", "--dataset", "own", "--annotations", "a.csv", *words, code=2)
    assert error.count("\n") == 1 and error.startswith(f"error: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "images"]


def test_an_open_quotation_mark_in_train_options_is_one_line(commands):
    with pytest.raises(UserError, match="train_options: .* cannot be split into words"):
        commands(train_options="--epochs '5")
