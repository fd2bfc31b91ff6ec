"""
Tensors in files, and the checkpoints made of them: written whole, read without running anything that is in them.
"""

import os
import warnings
import zipfile
from pathlib import Path

import torch

from captioning.storage.files import atomic_path, check_file
from captioning.storage.hdf5 import MAX_IMAGE_SIZE
from captioning.storage.unpickling import ZIP_MAGIC, UnlistedName, check_pickle
from utils import UserError, short

MOST_SHARING = 4  # so many tensors may, on average, share the bytes of a file: tied weights do
MOST_VALUES = 2_000_000  # in a file of tensors, where each takes a byte or more; a word map has one per word
MOST_LEVELS = 32  # of dicts and lists within each other
# What code that takes up a state may raise where a file has a part of another kind than it should.
OTHER_KIND = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
FORMAT = 1  # of checkpoints; a higher one has parts that this code would not understand


def save_checkpoint(content, path, predecessor=None):
    """
    Write a checkpoint, atomically, with the version of its format.

    :param content: dict of state dicts, numbers, strings, lists and dicts: plain types only, so that
        `load_checkpoint` needs to run no code of the file's
    :param predecessor: path that the old file gets; None drops it
    :raises UserError: if the file cannot be written; the old one is then untouched
    """
    with atomic_path(path, predecessor) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save({"format": FORMAT, **content}, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(error) from error


def load_checkpoint(path):
    """
    Read a checkpoint without running any code that may be in it.

    :return: dict
    :raises UserError: if the file is missing, damaged, or not a checkpoint of train.py
    """
    checkpoint = load_tensors(path)
    version = checkpoint.get("format", FORMAT)  # files written before there were versions have none
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise UserError(
            f"{path}: format {short(version)} found, 1 to {FORMAT} expected; update this project to read it"
        )
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
        raise UserError(f"{path}: its progress is not a dict of numbers; get or make it again")
    return checkpoint


def load_tensors(path):
    """
    :return: the dict in a file that torch.save wrote (a checkpoint, a network's state dict)
    :raises UserError: if the file is missing or damaged, or holds anything but plain types
    """
    check_file(path)
    try:
        new_format = check_archive(path)
        check_pickle(path)
        # Mapped, a file is not copied into memory twice; Windows lets nothing replace a mapped file.
        mapped = new_format and os.name != "nt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storages of the kind that old PyTorch wrote
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        content = PlainCopy(MOST_SHARING * Path(path).stat().st_size).copy(content)
    except UnlistedName as name:
        raise UserError(
            f"{path}: is refused, and nothing of it was run: more than tensors and plain values found (it asks for "
            f"{name}); a checkpoint of the tutorial can be converted with convert_checkpoint.py"
        ) from None
    except Exception as error:  # a damaged file fails in a dozen ways: zipfile, struct, key and type errors
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:150]
        if "weights_only" in reason:  # advice on how to load it nevertheless
            reason = "it is not in the format of torch.save"
        raise UserError(f"{path}: cannot be read as a file of tensors ({reason}); get or make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__} found, a dict of tensors expected")
    return content


class PlainCopy:
    """
    Copies what a file holds into dicts, lists and tensors that are nothing more.

    A dict from a file may have attributes that hide its methods, and a list that holds another twice, that one the next
    one twice, ... is small, but has no end for whoever walks through it.
    """

    def __init__(self, most_bytes):
        """:param most_bytes: that its tensors may have together; it may not have more values either"""
        self.bytes, self.values = most_bytes, min(most_bytes, MOST_VALUES)

    def copy(self, value, levels=MOST_LEVELS):
        """
        :return: the copy; tensors share their numbers with the original's
        :raises ValueError: if it is too large, nested too deep, or holds anything but tensors and plain values
        """
        self.values -= 1
        if levels < 0 or self.values < 0:
            raise ValueError(f"more than {MOST_LEVELS} levels, or more values than the file can hold, found in it")
        if isinstance(value, dict):
            return {self.key(key): self.copy(item, levels - 1) for key, item in dict.items(value)}
        if isinstance(value, list | tuple):
            kind = list if isinstance(value, list) else tuple
            return kind([self.copy(item, levels - 1) for item in kind.__iter__(value)])
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, int) and value.bit_length() > 64:
            raise ValueError(f"a number of {value.bit_length()} bits found in it")
        if value is None or isinstance(value, str | int | float):
            return value
        raise ValueError(f"a {type(value).__name__} found in it, tensors and plain values expected")

    def key(self, key):
        if not isinstance(key, str | int):
            raise ValueError(f"a {type(key).__name__} found in it where a name is expected")
        return key

    def tensor(self, tensor):
        self.bytes -= tensor.nbytes
        if self.bytes < 0:
            raise ValueError("its tensors have more numbers than the file")
        return torch.Tensor.detach(tensor)  # without attributes of its own


def check_archive(path):
    """
    Compare a file's checksums, which torch.load does not.

    :return: whether it is in torch.save's format since PyTorch 1.6, a zip file; the older one has no checksums
    :raises ValueError: if it has changed since it was saved
    """
    with Path(path).open("rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return False
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has changed since it was saved: its checksum is another")
    return True


def check_weights(module, state_dict, name):
    """
    :param module: what the weights are for; it may be on the meta device, where only shapes are
    :raises UserError: if a state dict does not fit the module, or has weights that cannot be (NaN, variances below 0)
    """
    check_tensors(module.state_dict(), state_dict, name)


def check_tensors(own, found, name):
    """
    :param own: dict of name -> tensor, of a model
    :param found: what is to take their place, from a file
    :param name: of the part, for messages
    :raises UserError: if it does not fit, or has weights that cannot be (NaN, variances below 0)
    """
    for key in dict.fromkeys([*own, *found]):
        kind, expected = (describe_tensor(tensors.get(key)) for tensors in (found, own))
        if kind != expected:
            raise UserError(f"{name}: '{str(key)[:80]}' is {kind}, its model needs {expected}")
        if not found[key].isfinite().all():
            raise UserError(f"{name}: '{str(key)[:80]}' has values that are not finite numbers; the model is of no use")
        if str(key).endswith("running_var") and (found[key] < 0).any():
            raise UserError(f"{name}: '{key[:80]}' has variances below 0; the model is of no use")


def describe_tensor(tensor):
    """:return: what kind of tensor it is, in words"""
    if tensor is None:
        return "missing"
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
