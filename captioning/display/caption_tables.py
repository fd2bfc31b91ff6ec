"""
Photos in, captions out: finding photos, reading them, and printing and writing what was said about them.

This is what caption.py and blip.py share. It knows no model.
"""

import csv
import glob
import math
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from captioning.display import html_page as pages
from captioning.display.figures import attention_figure, save_figure, show_or_save
from captioning.preparation.photos import FORMATS, photo_reader
from captioning.storage.files import atomic_path, save_json
from utils import UserError

PAGES = (".html", ".htm")
ANY_NAME = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name may be no text; it keeps its bytes


class Captioned(NamedTuple):
    """A photo with its captions."""

    path: Path
    image: np.ndarray  # (3, S, S) uint8
    captions: list  # of dicts, best first: caption, words, log_prob, perplexity, score
    alphas: np.ndarray | None  # (T, P), where the model looked for each word of the best caption


def find_photos(names):
    """
    :param names: files, folders (of which the photos are taken, without subfolders) and patterns (** for subfolders)
    :return: list of paths, sorted, each once; a file that is named may be missing
    :raises UserError: if a folder or a pattern has no photo
    """
    endings = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
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
        raise UserError("img: nothing found; name photos, folders or patterns")
    return sorted(paths, key=str)


def is_alone(names, paths):
    """:return: whether it is one photo, called by its name; its caption then stands by itself"""
    return len(names) == 1 and paths == [Path(names[0])]


def read_batches(paths, size, batch_size, workers=None):
    """
    Yield lists of up to `batch_size` pairs of a path and its photo (3, size, size) uint8, in order. Photos that cannot
    be read are named on the error stream.

    :param size: width and height of the result, in pixels
    :param workers: processes that read; 0 for this one alone, None for one a core if there are many photos
    :raises UserError: if no photo can be read
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, len(paths) // 64)  # a process takes seconds to start
    try:
        with photo_reader(workers) as read_photos:
            photos = readable(paths, read_photos(paths, size))
            while batch := list(islice(photos, batch_size)):
                yield batch
    except BrokenProcessPool:
        raise UserError("workers: one was killed, most likely for want of memory; run with fewer --workers") from None


def readable(paths, pixels):
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


def describe(words, log_prob, score, ended):
    """
    :param log_prob: natural logarithm of the caption's probability
    :param score: what it was ranked by
    :param ended: whether the model ended it, not the longest length
    :return: dict of what there is to say about a caption, plain types only
    """
    steps = max(1, len(words) + ended)  # the end, too, was to be foreseen
    numbers = {"log_prob": log_prob, "perplexity": math.exp(min(700, -log_prob / steps)), "score": score}
    return {"caption": " ".join(words), "words": words, **numbers}


def show(photos, alone, drawn=False, figure=None, smooth=True):
    """
    Print each photo's captions, and draw its attention if `drawn`; then yield it on.

    :param photos: iterable of `Captioned`
    :param alone: there is one photo, so its name need not be said
    :param figure: file for the attention figure; None for a window, or for outputs/ without a display
    """
    for photo in photos:
        for i, each in enumerate(photo.captions):
            numbers = f"log-probability {each['log_prob']:.2f}, perplexity {each['perplexity']:.2f} a word"
            start = "" if alone else f"{printable(photo.path)}: " if i == 0 else "    "
            print(f"{start}{each['caption']}", numbers, sep="\n" if alone else "  # ")
        if drawn:
            image, words = photo.image.transpose(1, 2, 0), photo.captions[0]["words"]
            drawing = attention_figure(image, words, photo.alphas, smooth=smooth)
            path = figure or Path("outputs") / f"{photo.path.stem}_attention.png"
            written = save_figure(drawing, path) or path if figure else show_or_save(drawing, path)
            if written:
                print(f"Attention figure: {written}")
        yield photo


def check_output(output):
    """:raises UserError: unless captions can be written to `output`, a file's name or None"""
    if output is not None and (Path(output).is_dir() or Path(output).suffix.lower() not in (".csv", ".json", *PAGES)):
        raise UserError(f"output: '{output}' found, a file whose name ends in .csv, .json or .html expected")


def write_captions(photos, output, name, models, options, keep_alphas=False):
    """
    Go through the photos, and write their captions: image and caption to a .csv, everything to a .json, one page with
    photos to a .html.

    :param photos: iterable of `Captioned`
    :param output: file to write, or None
    :param name: of the model, for the page
    :param models: list of the models' files or folders
    :param options: dict of the settings, for the .json
    """
    suffix = Path(output or "").suffix.lower()
    if suffix in PAGES:
        rows = (on_page(photo, name) for photo in photos)
        pages.write_page(output, rows, f"Captions by {name}", ["Model: " + ", ".join(models)])
    else:
        rows = [as_dict(photo, keep_alphas) for photo in photos]
        if suffix == ".json":
            save_json({"models": models, "options": options, "photos": rows}, output)
        elif suffix == ".csv":
            with atomic_path(output) as part, part.open("w", newline="", **ANY_NAME) as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerows([("image", "caption"), *((row["file"], row["caption"]) for row in rows)])
    if output:
        print(f"Captions: {output}")


def printable(path):
    """:return: the path as text that can be printed, whatever bytes are in it"""
    return os.fsencode(path).decode("utf-8", errors="replace")


def as_dict(photo, keep_alphas):
    """:return: dict of all that is known of a photo but its pixels, plain types only"""
    row = {"file": str(photo.path), **photo.captions[0], "n_best": photo.captions}
    return row | {"alphas": photo.alphas.tolist()} if keep_alphas and photo.alphas is not None else row


def on_page(photo, model):
    """:return: `pages.Photo` with the best caption"""
    best = photo.captions[0]
    caption = pages.Caption(model, best["words"], photo.alphas, best["log_prob"])
    return pages.Photo(printable(photo.path), photo.image.transpose(1, 2, 0), [caption])
