"""What a run tells and keeps: which epoch is the best, why it ended, its numbers; and what its workers may do to it."""

import csv
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from kill_training import equal
from tiny_training import TINY, command

import train
from captioning import features
from captioning.evaluation import metrics
from captioning.features import spread
from captioning.storage.tensors import load_checkpoint
from captioning.training.run import Run
from captioning.training.schedules import Schedule
from utils import UserError


def a_run(**config):
    config = train.Config(schedule_patience=2, **config)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = Schedule("plateau", optimizer, 1000, gamma=0.5, patience=config.schedule_patience)
    return SimpleNamespace(
        config=config, epoch=0, batch=0, sums={}, history=[], best={}, epochs_since_best=0, schedule=schedule
    )  # fmt: skip


def an_epoch(bleu4, bleu2=0.0, val_loss=1.0):
    return {"BLEU-1": 0.1, "BLEU-2": bleu2, "BLEU-3": 0.0, "BLEU-4": bleu4, "val_loss": val_loss}


def test_of_epochs_with_equal_scores_the_other_scores_then_the_validation_loss_choose_the_best():
    run = a_run()
    epochs = [an_epoch(0.0, 0.0, 3.0), an_epoch(0.0, 0.0, 2.0), an_epoch(0.0, 0.2, 2.5), an_epoch(0.0, 0.2, 2.4)]
    assert [Run.finish_epoch(run, epoch)[0] for epoch in epochs] == [True] * 4
    assert not Run.finish_epoch(run, an_epoch(0.0, 0.1, 1.0))[0] and run.best == epochs[3]
    assert Run.finish_epoch(run, an_epoch(0.01, 0.0, 9.0))[0]


def test_epochs_at_zero_neither_end_the_run_nor_lower_the_rates_but_a_score_that_stays_does():
    run = a_run()
    for _ in range(10):
        Run.finish_epoch(run, an_epoch(0.0))
    assert run.epochs_since_best == 0 and run.schedule.drops == 0
    lowered = [Run.finish_epoch(run, an_epoch(0.5 - 0.1 * i))[1] for i in range(4)]
    assert lowered == [False, False, True, False] and run.epochs_since_best == 3


def test_a_run_tells_what_it_works_with_how_each_epoch_went_and_why_it_ended(training, capsys):
    folder = training("run")
    printed = capsys.readouterr().out
    assert "Device cpu; 6 photos with 12 captions to learn from, 2 photos to validate on; 10 words" in printed
    assert "17,183 parameters; 6 steps per epoch, each of 2 captions" in printed
    assert "Only 2 photos to validate on" in printed
    number = r"\d+\.\d{4}"
    line = rf"^epoch 2: train loss {number}, val loss {number}, BLEU-1 {number}, .*BLEU-4 {number} \(beam 1\).*, "
    assert re.search(line + r"learning rate 0.0004, \d+ s and \d+ s for validation", printed, flags=re.MULTILINE)
    assert "The run ended after epoch 2: all epochs are done (--epochs)" in printed
    assert re.search(rf"{folder}/best.pth: epoch \d, the best, BLEU-4 {number}", printed)

    training("run", "--resume", "auto", "--epochs", 3, "--accumulate", 2)
    printed = capsys.readouterr().out
    assert f"Continuing from {folder}/last.pth: step 12, epoch 3 of 3\nepoch 2: train loss" in printed
    assert "each of 2 batches of 2 captions, whose gradients are averaged" in printed

    training("run", "--resume", "auto", "--epochs", 3)
    assert "last.pth: step 15, after epoch 3 of 3\nepoch 3: train loss" in capsys.readouterr().out


def test_a_run_whose_scores_stay_the_same_says_so(training, monkeypatch, capsys):
    monkeypatch.setattr(train, "validate", lambda *_: ({**an_epoch(0.5), "val_cut": 0}, None))
    training("run", "--epochs", 9, "--stop_patience", 2)
    assert "ended after epoch 3: no epoch since 1 was better (--stop_patience 2)" in capsys.readouterr().out


def test_log_csv_has_a_row_for_each_epoch_also_of_a_resumed_run(training):
    folder = training("run")
    training("run", "--resume", "auto", "--epochs", 3)
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "6"), ("2", "12"), ("3", "18")]
    columns = {"train_loss", "val_loss", "BLEU-4", "learning_rate", "train_seconds", "val_seconds"}
    assert columns <= set(rows[0]) and all(float(row[name]) >= 0 for row in rows for name in columns)


