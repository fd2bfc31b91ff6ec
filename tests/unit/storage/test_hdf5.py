"""HDF5 files are read as they are, wherever they are open too, and links out of them are not followed."""

import os

import h5py
import numpy as np
import pytest

from captioning.storage.hdf5 import map_rows, open_hdf5
from utils import UserError


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)


@pytest.fixture
def path(tmp_path, images):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["images"] = images
    return tmp_path / "a.hdf5"


@pytest.mark.parametrize("before", [0, 512, 2048])
def test_rows_are_right_where_bytes_were_put_before_the_file(path, images, before):
    path.write_bytes(bytes(before) + path.read_bytes())
    assert np.array_equal(map_rows(path, "images")[:], images)


def test_rows_are_right_where_the_file_was_made_with_a_user_block(tmp_path, images):
    with h5py.File(tmp_path / "b.hdf5", "w", userblock_size=512) as file:
        file["images"] = images
    assert np.array_equal(map_rows(tmp_path / "b.hdf5", "images")[:], images)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_that_is_open_elsewhere_in_the_process_is_not_called_damaged(path, images, mode):
    with h5py.File(path, mode):
        assert np.array_equal(map_rows(path, "images")[:], images)


def test_a_link_to_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "c.hdf5", "w") as file:
        file["images"] = h5py.ExternalLink(str(tmp_path / "pipe"), "images")
    with pytest.raises(UserError, match="c.hdf5: has no photos under 'images'"):
        open_hdf5(tmp_path / "c.hdf5", "images")
