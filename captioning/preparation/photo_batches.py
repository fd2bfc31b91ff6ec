"""Photos that a user names, found and read: files, folders and patterns in, batches of pixels out."""

import collections
import contextlib
import glob
import os
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

from PIL import ExifTags, Image

from captioning.preparation.photos import open_photo, photo_formats, photo_reader
from captioning.screen import printable
from utils import UserError

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations of photos that are stored on their side


def find_photos(names):
    """
    Give the photos that the names stand for, sorted, each once. Files in a folder that are not photos are counted on
    the error stream.

    :param names: files, folders (of which the photos are taken, without subfolders) and patterns (** for subfolders,
        but not those that are links: they could lead back)
    :return: list of paths; a file that is named may be missing
    :raises UserError: if a folder or a pattern has no photo
    """
    paths = set()
    for name in names:
        if Path(name).is_dir():
            found = photos_of_folder(Path(name))
        elif glob.has_magic(name) and not Path(name).exists():
            found = files_of_pattern(name)
        else:
            found = [Path(name)]
        if not found:
            raise UserError(f"{name}: no photo found there; name a photo, a folder that has some, or a pattern")
        paths.update(found)
    if not paths:
        raise UserError("img: no photos given; name photos, folders or patterns")
    return sorted(paths, key=str)


def photos_of_folder(folder):
    """:return: list of the files in a folder whose names end as those of photos that can be read here"""
    formats = photo_formats()
    endings = {ending for ending, name in Image.registered_extensions().items() if name in formats}
    files = [path for path in folder.iterdir() if path.name[0] != "." and not path.is_dir()]
    others = collections.Counter(path.suffix.lower() or "without ending" for path in files)
    others = {ending: count for ending, count in others.items() if ending not in endings}
    if others:
        kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
        print(
            printable(f"{folder}: {sum(others.values())} files are not photos that can be read here ({kinds})"),
            file=sys.stderr,
        )
    return [path for path in files if path.suffix.lower() in endings]


def files_of_pattern(pattern):
    """:return: list of the files that match a pattern; those whose names begin with a dot only if the pattern does"""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    # Only as a whole part does ** stand for subfolders; within one it is as *.
    below = [part if part == "**" else re.sub(r"\*+", "*", part) for part in parts[first:]]
    base = Path(*parts[:first])
    found = (path for path in base.glob("/".join(below)) if path.is_file())  # follows no links where ** stands
    if any(part.startswith(".") for part in below):
        return list(found)
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(base).parts)]


def is_single_photo(names, paths):
    """:return: whether one photo was asked for by its own name, so that its caption needs no name beside it"""
    return len(names) == 1 and paths == [Path(names[0])]


def read_batches(paths, size, batch_size, workers=None):
    """
    Yield lists of up to `batch_size` pairs of a path and its photo (3, size, size) uint8, in order. Photos that cannot
    be read are named on the error stream.

    :param size: width and height of the result, in pixels
    :param workers: processes that read; 0 for this one alone, None for one per core if there are many photos
    :raises UserError: if no photo can be read
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, len(paths) // 64)  # a process takes seconds to start
    try:
        with photo_reader(workers) as read_photos:
            photos = readable_photos(paths, read_photos(paths, size))
            while batch := list(islice(photos, batch_size)):
                yield batch
    except BrokenProcessPool:
        raise UserError("workers: one was killed, most likely for lack of memory; run with fewer --workers") from None


def photo_size(path):
    """
    :return: (width, height) in pixels of any photo that `read_photo` reads, upright; only its first bytes are read
    :raises Exception: as `read_photo`
    """
    with open_photo(path) as photo:
        turned = False
        with contextlib.suppress(Exception):  # a damaged note says nothing, to `read_photo` too
            turned = photo.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
        return photo.size[::-1] if turned else photo.size


def readable_photos(paths, pixels):
    """Yield (path, image) of photos that can be read; for the others `pixels` has the reason, which is printed."""
    count, advice = 0, "give a JPEG, PNG or another common format"
    for path, image in zip(paths, pixels, strict=True):
        if not isinstance(image, str):
            count += 1
            yield path, image
        elif len(paths) == 1:
            raise UserError(f"{printable(path)}: cannot be read as a photo ({image}); {advice}")
        else:
            print(f"{printable(path)}: skipped, cannot be read as a photo ({image})", file=sys.stderr)
    if not count:
        raise UserError(f"img: none of {len(paths)} photos can be read; {advice}")
