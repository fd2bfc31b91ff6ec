"""
The tensors of pickled modules, without running anything that the file asks for.

A pickle is a small program: it names functions and classes, and its reader imports and calls them. Whoever wrote the
file decides what runs. Here every name is looked up in a short list of what a captioning model is made of. What is on
the list becomes a stand-in that does nothing; any other name ends the reading. Nothing is imported.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from captioning.storage.files import check_file
from utils import UserError

# The classes of such a model, of its optimizers and of what old PyTorch kept beside them.
INERT = {
    "models": "Encoder DecoderWithAttention Attention",
    "torch": "device",
    "torch.nn.modules.activation": "ReLU Sigmoid Softmax",
    "torch.nn.modules.batchnorm": "BatchNorm2d",
    "torch.nn.modules.container": "Sequential",
    "torch.nn.modules.conv": "Conv2d",
    "torch.nn.modules.dropout": "Dropout",
    "torch.nn.modules.linear": "Identity Linear",
    "torch.nn.modules.pooling": "AdaptiveAvgPool2d MaxPool2d",
    "torch.nn.modules.rnn": "LSTMCell",
    "torch.nn.modules.sparse": "Embedding",
    "torch.nn.parallel.data_parallel": "DataParallel",
    "torch.nn.backends.thnn": "_get_thnn_function_backend",
    "torch.optim.adam": "Adam",
    "torch.optim.adamw": "AdamW",
    "torch.optim.rmsprop": "RMSprop",
    "torch.optim.sgd": "SGD",
    "torchvision.models.resnet": "BasicBlock Bottleneck",
}
DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before PyTorch 1.6


class Inert:
    """Stands in for an object of any class: keeps the state that the pickle gives it, and does nothing."""

    state = None

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state


class StoredNumbers:
    """A storage in the file: a row of numbers of which tensors are made."""

    def __init__(self, kind, key, location, count, view=None):
        self.dtype, self.key, self.count = kind.dtype, key, count
        if view is not None:
            raise ValueError("a storage that is a piece of another found")


class StoredTensor:
    """A tensor in the file: which numbers of which storage, in which shape."""

    def __init__(self, storage, offset, size, stride, *others):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, state):
        """Leave out what old PyTorch kept here: hooks, and whether there is a gradient."""


class Unpickler(pickle._Unpickler):  # the one in Python: the one in C takes gigabytes when a damaged file says so
    """Knows what a captioning model is made of, as stand-ins, and nothing else."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}  # key -> StoredNumbers

    def find_class(self, module, name):
        """:raises UserError: if the pickle asks for anything that is not on the list"""
        if name in INERT.get(module, "").split():
            return type(name, (Inert,), {})
        if module in ("torch", "torch.cuda") and name in DTYPES:
            return type(name, (), {"dtype": DTYPES[name]})
        plain = {
            "builtins.dict": dict,
            "builtins.set": set,
            "collections.OrderedDict": OrderedDict,
            "collections.defaultdict": lambda *default: {},
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor": StoredTensor,
            "torch._utils._rebuild_tensor_v2": StoredTensor,
            "torch._utils._rebuild_parameter": lambda tensor, *others: tensor,
            "torch.nn.parameter.Parameter": lambda tensor, *others: tensor,  # before PyTorch 1.0
        }
        wanted = f"{module}.{name}".replace("__builtin__", "builtins")  # Python 2's name, which pickles keep
        if wanted not in plain:
            raise UserError(
                f"asks for {wanted[:80]!r}, which no pickled captioning model needs; the file is refused, and nothing "
                "of it was run"
            )
        return plain[wanted]

    def persistent_load(self, pickled_id):
        """:return: what torch.save keeps beside the pickle: a storage, or a class that comes with its source code"""
        kind, *values = pickled_id
        if kind == "module":
            return values[0]  # the class; its source is not looked at
        if kind != "storage":
            raise ValueError(f"{kind!r} found among its storages")
        storage = StoredNumbers(*values)
        return self.storages.setdefault(storage.key, storage)


