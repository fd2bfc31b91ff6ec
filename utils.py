"""What every script shares: clear errors, its command line, seeds, devices."""

import contextlib
import errno
import io
import os
import random
import re
import signal
import sys
import threading

import numpy as np
import torch
import tyro

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the user can mend. One line: which file or field, what was found, what was expected, what to do."""


class Stopped(KeyboardInterrupt):
    """A signal asked the script to end."""

    def __init__(self, number, message=""):
        """
        :param number: of the signal
        :param message: what to tell the user; default its name
        """
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.number = number


def run_script(main, config_class, args=None):
    """
    Read a script's config from the command line and run its `main(config)`.

    :param main: function of one argument, an instance of `config_class`
    :param config_class: the script's dataclass; its comments become the help text
    :param args: list of command line words, default the process's own
    Exits with 2 and one line on the error stream after a UserError, with 130 after Ctrl-C, with 143 after SIGTERM; any
    other exception keeps its traceback.
    """

    def stop(number, _):  # an exception, as Ctrl-C is: temporary files and workers are cleaned away
        raise Stopped(number)

    def excepthook(args):  # TensorBoard writes in a thread, and raises the same again in ours
        if getattr(args.exc_value, "errno", None) not in FULL_DISK:
            threading.__excepthook__(args)

    before = signal.signal(signal.SIGTERM, stop)
    threading.excepthook = excepthook
    config = None
    try:
        config = parse_args(config_class, args)
        main(config)
    except UserError as error:
        if config is None and os.environ.get("RANK", "0") != "0":  # torchrun's other processes read the same words
            sys.exit(2)
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        print(f"error: {error}; make room on the disk and run it again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as reason:
        print(str(reason) or "stopped", file=sys.stderr)
        sys.exit(128 + getattr(reason, "number", signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)
        threading.excepthook = threading.__excepthook__


def one_line(error):
    """:return: a UserError's text, without what a terminal would take for commands: it may quote a hostile file"""
    last_line = str(error).strip().split("\n")[-1]  # a DataLoader's worker puts its traceback before it
    return "".join(c if c.isprintable() else "?" for c in last_line.removeprefix("utils.UserError: "))


def short(value):
    """:return: a value as a message shows it, whatever a file put there"""
    if isinstance(value, int) and value.bit_length() > 64:  # thousands of digits are slow to write, or refused
        return "a number of many digits"
    return repr(value)[:80] if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def parse_args(config_class, args=None):
    """Build `config_class` from the command line; a wrong option is a UserError of one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config_class, args=args, use_underscores=True)
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        lines = re.findall(r"^│ (.*) │$", complaint.getvalue(), flags=re.MULTILINE)  # tyro draws a box
        words = " ".join(line for line in lines if not set(line) <= {" ", "─"})
        raise UserError(" ".join(words.split())) from None


def seed_everything(seed, deterministic=False):
    """
    Seed Python's, NumPy's and PyTorch's random numbers (all devices).

    :param deterministic: let GPUs too do sums in one fixed order, so that two runs are equal to the last bit
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products; read at the first of them
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from the global generator
    torch.manual_seed(seed)


def choose_device(name):
    """:return: torch.device; 'auto' is a GPU if there is one"""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)  # is it there?
        return device
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        reason = str(error).split("\n")[0]
        raise UserError(
            f"device: '{name}' cannot be used ({reason}); 'auto', 'cpu' or a GPU such as 'cuda' expected"
        ) from error


def choose_autocast(precision, device):
    """:return: a context within which matrix products are done in this precision"""
    types = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in types:
        raise UserError(f"precision: '{precision}' found, one of {', '.join(types)} expected")
    if types[precision] is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=types[precision])
