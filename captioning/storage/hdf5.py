"""
HDF5 files: written so that a full disk is an error like any other, opened only if they hold what they should, and read
row by row.
"""

import contextlib
import io
from pathlib import Path

import h5py
import numpy as np

from captioning.storage.files import check_file
from utils import UserError

MAX_IMAGE_SIZE = 4096  # pixels of a side that models are given; more is a mistake, or an attempt on the memory


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


def map_rows(path, name):
    """
    :return: the dataset `name` of an HDF5 file as an array that is read from disk row by row, as it is used

    A dataset that lies in one piece, as ours do, is mapped into memory: twenty times as fast as h5py for single rows,
    and shared by all workers. A compressed or chunked one is read through h5py.
    """
    rows = open_hdf5(path, name)[name]
    offset = rows.id.get_offset()
    if offset is None or rows.file.userblock_size > 0:  # bytes before it, from which offsets may or may not count
        return rows
    return np.memmap(path, dtype=rows.dtype, mode="r", offset=offset, shape=rows.shape)


def open_hdf5(path, name):
    """
    :return: an open h5py.File that holds the dataset `name`
    :raises UserError: if the file is missing, broken, or another
    """
    if not Path(path).exists():
        raise UserError(
            f"{path}: no such file; make it with create_input_files.py, or correct --data_folder or --data_name"
        )
    check_file(path)
    try:
        file = open_to_read(path)
        # A link may lead to a pipe, which would be waited for: it is looked at before it is followed.
        rows = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    except Exception as error:  # what a damaged file makes of the HDF5 library is not to be foreseen
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path}: is not a complete HDF5 file ({reason}); make it again") from None
    if isinstance(rows, h5py.Dataset) and (rows.external or rows.is_virtual):
        raise UserError(f"{path}: its '{name}' lie in another file; give one that holds them itself")
    if not isinstance(rows, h5py.Dataset) or rows.ndim != 4 or rows.size == 0:
        raise UserError(f"{path}: has no photos under '{name}'; make it again with create_input_files.py")
    if name == "images" and (rows.shape[1] != 3 or rows.shape[2] != rows.shape[3] or rows.dtype != np.uint8):
        raise UserError(f"{path}: photos of {rows.shape} {rows.dtype} found, (photos, 3, side, side) uint8 expected")
    if name == "images" and rows.shape[3] > MAX_IMAGE_SIZE:
        raise UserError(f"{path}: photos of {rows.shape[3]} pixels found, at most {MAX_IMAGE_SIZE} expected")
    return file


def open_to_read(path):
    """
    :return: an open h5py.File
    :raises OSError: if it is no HDF5 file
    """
    try:
        return h5py.File(path, "r", locking=False)  # files never change once they have their name
    except OSError as error:
        if "locking flag" in str(error):  # it is open elsewhere in this process, where it was opened with locks
            return h5py.File(path, "r")
        raise
