"""Learning rates and teacher forcing are what their names promise at every step, and go on unchanged after a resume."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from captioning.training.schedules import SCHEDULES, TEACHER_FORCING, Schedule, teacher_forcing
from utils import UserError

DECODER_LR, ENCODER_LR = 0.4, 0.01


def make_optimizer():
    """An optimizer with two groups of different base rates, as the decoder's and the encoder's are."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (DECODER_LR, ENCODER_LR)]
    return torch.optim.SGD(groups)


def rates_of(schedule, steps, group=0):
    """The rate that each of the steps is made with."""
    rates = []
    for _ in range(steps):
        rates.append(schedule.optimizer.param_groups[group]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


def rates(name, total_steps, group=0, **settings):
    return rates_of(Schedule(name, make_optimizer(), total_steps, **settings), total_steps, group)


def rates_of_torch(make_scheduler, steps):
    """The decoder's rates with one of torch's own schedulers."""
    optimizer = make_optimizer()
    return rates_of(make_scheduler(optimizer), steps)


def test_none_keeps_the_rate():
    assert rates("none", 7) == [DECODER_LR] * 7


def test_steps_are_those_of_torch():
    expected = rates_of_torch(lambda optimizer: lr_scheduler.StepLR(optimizer, 4, gamma=0.5), 13)
    assert rates("steps", 13, step_size=4, gamma=0.5) == pytest.approx(expected)
    assert expected[-1] == DECODER_LR / 8


def test_exponential_is_that_of_torch_and_meets_steps_at_every_stair():
    expected = rates_of_torch(lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.5 ** (1 / 4)), 13)
    found = rates("exponential", 13, step_size=4, gamma=0.5)
    assert found == pytest.approx(expected)
    assert found[::4] == pytest.approx(rates("steps", 13, step_size=4, gamma=0.5)[::4])


def test_cosine_is_that_of_torch():
    expected = rates_of_torch(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20), 21)
    assert rates("cosine", 21) == pytest.approx(expected)


def test_one_cycle_is_that_of_torch():
    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer, [DECODER_LR, ENCODER_LR], total_steps=41, pct_start=12 / 41, final_div_factor=1e12,
            cycle_momentum=False,
        )  # fmt: skip

    optimizer = make_optimizer()
    scheduler, expected = make(optimizer), []
    for _ in range(41):  # one step more than 40 would be refused by torch's
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 41:
            scheduler.step()
    found = rates("one_cycle", 41)
    assert found == pytest.approx(expected)
    assert found[0] == pytest.approx(DECODER_LR / 25)
    assert max(found) == found[11] == DECODER_LR
    assert found[-1] == 0


@pytest.mark.parametrize("cycles", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [50, 97, 1001])
def test_cosine_with_restarts_ends_every_cycle_and_the_run_at_the_lowest_rate(cycles, total):
    found = rates("cosine", total, cycles=cycles)
    starts = [0] + [i for i in range(1, total) if found[i] > found[i - 1]]
    assert len(starts) == cycles
    assert found[-1] == 0
    assert [found[i] for i in starts] == pytest.approx([DECODER_LR] * cycles)
    assert [found[i - 1] for i in starts[1:]] == [0] * (cycles - 1)
    lengths = [end - start for start, end in zip(starts, [*starts[1:], total], strict=True)]
    assert max(lengths) - min(lengths) <= 1  # each is rounded to whole steps


def test_plateau_drops_when_the_best_score_is_patience_epochs_old():
    schedule = Schedule("plateau", make_optimizer(), 100, gamma=0.5, patience=2)
    best = [True, True, False, False, True, False, False, False, False, True]
    dropped = [schedule.after_validation(is_best) for is_best in best]
    assert [i for i, drop in enumerate(dropped) if drop] == [3, 6, 8]
    assert [group["lr"] for group in schedule.optimizer.param_groups] == [DECODER_LR / 8, ENCODER_LR / 8]


def test_plateau_is_that_of_torch():
    scores = torch.rand(200, generator=torch.Generator().manual_seed(0)).cummax(dim=0).values.round(decimals=2).tolist()
    schedule = Schedule("plateau", make_optimizer(), 1000, gamma=0.5, patience=3)
    optimizer = make_optimizer()
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=2, threshold=0, eps=0)
    best = -1.0
    for score in scores:
        schedule.after_validation(score > best)
        best = max(score, best)
        schedule.step()
        theirs.step(score)
        assert schedule.optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert schedule.drops > 5


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "plateau"])
def test_only_plateau_listens_to_the_score(name):
    schedule = Schedule(name, make_optimizer(), 30, patience=1, step_size=5)
    before = schedule.optimizer.param_groups[0]["lr"]
    assert not any(schedule.after_validation(is_best) for is_best in (True, False, False))
    assert schedule.optimizer.param_groups[0]["lr"] == before


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_linearly_and_then_the_schedule_runs_in_the_steps_that_are_left(name):
    settings = {"step_size": 5, "gamma": 0.5, "cycles": 2}
    plain = rates(name, 40, **settings)
    warmed = rates(name, 50, warmup_steps=10, **settings)
    assert warmed[10:] == pytest.approx(plain)
    assert warmed[:10] == pytest.approx([plain[0] * (i + 1) / 11 for i in range(10)])
    assert warmed[0] > 0


