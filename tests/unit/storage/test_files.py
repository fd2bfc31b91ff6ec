"""Temporary files belong to who made them: nobody else's is written over, and no link is followed."""

import errno
import os

import pytest

from captioning.storage.files import atomic_path, check_not_there, remove_leftovers
from utils import UserError


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


def test_what_is_not_a_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_text("old")
    for name, predecessor in (("pipe", None), ("folder", None), ("a", tmp_path / "folder")):
        found = predecessor.name if predecessor else name
        with (
            pytest.raises(UserError, match=rf"{name}: .*{found} is there and is not a file\); .* untouched"),
            atomic_path(tmp_path / name, predecessor) as temporary,
        ):
            temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "old" and (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder", "pipe"]
    with pytest.raises(UserError, match="^output: .*pipe is there and is not a file; name another"):
        check_not_there("output", tmp_path / "pipe", overwrite=True)


@pytest.mark.parametrize("name", [".a.123.tmp", ".a.0123456789abcdef.tmp", ".a.0123456789abcdef.old.tmp"])
def test_what_a_killed_run_left_is_removed(tmp_path, name):
    (tmp_path / name).touch()
    remove_leftovers(tmp_path, "a")
    assert not list(tmp_path.iterdir())


def fail_with(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


def test_a_lock_that_another_process_holds_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "a").write_bytes(b"before")
    monkeypatch.setattr(fcntl, "flock", fail_with(errno.EWOULDBLOCK))
    with (
        pytest.raises(UserError, match="a: could not be written .another process has locked"),
        atomic_path(tmp_path / "a"),
    ):
        pytest.fail("the block is not entered")
    assert (tmp_path / "a").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_drive_without_locks_can_be_written_to_and_keeps_what_it_cannot_tell_from_a_leftover(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", fail_with(errno.ENOLCK))
    (tmp_path / ".b.0123456789abcdef.tmp").touch()
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"new")
    remove_leftovers(tmp_path, "a|b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.0123456789abcdef.tmp", "a"]
