"""What is taken from a checkpoint when a run goes on, what is refused, and which run it may take the place of."""

import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
from conftest import WORD_MAP
from kill_training import equal, scalars
from tiny_training import command

import train
from captioning.storage.tensors import load_checkpoint
from captioning.training.resume import copy_moments
from captioning.training.run_folder import RunFolder
from utils import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def refused(training, capsys):
    """A function that trains and gives the one line with which it is refused."""

    def run(name, *options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            training(name, *options)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1, error
        return error

    return run


def change(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


# Whose place a run takes


def test_a_second_run_does_not_replace_the_first_ones_checkpoints_unless_it_is_told_to(training, refused):
    folder = training("run", "--epochs", 1)
    before = (folder / "best.pth").read_bytes()
    error = refused("run", "--epochs", 1, "--no_overwrite")
    assert all(word in error for word in ("--resume auto", "--run_folder", "--overwrite", "best.pth"))
    assert (folder / "best.pth").read_bytes() == before
    training("run", "--epochs", 1, "--overwrite", "--seed", 3)
    assert load_checkpoint(folder / "best.pth")["config"]["seed"] == 3
    assert not (folder / "previous.pth").exists()


def test_another_runs_checkpoint_is_not_resumed_into_a_folder_that_has_its_own(training, refused):
    one, _ = training("one", "--epochs", 1), training("two", "--epochs", 1)
    assert "has the checkpoints of another run" in refused("two", "--resume", one / "last.pth")


@pytest.mark.parametrize("resume", ["auto", "last.pth"])
def test_a_run_is_not_continued_and_replaced_at_once(training, refused, resume):
    folder = training("run", "--epochs", 1)
    resume = folder / resume if resume != "auto" else resume
    assert "resume, overwrite: both found" in refused("run", "--resume", resume, "--overwrite", "--epochs", 2)


def test_a_run_that_is_continued_in_place_of_another_leaves_nothing_of_that(training):
    one, two = training("one", "--epochs", 1), training("two", "--epochs", 2)
    assert (two / "previous.pth").exists()
    (two / "best.pth").write_bytes(b"the other's")
    training("two", "--resume", one / "last.pth", "--epochs", 2, "--overwrite")
    assert not (two / "best.pth").exists() or (two / "best.pth").read_bytes() != b"the other's"


@pytest.mark.parametrize("missing, found", [(("last",), "previous.pth"), (("last", "previous"), "best.pth")])
def test_auto_goes_on_from_what_there_is(training, capsys, missing, found):
    folder = training("run", "--epochs", 2)
    for name in missing:
        (folder / f"{name}.pth").unlink()
    capsys.readouterr()
    training("run", "--resume", "auto", "--epochs", 3)
    assert f"last.pth: no such file; continuing from {folder / found}" in capsys.readouterr().out
    assert load_checkpoint(folder / "last.pth")["progress"]["epoch"] == 3


def test_two_trainings_do_not_write_to_one_folder_at_once(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from captioning.training.run_folder import RunFolder\n"
         f"folder = RunFolder({str(tmp_path)!r}, 10); folder.hold(); print('held', flush=True); sys.stdin.read()"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another training is writing there"):
            RunFolder(tmp_path, 10).load("auto")
    finally:
        holder.communicate()
    RunFolder(tmp_path, 10).load("auto")  # the lock went with its process


def test_resuming_a_file_takes_its_runs_own_settings_and_options_come_on_top(training, tmp_path):
    folder = training("run", "--epochs", 1, "--decoder_lr", "0.002", "--clip", "norm")
    command("--resume", folder / "last.pth", "--epochs", 3, "--clip", "value")
    config = load_checkpoint(folder / "last.pth")["config"]
    assert (config["epochs"], config["decoder_lr"], config["clip"]) == (3, 0.002, "value")
    assert config["data_folder"] == str(tmp_path) and config["embed_dim"] == 4


# Whether it is the same run


def test_other_photos_captions_or_image_sizes_are_refused(training, refused, make_files):
    folder = training("run", "--epochs", 1)
    make_files("TRAIN", photos=6, side=64, seed=5)
    error = refused("run", "--resume", "auto")
    assert "other training photos or captions" in error
    assert "begin a new run: with another --run_folder, or with --overwrite and no --resume" in error
    make_files("TRAIN", photos=6, side=64)
    change(folder / "last.pth", lambda content: content.update(image_size=32))
    assert "photos of 64 px, but the resumed run has 32 px" in refused("run", "--resume", "auto")


def test_with_another_metric_or_other_validation_photos_the_comparison_begins_anew(training, make_files, capsys):
    folder = training("run", "--epochs", 1)
    change(folder / "last.pth", lambda content: content["best"].update({"BLEU-4": 1.0, "BLEU-1": 1.0}))
    for options in (["--stop_metric", "CIDEr"], ["--val_share", "0.5"]):
        capsys.readouterr()
        training("run", "--resume", folder / "last.pth", "--epochs", 2, *options)
        assert f"Changed since the checkpoint: {options[0][2:]}. Scores cannot be" in capsys.readouterr().out
        change(folder / "previous.pth", lambda content: None)
        (folder / "last.pth").write_bytes((folder / "previous.pth").read_bytes())


def test_validation_data_that_are_replaced_during_a_run_end_it_and_no_step_is_lost(training, refused, monkeypatch):
    epoch = train.train_one_epoch

    def train_and_replace(run, loader, *rest):
        path = Path(run.config.data_folder) / "VAL_IMAGES_tiny.hdf5"
        epoch(run, loader, *rest)
        with h5py.File(path, "a") as file:
            file.attrs["changed"] = 1

    monkeypatch.setattr(train, "train_one_epoch", train_and_replace)
    assert "VAL_IMAGES_tiny.hdf5: was replaced during the run" in refused("run", "--overwrite")


# What an attacker, or a broken disk, may have put there


def an_optimizer():
    parameters = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.Adam([{"params": parameters[:1]}, {"params": parameters[1:]}], fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_moments_are_copied_into_memory_of_our_own():
    optimizer = an_optimizer()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.full((1,), 0.25).expand(3, 4)  # one number for twelve
    copies = copy_moments(optimizer, state)
    assert copies[0]["exp_avg"].untyped_storage().nbytes() == 48 and (copies[0]["exp_avg"] == 0.25).all()
    assert copies[0]["exp_avg_sq"].data_ptr() != state["state"][0]["exp_avg_sq"].data_ptr()


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state["param_groups"].reverse(),
        lambda state: state["param_groups"][0].update(params=[1]),
        lambda state: state["param_groups"][0].pop("lr"),
        lambda state: state["state"][0].pop("exp_avg"),
        lambda state: state["state"][0].pop("step"),
        lambda state: state["state"][0].update(max_exp_avg_sq=torch.ones(3, 4)),
        lambda state: state["state"][0].update(exp_avg=torch.ones(4, 3)),
        lambda state: state["state"][0].update(exp_avg=torch.ones(3, 4, dtype=torch.float64)),
        lambda state: state["state"][0].update(exp_avg=torch.ones(3, 4, device="meta")),
        lambda state: state["state"][0].update(exp_avg=torch.ones(3, 4) / 0),
        lambda state: state["state"].update({7: state["state"][0]}),
    ],
)
def test_moments_of_another_optimizer_are_refused(edit):
    state = an_optimizer().state_dict()
    edit(state)
    with pytest.raises((UserError, KeyError)):
        copy_moments(an_optimizer(), state)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["progress"].update(step=2**63),
        lambda content: content["readings"].update(cross_entropy=[[1.0], 2.0]),
        lambda content: content["readings"].update(cross_entropy=3),
        lambda content: content["sums"].update(other=[1.0, 1]),
        lambda content: content["sums"].update(cross_entropy=[1.0, 0]),
        lambda content: content.update(history=[{"epoch": "one"}]),
        lambda content: content.update(history=3),
        lambda content: content.update(history={}),
        lambda content: content.update(history=[{}]),
        lambda content: content["readings"].update(other=[1.0]),
        lambda content: content["schedule"].update(drops=1e308),
        lambda content: content["schedule"].update(steps=-5),
        lambda content: content["progress"].update(batch=10**6, epoch=0),
        lambda content: content.update(random_states=""),
        lambda content: content.update(data=""),
        lambda content: content.update(best={"epoch": 1}),
        lambda content: content["optimizer"]["state"][0].clear(),
        lambda content: content.update(own_weights={"decoder.fc.bias": torch.ones(3)}),
        lambda content: content.update(own_weights={"other.fc.bias": torch.ones(10)}),
        lambda content: content.update(own_weights=[3]),
        lambda content: content["average"].update(steps=-1),
        lambda content: content["average"].update(moving={"decoder.fc.bias": torch.ones(10)}),
        lambda content: content["average"].update(epoch_ends={0: {}}),
        lambda content: content.update(average=3),
        lambda content: content["optimizer"]["param_groups"][0].update(params=[[]]),
        lambda content: content.update(optimizer=torch.ones(3)),
    ],
)
def test_a_checkpoint_with_odd_numbers_is_refused_in_one_line(training, refused, edit):
    folder = training("run", "--epochs", 1)
    change(folder / "last.pth", edit)
    assert "resume: the checkpoint is of another run (" in refused("run", "--resume", "auto")