def load_pickled_modules(path, names):
    """
    Read what `torch.save({"encoder": encoder, ...}, path)` wrote, with any PyTorch since 0.4.

    :param path: of the file
    :param names: of those modules in the pickled dict whose tensors are wanted
    :return: the dict, in which modules are `Inert`; and a dict of name -> state dict
    :raises UserError: if the file is missing, damaged or another, or asks for code
    """
    check_file(path)
    try:
        with Path(path).open("rb") as file:
            content, read_storage = open_zip(file) if file.read(4) == b"PK\3\4" else open_legacy(file)
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, not a dict")
            for name in names:
                if not isinstance(content.get(name), Inert):
                    raise UserError(f"has no pickled module '{name}'; give a checkpoint of the tutorial")
                children = content[name].state["_modules"]
                if list(children) == ["module"]:  # DataParallel is around it
                    content[name] = children["module"]
            return content, {name: read_tensors(content[name], read_storage) for name in names}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file fails in a dozen ways: zipfile, pickle, struct, key and type errors
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"{path}: cannot be read as a pickled checkpoint ({reason}); get it again") from error


def open_zip(file):
    """
    :param file: that PyTorch 1.6 or newer wrote: a zip file of a pickle and a record for each storage
    :return: the pickled object, and a function that gives a `StoredNumbers`'s bytes
    """
    archive = zipfile.ZipFile(file)
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError("it is compressed, which torch.save never does")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ValueError("its numbers are big-endian")

    def read_storage(storage):
        return archive.read(entries[f"data/{storage.key}"])  # checks its CRC-32

    return Unpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load(), read_storage


def open_legacy(file):
    """
    :param file: that PyTorch before 1.6 wrote: five pickles one after the other, then the storages
    :return: as of `open_zip`
    """
    file.seek(0)
    if Unpickler(file).load() != LEGACY_MAGIC:
        raise ValueError("it does not begin as torch.save begins its files")
    version, system = Unpickler(file).load(), Unpickler(file).load()
    if version != 1001 or not system["little_endian"]:
        raise ValueError(f"version {version!r} of a machine with other numbers found")
    unpickler = Unpickler(file)
    content, keys = unpickler.load(), Unpickler(file).load()

    places, end = {}, os.fstat(file.fileno()).st_size  # of each storage: where its numbers begin, and their bytes
    for key in keys:
        storage = unpickler.storages[key]
        [count] = struct.unpack("<q", file.read(8))
        size = count * storage.dtype.itemsize
        if count != storage.count or file.tell() + size > end:
            raise ValueError(f"{count} numbers found in storage {key!r}, {storage.count} expected; it was cut off")
        places[key] = file.tell(), size
        file.seek(size, os.SEEK_CUR)

    def read_storage(storage):
        start, size = places[storage.key]
        file.seek(start)
        return file.read(size)

    return content, read_storage


def read_tensors(module, read_storage):
    """
    :param module: `Inert`
    :param read_storage: function of a `StoredNumbers` to its bytes
    :return: dict of dotted name -> tensor, the parameters and buffers of the module and those within it
    """
    tensors, seen, waiting = {}, set(), [("", module)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:  # a module that holds itself would never end
            continue
        seen.add(id(module))
        for name, stored in [*module.state["_parameters"].items(), *module.state["_buffers"].items()]:
            if stored is not None:  # a layer without bias
                tensors[prefix + name] = read_tensor(stored, read_storage)
        waiting += [(f"{prefix}{name}.", child) for name, child in module.state["_modules"].items() if child]
    return tensors


def read_tensor(stored, read_storage):
    """
    :param stored: `StoredTensor`
    :return: tensor
    :raises ValueError: if it reaches beyond its storage
    """
    storage, start = stored.storage, stored.offset
    numbers = torch.frombuffer(bytearray(read_storage(storage)), dtype=storage.dtype)
    last = start + sum((n - 1) * step for n, step in zip(stored.size, stored.stride, strict=True))
    if len(numbers) != storage.count or min(start, *stored.size, *stored.stride, 0) < 0 or last >= storage.count:
        raise ValueError(f"a tensor of {tuple(stored.size)} reaches beyond its {len(numbers)} numbers")
    if math.prod(stored.size) > storage.count:
        raise ValueError(f"a tensor of {tuple(stored.size)} repeats its {len(numbers)} numbers")
    return numbers.as_strided(stored.size, stored.stride, start).clone()
