"""
What every script shares: clear errors, the types of its settings, seeds, devices.

torch takes seconds to import, so the functions that use it import it themselves: `--help` comes at once.
"""

import contextlib
import os
import random
import signal
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

SPECIAL_WORDS = ("<pad>", "<unk>", "<start>", "<end>")  # of every word map, beside the words of the captions

# What the fields of a Config may be: `epochs: Count = 120` is checked, and explained by --help, by its type alone.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
CountOrZero = Annotated[int, Field(ge=0, le=1_000_000_000)]
Dimension = Annotated[int, Field(ge=1, le=100_000)]  # of a vector
GridSide = Annotated[int, Field(ge=1, le=256)]  # of the encoder's grid, in locations
Layers = Annotated[int, Field(ge=1, le=100)]
Block = Annotated[int, Field(ge=1, le=4)]  # of convolutions
Views = Annotated[int, Field(ge=0, le=1000)]  # of a photo
Several = Annotated[int, Field(ge=2, le=1000)]
ImageSize = Annotated[int, Field(ge=1, le=4096)]  # in pixels
BeamSize = Annotated[int, Field(ge=1, le=1000)]
BeamSizes = Annotated[tuple[BeamSize, ...], Field(min_length=1)]
BeamSizeOfPage = Annotated[int, Field(ge=1, le=20)]  # of app.py's slider
CaptionsOfPage = Annotated[int, Field(ge=1, le=10)]  # likewise
Port = Annotated[int, Field(ge=1, le=65535)]
CaptionsPerPhoto = Annotated[int, Field(ge=1, le=1000)]
CaptionLength = Annotated[int, Field(ge=1, le=1000)]  # in words
LengthOrZero = Annotated[int, Field(ge=0, le=1000)]  # in words
Workers = Annotated[int, Field(ge=0, le=1024)]  # processes
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as NumPy's
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]  # of a whole
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # share of an average that a step keeps
Split = Annotated[Literal["TRAIN", "VAL", "TEST"], BeforeValidator(lambda name: str(name).upper())]
Metric = Literal["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
Precision = Literal["float32", "bf16", "fp16"]
Ranking = Literal["none", "length", "reward"]  # of finished captions


class UserError(Exception):
    """What the user can put right, in one line: which file or field, what was found and expected, what to do."""


class Stopped(KeyboardInterrupt):
    """A signal asked the script to end."""

    def __init__(self, number, message=""):
        """
        :param number: of the signal
        :param message: what to tell the user; default its name
        """
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.number = number


def short(value):
    """:return: a value as a message shows it, whatever a file put there"""
    if isinstance(value, int) and value.bit_length() > 64:  # thousands of digits are slow to write, or refused
        return "a number of many digits"
    return repr(value)[:80] if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def is_out_of_memory(error):
    """:return: whether an exception of Python, NumPy or PyTorch says that memory, a GPU's or the computer's, is full"""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError")
    )


def seed_everything(seed, deterministic=False):
    """
    Seed Python's, NumPy's and PyTorch's random numbers (all devices).

    :param deterministic: let GPUs too do sums in one fixed order, so that two runs are equal to the last bit
    """
    import numpy as np
    import torch

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products; read at the first of them
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from the global generator
    torch.manual_seed(seed)


def choose_device(name, tf32=True):
    """
    :param name: 'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1' ...
    :param tf32: let a GPU's float32 products use TensorFloat-32
    :return: torch.device
    :raises UserError: if there is no such device
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # is it there, and can it hold numbers?
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        reason = str(error).split("\n")[0]
        raise UserError(
            f"device: '{name}' cannot be used ({reason}); 'auto', 'cpu' or a GPU such as 'cuda' expected"
        ) from error
    if device.type == "cuda":
        allow_tf32(tf32)
    return device


def allow_tf32(allowed):
    """Let float32 products on GPUs use TensorFloat-32, or not."""
    import torch

    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def choose_autocast(precision, device):
    """
    :param precision: 'float32', 'bf16' or 'fp16'
    :return: a context within which matrix products are done in this precision
    """
    import torch

    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def autocast_dtype(tensor):
    """:return: the type in which autocast would multiply this tensor; its own, where autocast is off"""
    import torch

    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
