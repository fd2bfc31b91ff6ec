"""What watches over an epoch of training while its loop only goes forward, backward, and takes a step."""

import signal

import torch
from tqdm import tqdm

from captioning import distributed
from captioning.training.interruptions import FiniteCheck


class Watch:
    """The progress bar, finite numbers, readings of the loss, signals, and checkpoints that are due."""

    def __init__(self, run, loader, folder, stop):
        """
        :param run: `Run`
        :param loader: DataLoader of training batches
        :param folder: `RunFolder`, where checkpoints go when they are due
        :param stop: `Postponed`; once its signal has come, no further step is made
        """
        self.run, self.loader, self.folder, self.stop = run, loader, folder, stop
        self.finite = FiniteCheck(loader.dataset, run.scaler)
        self.readings = []  # of the batches since the last step: what comes of them is not known yet
        self.bar = tqdm(
            loader, f"epoch {run.epoch + 1}", total=len(loader), initial=run.batch, unit="step", leave=False,
            disable=distributed.hide_bar(),
        )  # fmt: skip

    def batches(self):
        """:return: yields (its place in the epoch, batch), from where the run stands"""
        for i, batch in enumerate(self.bar, start=self.run.batch):
            if self.loader.num_workers > 0 and hasattr(signal, "SIGCHLD"):
                # The DataLoader would have a worker's death raise an error anywhere, in the middle of a step too. Left
                # alone, it notices when it waits for the next batch, where no step is half done.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield i, batch

    def after_batch(self, photos, loss, readings):
        """
        :param photos: (B,), the batch's places in the split
        :param loss: 0-d, on the device
        :param readings: dict of what to tell of the batch, each 0-d; of several processes, the mean is the batch's
        """
        self.finite.add_batch(photos, loss)
        self.readings.append(readings)

    def after_step(self, rate, norm):
        """
        Look whether all is well, tell how it goes, save if it is time.

        :param rate: the learning rate of the step
        :param norm: 0-d, of all gradients
        :return: whether to leave: a signal has come, here or in another process, or validation is due
        :raises UserError: if the loss or gradients are not finite
        """
        run = self.run
        self.finite.add_step(run.step, rate, norm)
        for readings in self.readings:
            for name, value in readings.items():
                run.readings.setdefault(name, []).append(value)
        self.readings = []
        batches_told_of = max(map(len, run.readings.values()))
        every = run.config.validate_every
        validating = every > 0 and run.step % every == 0 and run.batch < len(self.loader)
        reading = validating or batches_told_of >= run.config.print_every or run.batch == len(self.loader)
        signal_number, saving = distributed.highest(self.stop.number or 0, self.folder.is_due())
        if signal_number:
            self.stop.number = signal_number  # perhaps another process's
        if reading or saving or signal_number or run.device.type == "cpu":  # reading numbers makes a GPU wait
            self.finite.check()
        if reading:
            self.tell(rate)
        if signal_number:
            return True  # who called us saves
        if saving:
            self.folder.save(run)
        return validating

    def tell(self, rate):
        """Note the means of the readings, and begin new ones."""
        run, means = self.run, {}
        for name, values in run.readings.items():
            mean, count = mean_of_finite(values)
            means[name] = mean
            if count:
                total, number = run.sums.get(name, (0.0, 0))
                run.sums[name] = [total + mean * count, number + count]
        run.readings = {}
        numbers = {f"train/{name}": mean for name, mean in means.items()}
        run.log.numbers({**numbers, "train/learning_rate": rate}, run.step)
        self.bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})


def mean_of_finite(readings):
    """:return: mean of a list of 0-d tensors without those of steps that the scaler skipped; how many there are"""
    values = distributed.average(torch.stack(readings))
    finite = values[values.isfinite()]
    return finite.mean().item(), len(finite)
