"""What every script shares: clear errors, files that are whole or absent, seeds, checkpoints."""

import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro

try:
    import fcntl
except ImportError:  # Windows: there what a killed run left behind is not told from what another is writing
    fcntl = None


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
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch: large tensors in large pages, a fifth off a step

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
        last_line = str(error).strip().split("\n")[-1]  # a DataLoader's worker puts its traceback before it
        print(f"error: {last_line.removeprefix('utils.UserError: ')}", file=sys.stderr)
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


@contextlib.contextmanager
def atomic_path(path, predecessor=None):
    """
    Give a temporary path beside `path` which becomes `path` when the block ends well, and vanishes when it does not.

    The content is flushed to disk before the rename, so that a crash leaves the old file or the new, never a half.
    :param predecessor: path beside it that the old file gets, only once the new one has its name; None drops the old
    :raises UserError: if the file cannot be written (disk full, no permission)
    """
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}tmp") for kind in ("", "old."))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if not lock(file):  # else nobody takes it, until the end, for what a killed run left behind
                file.close()  # where there are no locks, an open file cannot be renamed either
            yield temporary
            flush(temporary)
            if predecessor and path.exists():
                link(path, old)
            temporary.replace(path)
            if old.exists():
                old.replace(predecessor)
            flush(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: could not be written ({reason}); what was there before is untouched") from error
    finally:
        for leftover in (temporary, old):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def flush(path):
    """Have the system write a file, or which files a folder has, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders, and does this by itself
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(path, second):
    """Give a file a second name, or a copy where the file system knows no links."""
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        shutil.copyfile(path, second)
        flush(second)


def lock(file):
    """:return: whether this process now holds the open file's lock, which ends with the process, however it ends"""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):  # another holds it; or there are no locks here
        return False
    return True


def remove_leftovers(folder, names):
    """
    Remove the temporary files of `atomic_path` that killed processes left in a folder, and none that is being written.

    :param names: regular expression of the names that the files were to get
    """
    ours = re.compile(rf"\.+({names})(\.\d+\.(old\.)?tmp)+")
    for path in Path(folder).glob(".*.tmp"):
        if ours.fullmatch(path.name):
            with contextlib.suppress(OSError), path.open("rb+") as file:  # it may vanish meanwhile
                if lock(file):
                    path.unlink()


class FileForHdf5(io.FileIO):
    """A file that fails once and then no more: HDF5 crashes at exit if a full disk kept it from closing a file."""

    error = None

    def write(self, data):
        rest = memoryview(data)
        while len(rest) and not self.error:  # the system may write less than it is given
            rest = rest[self.attempt(super().write, rest) :]
        return len(data)

    def truncate(self, size=None):
        return size if self.error else self.attempt(super().truncate, size)

    def attempt(self, work, argument):
        try:
            return work(argument)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def new_hdf5(path):
    """Give an open h5py.File; where the disk is full it raises OSError, as files do."""
    with FileForHdf5(path, "w+") as raw, h5py.File(raw, "w") as file:
        yield file
        file.flush()


def save_json(content, path):
    """Write `content` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def load_json(path):
    """
    :return: the content of a JSON file
    :raises UserError: if the file is missing, or not JSON
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); make or download it again") from None


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


def save_checkpoint(content, path, predecessor=None):
    """
    Write a checkpoint, atomically.

    :param content: dict of state dicts, numbers, strings, lists and dicts: plain types only, so that
        `load_checkpoint` needs to run no code of the file's
    :param predecessor: path that the old file gets; None drops it
    :raises UserError: if the file cannot be written; the old one is then untouched
    """
    with atomic_path(path, predecessor) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(error) from error


def load_checkpoint(path, device="cpu"):
    """
    Read a checkpoint without running any code that may be in it.

    :return: dict
    :raises UserError: if the file is missing, damaged, or not a checkpoint of train.py
    """
    checkpoint = load_tensors(path, device)
    missing = {"config", "word_map", "image_size", "encoder", "decoder"} - set(checkpoint)
    if missing:
        raise UserError(f"{path}: has no {', '.join(sorted(missing))}; this is not a checkpoint of train.py")
    return checkpoint


def load_tensors(path, device="cpu"):
    """
    :return: the dict in a file that torch.save wrote (a checkpoint, a network's state dict)
    :raises UserError: if the file is missing or damaged, or holds anything but plain types
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file fails in a dozen ways: zipfile, pickle, struct, key and type errors
        reason = str(error).strip().split("\n")[0][:150]
        raise UserError(f"{path}: cannot be read as a file of tensors ({reason}); get or make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__} found, a dict of tensors expected")
    return content
