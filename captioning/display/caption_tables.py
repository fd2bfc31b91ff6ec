"""
Captions of photos, printed and written: on the screen, in a table (.csv, .json) or on a page (.html).

caption.py and blip.py share it. It knows no model.
"""

import contextlib
import csv
import hashlib
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from captioning.display.html_page import PageCaption, PagePhoto, write_page
from captioning.preparation.photo_batches import photo_size
from captioning.screen import printable
from captioning.storage.files import atomic_path, save_json
from utils import UserError

PAGES = (".html", ".htm")
ANY_NAME = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name need not be text; its bytes are kept


class CaptionedPhoto(NamedTuple):
    """A photo with what a model wrote about it."""

    path: Path
    image: np.ndarray  # (3, S, S) uint8
    captions: list  # of `caption_row`, best first
    alphas: np.ndarray | None  # (T, P), where the model looked for each word of the best caption


def caption_row(words, log_prob, score, ended):
    """
    Give what is printed and written about one caption.

    :param log_prob: natural logarithm of the caption's probability
    :param score: what it was ranked by
    :param ended: whether the model ended it, not the longest length
    :return: dict of plain types: caption, words, log_prob, perplexity (per word, <end> included), score
    """
    steps = max(1, len(words) + ended)
    numbers = {"log_prob": log_prob, "perplexity": math.exp(min(700, -log_prob / steps)), "score": score}
    return {"caption": " ".join(words), "words": words, **numbers}


def print_captions(photos, single, drawn=False, figure=None, smooth=True):
    """
    Print each photo's captions, and draw its attention if `drawn`; then yield it on.

    :param photos: iterable of `CaptionedPhoto`
    :param single: there is one photo only, so its name need not be said
    :param figure: file for the attention figure; None for a window, or for outputs/ without a display
    """
    for photo in photos:
        for i, row in enumerate(photo.captions):
            numbers = f"log-probability {row['log_prob']:.2f}, perplexity {row['perplexity']:.2f} per word"
            if single:
                print(row["caption"], numbers, sep="\n")
            else:
                print(f"{'    ' if i else f'{printable(photo.path)}: '}{row['caption']}  # {numbers}")
        if drawn:
            draw_attention(photo, figure, smooth)
        yield photo


def draw_attention(photo, path, smooth):
    """Write the attention figure of a `CaptionedPhoto` to `path`; show it, or put it into outputs/, if that is None."""
    # Here, because the sentence need not wait for matplotlib.
    from captioning.display.attention_figures import attention_figure
    from captioning.display.figure_files import save_figure, show_or_save

    figure = attention_figure(in_shape(photo), photo.captions[0]["words"], photo.alphas, smooth=smooth)
    if path:
        save_figure(figure, path)
    else:
        path = show_or_save(figure, default_figure_path(photo.path))
    if path:
        print(f"Attention figure: {path}")


def in_shape(photo):
    """
    :param photo: `CaptionedPhoto`, whose pixels are a square, as the model saw them
    :return: (H, W, 3) uint8, in the shape of its file, with the square's side as the longer one
    """
    pixels, side = photo.image.transpose(1, 2, 0), photo.image.shape[1]
    with contextlib.suppress(Exception):  # the file may have vanished or changed; then the square will do
        width, height = photo_size(photo.path)
        size = [max(1, round(side * length / max(width, height))) for length in (width, height)]
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    return pixels


def default_figure_path(photo_path):
    """
    :return: a path in outputs/ that is this photo's alone: of holiday/a.jpg, outputs/holiday/a.jpg_attention.png; of a
        photo from outside the working folder, outputs/a.jpg_<8 digits that stand for its folder>_attention.png
    """
    path = photo_path.resolve()
    if path.is_relative_to(Path.cwd()):
        return Path("outputs", path.relative_to(Path.cwd()).parent, f"{path.name}_attention.png")
    folder = hashlib.sha256(os.fsencode(path.parent)).hexdigest()[:8]
    return Path("outputs", f"{path.name}_{folder}_attention.png")


def check_output(output):
    """:raises UserError: unless captions can be written to `output`, a file's name or None"""
    if output is not None and (Path(output).is_dir() or Path(output).suffix.lower() not in (".csv", ".json", *PAGES)):
        raise UserError(f"output: '{output}' found, a file whose name ends in .csv, .json or .html expected")


def write_captions(photos, output, name, models, options, keep_alphas=False):
    """
    Go through the photos, and write their captions: image and caption to a .csv, everything to a .json, one page with
    photos to a .html.

    :param photos: iterable of `CaptionedPhoto`
    :param output: file to write, or None
    :param name: of the model, for the page
    :param models: list of the models' files or folders
    :param options: dict of the settings, for the .json
    :param keep_alphas: write to the .json where the model looked
    """
    suffix = Path(output or "").suffix.lower()
    if suffix in PAGES:
        rows = (page_photo(photo, name) for photo in photos)
        write_page(output, rows, f"Captions by {name}", ["Model: " + ", ".join(models)])
    else:
        rows = [photo_row(photo, keep_alphas) for photo in photos]
        if suffix == ".json":
            save_json({"models": models, "options": options, "photos": rows}, output)
        elif suffix == ".csv":
            with atomic_path(output) as part, part.open("w", newline="", **ANY_NAME) as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerows([("image", "caption"), *((row["file"], row["caption"]) for row in rows)])
    if output:
        print(f"Captions: {output}")


def photo_row(photo, keep_alphas):
    """:return: dict of all that is known of a photo but its pixels, plain types only"""
    row = {"file": str(photo.path), **photo.captions[0], "n_best": photo.captions}
    if keep_alphas and photo.alphas is not None:
        row["alphas"] = photo.alphas.tolist()
    return row


def page_photo(photo, model):
    """:return: `PagePhoto` with the best caption"""
    best = photo.captions[0]
    caption = PageCaption(model, best["words"], photo.alphas, best["log_prob"])
    return PagePhoto(printable(photo.path), in_shape(photo), [caption])