def test_readings_that_are_whole_numbers_are_taken_for_what_they_are(training):
    folder = training("run", "--epochs", 1)
    change(folder / "last.pth", lambda content: content["readings"].update(cross_entropy=[1, 2]))
    training("run", "--resume", "auto", "--epochs", 2)
    assert load_checkpoint(folder / "last.pth")["progress"]["epoch"] == 2


def test_settings_of_the_optimizer_are_the_configs_not_the_files(training):
    folder = training("run", "--epochs", 1)

    def edit(content):
        for group in content["optimizer"]["param_groups"]:
            del group["betas"]
            group["amsgrad"] = True

    change(folder / "last.pth", edit)
    training("run", "--resume", "auto")
    group = load_checkpoint(folder / "last.pth")["optimizer"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.999) and not group["amsgrad"]


@pytest.mark.parametrize("curves", [{"x": 5}, {"events.out.tfevents.1.gone": 5}, {"../last.pth": 5}])
def test_curves_that_are_not_those_of_the_folder_remove_none(training, curves):
    folder = training("run", "--epochs", 1)
    change(folder / "last.pth", lambda content: content.update(curves=curves))
    training("run", "--resume", "auto")
    assert [step for step, _ in scalars(folder)["val/BLEU-4"]][:1] == [1]
    assert len(list(folder.glob("events*"))) == 2


