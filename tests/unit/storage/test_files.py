"""Temporary files belong to who made them: nobody else's is written over, and no link is followed."""

import os

import pytest

from captioning.storage.files import atomic_path, remove_leftovers


def test_two_writers_with_one_process_id_do_not_share_a_temporary_file(tmp_path):
    with atomic_path(tmp_path / "a") as one, atomic_path(tmp_path / "a") as other:  # as in two containers
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_that_was_put_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"kept")
    planted = tmp_path / f".a.{os.getpid()}.tmp"
    planted.symlink_to("precious")
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "precious").read_bytes() == b"kept" and planted.is_symlink()


@pytest.mark.parametrize("name", [".a.123.tmp", ".a.0123456789abcdef.tmp", ".a.0123456789abcdef.old.tmp"])
def test_what_a_killed_run_left_is_removed(tmp_path, name):
    (tmp_path / name).touch()
    remove_leftovers(tmp_path, "a")
    assert not list(tmp_path.iterdir())
