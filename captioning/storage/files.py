"""
Files written whole and read without trust: what is written appears under its name when it is complete, or not at all;
text and JSON are checked before they are used.
"""

import collections
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from pathlib import Path

from utils import UserError

try:
    import fcntl
except ImportError:  # Windows: there what a killed run left behind is not told from what another is writing
    fcntl = None


@contextlib.contextmanager
def atomic_path(path, predecessor=None):
    """
    Give a temporary path beside `path` which becomes `path` when the block ends well, and vanishes when it does not.

    The content is flushed to disk before the rename, so that a crash leaves the old file or the new, never a half.
    :param predecessor: path beside it that the old file gets, only once the new one has its name; None drops the old
    :raises UserError: if the file cannot be written (disk full, no permission, a folder or a pipe of that name)
    """
    path = Path(path)
    token = secrets.token_hex(8)  # a process id may be another container's too
    temporary, old = (path.with_name(f".{path.name}.{token}.{kind}tmp") for kind in ("", "old."))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for one in filter(None, (path, predecessor)):
            if Path(one).exists() and not Path(one).is_file():
                raise FileExistsError(errno.EEXIST, f"{Path(one).name} is there and is not a file")
        with open(temporary, "xb", opener=open_no_link) as file:  # noqa: PTH123  Path.open takes no opener
            if not lock(file):  # else nobody takes it, until the end, for what a killed run left behind
                file.close()  # Windows, which has no such locks, renames no open file either
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


def open_no_link(path, flags):
    """Open a file for `open`, but never through a link that somebody has put there."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def lock(file):
    """
    Lock an open file for this process until it ends, however it ends.

    :return: False where there are no such locks: on Windows, on some network drives
    :raises OSError: if another process has locked the file, or removed it
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BlockingIOError(errno.EAGAIN, f"another process has locked {file.name}") from None
    except (OSError, AttributeError):
        return False
    if os.fstat(file.fileno()).st_nlink == 0:  # another took it for a leftover, just before
        raise FileNotFoundError(errno.ENOENT, f"another process has removed {file.name}")
    return True


def remove_leftovers(folder, names):
    """
    Remove the temporary files of `atomic_path` that killed processes left in a folder, and none that is being written.

    :param names: regular expression of the names that the files were to get
    """
    ours = re.compile(rf"\.+({names})(\.[0-9a-f]+\.(old\.)?tmp)+")
    for path in Path(folder).glob(".*.tmp"):
        if ours.fullmatch(path.name):
            with contextlib.suppress(OSError), path.open("rb+") as file:  # it may vanish meanwhile
                if lock(file):
                    path.unlink()


def check_not_there(name, path, overwrite):
    """
    :param name: of the option that says where to write
    :param path: that it names, or None
    :param overwrite: whether what is there may be replaced
    :raises UserError: if writing would replace a file that may not be, or a folder or pipe
    """
    if path and Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{name}: {path} is there and is not a file; name another")
    if path and Path(path).exists() and not overwrite:
        raise UserError(f"{name}: {path} is there already; name another file, or add --overwrite")


def check_not_an_input(name, path, inputs):
    """
    :param name: of the option that says where to write
    :param path: that it names, or None
    :param inputs: list of the paths that are read, or None among them
    :raises UserError: if writing would replace what is read
    """
    for other in inputs if path else ():
        if other and Path(other).exists() and Path(path).exists() and Path(path).samefile(other):
            raise UserError(f"{name}: '{path}' found, but that file is read here; name another, so that it is kept")


def save_json(content, path):
    """Write `content` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def load_json(path):
    """
    :return: the content of a JSON file
    :raises UserError: if the file is missing, or not JSON, or names a thing twice
    """
    try:
        return parse_json(read_text(path))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UserError(f"{path}: is not valid JSON ({error}); make or download it again") from None


def parse_json(text):
    """
    :return: the content of a text in JSON
    :raises ValueError: if it is not JSON, or an object has a key twice: of two values one would be lost
    :raises RecursionError: if it is nested too deep
    """

    def to_dict(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"an object has {name[:60]!r} twice")
        return content

    return json.loads(text, object_pairs_hook=to_dict)


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
        raise UserError(f"{path}: is not text in UTF-8 ({error.reason}); save it as UTF-8, or get it again") from None


def check_file(path):
    """:raises UserError: if there is no file of that name; a pipe or a device would be read for ever"""
    try:
        if Path(path).is_file():
            return
        found = "cannot be read (it is not a file)" if Path(path).exists() else "no such file"
    except (OSError, ValueError) as error:  # a name that the file system cannot hold
        found = f"no such file ({getattr(error, 'strerror', None) or error})"
    raise UserError(f"{str(path)[:500]}: {found}; give the path of a file")
