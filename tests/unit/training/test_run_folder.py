"""A run's folder: one checkpoint is always complete, curves continue as they were, and its origin is known."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kill_training import scalars
from torch.utils.tensorboard import SummaryWriter

from captioning.storage.files import atomic_path, lock, remove_leftovers
from captioning.storage.tensors import load_checkpoint, save_checkpoint
from captioning.training.run_folder import RunFolder
from captioning.training.run_log import RunLog
from captioning.training.weight_averaging import WeightAverage
from train import Config
from utils import UserError

ROOT = Path(__file__).parents[3]


def a_run(step, size=10, **config):
    """What RunFolder needs of a `Run`: a stand-in whose weights tell the step."""
    content = {"config": {}, "word_map": {}, "image_size": 8, "encoder": {}, "progress": {"step": step}}
    content["decoder"] = {"w": torch.full((size,), step)}
    return SimpleNamespace(
        step=step, log=RunLog(), check_weights=lambda: None, state_dict=lambda: dict(content), history=[],
        config=Config(**config), average=WeightAverage(torch.nn.Identity(), torch.nn.Identity()),
    )  # fmt: skip


def begin_and_end(path, run):
    folder = RunFolder(path, 10)
    folder.begin(run).close()
    folder.release()


def step_of(path):
    return load_checkpoint(path)["decoder"]["w"][0].item()


@pytest.fixture
def folder(tmp_path):
    """A run's folder after steps 1 and 2."""
    folder = RunFolder(tmp_path / "run", save_minutes=10)
    folder.save(a_run(1), best=True)
    folder.save(a_run(2))
    return folder


def test_the_last_checkpoint_its_predecessor_and_the_best_are_kept(folder):
    assert (step_of(folder.last), step_of(folder.previous), step_of(folder.best)) == (2, 1, 1)
    folder.save(a_run(3), best=True)
    assert (step_of(folder.last), step_of(folder.previous), step_of(folder.best)) == (3, 2, 3)
    assert len(list(folder.path.iterdir())) == 3


@pytest.mark.parametrize("linkable", [True, False])
def test_wherever_a_save_is_broken_off_the_last_checkpoint_is_complete(folder, monkeypatch, linkable):
    if not linkable:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    replace, reached = Path.replace, []
    for broken in range(3):  # the save has two renames, so that the third attempt comes to its end
        calls = []

        def kill(path, target, broken=broken, calls=calls):
            calls.append(target)
            if len(calls) > broken:
                raise SystemExit
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", kill)
        try:
            folder.save(a_run(3 + broken))
        except SystemExit:
            reached.append(broken)
        assert step_of(folder.last) == (2, 4, 5)[broken]
        assert step_of(folder.previous) == (1, 1, 4)[broken]
    assert reached == [0, 1]


def test_a_full_disk_leaves_the_checkpoints_as_they_were_and_is_one_clear_line(folder, small_files):
    small_files(100_000)
    with pytest.raises(UserError, match=r"last\.pth: could not be written \(File too large\).*untouched") as raised:
        folder.save(a_run(3, size=100_000))
    assert "\n" not in str(raised.value)
    assert (step_of(folder.last), step_of(folder.previous)) == (2, 1)
    assert len(list(folder.path.iterdir())) == 3


def test_a_damaged_checkpoint_is_refused_with_the_name_of_its_sound_predecessor(folder):
    folder.last.write_bytes(folder.last.read_bytes()[:500])
    with pytest.raises(UserError, match=r"last\.pth: .*--resume .*previous\.pth$") as raised:
        folder.load(str(folder.last))
    assert "\n" not in str(raised.value)
    folder.previous.write_bytes(b"")
    with pytest.raises(UserError) as raised:
        folder.load(str(folder.last))
    assert "previous" not in str(raised.value)


def test_continuing_from_the_predecessor_never_leaves_two_damaged_ones(folder, monkeypatch):
    folder.last.write_bytes(b"damaged")
    assert step_of(folder.previous) == 1
    replace, sound = Path.replace, []

    def watch(path, target):
        replace(path, target)
        names = [name for name in (folder.last, folder.previous) if name.read_bytes() != b"damaged"]
        sound.append([step_of(name) for name in names])

    monkeypatch.setattr(Path, "replace", watch)
    folder.save(a_run(3))
    assert sound == [[3, 1], [3]]


def test_auto_resumes_the_folders_last_checkpoint_if_there_is_one(folder, tmp_path):
    assert folder.load("auto")["progress"]["step"] == 2
    assert RunFolder(tmp_path / "new", 10).load("auto") is None
    assert RunFolder(tmp_path / "new", 10).load(None) is None


def test_a_checkpoint_is_due_after_so_many_minutes_and_never_if_they_are_zero(tmp_path):
    assert not RunFolder(tmp_path, 10).is_due()
    assert RunFolder(tmp_path, 1e-9).is_due()
    assert not RunFolder(tmp_path, 0).is_due()


