"""
Files, read without trust and written whole: what is written appears under its name when it is complete, or not at all;
what is read is checked before it is used, and nothing in it is run.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import h5py
import torch

from utils import UserError

try:
    import fcntl
except ImportError:  # Windows: there what a killed run left behind is not told from what another is writing
    fcntl = None


MAX_IMAGE_SIZE = 4096  # pixels of a side that models are given; more is a mistake, or an attempt on the memory


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
    # Version 1.10 of the format is the first whose structures have checksums.
    with FileForHdf5(path, "w+") as raw, h5py.File(raw, "w", libver="v110") as file:
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
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UserError(f"{path}: is not valid JSON ({error}); make or download it again") from None


def read_text(path):
    """
    :return: the content of a text file in UTF-8
    :raises UserError: if it is missing, no file, or another kind of text
    """
    check_file(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8 ({error.reason}); save it as UTF-8, or get it again") from None


def check_file(path):
    """:raises UserError: if there is no file of that name; a pipe or a device would be read for ever"""
    try:
        if Path(path).is_file():
            return
        found = "cannot be read (it is no file)" if Path(path).exists() else "no such file"
    except (OSError, ValueError) as error:  # a name that the file system cannot hold
        found = f"no such file ({getattr(error, 'strerror', None) or error})"
    raise UserError(f"{str(path)[:500]}: {found}; give the path of one")


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
    kinds = {"config": dict, "word_map": dict, "image_size": int, "encoder": dict, "decoder": dict}
    missing = set(kinds) - set(checkpoint)
    if missing:
        raise UserError(f"{path}: has no {', '.join(sorted(missing))}; this is not a checkpoint of train.py")
    for name, kind in kinds.items():
        if not isinstance(checkpoint[name], kind):
            found = type(checkpoint[name]).__name__
            raise UserError(f"{path}: its {name} is {found}, {kind.__name__} expected; get or make it again")
    if not 1 <= checkpoint["image_size"] <= MAX_IMAGE_SIZE:
        raise UserError(f"{path}: its image_size is {checkpoint['image_size']}, 1 to {MAX_IMAGE_SIZE} pixels expected")
    progress = checkpoint.setdefault("progress", {"epoch": 0})
    if not isinstance(progress, dict) or not all(isinstance(value, int | float) for value in progress.values()):
        raise UserError(f"{path}: its progress is no dict of numbers; get or make it again")
    return checkpoint


def load_tensors(path, device="cpu"):
    """
    :return: the dict in a file that torch.save wrote (a checkpoint, a network's state dict)
    :raises UserError: if the file is missing or damaged, or holds anything but plain types
    """
    check_file(path)
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch.save does not write; the line below says it
            content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wanted[1][:80]}" if wanted else "its pickle is not as torch.save writes it"
        raise UserError(
            f"{path}: is refused, and nothing of it was run: more than tensors and plain values found ({reason}); a "
            "checkpoint of the tutorial can be converted with convert_checkpoint.py"
        ) from error
    except Exception as error:  # a damaged file fails in a dozen ways: zipfile, struct, key and type errors
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:150]
        if "weights_only" in reason:  # advice on how to load it nevertheless
            reason = "it is not in the format of torch.save"
        raise UserError(f"{path}: cannot be read as a file of tensors ({reason}); get or make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__} found, a dict of tensors expected")
    return content


def check_archive(path):
    """:raises ValueError: if a file of torch.save's zip format has changed since; torch.load compares no checksums"""
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\3\4":  # the format before PyTorch 1.6, which has none
            return
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has changed since it was saved: its checksum is another")


def check_weights(module, state_dict, name):
    """
    :param module: what the weights are for; it may be on the meta device, where only shapes are
    :raises UserError: if a state dict does not fit the module, or has weights that are no finite numbers
    """
    own = module.state_dict()
    for key in dict.fromkeys([*own, *state_dict]):
        found, expected = (describe(tensors.get(key)) for tensors in (state_dict, own))
        if found != expected:
            raise UserError(f"{name}: '{str(key)[:80]}' is {found}, its model needs {expected}")
        if state_dict[key].is_meta or not state_dict[key].isfinite().all():
            raise UserError(f"{name}: '{key}' has values that are no finite numbers; the model is of no use")


def short(value):
    """:return: a value as a message shows it"""
    return repr(value)[:80] if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def describe(tensor):
    """:return: what kind of tensor it is, in words"""
    if tensor is None:
        return "missing"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
