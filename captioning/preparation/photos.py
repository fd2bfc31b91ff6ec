"""Reading photos: any common format in, upright RGB pixels of one size out, one at a time or in many processes."""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.nn.functional import interpolate

# Formats of photos only. Pillow also opens some that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# A large JPEG is decoded at a half, a quarter or an eighth, but never below twice the size that is asked for:
# the pixels then differ from those of a full decode by about 0.2 of 255 (see benchmarks/preprocess.py).
DRAFT_GAP = 2
# What undoes each EXIF orientation. 1, and anything else, is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_photo(path, size):
    """
    Read a photo, stretched to a square as the field's tutorial does.

    :param path: of a JPEG, PNG, WebP, GIF (its first frame), BMP, TIFF or PPM file
    :param size: width and height of the result, in pixels
    :return: (3, size, size) uint8, RGB, upright
    :raises Exception: Pillow's many kinds, when the file is missing, damaged, no photo, or a decompression bomb
    """
    if not Path(path).is_file():  # a pipe would wait for ever
        raise OSError("is missing, or is no file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of notes beside the pixels that are not as they should be
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as photo:
            photo.draft(None, (DRAFT_GAP * size, DRAFT_GAP * size))  # does nothing unless it is a JPEG
            pixels = np.array(upright(to_rgb(photo), exif_orientation(photo)))  # (H, W, 3)
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W)
    # The tutorial's filter. Pillow has it too, three times slower; they differ by 1 of 255, in a pixel of 200.
    pixels = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)  # (1, 3, size, size)
    return pixels[0].contiguous().numpy()  # (3, size, size)


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


def upright(photo, orientation):
    """
    :return: the Pillow image turned as its EXIF orientation asks for
    """
    return photo.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else photo


def exif_orientation(photo):
    """
    :param photo: Pillow image file that has been loaded
    :return: its EXIF orientation, 1 (upright) where there is none or where it cannot be read
    """
    try:
        return photo.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged note beside sound pixels is no reason to lose the photo
        return 1


@contextlib.contextmanager
def photo_reader(workers, chunk=8):
    """
    Give a function `read_photos(paths, size)` that reads many photos in parallel.

    It is a generator of one item a path, in order: (3, size, size) uint8, or a line that says why there is none. Only a
    few photos a worker are in memory at a time. It raises BrokenProcessPool if a worker was killed (most often for
    want of memory). The workers end with the block, and also when this process is killed.

    :param workers: number of processes; 0 reads in this process
    :param chunk: photos that a worker takes at a time
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
    except Exception as error:  # what a damaged file makes of a decoder is not to be foreseen
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return " ".join(f"{type(error).__name__}: {reason}".split())


def _start_worker():
    """Use one core, leave Ctrl-C to the main process, and end when that one ends, in whichever way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
