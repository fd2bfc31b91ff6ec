"""
The mean of a run's weights over time, which often captions better than the weights of any one step: they circle around
a good place, and their mean lies nearer to it.

There are two such means: an exponential moving average over the steps (Polyak and Juditsky 1992), and the plain mean of
the weights after each of the last epochs (stochastic weight averaging, Izmailov et al. 2018). Training goes on with the
weights themselves; the mean takes their place where it is asked for:

    average = WeightAverage(encoder, decoder, ema_decay=0.999)
    average.after_step()       # after each step of the optimizer
    average.end_epoch(epoch)   # after an epoch's last step
    with average.in_place():   # here the model has the mean weights
        ...

Batch normalisation's means and variances, of an encoder that is trained, are averaged as the weights are. That is an
approximation, and a good one as long as the weights move slowly: the exact numbers are those that the averaged network
meets, and would take a pass over all photos.
"""

import contextlib

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from captioning.storage.tensors import check_tensors
from utils import UserError, short


class WeightAverage:
    """The mean of what is trained of an encoder and a decoder; with the defaults, simply what they are."""

    def __init__(self, encoder, decoder, ema_decay=0.0, average_last=1):
        """
        :param encoder, decoder: on their device; what requires gradients now is averaged, the rest does not change
        :param ema_decay: share of the moving average that each step keeps; 0 for none
        :param average_last: number of epochs after which the weights are averaged; 1 for none
        """
        self.ema_decay, self.average_last = ema_decay, average_last
        self.weights = {
            f"{part}.{name}": tensor
            for part, module in (("encoder", encoder), ("decoder", decoder))
            for name, tensor in trained_tensors(module).items()
        }  # the model's own, which training changes
        self.steps = 0  # that the moving average has seen
        self.moving = copy(self.weights) if ema_decay else {}  # the moving average
        self.epoch_ends = {}  # epoch -> its last weights, on the CPU

    @torch.no_grad()
    def after_step(self):
        """
        Let the moving average take in the weights.

        At first it keeps less than `ema_decay`, (1 + steps) / (10 + steps), so that the random weights of the beginning
        are soon forgotten.
        """
        if not self.ema_decay:
            return
        decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
        update = get_ema_multi_avg_fn(decay)  # moving * decay + weights * (1 - decay)
        update(list(self.moving.values()), list(self.weights.values()), None)
        self.steps += 1

    def end_epoch(self, epoch):
        """
        Keep the weights for the mean over the last epochs.

        :param epoch: its number; to say the same one twice, as a resumed run may, changes nothing
        """
        if self.average_last == 1:
            return
        self.epoch_ends[epoch] = copy(self.weights, "cpu")
        self.epoch_ends = dict(sorted(self.epoch_ends.items())[-self.average_last :])

    def mean(self):
        """:return: dict of name -> tensor; an empty one where nothing is averaged"""
        if self.moving:
            return self.moving
        ends = list(self.epoch_ends.values())
        return {name: torch.stack([end[name] for end in ends]).mean(dim=0) for name in self.weights} if ends else {}

    @contextlib.contextmanager
    def in_place(self):
        """
        Within this block, the model has the mean weights. After it, it has its own again, to the bit.

        :return: gives the model's own weights, a dict of name -> tensor; an empty one where nothing is averaged
        """
        mean = self.mean()
        own = copy(self.weights) if mean else {}
        put(mean, self.weights)
        try:
            yield own
        finally:
            put(own, self.weights)

    def state_dict(self):
        """:return: dict of numbers and tensors"""
        return {"steps": self.steps, "moving": self.moving, "epoch_ends": self.epoch_ends}

    def load_state_dict(self, state):
        """
        Go on from `state_dict`. What it lacks, because the run had no average before, begins with the weights as they
        are now: load those first.

        :param state: from a file, so nothing in it is trusted
        :raises UserError: if it does not fit the model
        """
        steps, moving, ends = state.get("steps", 0), state.get("moving", {}), state.get("epoch_ends", {})
        if type(steps) is not int or steps < 0:
            raise UserError(f"average: its steps are {short(steps)}, a whole number expected")
        for tensors in (*[moving] * bool(moving), *ends.values()):
            check_tensors(self.weights, tensors, "average")
        if not all(type(epoch) is int and epoch >= 0 for epoch in ends):
            raise UserError("average: the epochs of its weights are not whole numbers")
        if self.ema_decay:
            self.steps = steps if moving else 0
            put(moving or self.weights, self.moving)
        if self.average_last > 1:
            self.epoch_ends = {epoch: copy(tensors, "cpu") for epoch, tensors in sorted(ends.items())}


def trained_tensors(module):
    """
    :return: dict of name -> tensor, as in the module's state dict, of the parameters that are trained, with the
        statistics (floating-point buffers) of the layers that have them
    """
    saved, trained = module.state_dict(), {}
    for prefix, layer in module.named_modules():
        parameters = dict(layer.named_parameters(prefix, recurse=False))
        if any(parameter.requires_grad for parameter in parameters.values()):
            tensors = parameters | dict(layer.named_buffers(prefix, recurse=False))
            numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
            trained |= {name: tensor for name, tensor in numbers.items() if name in saved}
    return trained


def copy(tensors, device=None):
    """:return: dict of name -> a tensor with the same numbers in memory of its own, on the device if one is named"""
    return {name: tensor.detach().to(device, copy=True) for name, tensor in tensors.items()}


@torch.no_grad()
def put(numbers, tensors):
    """Write the numbers of a dict of tensors into the tensors of the same names."""
    for name, tensor in numbers.items():
        tensors[name].copy_(tensor)
