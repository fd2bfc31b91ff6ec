"""
Tensors in files, and the checkpoints made of them: written whole, read without running anything that is in them.
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from captioning.storage.files import atomic_path, check_file
from captioning.storage.hdf5 import MAX_IMAGE_SIZE
from utils import UserError, short

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


def load_checkpoint(path, device="cpu"):
    """
    Read a checkpoint without running any code that may be in it.

    :return: dict
    :raises UserError: if the file is missing, damaged, or not a checkpoint of train.py
    """
    checkpoint = load_tensors(path, device)
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
    :raises UserError: if a state dict does not fit the module, or has weights that are not finite numbers
    """
    own = module.state_dict()
    for key in dict.fromkeys([*own, *state_dict]):
        found, expected = (describe_tensor(tensors.get(key)) for tensors in (state_dict, own))
        if found != expected:
            raise UserError(f"{name}: '{str(key)[:80]}' is {found}, its model needs {expected}")
        if state_dict[key].is_meta or not state_dict[key].isfinite().all():
            raise UserError(f"{name}: '{key}' has values that are not finite numbers; the model is of no use")


def describe_tensor(tensor):
    """:return: what kind of tensor it is, in words"""
    if tensor is None:
        return "missing"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