def test_the_rates_drop_during_the_warm_up_too():
    schedule = Schedule("plateau", make_optimizer(), 50, warmup_steps=9, gamma=0.5, patience=1)
    for _ in range(4):
        schedule.step()
    assert schedule.optimizer.param_groups[0]["lr"] == pytest.approx(DECODER_LR * 0.5)
    schedule.after_validation(True)
    schedule.after_validation(False)
    assert schedule.optimizer.param_groups[0]["lr"] == pytest.approx(DECODER_LR * 0.25)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_group_keeps_its_share_and_the_last_rate_stays(name):
    schedule = Schedule(name, make_optimizer(), 40, warmup_steps=4, step_size=6, cycles=2)
    for step in range(50):
        decoder, encoder = (group["lr"] for group in schedule.optimizer.param_groups)
        assert encoder / ENCODER_LR == pytest.approx(decoder / DECODER_LR)
        assert decoder == pytest.approx(DECODER_LR * schedule.factor(min(step, 39)))
        schedule.optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [0, 3, 17, 40])
def test_a_resumed_run_has_the_rates_of_one_that_never_stopped(name, stop, tmp_path):
    settings = {"warmup_steps": 5, "step_size": 6, "cycles": 3, "patience": 2}

    def run(schedule, first, last):
        seen = []
        for step in range(first, last):
            seen.append([group["lr"] for group in schedule.optimizer.param_groups])
            schedule.optimizer.step()
            schedule.step()
            if step % 2:
                schedule.after_validation(step % 3 == 0)
        return seen

    whole = run(Schedule(name, make_optimizer(), 40, **settings), 0, 40)
    schedule = Schedule(name, make_optimizer(), 40, **settings)
    seen = run(schedule, 0, stop)
    state = {"optimizer": schedule.optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, tmp_path / "state.pth")

    state = torch.load(tmp_path / "state.pth", weights_only=True)
    schedule = Schedule(name, make_optimizer(), 40, **settings)
    schedule.optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert seen + run(schedule, stop, 40) == whole


def test_a_group_that_joins_later_follows_the_schedule_from_there():
    schedule = Schedule("steps", make_optimizer(), 40, step_size=10, gamma=0.5)
    for _ in range(10):
        schedule.step()
    schedule.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.08})
    schedule.apply()
    assert schedule.optimizer.param_groups[2]["lr"] == pytest.approx(0.04)
    assert schedule.optimizer.param_groups[0]["lr"] == pytest.approx(DECODER_LR / 2)


@pytest.mark.parametrize(
    ("name", "total", "settings", "field"),
    [
        ("cosin", 10, {}, "schedule"),
        ("none", 0, {}, "total_steps"),
        ("none", 10, {"warmup_steps": 10}, "warmup_steps"),
        ("none", 10, {"warmup_steps": -1}, "warmup_steps"),
        ("steps", 10, {"step_size": 0}, "schedule_step_size"),
        ("steps", 10, {"gamma": 1.5}, "schedule_gamma"),
        ("plateau", 10, {"gamma": float("nan")}, "schedule_gamma"),
        ("plateau", 10, {"patience": 0}, "schedule_patience"),
        ("cosine", 10, {"cycles": 0}, "schedule_cycles"),
        ("cosine", 10, {"cycles": 6}, "schedule_cycles"),
        ("one_cycle", 10, {"warmup_steps": 6}, "total_steps"),
    ],
)
def test_a_setting_out_of_range_is_named(name, total, settings, field):
    with pytest.raises(UserError, match=f"^{field}: .* found, .* expected$"):
        Schedule(name, make_optimizer(), total, **settings)


def test_always_shows_the_true_word():
    assert [teacher_forcing("always", step, 10, floor=0.5) for step in (0, 5, 10)] == [1, 1, 1]


@pytest.mark.parametrize("name", TEACHER_FORCING[1:])
@pytest.mark.parametrize("total", [10, 1000, 1_000_000])
def test_teacher_forcing_falls_from_one_through_a_half_to_its_floor(name, total):
    points = [total * i // 10 for i in range(11)]
    curve = [teacher_forcing(name, step, total) for step in points]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] == pytest.approx(1, abs=0.01 if total > 10 else 0.25)
    assert curve[5] == pytest.approx(0.5)
    assert curve[10] == pytest.approx({"linear": 0, "exponential": 0.25, "inverse_sigmoid": 0}[name], abs=0.25)
    with_floor = [teacher_forcing(name, step, total, floor=0.4) for step in points]
    assert with_floor == [max(0.4, probability) for probability in curve]
    assert teacher_forcing(name, 100 * total, total, floor=0.4) == 0.4


def test_teacher_forcing_has_the_forms_of_the_paper():
    total, steps = 1000, range(0, 1001, 100)
    c = 1 / total
    assert [teacher_forcing("linear", i, total, 0.3) for i in steps] == pytest.approx(
        [max(0.3, 1 - c * i) for i in steps]
    )
    k = teacher_forcing("exponential", 1, total)
    assert [teacher_forcing("exponential", i, total) for i in steps] == pytest.approx([k**i for i in steps])
    start = teacher_forcing("inverse_sigmoid", 0, total)
    k = start / (1 - start)  # of k / (k + 1)
    expected = [k / (k + math.exp(i / k)) for i in steps]
    assert [teacher_forcing("inverse_sigmoid", i, total) for i in steps] == pytest.approx(expected)
    assert expected[-1] < 0.01


@pytest.mark.parametrize(("name", "floor"), [("sometimes", 0.0), ("linear", 1.5), ("linear", -0.1)])
def test_wrong_teacher_forcing_is_refused(name, floor):
    with pytest.raises(UserError, match="teacher"):
        teacher_forcing(name, 0, 10, floor)
