"""A script's dataclass as options, help and checks; what is typed wrongly is one line and exit code 2."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import train
from captioning.command_line import parse_args, run_script
from captioning.config_fields import check_fields, read_options
from utils import BeamSizes, Count, Positive, Seed, Share, Split, UserError

ROOT = Path(__file__).parents[2]
SCRIPTS = ["create_input_files", "train", "eval", "caption", "view_captions", "convert_checkpoint", "run_pipeline"]


@dataclass
class Small:
    photos: tuple[str, ...] = ()  # what to look at

    # Training, 100% of it
    batch_size: Count = 32  # captions per step
    rate: Positive | None = None  # default a good one
    dropout: Share = 0.5  # share that is dropped
    optimizer: Literal["adam", "sgd"] = "adam"
    seed: Seed = 0
    split: Split = "VAL"
    beam_sizes: BeamSizes = (1, 3)
    fine_tune: bool = False  # train the encoder too
    gate: bool = True
    title: str | None = "none"


@dataclass
class Needy:
    """Do one thing."""

    model: str  # which


@dataclass
class Idle:
    """Do nothing."""

    hours: Count = 8


def parse(line, config_class=Small):
    return parse_args(config_class, line.split())


def test_each_option_is_read_as_its_type_says():
    assert parse("") == Small()
    assert parse(
        "--batch_size 8 --rate 1e-3 --dropout 1 --optimizer sgd --split test --beam_sizes 1 5 --title x"
    ) == Small(batch_size=8, rate=1e-3, dropout=1.0, optimizer="sgd", split="TEST", beam_sizes=(1, 5), title="x")
    assert parse("--rate=2 --batch-size=4") == Small(rate=2.0, batch_size=4)
    assert parse("--title None").title is None


@pytest.mark.parametrize(
    ("line", "fine_tune", "gate"),
    [
        ("--fine_tune", True, True),
        ("--fine_tune True", True, True),
        ("--fine_tune true --gate false", True, False),
        ("--fine-tune=True", True, True),
        ("--no_gate", False, False),
        ("--no-gate --fine_tune", True, False),
        ("--fine_tune False", False, True),
    ],
)
def test_a_switch_takes_a_word_or_none(line, fine_tune, gate):
    config = parse(line)
    assert (config.fine_tune, config.gate) == (fine_tune, gate)


def test_words_before_the_options_belong_to_the_first_field():
    assert parse("a.jpg b.jpg --fine_tune").photos == ("a.jpg", "b.jpg")
    assert parse("--fine_tune a.jpg").photos == ("a.jpg",)
    assert parse("a.jpg --photos b.jpg").photos == ("a.jpg", "b.jpg")


def test_a_value_may_itself_be_options():
    assert parse_args(Small, ["--title", "--epochs 5 --no-gate"]).title == "--epochs 5 --no-gate"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch_size x", "batch_size: 'x' found, a whole number from 1 to 1,000,000 expected"),
        ("--batch_size 2.5", "batch_size: '2.5' found, a whole number"),
        ("--batch_size", "--batch_size: expected one argument"),
        ("--batch_sise 3", "--batch_sise: there is no such option; did you mean --batch_size"),
        ("--qqq", "--qqq: there is no such option; --help lists all"),
        ("--rate 0", "rate: '0' found, a number above 0 or None expected"),
        ("--rate nan", "rate: 'nan' found"),
        ("--rate inf", "rate: 'inf' found"),
        ("--dropout 1.5", "dropout: '1.5' found, a number from 0 to 1 expected"),
        ("--optimizer lion", "optimizer: 'lion' found, 'adam' or 'sgd' expected"),
        (f"--seed {2**70}", f"seed: '{2**70}' found, a whole number from 0 to 4,294,967,295 expected"),
        ("--split dev", "split: 'dev' found, 'TRAIN', 'VAL' or 'TEST' expected"),
        ("--beam_sizes 1 1000000", "beam_sizes: '1000000' found, a whole number from 1 to 1,000 expected"),
        ("--title=", "title: an empty text found; give one that says something, or leave the option out"),
        ("one.jpg  --photos=", "photos: an empty text found"),
        ("--fine_tune=maybe", "fine_tune: 'maybe' found, True or False expected"),
    ],
)
def test_a_wrong_option_is_one_line(line, message):
    with pytest.raises(UserError) as error:
        parse(line)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_option_and_a_word_out_of_place_are_named():
    with pytest.raises(UserError, match="^model: not given; add --model and text$"):
        parse("", Needy)
    with pytest.raises(UserError, match="^'photo.jpg': found where an option was expected, such as --model$"):
        parse("photo.jpg --model x", Needy)


def test_several_dataclasses_are_commands():
    assert parse("needy --model x", Needy | Idle) == Needy("x")
    assert parse("idle", Needy | Idle) == Idle()
    with pytest.raises(UserError, match="invalid choice: 'lazy'"):
        parse("lazy", Needy | Idle)
    with pytest.raises(UserError, match="^--hour: there is no such option; did you mean --hours"):
        parse("idle --hour 3", Needy | Idle)


def test_help_has_the_comments_choices_ranges_and_groups_of_the_file(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    before, group = capsys.readouterr().out.split("Training, 100% of it:")
    assert "--photos TEXT [TEXT ...]" in before and "what to look at" in before
    assert "captions per step (from 1 to 1,000,000, default 32)" in group
    assert "default a good one (above 0)" in group
    assert "--optimizer {adam,sgd}" in group
    assert "--fine_tune [True|False]" in group


def test_every_field_of_train_has_a_comment_and_a_group():
    for option in read_options(train.Config):
        assert option.comment and option.group, option.name


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch_size", "32", "'32' found, a whole number"),
        ("batch_size", 32.0, "32.0 found, a whole number"),
        ("batch_size", True, "True found, a whole number"),
        ("decoder_lr", "4e-4", "'4e-4' found, a number above 0"),
        ("decoder_lr", (4, 4), "a tuple found, a number above 0"),
        ("fine_tune_encoder", "no", "'no' found, True or False"),
        ("data_folder", None, "None found, text"),
        ("resume", "", "an empty text found"),
        ("cached_views", 10**9, "1000000000 found, a whole number from 0 to 1,000"),
        ("seed", 2**70, "a number of many digits found, a whole number from 0"),
        ("optimizer", "lion", "'lion' found, 'adam', 'adamw' or 'sgd'"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_from_python_too(field, value, expected):
    with pytest.raises(UserError) as error:
        check_fields(train.Config(**{field: value}))
    assert str(error.value).startswith(f"{field}: {expected}")


def test_paths_whole_numbers_for_floats_and_lists_for_tuples_are_taken():
    check_fields(Small(photos=[Path("a.jpg")], rate=1, beam_sizes=[2], title=Path("x")))


def edited(folder, old, new):
    """:return: a copy of train.py with one line changed, as somebody does who edits its settings"""
    text = (ROOT / "train.py").read_text()
    assert text.count(old) == 1
    path = folder / "train.py"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size: Count = 32", 'batch_size: Count = "32"', "batch_size: '32' found, a whole number"),
        ("batch_size: Count = 32", 'batch_size: int = "32"', "batch_size: '32' found, a whole number expected"),
        ("decoder_lr: Positive = 4e-4", 'decoder_lr = "4e-4"', "decoder_lr: has no type, so it is not a setting"),
        ("fine_tune_encoder: bool = False", 'fine_tune_encoder: bool = "no"', "fine_tune_encoder: 'no' found"),
        ("val_beam_size:", "val_baem_size:", "val_beam_size: missing from Config"),
        ("dropout: Probability = 0.5", "droput: Probability = 0.1", "dropout: missing from Config"),
        ("optimizer: Lit", "optimiser: Lit", "optimizer: missing from Config"),
    ],
)
def test_what_is_typed_wrongly_at_the_top_of_the_file_is_one_line(tmp_path, old, new, message):
    script = edited(tmp_path, f"\n    {old}", f"\n    {new}")
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {message}") and ended.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", [*SCRIPTS, "blip"])
def test_help_comes_before_torch_is_imported(script):
    """Under a second, where importing torch alone takes several: a heavy import would show in `-X importtime`."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / f"{script}.py", "--help"], capture_output=True, text=True
    )
    assert ended.returncode == 0 and ended.stdout.startswith(f"usage: {script}.py")
    imported = {line.split("|")[-1].strip() for line in ended.stderr.splitlines()}
    assert "pydantic" in imported
    assert not imported & {"torch", "torchvision", "transformers", "matplotlib", "h5py", "numpy"}


