"""Which batches make one step of the optimizer, and how large its gradients may be."""

from typing import NamedTuple

import torch


class Window(NamedTuple):
    """Where a batch stands among those whose mean gradient makes one step of the optimizer."""

    begins: bool
    ends: bool
    size: int  # number of batches


def window_of(i, batches, accumulate):
    """
    :param i: the batch's place in the epoch
    :param batches: of the epoch
    :param accumulate: batches in a step
    :return: its `Window`; the epoch's last one may be shorter
    """
    first = i // accumulate * accumulate
    size = min(accumulate, batches - first)
    return Window(begins=i == first, ends=i + 1 == first + size, size=size)


def clip_gradients(parameters, how, limit):
    """
    :param how: 'value' cuts each number off at the limit; 'norm' scales all of them, so that their norm is at most that
        (Pascanu et al. 2013); 'none' leaves them
    :return: the norm of all gradients as they were, 0-d
    """
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if how == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
    elif how == "norm":
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
