"""Reading photos: any common format in, upright RGB pixels of one size out, one at a time or in many processes."""

import collections
import contextlib
import functools
import itertools
import mmap
import multiprocessing
import os
import re
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError, features

from captioning.storage.open_files import allow_open_files

# A large JPEG is decoded at a half, a quarter or an eighth, but never below twice the size that is asked for:
# the pixels then differ from those of a full decode by about 0.2 of 255 (see benchmarks/preprocess.py).
DRAFT_GAP = 2
MAX_SCANS = 100  # of a JPEG; a progressive one usually has ten, and a small file of thousands takes minutes to decode
START, SCAN, END = 0xD8, 0xDA, 0xD9  # markers in a JPEG
NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # 0 and D0 to D7 stand within a scan
FILES_OF_WORKER = 4  # open ones: its pipes
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")


@functools.cache
def photo_formats():
    """:return: Pillow's names of the formats that are read: of photos only, as it also opens some that run programs"""
    formats = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
    return (*formats, "AVIF") if "avif" in features.modules and features.check("avif") else formats


def read_photo(path, size):
    """
    Read a photo, stretched to a square as the field's tutorial does.

    :param path: of a JPEG, PNG, WebP, GIF (its first frame), BMP, TIFF or PPM file, or AVIF where Pillow can
    :param size: width and height of the result, in pixels
    :return: (3, size, size) uint8, RGB, upright
    :raises Exception: Pillow's many kinds, when the file is missing, damaged, no photo, or a decompression bomb
    """
    with open_photo(path) as photo:
        full_size = photo.size
        photo.draft(None, (DRAFT_GAP * size, DRAFT_GAP * size))  # does nothing unless it is a JPEG
        refuse_bomb(photo, full_size)
        photo.load()
        with contextlib.suppress(Exception):  # a damaged note beside sound pixels is no reason to lose the photo
            ImageOps.exif_transpose(photo, in_place=True)
        square = to_rgb(photo).resize((size, size), Image.Resampling.BILINEAR)  # antialiased, as the tutorial's
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))  # (3, size, size)


@contextlib.contextmanager
def open_photo(path):
    """Give a Pillow image file, not decoded yet, and keep warnings about it from the screen meanwhile."""
    if not Path(path).is_file():  # a pipe would wait for ever
        raise OSError("is missing, or is not a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about notes beside the pixels that are not as they should be
        with image_file(path) as photo:
            yield photo


def image_file(path):
    """:return: Pillow image file, not decoded yet; a JPEG of any size, as it may be decoded at an eighth of that"""
    try:
        return Image.open(path, formats=photo_formats())
    except Image.DecompressionBombError:
        with Path(path).open("rb") as file:
            is_jpeg = file.read(3) == b"\xff\xd8\xff"
        if not is_jpeg:
            raise
        return JpegImagePlugin.JpegImageFile(path)


def refuse_bomb(photo, full_size):
    """
    :param photo: Pillow image file, set to the size that it is to be decoded at
    :param full_size: its width and height before that
    :raises ValueError: if decoding would take more memory or time than a photo's should
    """
    scans = count_scans(photo.filename) if isinstance(photo, JpegImagePlugin.JpegImageFile) else 1
    if scans > MAX_SCANS:
        raise ValueError(f"is a JPEG of {scans} scans, at most {MAX_SCANS} expected; save it again")
    width, height = full_size if scans > 1 else photo.size  # of several scans, all of the photo must be in memory
    if width * height > Image.MAX_IMAGE_PIXELS:
        megapixels, limit = width * height / 1e6, Image.MAX_IMAGE_PIXELS / 1e6
        raise ValueError(f"has {megapixels:.0f} megapixels, at most {limit:.0f} expected; save it smaller")


def count_scans(path):
    """:return: in how many passes a JPEG file stores its photo"""
    scans, place = 0, 0
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while found := NEXT_MARKER.search(content, place):
            marker, place = content[found.start() + 1], found.end()
            if marker == END:
                break
            if marker != START:  # all others are followed by their length
                place += int.from_bytes(content[place : place + 2], "big")
            scans += int(marker == SCAN)
    return scans


def to_rgb(photo):
    """
    :param photo: Pillow image of any mode
    :return: Pillow image of mode RGB; transparency is dropped, 16 bits become 8
    :raises ValueError: for floating-point pixels, whose range nobody knows
    """
    if photo.mode == "F":
        raise ValueError("has floating-point pixels; save it with 8 bits")
    if photo.mode.startswith("I"):  # Pillow would clip 16-bit grey to 255 rather than scale it
        photo = Image.fromarray((np.asarray(photo).clip(0, 65535) // 257).astype(np.uint8))
    return photo.convert("RGB")


@contextlib.contextmanager
def photo_reader(workers, chunk=8):
    """
    Give a function `read_photos(paths, size)` that reads many photos in parallel.

    It is a generator of one item a path, in order: (3, size, size) uint8, or a line that says why there is none. Only a
    few photos a worker are in memory at a time. It raises BrokenProcessPool if a worker was killed (most often for
    want of memory). The workers end with the block, and also when this process is killed.

    :param workers: number of processes; 0 reads in this process
    :param chunk: photos that a worker takes at a time
    :raises UserError: if this process may not open files enough for the workers
    """
    if not workers:
        yield lambda paths, size: (_photo_or_reason(path, size) for path in paths)
        return

    def read_photos(paths, size):
        chunks = (paths[i : i + chunk] for i in range(0, len(paths), chunk))
        waiting = collections.deque(submit(some, size) for some in itertools.islice(chunks, 3 * workers))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(submit(some, size) for some in itertools.islice(chunks, 1))
            yield from done

    allow_open_files(workers, FILES_OF_WORKER)
    # Never a plain fork: it copies locks that threads of this process may hold, and Windows has none.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=_start_worker)
    submit = functools.partial(pool.submit, _read_chunk)
    try:
        yield read_photos
    finally:
        pool.shutdown(cancel_futures=True)


def _read_chunk(paths, size):
    return [_photo_or_reason(path, size) for path in paths]


def _photo_or_reason(path, size):
    try:
        return read_photo(path, size)
    except UnidentifiedImageError:
        return describe_format(path)
    except Exception as error:  # what a damaged file makes of a decoder is not to be foreseen
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return " ".join(f"{type(error).__name__}: {reason}".split())


def describe_format(path):
    """:return: why a file cannot be read that is of none of the formats, or damaged at its very start"""
    with Path(path).open("rb") as file:
        start = file.read(12)
    if start[4:] in HEIC_BRANDS:
        return "is a HEIC photo, which cannot be read here; convert it to JPEG"
    if start[4:8] == b"ftyp":
        return f"is a photo or film of type {start[8:]!r}, which cannot be read here; convert it to JPEG"
    return f"is damaged, or of no format that can be read here ({', '.join(photo_formats())})"


def _start_worker():
    """Leave Ctrl-C to the main process, and end when that one ends, in whichever way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def num_cores():
    """:return: number of cores that this process may use"""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
