"""
Several processes that train one model: what `torchrun --nproc_per_node=4 train.py` needs beyond `python train.py`.

torchrun starts the script several times and gives each process a number, its rank. Every process has the whole model
and computes its share of every batch; DistributedDataParallel adds up the gradients, so that all take the same step.
What only one may do (files, curves, words on the screen) is done by the first. Started without torchrun there is but
one process, and every function here leaves things as they are.
"""

import contextlib
import os
import signal
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils import UserError, allow_tf32, choose_device, seed_everything

PATIENCE = timedelta(minutes=30)  # with a process that is silent but alive; one that dies is noticed at once


@contextlib.contextmanager
def join_processes(device_name, tf32=True):
    """
    Let the processes that torchrun started work together within this block.

    Only the first of them prints. A fault is told once: by the first process that meets it.
    :param device_name: the config's
    :param tf32: as for `utils.choose_device`
    :return: gives this process's device; on a machine with GPUs each process has its own
    :raises UserError: if the device cannot be used, or when another process has ended before its work was done
    """
    if "WORLD_SIZE" not in os.environ:  # torchrun's
        yield choose_device(device_name, tf32)
        return
    check_launcher()
    store, rank, world_size = next(dist.rendezvous("env://"))  # the store keeps numbers for all, also for the last one
    try:
        device = choose_own_device(device_name, tf32)
        # Tensors on a GPU are exchanged by nccl, numbers and Python objects by gloo, which makes no GPU wait.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
        with contextlib.ExitStack() as stack:
            if rank > 0:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))  # noqa: PTH123
            yield device
    except (UserError, KeyboardInterrupt, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_lost_contact(error):
            raise
        if is_told(store):
            sys.exit(128 + getattr(error, "number", signal.SIGINT) if isinstance(error, KeyboardInterrupt) else 2)
        if not isinstance(error, RuntimeError):
            raise
        raise UserError(
            "another process of this run has ended, so the run ends here; its message, if any, is above; continue "
            "with --resume auto"
        ) from error
    dist.destroy_process_group()


def is_told(store):
    """:return: whether another process has said why the run ends; if not, this one is to"""
    try:
        return store.add("complaints", 1) > 1
    except dist.DistError:  # the first process keeps the store, and has ended
        return True


def check_launcher():
    """:raises UserError: if WORLD_SIZE is set, but not all that torchrun sets with it"""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    advice = "start several processes with torchrun, or unset WORLD_SIZE"
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE: set by another launcher, without {', '.join(missing)}; {advice}")
    for name in names[:-1]:
        if not os.environ[name].isdecimal():
            raise UserError(f"{name}: {os.environ[name][:80]!r} found, a whole number expected; {advice}")


def choose_own_device(name, tf32=True):
    """:return: torch.device; the GPU with this process's number on its machine, unless the CPU is asked for"""
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        device = choose_device(name, tf32)
        if device.type == "cuda":
            raise UserError(f"device: '{name}' found, but under torchrun each process takes its own GPU; leave it out")
        return device
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= gpus:
        raise UserError(f"nproc_per_node: more processes than the {gpus} GPUs here; start one process per GPU")
    torch.cuda.set_device(number)
    allow_tf32(tf32)
    return torch.device("cuda", number)


def is_lost_contact(error):
    """:return: whether an exception is what gloo, nccl or the store make of another process's end"""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def is_joined():
    """:return: whether this process is one of those that torchrun started"""
    return dist.is_available() and dist.is_initialized()


def get_rank():
    """:return: this process's number"""
    return dist.get_rank() if is_joined() else 0


def get_world_size():
    """:return: number of processes, on all machines together"""
    return dist.get_world_size() if is_joined() else 1


def is_first():
    """:return: whether this is the process that writes files and speaks"""
    return get_rank() == 0


def hide_bar():
    """:return: tqdm's `disable`: None, which shows the bar on a terminal, in the first process; True in the others"""
    return None if is_first() else True


def seed_own(seed):
    """Let each process draw its own dropout, once all have built the same model; the first goes on as it is."""
    if not is_first():
        seed_everything((seed + get_rank() * 1_000_003) % 2**32)


def own_share(items):
    """:return: every `world_size`-th of a sequence; each item goes to one process"""
    return items[get_rank() :: get_world_size()]


def join_shares(items):
    """:return: in all processes, the list of which each gives its `own_share`"""
    shares = gather(items)
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def gather(value):
    """:return: in all processes, a list of what each gives"""
    if not is_joined():
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_at_first(value):
    """:return: in the first process a list of what each gives; None in the others"""
    if not is_joined():
        return [value]
    values = [None] * get_world_size() if is_first() else None
    dist.gather_object(value, values)
    return values


def from_first(value):
    """:return: in all processes, what the first gives"""
    if not is_joined():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def highest(*numbers):
    """:return: in all processes, for each number the highest that a process gives, as an int"""
    if not is_joined():
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def average(tensor):
    """:return: in all processes, the mean of the tensors that each gives"""
    if not is_joined():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / get_world_size()


class Share(NamedTuple):
    """How much of a batch this process has: 1 is as much as the others, 0 nothing."""

    words: float = 1.0
    captions: float = 1.0


def share_of_batch(lengths, counts=True):
    """
    DistributedDataParallel takes the mean of the processes' gradients. Where their captions are of unequal lengths,
    that is the gradient of the whole batch's mean only if each process's own mean counts by its share.

    :param lengths: (N,), of this process's captions, counting <start> and <end>
    :param counts: False if they only stand in where this process has no share (see `datasets.BatchOrder`)
    :return: `Share`
    """
    if not is_joined():
        return Share()
    own = torch.tensor([(lengths - 1).sum(), len(lengths)], dtype=torch.float64) * counts
    return Share(*(own / average(own)).tolist())


def wrap(model, share_buffers):
    """
    :param model: module whose forward pass is all that training differentiates
    :param share_buffers: whether the first process's buffers (statistics of batch normalisation) are sent to all before
        each step; those of a frozen encoder do not change
    :return: the model in DistributedDataParallel, if there are several processes
    """
    if not is_joined():
        return model
    model = DistributedDataParallel(model)
    model.broadcast_buffers = share_buffers
    return model


def exchange(model, now):
    """
    :return: context for a forward and a backward pass through a model of `wrap`: gradients are added up over the
        processes if `now`, else they stay here and are added to the next ones
    """
    if now or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def copy_buffers(module):
    """Give the first process's buffers to all: each updates its own statistics of batch normalisation in a step."""
    if is_joined():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
