"""What may happen to a run: a signal that asks it to stop, and a loss or gradients that are not finite any more."""

import math
import signal

import torch

from captioning.distributed import gather
from utils import Stopped, UserError

SMALLEST_SCALE = 2.0**-14  # of gradients in half precision: from 2 ** 16, after 30 steps that were skipped
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; what `kill` and cluster schedulers send


class Postponed:
    """
    A block that SIGTERM and Ctrl-C do not break off: the first is remembered, a second ends the process at once.

        with Postponed() as stop:
            for batch in loader:
                ...
                if stop.number:
                    break
    At the end of the block, `Stopped` is raised if there was a signal.
    """

    def __enter__(self):
        self.number = None  # of the signal that came
        self.before = {number: signal.signal(number, self.remember) for number in SIGNALS}
        return self

    def remember(self, number, _):
        self.number = number
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)

    def __exit__(self, kind, *_):
        if self.number is None:
            for number, handler in self.before.items():
                signal.signal(number, handler)
        elif kind is None:
            raise Stopped(self.number)


class FiniteCheck:
    """
    Watch whether loss and gradients stay finite, and know which photos they are of.

    The numbers stay on the device until `check` reads them, so that a GPU need not wait at each step.
    """

    def __init__(self, dataset, scaler):
        """
        :param dataset: `CaptionDataset`, whose references have the photos' names
        :param scaler: GradScaler; one that is enabled skips such steps, so that only endless skipping is a fault
        """
        self.dataset, self.scaler = dataset, scaler
        self.batches = []  # of the step that is under way: (photos, loss)
        self.steps = []  # since the last check: (step, learning rate, its batches, norm of the gradients)

    def add_batch(self, photos, loss):
        """
        :param photos: (B,), places in the split
        :param loss: 0-d, on the device
        """
        self.batches.append((photos, loss.detach()))

    def add_step(self, step, rate, norm):
        """
        :param step: of the optimizer, counted from 1
        :param rate: the learning rate
        :param norm: 0-d, of all gradients of the batches since the last step
        """
        self.steps.append((step, rate, self.batches, norm))
        self.batches = []

    def check(self):
        """:raises UserError: for the first step whose loss or gradients are not finite"""
        steps, self.steps = self.steps, []
        if not steps:
            return
        numbers = [torch.stack([norm, *(loss for _, loss in batches)]) for _, _, batches, norm in steps]
        finite = torch.stack([some.isfinite().all() for some in numbers]).tolist()
        # The photos may be another process's: all look at the same step, and name those of all.
        first = min(gather(finite.index(False) if False in finite else len(finite)))
        if first == len(finite) or (self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE):
            return
        step, rate, batches, norm = steps[first]
        batches = [batch for some in gather([(photos, loss.item()) for photos, loss in batches]) for batch in some]
        bad = [(photos, loss) for photos, loss in batches if not math.isfinite(loss)] or batches
        names = ", ".join(self.names(torch.cat([photos for photos, _ in bad])))
        raise UserError(
            f"loss: is {bad[0][1]:.4g} and the gradients' norm {norm.item():.4g} at step {step}, with learning "
            f"rate {rate:.2g}; finite numbers expected; its photos are {names}; look at them, lower the learning "
            "rates or --clip_at, and --resume the last checkpoint, which is from before"
        )

    def names(self, photos):
        """:return: list of the photos' file names; their places in the split where those cannot be known"""
        try:
            return [str(self.dataset.references[photo]["file_name"]) for photo in photos.unique().tolist()]
        except (UserError, KeyError):
            return [f"number {photo} of {self.dataset.image_file.name}" for photo in photos.unique().tolist()]