def test_the_validation_loss_is_the_cross_entropy_of_all_words_under_teacher_forcing(training):
    folder = training("run", "--epochs", 1)
    from captioning.features import build_loader
    from captioning.inference.trained_model import load_captioner

    captioner, checkpoint, _ = load_captioner(folder / "last.pth")
    data = checkpoint["config"]["data_folder"], "tiny", "VAL"
    loader, _ = build_loader(*data, captioner.encoder, torch.device("cpu"), batch_size=1)
    found = checkpoint["history"][0]["val_loss"]
    assert found == pytest.approx(torch.tensor(captioner.perplexity(loader)).log().item(), rel=1e-5)


def test_captions_may_be_as_long_as_the_longest_in_training_and_those_cut_are_counted(training, make_files, capsys):
    captions = [[8, *[1, 2] * 30, 9]] * 12  # 60 words
    make_files("TRAIN", photos=6, side=64, captions=captions, lengths=[62] * 12)
    folder = training("run", "--epochs", 1, "--decoder_lr", "1e-9")
    checkpoint = load_checkpoint(folder / "last.pth")
    assert checkpoint["max_length"] == 60
    cut = checkpoint["history"][0]["val_cut"]
    assert cut == 0 or f"{cut} captions cut" in capsys.readouterr().out


def test_curves_take_little_room_however_long_the_run(training):
    folder = training("run", "--epochs", 20)
    assert sum(path.stat().st_size for path in folder.glob("events*")) < 500_000


def test_meteors_java_is_started_once_a_run(training, monkeypatch):
    started = []

    class Scorer:
        def compute_score(self, truth, guess):
            return 0.5, [0.5] * len(truth)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            started.append("ended")

    monkeypatch.setattr(metrics, "ClosingMeteor", lambda: started.append("started") or Scorer())
    training("run", "--epochs", 3, "--stop_metric", "METEOR")
    assert started == ["started", "ended"]


def test_weights_and_biases_gets_the_curves_if_it_is_asked_for(training, monkeypatch):
    logged = []
    made = SimpleNamespace(log=logged.append, finish=lambda: logged.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: logged.append(options) or made))
    training("run", "--epochs", 1, "--wandb", "captions")
    assert logged[0]["project"] == "captions" and logged[0]["config"]["embed_dim"] == 4 and logged[-1] == "finished"
    assert any("val/BLEU-4" in values and values["epoch"] == 1 for values in logged[1:-1])


def test_weights_and_biases_that_is_not_installed_is_one_line(training, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        training("run", "--epochs", 1, "--wandb", "captions")
    assert (
        capsys.readouterr().err
        == "error: wandb: the package is not installed: pip install wandb, or leave --wandb out\n"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--fine_tune_encoder", "--fine_tune_from_step", 12], "fine_tune_from_step: 12 found, but the run ends after"),
        (["--image_major", "--self_critical_from_epoch", 3], "self_critical_from_epoch: 3 found, but the run ends"),
    ],
)
def test_what_would_begin_after_the_end_is_refused(training, capsys, options, message):
    with pytest.raises(SystemExit):
        training("run", *options)
    assert message in capsys.readouterr().err


def test_a_mistake_about_the_decoder_is_told_before_weights_are_fetched(training, capsys):
    for mistake in (["--decoder", "soft", "--attention_heads", 4], ["--decoder", "sofft"]):
        with pytest.raises(SystemExit):
            training("run", *mistake, "--encoder_weights", "nowhere.pth")
        assert f"error: {mistake[-2][2:]}: " in capsys.readouterr().err


def test_a_missing_validation_split_is_told_with_what_makes_one(training, tmp_path, capsys):
    (tmp_path / "VAL_IMAGES_tiny.hdf5").unlink()
    with pytest.raises(SystemExit):
        training("run")
    assert "--val_share" in capsys.readouterr().err


def test_a_share_of_the_validation_photos_is_spread_over_all_of_them():
    assert spread(8, 0.5) == [0, 2, 4, 6] and spread(8, 1.0) == list(range(8)) and spread(5, 0.01) == [0]
    assert spread(10, 0.3) == [0, 3, 6]


# Workers


