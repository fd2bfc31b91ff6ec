"""
Pickles, read without running anything that they ask for.

A pickle is a small program: it names functions and classes, and its reader imports and calls them. Whoever wrote the
file decides what runs. Here every name is looked up in a short list of what files of tensors are made of. What is on
the list becomes a stand-in that does nothing; any other name ends the reading. Nothing is imported.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch

DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before PyTorch 1.6
ZIP_MAGIC = b"PK\3\4"  # what it writes first since


class UnlistedName(Exception):
    """A pickle asks for a function or a class that is not on the list: its text is the name."""


class Inert:
    """Stands in for an object of any class: keeps the state that the pickle gives it, and does nothing."""

    state = None

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state


class InertDict(dict):
    """Stands in for an OrderedDict and its like: keeps their items, and none of the attributes that hide methods."""

    def __init__(self, items=()):
        for key, value in items.items() if isinstance(items, dict) else items:
            check_key(key)
            self[key] = value

    def __setstate__(self, state):
        check_key(*state)


class StoredNumbers:
    """A storage in the file: a row of numbers of which tensors are made."""

    def __init__(self, kind, key, location, count, view=None):
        check_key(key)
        check_counts(count)
        self.dtype, self.key, self.count = kind.dtype, key, count
        if view is not None:
            raise ValueError("a storage that is a piece of another found")


class StoredTensor:
    """A tensor in the file: which numbers of which storage, in which shape."""

    def __init__(self, storage, offset, size, stride, *others):
        """:raises ValueError: if it reaches beyond its storage, or repeats numbers of it"""
        check_counts(offset, *size, *stride)
        reach = 0  # of the axes so far, from the innermost in the storage on: how far their last number is
        for step, count in sorted(zip(stride, size, strict=True)):
            if count > 1 and step <= reach:
                raise ValueError("a tensor found that repeats the numbers of its storage")
            reach += max(count - 1, 0) * step
        if offset + reach >= storage.count and math.prod(size) > 0:
            raise ValueError(f"a tensor found that reaches beyond the {storage.count} numbers of its storage")
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)

    def __setstate__(self, state):
        """Leave out what old PyTorch kept here: hooks, and whether there is a gradient."""


def stored_set(items=()):
    """Stands in for a set: a list of what is in it."""
    check_key(*items)
    return list(items)


PLAIN = {
    "_codecs.encode": lambda text, encoding: b"",  # how pickles for Python 2 write bytes
    "builtins.dict": InertDict,
    "builtins.set": stored_set,
    "collections.Counter": InertDict,
    "collections.OrderedDict": InertDict,
    "collections.defaultdict": lambda *default: InertDict(),
    "torch.Size": tuple,
    "torch.device": Inert,
    **{str(dtype): Inert() for dtype in DTYPES.values()},
    "torch._utils._rebuild_tensor": StoredTensor,
    "torch._utils._rebuild_tensor_v2": StoredTensor,
    "torch._utils._rebuild_parameter": lambda tensor, *others: tensor,
    "torch.nn.parameter.Parameter": lambda tensor, *others: tensor,  # before PyTorch 1.0
}


class Unpickler(pickle._Unpickler):  # the one in Python: the one in C takes gigabytes when a damaged file says so
    """Knows what tensors and plain values are made of, as stand-ins, and nothing else."""

    dispatch = dict(pickle._Unpickler.dispatch)
    for opcode in (pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8):  # torch.save writes none of them
        del dispatch[opcode[0]]

    def __init__(self, file, inert=()):
        """:param inert: full names of further classes that become `Inert`"""
        super().__init__(file)
        self.inert = inert
        self.storages = {}  # key -> StoredNumbers

    def find_class(self, module, name):
        """:raises UnlistedName: if the pickle asks for anything that is not on the list"""
        wanted = f"{module}.{name}".replace("__builtin__", "builtins")  # Python 2's name, which pickles keep
        if wanted in PLAIN:
            return PLAIN[wanted]
        if wanted in self.inert:
            return type(name, (Inert,), {})
        if module in ("torch", "torch.cuda") and name in DTYPES:
            return type(name, (), {"dtype": DTYPES[name]})
        raise UnlistedName(wanted[:80])

    def persistent_load(self, pickled_id):
        """:return: what torch.save keeps beside the pickle: a storage, or a class that comes with its source code"""
        kind, *values = pickled_id
        if kind == "module":
            return values[0]  # the class; its source is not looked at
        if kind != "storage":
            raise ValueError("something other than storages found beside the pickle")
        storage = StoredNumbers(*values)
        return self.storages.setdefault(storage.key, storage)

    def load_setitem(self):
        check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self):
        check_key(*self.stack[::2])  # all that came since the mark: keys and values by turns
        super().load_setitems()

    def load_dict(self):
        check_key(*self.stack[::2])
        super().load_dict()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict


def check_key(*keys):
    """
    See that keys of dicts are plain values, or stand-ins: to hash a tuple is to visit all that it holds, and one that
    holds the last one twice, 40 times over, would take for ever.

    :raises ValueError: if one is anything else
    """
    for key in keys:
        if not isinstance(key, str | int | float | bytes | None | Inert | StoredTensor):
            raise ValueError(f"a {type(key).__name__} found where a name or a number is expected")


def check_counts(*values):
    """:raises ValueError: if a value is not a whole number from 0 to 2**63"""
    for value in values:
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError("sizes found that are not whole numbers from 0")


def check_pickle(path):
    """
    See that a file of torch.save asks for nothing but tensors and plain values, and that its tensors lie in the file.

    :raises UnlistedName: if it asks for more
    :raises Exception: of many kinds, if the file is damaged
    """
    with Path(path).open("rb") as file:
        open_pickle(file)


def open_pickle(file, inert=()):
    """
    :param file: open, of torch.save, in the format of any PyTorch since 0.4
    :param inert: as for `Unpickler`
    :return: the pickled object, made of stand-ins, and a function that gives a `StoredNumbers`'s bytes
    """
    head = file.read(len(ZIP_MAGIC))
    return open_zip(file, inert) if head == ZIP_MAGIC else open_legacy(file, inert)


def open_zip(file, inert):
    """
    As `open_pickle`, of a file that PyTorch 1.6 or newer wrote: a zip file of a pickle and a record for each storage.
    """
    archive = zipfile.ZipFile(file)
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):  # which of the two would others read?
        raise ValueError("it has records of the same name")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError("it is compressed, which torch.save never does")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ValueError("its numbers are big-endian")

    def read_storage(storage):
        return archive.read(entries[f"data/{storage.key}"])  # checks its CRC-32

    unpickler = Unpickler(io.BytesIO(archive.read(entries["data.pkl"])), inert)
    content = unpickler.load()
    for storage in unpickler.storages.values():  # a reader that maps the file would go on into the next record
        if entries[f"data/{storage.key}"].file_size != storage.count * storage.dtype.itemsize:
            raise ValueError(f"a storage is not of the {storage.count} numbers that it should have")
    return content, read_storage


def open_legacy(file, inert):
    """
    As `open_pickle`, of a file that PyTorch before 1.6 wrote: five pickles one after the other, then the storages.
    """
    file.seek(0)
    if Unpickler(file).load() != LEGACY_MAGIC:
        raise ValueError("it does not begin as torch.save begins its files")
    version, system = Unpickler(file).load(), Unpickler(file).load()
    if version != 1001 or not system["little_endian"]:
        raise ValueError("it is of another version, or of a machine with other numbers")
    unpickler = Unpickler(file, inert)
    content, keys = unpickler.load(), Unpickler(file).load()

    places, end = {}, os.fstat(file.fileno()).st_size  # of each storage: where its numbers begin, and their bytes
    for key in keys:
        check_key(key)
        storage = unpickler.storages[key]
        [count] = struct.unpack("<q", file.read(8))
        size = count * storage.dtype.itemsize
        if count != storage.count or file.tell() + size > end:
            raise ValueError(f"{count} numbers found in a storage, {storage.count} expected; it was cut off")
        places[key] = file.tell(), size
        file.seek(size, os.SEEK_CUR)

    def read_storage(storage):
        start, size = places[storage.key]
        file.seek(start)
        return file.read(size)

    return content, read_storage
