"""What create_input_files.py leaves in its folder when it is run again, breaks off, is killed, or is not alone."""

import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
from small_dataset import config, contents, make_dataset

import create_input_files
from captioning.preparation import input_files
from captioning.storage.folder_lock import sole_writer
from create_input_files import main
from utils import UserError


def test_two_runs_give_the_same_files_and_another_seed_other_captions(tmp_path):
    make_dataset(tmp_path, captions=9)
    main(config(tmp_path, output_folder=str(tmp_path / "a")))
    main(config(tmp_path, output_folder=str(tmp_path / "b"), workers=2))
    main(config(tmp_path, output_folder=str(tmp_path / "c"), seed=1))
    first, second, third = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert [name.split("_own")[0] for name in first if first[name] != third[name]].count("TRAIN_CAPTIONS") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_a_run_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch, error):
    make_dataset(tmp_path)
    main(config(tmp_path))
    before = contents(tmp_path / "out")

    def breaks(*_):
        raise error

    monkeypatch.setattr(input_files, "encode", breaks)
    with pytest.raises(UserError if isinstance(error, OSError) else error):
        main(config(tmp_path, seed=1))
    assert contents(tmp_path / "out") == before


def test_a_split_that_is_gone_is_gone_from_the_folder_too(tmp_path):
    make_dataset(tmp_path, "TTTTVX")
    main(config(tmp_path))
    make_dataset(tmp_path, "TTTTVV")
    main(config(tmp_path))
    assert not list((tmp_path / "out").glob("TEST*"))
    assert len(list((tmp_path / "out").glob("VAL*"))) == 4


def test_features_of_photos_that_are_replaced_go_with_them_and_no_others(tmp_path, capsys):
    make_dataset(tmp_path)
    base, folder = "own_5_cap_per_img_2_min_word_freq", tmp_path / "out"
    folder.mkdir()
    stale = [
        f"TRAIN_FEATURES_{base}_resnet101_0123456789ab.hdf5",
        f"TEST_FEATURES_{base}_lite0_view2_ba9876543210.hdf5",
    ]
    others = [
        "TRAIN_FEATURES_own_5_cap_per_img_5_min_word_freq_resnet101_0123456789ab.hdf5",
        f"TRAIN_FEATURES_{base}_b_5_cap_per_img_2_min_word_freq_resnet101_0123456789ab.hdf5",
    ]
    for name in stale + others:
        (folder / name).write_bytes(b"features")
    (tmp_path / "images" / "0.png").rename(tmp_path / "0.png")
    with pytest.raises(UserError):
        main(config(tmp_path))
    assert all((folder / name).exists() for name in stale)
    (tmp_path / "0.png").rename(tmp_path / "images" / "0.png")
    main(config(tmp_path))
    assert sorted(path.name for path in folder.glob("*_FEATURES_*")) == sorted(others)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Removed features")]
    assert all(name in line for name in stale)


def test_after_a_kill_nothing_looks_finished_and_the_next_run_gives_what_a_clean_one_gives(tmp_path):
    make_dataset(tmp_path)
    main(config(tmp_path, output_folder=str(tmp_path / "clean")))
    options = [f"--{name}={value}" for name, value in vars(config(tmp_path)).items() if value is not None]
    options = [option.replace("('", "").replace("',)", "") for option in options if "workers" not in option]
    script = [sys.executable, create_input_files.__file__, "--workers=1", *options]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not list((tmp_path / "out").glob(".TRAIN_IMAGES*.tmp")):  # its workers are starting now
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=20)  # ends when nobody holds its output any more: the workers end by themselves
    left = list((tmp_path / "out").iterdir())
    assert left
    assert all(path.name.startswith(".") for path in left)
    (tmp_path / "out" / ".WORDMAP_another_5_cap_per_img_2_min_word_freq.json.1.tmp").touch()

    main(config(tmp_path))
    assert contents(tmp_path / "out").items() >= contents(tmp_path / "clean").items()
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [
        ".WORDMAP_another_5_cap_per_img_2_min_word_freq.json.1.tmp"
    ]


def test_a_disk_that_is_too_small_is_told_before_anything_is_read(tmp_path, monkeypatch):
    make_dataset(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="output_folder: .* has 0.00 GB free, .* are needed"):
        main(config(tmp_path))
    assert not contents(tmp_path / "out")


def test_a_disk_that_fills_up_is_one_clear_line_and_leaves_the_old_dataset_as_it_was(tmp_path):
    make_dataset(tmp_path)
    main(config(tmp_path))
    before = contents(tmp_path / "out")
    make_dataset(tmp_path, "TTTTTTTTTTTTVVXX", captions=3)
    options = vars(config(tmp_path, annotations=tmp_path / "dataset.json"))
    script = [sys.executable, create_input_files.__file__, *(f"--{k}={v}" for k, v in options.items() if v is not None)]
    limit = f"ulimit -f 8; exec {shlex.join(map(str, script))}"  # blocks: the word map fits, TRAIN's photos do not
    result = subprocess.run(["bash", "-c", limit], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr
    [error] = [line for line in result.stderr.split("\n") if line.startswith("error: ")]
    assert "TRAIN_IMAGES_" in error and "could not be written (File too large)" in error and "untouched" in error
    assert "Traceback" not in result.stderr
    assert contents(tmp_path / "out") == before


def test_a_killed_worker_ends_the_run_with_advice(tmp_path, monkeypatch):
    make_dataset(tmp_path)

    def kills(path, photos, pixels, *_):
        raise BrokenProcessPool  # what reading from `pixels` raises then, see test_photos.py

    monkeypatch.setattr(input_files, "write_images", kills)
    with pytest.raises(UserError, match="workers: one was killed"):
        main(config(tmp_path))


def test_annotations_are_not_written_over(tmp_path):
    make_dataset(tmp_path)
    (tmp_path / "out").mkdir()
    annotations = tmp_path / "out/TRAIN_REFERENCES_own_5_cap_per_img_2_min_word_freq.json"
    (tmp_path / "dataset.json").rename(annotations)
    before = annotations.read_bytes()
    with pytest.raises(UserError, match="TRAIN_REFERENCES.* found, but that file is read here"):
        main(config(tmp_path, annotations=(str(annotations),), image_folder=str(tmp_path / "images")))
    assert annotations.read_bytes() == before


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    make_dataset(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output_folder: .* cannot be made"):
        main(config(tmp_path, output_folder=str(tmp_path / "file" / "out")))


def test_two_runs_at_once_in_one_folder_do_not_mix_their_files(tmp_path):
    make_dataset(tmp_path)
    main(config(tmp_path))
    before = contents(tmp_path / "out")
    with sole_writer(tmp_path / "out", "output_folder"):
        options = {**vars(config(tmp_path, seed=1)), "annotations": tmp_path / "dataset.json"}
        options = [f"--{name}={value}" for name, value in options.items() if value is not None]
        script = [sys.executable, create_input_files.__file__, *options]
        result = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: output_folder: another run is writing to {tmp_path / 'out'}; wait until it has ended, or give another "
        "folder\n"
    )
    assert contents(tmp_path / "out") == before
    main(config(tmp_path, seed=1))