def test_too_little_shared_memory_is_told_before_workers_wait_for_ever(training, monkeypatch, capsys):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=60_000))
    with pytest.raises(SystemExit):
        training("run", "--workers", 2, "--no_cache_features")
    assert re.search("error: workers: 2 need 0 MB of shared memory .* take --workers 1", capsys.readouterr().err)


def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_told(training, monkeypatch, tmp_path):
    def fail(**_):
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(features, "Listener", fail)
    with pytest.raises(UserError, match="^TMPDIR: workers cannot send .*AF_UNIX path too long"):
        features.check_workers(None, 4, workers=1)


def test_a_killed_worker_ends_the_run_with_a_line_and_all_steps_are_saved(training, monkeypatch, capsys, tmp_path):
    clip, steps = train.clip_gradients, []

    def kill_a_worker(*args):
        steps.append(args)
        if len(steps) == 3:
            children = torch.multiprocessing.active_children()
            for child in children:
                os.kill(child.pid, signal.SIGKILL)
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "clip_gradients", kill_a_worker)
        with pytest.raises(SystemExit) as ended:
            training("run", "--workers", 1, "--epochs", 40)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "workers: one of them has ended" in error and error.count("\n") == 1
    step = load_checkpoint(tmp_path / "run" / "last.pth")["progress"]["step"]
    assert step >= 3 and f"All steps up to {step} are saved: --resume {tmp_path}/run/last.pth" in error
    command("--resume", tmp_path / "run" / "last.pth", "--epochs", 8, "--workers", 0)


@pytest.mark.parametrize("side", [1, 16])
def test_photos_too_small_for_the_encoder_are_one_line(make_files, tmp_path, capsys, side):
    make_files("TRAIN", photos=2, side=side)
    make_files("VAL", photos=2, side=side, seed=1)
    with pytest.raises(SystemExit) as end:
        command("--data_folder", tmp_path, "--data_name", "tiny", "--run_folder", tmp_path / "run", *TINY)
    assert end.value.code == 2
    assert re.search(rf"error: encoder: squeezenet1_1 cannot see photos of {side} px", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_validation_within_an_epoch_tells_how_it_goes_and_changes_nothing(training, capsys):
    plain = load_checkpoint(training("plain", "--epochs", 2) / "last.pth")
    capsys.readouterr()
    watched = load_checkpoint(training("watched", "--epochs", 2, "--validate_every", 4) / "last.pth")
    printed = capsys.readouterr().out
    lines = re.findall(r"^(?:step \d+, within )?epoch \d", printed, flags=re.MULTILINE)
    assert lines == ["step 4, within epoch 1", "epoch 1", "step 8, within epoch 2", "epoch 2"]
    for name in ("encoder", "decoder", "optimizer", "random_states"):
        assert equal(watched[name], plain[name]), name
    assert [set(entry) for entry in watched["history"]] == [set(entry) for entry in plain["history"]]
    for one, other in zip(watched["history"], plain["history"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"]) and one["BLEU-1"] == other["BLEU-1"]


def test_a_run_with_validation_within_epochs_is_resumed_exactly(training):
    options = ("--validate_every", 4, "--save_minutes", "0.00001", "--ema_decay", "0.9")
    whole = load_checkpoint(training("whole", "--epochs", 2, *options) / "last.pth")
    folder = training("parts", "--epochs", 1, *options)
    parts = load_checkpoint(training("parts", "--resume", folder / "last.pth", "--epochs", 2) / "last.pth")
    for name in ("encoder", "decoder", "optimizer", "average", "random_states"):
        assert equal(parts[name], whole[name]), name


def test_within_an_epoch_of_rewards_a_fall_is_warned_of(training, monkeypatch, capsys):
    validate, scores = train.validate, iter([0.5, 0.4, 0.6])

    def judge(run, *rest):
        found, figure = validate(run, *rest)
        return found | {"BLEU-4": next(scores)}, figure

    monkeypatch.setattr(train, "validate", judge)
    rewards = ("--image_major", "--self_critical_from_epoch", 2, "--validate_every", 5)
    training("run", "--epochs", 2, *rewards)  # 3 steps an epoch
    printed = capsys.readouterr().out
    assert "Warning: BLEU-4 is 0.4000 and was 0.5000 before the rewards" in printed
    assert printed.index("step 5, within epoch 2: train reward") < printed.index("Warning") < printed.index("\nepoch 2")
    assert printed.count("Warning: BLEU-4") == 1  # after the epoch it is better again