def end(main, capsys, config_class=Idle, args=()):
    """:return: exit code and lines on the error stream of a script with this main"""
    with pytest.raises(SystemExit) as stop:
        run_script(main, config_class, list(args))
    return stop.value.code, capsys.readouterr().err.splitlines()


def test_a_field_that_a_script_misses_later_is_one_line(capsys):
    assert end(lambda config: config.hour, capsys) == (
        2, ["error: hour: missing from Idle at the top of the script ('hours' found instead); write it as it was"]
    )  # fmt: skip
    with pytest.raises(AttributeError):  # a bug keeps its traceback
        run_script(lambda config: "text".hours, Idle, [])


def test_too_many_open_files_are_one_line(capsys):
    def main(config):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    line = f"error: [Errno {errno.EMFILE}] {os.strerror(errno.EMFILE)}; raise the limit (ulimit -n), or take"
    code, [found] = end(main, capsys)
    assert code == 2 and found.startswith(line)


def test_only_among_several_processes_do_others_tell_of_a_wrong_option(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    code, [line] = end(lambda config: None, capsys, args=["--hour", "3"])
    assert code == 2 and line.startswith("error: --hour: there is no such option")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert end(lambda config: None, capsys, args=["--hour", "3"]) == (2, [])


@pytest.mark.parametrize("kind", ["too long", "a folder", "not a folder", "no permission"])
def test_a_path_that_cannot_be_used_is_one_line(tmp_path, capsys, kind):
    (tmp_path / "file").write_text("text")
    path = {"too long": tmp_path / ("x" * 300), "a folder": tmp_path, "not a folder": tmp_path / "file" / "x"}.get(kind)

    def main(config):
        if path is None:  # the tests may run as root, who may do everything
            raise PermissionError(13, "Permission denied", "data/secret.json")
        path.open()

    code, lines = end(main, capsys)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"error: {path or 'data/secret.json'}: ")


