"""Signals let a run save before it ends, and a loss that is no number ends it before anything is saved."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kill_training import same_part, scalars

import train
from captioning.command_line import run_script
from captioning.evaluation import metrics
from captioning.storage.tensors import load_checkpoint
from captioning.training.interruptions import SMALLEST_SCALE, FiniteCheck, Postponed
from captioning.training.run import Run
from captioning.training.watch import mean_of_finite
from utils import Stopped, UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture(autouse=True)
def handlers():
    """What the signals did before, put back after each test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job starts without
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_the_block(number):
    done = []
    with pytest.raises(Stopped) as raised, Postponed() as stop:
        assert stop.number is None
        os.kill(os.getpid(), number)
        done.append(stop.number)
    assert done == [number] and raised.value.number == number


def test_without_a_signal_the_handlers_are_as_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Postponed():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number):
    child = os.fork()
    if not child:
        with Postponed():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number  # which a shell gives as 128 + number


def test_sigterm_ends_any_script_with_143_after_cleaning_up(capsys):
    cleaned = []

    def main(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as ended:
        run_script(main, train.Config, [])
    assert ended.value.code == 143 and cleaned
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_a_full_disk_is_one_clear_line_wherever_it_is_met(capsys):
    def main(_):
        Path("/dev/full").write_text("x")

    with pytest.raises(SystemExit) as ended:
        run_script(main, train.Config, [])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "No space left on device" in error


@pytest.mark.parametrize(("where", "number"), [("step", signal.SIGTERM), ("validation", signal.SIGINT)])
def test_a_run_that_is_stopped_saves_and_ends_as_if_it_had_not_been(training, monkeypatch, capsys, where, number):
    clean = training("clean")
    module, name = {"step": (train, "readings_of_batch"), "validation": (metrics, "score")}[where]
    calls, work = [], getattr(module, name)

    def signal_at_the_second_call(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return work(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, signal_at_the_second_call)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            training("stopped")
    error = capsys.readouterr().err
    step = {"step": 2, "validation": 12}[where]
    last = clean.with_name("stopped") / "last.pth"
    assert ended.value.code == 128 + number
    assert f"stopped by {number.name} at step {step}; continue with --resume {last}\n" in error
    assert "Traceback" not in error
    assert load_checkpoint(last)["progress"]["step"] == step

    stopped = training("stopped", "--resume", last)
    one, other = load_checkpoint(clean / "last.pth"), load_checkpoint(stopped / "last.pth")
    for part in set(one) - {"config", "curves"}:
        assert same_part(part, one, other), part
    assert scalars(clean) == scalars(stopped)


def test_a_loss_that_is_not_finite_names_step_rate_and_photos_and_leaves_the_last_checkpoint(training, capsys):
    folder = training("run", "--epochs", 1)
    before = (folder / "last.pth").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:  # rates so high that weights and then the loss are no numbers
        training("run", "--resume", "auto", "--clip", "none", "--optimizer", "adam", "--save_minutes", "1e-9",
                 "--doubly_stochastic_weight", "1e38", "--decoder_lr", "1e-4")  # fmt: skip
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "loss: is inf" in error or "norm inf" in error or "nan" in error
    assert "at step 7" in error and "learning rate 0.0" in error
    names = error.split("its photos are ")[1].split(";")[0].split(", ")
    assert 1 <= len(names) <= 2 and all(name in [f"{i}.jpg" for i in range(6)] for name in names)
    assert (folder / "last.pth").read_bytes() == before


def dataset(names):
    return SimpleNamespace(references=[{"file_name": name} for name in names])


def test_the_first_step_that_is_not_finite_is_named_with_only_its_own_photos():
    finite = FiniteCheck(dataset("abcdef"), NO_SCALER)
    for step, (losses, norm) in enumerate([((1.0, 2.0), 1.0), ((1.0, float("nan")), 1.0), ((1.0, 1.0), float("inf"))]):
        for i, loss in enumerate(losses):
            finite.add_batch(torch.tensor([2 * step + i]), torch.tensor(loss))
        finite.add_step(10 + step, 0.5, torch.tensor(norm))
    with pytest.raises(UserError, match="loss: is nan .* at step 11, with learning rate 0.5; .* photos are d;"):
        finite.check()


def test_gradients_that_are_not_finite_name_the_photos_of_all_their_batches():
    finite = FiniteCheck(dataset("abcdef"), NO_SCALER)
    finite.add_batch(torch.tensor([4, 1, 1]), torch.tensor(1.0))
    finite.add_batch(torch.tensor([0]), torch.tensor(2.0))
    finite.add_step(1, 0.5, torch.tensor(float("inf")))
    with pytest.raises(UserError, match="norm inf at step 1, .* photos are a, b, e;"):
        finite.check()


def test_the_scaler_may_skip_steps_but_not_for_ever():
    scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 2.0**10)
    finite = FiniteCheck(dataset("ab"), scaler)

    def one_step():
        finite.add_batch(torch.tensor([1]), torch.tensor(float("nan")))
        finite.add_step(1, 0.5, torch.tensor(1.0))
        finite.check()

    one_step()
    scaler.get_scale = lambda: SMALLEST_SCALE
    with pytest.raises(UserError, match="photos are b;"):
        one_step()


def test_readings_of_skipped_steps_do_not_spoil_the_mean():
    readings = [torch.tensor(x) for x in (1.0, float("nan"), 3.0, float("inf"))]
    assert mean_of_finite(readings) == (2.0, 2)


def test_weights_that_are_not_finite_are_not_saved(training, monkeypatch, capsys):
    folder = training("run", "--epochs", 1)
    before = (folder / "last.pth").read_bytes()
    finish_epoch = Run.finish_epoch

    def spoil(run, entry):
        run.decoder.fc.bias.data[0] = float("nan")
        return finish_epoch(run, entry)

    monkeypatch.setattr(Run, "finish_epoch", spoil)
    with pytest.raises(SystemExit) as ended:
        training("run", "--resume", "auto")
    assert ended.value.code == 2 and "fc.bias is not finite" in capsys.readouterr().err
    assert (folder / "last.pth").read_bytes() == before


def test_within_an_epoch_only_the_same_batches_can_be_resumed(training, monkeypatch, capsys):
    folder = training("run", "--epochs", 1)
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    checkpoint["progress"]["batch"] = 2
    torch.save(checkpoint, folder / "last.pth")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        training("run", "--resume", "auto", "--batch_size", 3)
    assert "batch_size: 3 found, but the resumed run has 2" in capsys.readouterr().err


def test_a_run_can_be_resumed_with_other_learning_rates(training):
    folder = training("run", "--epochs", 1)
    training("run", "--resume", "auto", "--decoder_lr", "1e-5", "--weight_decay", "0.5")
    groups = torch.load(folder / "last.pth", weights_only=True)["optimizer"]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-5, 0.5)] * 2


def test_a_frozen_run_is_not_resumed_with_fine_tuning(training, capsys):
    training("run", "--epochs", 1)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        training("run", "--resume", "auto", "--fine_tune_encoder")
    assert "fine_tune_encoder: True found, but the resumed run has False" in capsys.readouterr().err


def test_deterministic_asks_torch_for_it(training):
    training("run", "--epochs", 1, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    training("other", "--epochs", 1)
    assert not torch.are_deterministic_algorithms_enabled()