def draw(writer, steps):
    for step in steps:
        writer.add_scalar("train/loss", 1 / step, step)
    writer.add_scalar("val/BLEU-4", steps[-1], steps[-1] // 4)


def test_curves_of_a_resumed_run_have_each_point_once(tmp_path):
    folder = RunFolder(tmp_path, 10)
    run = a_run(4)
    run.log = folder.begin(a_run(0))
    draw(run.log.writer, [1, 2, 3, 4])
    folder.save(run)
    draw(run.log.writer, [5, 6, 7, 8])
    run.log.close()
    folder.release()
    assert len(scalars(tmp_path)["train/loss"]) == 8

    folder = RunFolder(tmp_path, 10)
    assert folder.load("auto")
    log = folder.begin(a_run(4))
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4]
    assert scalars(tmp_path)["val/BLEU-4"] == [(1, 4.0)]
    draw(log.writer, [5, 6, 7, 8])
    log.close()
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert scalars(tmp_path)["val/BLEU-4"] == [(1, 4.0), (2, 8.0)]


def test_a_new_run_hides_the_curves_of_an_older_one_in_its_folder_and_keeps_their_file(tmp_path):
    with SummaryWriter(tmp_path) as old:
        draw(old, [1, 2, 3, 4])
    begin_and_end(tmp_path, a_run(0))
    assert not any(scalars(tmp_path).values())
    assert len(list(tmp_path.glob("events*"))) == 2


def test_resuming_another_folders_checkpoint_leaves_the_curves_that_are_there(folder, tmp_path):
    other = RunFolder(tmp_path / "other", 10)
    with SummaryWriter(other.path) as old:
        draw(old, [1])
    folder.save(a_run(3))
    other.load(str(folder.last))
    other.begin(a_run(3)).close()
    assert [step for step, _ in scalars(other.path)["train/loss"]] == [1]


def test_the_folder_tells_settings_versions_commit_and_command_of_each_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--run_folder", "my runs/a"])
    begin_and_end(tmp_path, a_run(0))
    begin_and_end(tmp_path, a_run(30, epochs=7))
    first, second = json.loads((tmp_path / "starts.json").read_text())
    assert first["command"] == "train.py --run_folder 'my runs/a'" and first["config"]["epochs"] == 120
    assert (first["step"], second["step"]) == (0, 30)
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 7
    assert first["versions"]["torch"] == torch.__version__
    assert {"python", "torchvision", "numpy", "cuda", "platform"} <= set(first["versions"])
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (first["git"] or {"commit": ""})["commit"] == commit


def test_what_killed_runs_left_is_removed_but_not_what_is_being_written(tmp_path):
    dead = [".last.pth.123.tmp", ".last.pth.123.old.tmp", "..last.pth.1.tmp.1.tmp"]
    others = [".other.csv.123.tmp", "last.pth", ".last.pth.swp", "notes.tmp"]
    for name in [*dead, *others]:
        (tmp_path / name).touch()
    with atomic_path(tmp_path / "last.pth") as temporary:
        remove_leftovers(tmp_path, r"\w+\.pth")
        assert temporary.exists()
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_killed_runs_end_as_those_that_were_left_alone():
    command = [sys.executable, ROOT / "tests" / "hostile" / "kill_training.py", "--kills", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    for work in ("train", "draw", "preprocess", "cache"):
        assert f"{work}: 2 of 2 ended as the one that was left alone" in result.stdout


def test_a_lock_ends_with_its_file(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as one, path.open("rb") as other:
        assert lock(one)
        with pytest.raises(BlockingIOError, match="another process has locked"):
            lock(other)
    with path.open("rb") as other:
        assert lock(other)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_lies_in_the_place_of_the_lock_is_neither_followed_nor_waited_for(folder, tmp_path, kind):
    lock_file = folder.path / ".lock"
    if kind == "link":
        lock_file.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(lock_file)
    with pytest.raises(UserError, match="run_folder: .* is not writable"):
        folder.hold()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["config.json", "log.csv"])
def test_a_folder_with_files_of_something_else_is_not_taken_for_a_run(tmp_path, name):
    path = tmp_path / name
    path.write_text("mine")
    with pytest.raises(UserError, match=f"run_folder: .*{name} is there already; .*--overwrite"):
        RunFolder(tmp_path, 10).load(None)
    assert path.read_text() == "mine"
    RunFolder(tmp_path, 10).load(None, overwrite=True)


def test_a_file_in_the_place_of_the_folder_is_told_at_once(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="run_folder: .*run is not a folder"):
        RunFolder(tmp_path / "run", 10).load(None)


def test_the_captioner_that_a_run_starts_from_is_not_replaced_by_it(folder):
    folder.release()
    with pytest.raises(UserError, match=r"run_folder: .*best\.pth' found, but that file is read here"):
        RunFolder(folder.path, 10).load(None, overwrite=True, inputs=(folder.best, "imagenet"))
    assert step_of(folder.best) == 1


def test_a_checkpoint_without_a_predecessor_replaces_the_old_one(tmp_path):
    for i in range(2):
        save_checkpoint({"a": i}, tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
