"""Photos that a user names, found and read: files, folders and patterns in, batches of pixels out."""

import glob
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

from PIL import Image

from captioning.preparation.photos import photo_formats, photo_reader
from captioning.screen import printable
from utils import UserError


def find_photos(names):
    """
    Give the photos that the names stand for, sorted, each once.

    :param names: files, folders (of which the photos are taken, without subfolders) and patterns (** for subfolders)
    :return: list of paths; a file that is named may be missing
    :raises UserError: if a folder or a pattern has no photo
    """
    endings = {ending for ending, name in Image.registered_extensions().items() if name in photo_formats()}
    paths = set()
    for name in names:
        if Path(name).is_dir():
            found = {path for path in Path(name).iterdir() if path.suffix.lower() in endings and path.name[0] != "."}
        elif glob.has_magic(name) and not Path(name).exists():
            matches = glob.glob(name, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
            found = {Path(match) for match in matches if Path(match).is_file()}
        else:
            found = {Path(name)}
        if not found:
            raise UserError(f"{name}: no photo found there; name a photo, a folder that has some, or a pattern")
        paths |= found
    if not paths:
        raise UserError("img: no photos given; name photos, folders or patterns")
    return sorted(paths, key=str)


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
