"""
What changes over time: the learning rates, and how often the decoder is shown the true word.

Each is a function of the step (and of the validation scores, for 'plateau'), so that a run is easily resumed.
"""

import bisect
import math

from utils import UserError

SCHEDULES = ("none", "steps", "plateau", "exponential", "cosine", "one_cycle")
TEACHER_FORCING = ("always", "linear", "inverse_sigmoid", "exponential")

ONE_CYCLE_START = 1 / 25  # share of the base rate that one cycle starts with, and
ONE_CYCLE_RISE = 0.3  # share of its steps until the base rate is reached: both as in torch's OneCycleLR


class Schedule:
    """
    Learning rates over time: of each of the optimizer's groups its own base rate times one common factor.

        optimizer.step()
        schedule.step()                   # after each step
        schedule.after_validation(is_best)  # after each epoch; only 'plateau' listens
    """

    def __init__(
        self, name, optimizer, total_steps, *, warmup_steps=0, step_size=1000, gamma=0.8, patience=8, cycles=1
    ):  # fmt: skip
        """
        :param name: what the factor does after the warm-up:
            'none': stays 1;
            'steps': is multiplied by `gamma` every `step_size` steps;
            'exponential': the same without stairs, a little at each step;
            'plateau': is multiplied by `gamma` after `patience` epochs without a better validation score;
            'cosine': falls from 1 to 0 along half a cosine, in each of `cycles` cycles (warm restarts, Loshchilov and
            Hutter 2017); the cycles fill the steps exactly, so that the run ends at the lowest rate;
            'one_cycle': rises from 1/25 to 1, then falls to 0, along half cosines (Smith and Topin 2018)
        :param optimizer: its groups' rates, as they are now, are the base rates
        :param total_steps: optimizer steps of the whole run, with the warm-up; the last rate is kept after them
        :param warmup_steps: steps in which the rates rise linearly to their first value (Goyal et al. 2017)
        :raises UserError: if a setting is out of its range
        """
        self.name, self.optimizer, self.total_steps, self.warmup_steps = name, optimizer, total_steps, warmup_steps
        self.step_size, self.gamma, self.patience, self.cycles = step_size, gamma, patience, cycles
        self.check()
        self.steps = 0  # that the optimizer has done
        self.epochs_since_best, self.drops = 0, 0
        self.apply()

    def step(self):
        """Set the rates of the next step; to be called after each step of the optimizer."""
        self.steps += 1
        self.apply()

    def after_validation(self, is_best):
        """
        :param is_best: whether the epoch was better than all before; 'plateau' listens, the others ignore it
        :return: whether the rates were lowered
        """
        if self.name != "plateau":
            return False
        self.epochs_since_best = 0 if is_best else self.epochs_since_best + 1
        if self.epochs_since_best < self.patience:
            return False
        self.epochs_since_best = 0
        self.drops += 1
        self.apply()
        return True

    def apply(self):
        """Set the rates; to be called by hand only if a group is added to the optimizer later."""
        factor = self.factor(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def factor(self, step):
        """:return: what the base rates are multiplied by in this step; the first is step 0"""
        if step < self.warmup_steps:
            return self.factor(self.warmup_steps) * (step + 1) / (self.warmup_steps + 1)
        total = self.total_steps - self.warmup_steps
        step = min(step - self.warmup_steps, total - 1)
        if self.name == "steps":
            return self.gamma ** (step // self.step_size)
        if self.name == "exponential":
            return self.gamma ** (step / self.step_size)
        if self.name == "plateau":
            return self.gamma**self.drops
        if self.name == "cosine":
            edges = cycle_edges(total, self.cycles)
            cycle = bisect.bisect(edges, step) - 1
            start, end = edges[cycle], edges[cycle + 1]
            return anneal(1, 0, (step - start) / (end - 1 - start))
        if self.name == "one_cycle":
            top = round(ONE_CYCLE_RISE * total) - 1
            if step < top:
                return anneal(ONE_CYCLE_START, 1, step / top)
            return anneal(1, 0, (step - top) / (total - 1 - top))
        return 1.0

    def check(self):
        """:raises UserError: if a setting is out of its range"""
        total, steps = self.total_steps, self.total_steps - self.warmup_steps
        expect(self.name in SCHEDULES, "schedule", self.name, f"one of {', '.join(SCHEDULES)}")
        expect(total >= 1, "total_steps", total, "1 or more")
        expect(
            0 <= self.warmup_steps < total, "warmup_steps", self.warmup_steps, f"0 to {total - 1}, less than the run"
        )
        expect(self.step_size > 0, "schedule_step_size", self.step_size, "more than 0 steps")
        expect(0 < self.gamma <= 1, "schedule_gamma", self.gamma, "more than 0, up to 1")
        expect(self.patience >= 1, "schedule_patience", self.patience, "1 epoch or more")
        expect(self.cycles >= 1, "schedule_cycles", self.cycles, "1 or more")
        if self.name == "cosine":
            edges = cycle_edges(steps, self.cycles)
            shortest = min(edges[i + 1] - edges[i] for i in range(self.cycles))
            expected = f"fewer (the shortest would have {shortest} of the {steps} steps)"
            expect(shortest >= 2, "schedule_cycles", self.cycles, expected)
        if self.name == "one_cycle":
            expect(steps >= 5, "total_steps", total, "5 or more after the warm-up, to rise and fall in")

    def state_dict(self):
        """:return: dict of numbers; the base rates are with the optimizer's groups, in its own state dict"""
        return {name: getattr(self, name) for name in ("steps", "epochs_since_best", "drops")}

    def load_state_dict(self, state):
        """Go on from `state_dict`; the optimizer's own is to be loaded before."""
        for name in self.state_dict():
            setattr(self, name, state[name])
        self.apply()


def teacher_forcing(name, step, total_steps, floor=0.0):
    """
    Probability that the decoder is shown the true word: scheduled sampling (Bengio et al. 2015, section 2.4).

    Each curve falls from 1 and is at 1/2 halfway through the run, from which follow the constants k and c of the paper.
    :param name: 'always' (1 throughout), or the curve's name:
        'linear': 1 - c i, which is 0 at the end;
        'exponential': k^i, which is 1/4 at the end;
        'inverse_sigmoid': k / (k + exp(i / k)), which stays near 1 at first and is near 0 at the end
    :param step: i, steps done so far
    :param total_steps: of the whole run
    :param floor: the lowest probability, epsilon in the paper
    :return: float from `floor` to 1
    :raises UserError: if a setting is out of its range
    """
    expect(name in TEACHER_FORCING, "teacher_forcing", name, f"one of {', '.join(TEACHER_FORCING)}")
    expect(0 <= floor <= 1, "floor of teacher forcing", floor, "0 to 1")
    step = min(step, total_steps)
    if name == "always":
        return 1.0
    if name == "linear":
        probability = 1 - step / total_steps
    elif name == "exponential":
        probability = 0.5 ** (2 * step / total_steps)
    else:
        k = half_time_constant(total_steps / 2)
        probability = k / (k + math.exp(step / k))
    return max(floor, probability)


def half_time_constant(half):
    """:return: the k for which k / (k + exp(i / k)) is 1/2 at i = half: k ln k = half, by Newton's method"""
    k = half + 1
    for _ in range(20):
        k = (k + half) / (math.log(k) + 1)
    return k


def anneal(start, end, share):
    """:return: number on half a cosine that leads from `start` (share 0) to `end` (share 1)"""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def cycle_edges(total, cycles):
    """:return: list of the step at which each cycle starts, and `total`"""
    return [round(total * i / cycles) for i in range(cycles + 1)]


def expect(holds, field, found, expected):
    """:raises UserError: unless `holds`"""
    if not holds:
        raise UserError(f"{field}: {found!r} found, {expected} expected")
