"""What a case of the table of broken and hostile files is, and the common ways to break a file."""

import json
import os
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """A file that is broken, and how the script that reads it must end."""

    run: str  # of hostile_files.RUNS
    file: str  # below the folder of sound files; {} stands for the dataset's name
    what: str  # how it is broken, in words
    change: object  # function that breaks it, given its path
    ends: str = "refused"  # or 'reported': the photo is named and left out; 'mended': a cache is made again;
    # 'same': refused, or as if nothing had happened
    says: str = ""  # what the line has to say; by default the file's name

    @property
    def name(self):
        return f"{self.run}: {self.file.format('*')} {self.what}"


def cut(share):
    """Keep a share of the file."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def write(content):
    """Put something else there: bytes, or a text."""
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_folder(path):
    path.unlink()
    path.mkdir()


def put_pipe(path):
    path.unlink()
    os.mkfifo(path)


def put_loop(path):
    path.unlink()
    path.symlink_to(path.name)


def put_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def flip(place, bit=4):
    """Change one bit; a place from 0 to 1 is a share of the file."""

    def change(path):
        content = bytearray(path.read_bytes())
        content[place if isinstance(place, int) else int(place * len(content))] ^= 1 << bit
        path.write_bytes(content)

    return change


ANY = {
    "is missing": lambda path: path.unlink(),
    "is empty": write(b""),
    "is cut off in the middle": cut(0.5),
    "is a folder": put_folder,
    "is a pipe that nobody writes to": put_pipe,
    "is a link to itself": put_loop,
    "is a device without an end": put_device,
    "is random bytes": write(np.random.default_rng(0).bytes(5000)),
    "is all zeros": write(bytes(5000)),
}


def any_of(run, file, but=()):
    """:return: cases of a file that is broken in all the common ways"""
    return [Case(run, file, what, change) for what, change in ANY.items() if what not in but]


def with_json(edit):
    """Change what is in a JSON file: `edit` changes it in place, or returns what takes its place."""

    def change(path):
        content = json.loads(path.read_text())
        changed = edit(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return change


def with_text(old, new):
    """Replace the first of a text's pieces."""

    def change(path):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def refused(run, file, changes, says=""):
    """:param changes: dict of what it is, in words -> function that does it"""
    return [Case(run, file, what, change, says=says) for what, change in changes.items()]