def test_an_error_that_quotes_a_hostile_name_is_one_harmless_line(capsys):
    def main(config):
        raise UserError("photo\x1b[2J\nerror: forged.jpg\x9b: \u202ebroken")

    code, lines = end(main, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].isprintable()
    assert lines[0].startswith("error: photo") and lines[0].endswith("broken")


@pytest.mark.parametrize("library", ["Python", "NumPy", "PyTorch"])
def test_full_memory_is_one_line(capsys, library):
    def main(config):
        if library == "Python":
            raise MemoryError
        (np if library == "NumPy" else torch).ones(2**46)

    code, [line] = end(main, capsys)
    assert code == 2 and line.startswith("error: memory: it is full") and line.endswith("model")
    assert library == "Python" or "could not allocate " in line


def test_an_error_of_a_worker_process_is_its_last_line(capsys):
    class OneFault(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise UserError("a\nb.hdf5: is gone")

    def main(config):
        list(torch.utils.data.DataLoader(OneFault(), num_workers=1, multiprocessing_context="fork"))

    assert end(main, capsys) == (2, ["error: a?b.hdf5: is gone"])


IMPORTING = """
import sys, time
from captioning.command_line import check_command_line, run_script
from dataclasses import dataclass

@dataclass
class Config:
    steps: int = 1

def main(config):
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

check_command_line(Config)
print("importing", flush=True)
if sys.argv[1:]:
    run_script(main, Config)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("words", "sign", "cleaned_up"), [([], "importing", ""), (["--steps", "1"], "working", "cleaned up\n")]
)
def test_ctrl_c_is_one_line_while_a_script_still_imports_too(tmp_path, words, sign, cleaned_up):
    (tmp_path / "script.py").write_text(IMPORTING)
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    script = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while script.stdout.readline() != f"{sign}\n":
        assert script.poll() is None
    script.send_signal(signal.SIGINT)
    out, errors = script.communicate(timeout=60)
    assert (script.returncode, out, errors) == (130, cleaned_up, "stopped\n")