# A new run on new data


def test_a_trained_captioner_starts_a_run_with_other_words_which_keep_their_rows(training, make_files, tmp_path):
    folder = training("run", "--epochs", 1)
    words = {word: i for i, word in enumerate(["<pad>", "cat", "a", "bird", *WORD_MAP])}
    words = {word: i for i, word in enumerate(dict.fromkeys(words))}  # other places, and a word more
    captions = [[words["<start>"], words["bird"], words["cat"], words["<end>"]]] * 12
    for split, photos in (("TRAIN", 6), ("VAL", 6)):
        make_files(split, photos=photos, side=64, word_map=words, captions=captions, lengths=[4] * 12)
    other = training("other", "--start_from", folder / "best.pth", "--epochs", 1, "--decoder_lr", "1e-12",
                     "--decoder_dim", 512)  # fmt: skip
    old, new = load_checkpoint(folder / "best.pth"), load_checkpoint(other / "last.pth")
    assert new["config"]["decoder_dim"] == 4 and new["progress"]["step"] == 6
    assert new["max_length"] == old["max_length"] > 2  # its own sentences are not cut to the length of the new ones
    for name in ("embedding.weight", "fc.weight", "fc.bias"):
        for word in WORD_MAP:
            row = new["decoder"][name][words[word]], old["decoder"][name][WORD_MAP[word]]
            torch.testing.assert_close(*row, atol=1e-6, rtol=0)
    assert equal(new["encoder"], old["encoder"])
    torch.testing.assert_close(
        new["decoder"]["attention.full_att.weight"], old["decoder"]["attention.full_att.weight"], atol=1e-6, rtol=0
    )


def test_another_decoder_than_the_trained_ones_is_refused(training, refused):
    folder = training("run", "--epochs", 1)
    error = refused("other", "--start_from", folder / "best.pth", "--decoder_dim", 8)
    assert "decoder_dim: 8 found, but" in error and "has 4" in error
