"""
One self-contained HTML page of captioned photos: no network, no server, one file to open, keep or send.

Photos go in as pixels, captions as words with their attention. The page holds each photo once, as a small JPEG, and
attention as one byte per location; templates/page.js draws both only when they are looked at, so that a page of 1,000
photos opens at once. What the page looks like is in templates/; what it says is JSON, which cannot break out of its
place.
"""

import base64
import hashlib
import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from captioning.display.arrays import check_image, square_grids
from captioning.storage.files import atomic_path
from utils import UserError

TEMPLATES = Path(__file__).with_name("templates")
JPEG_QUALITY = 80
LEAST_BETA = 0.005  # attention that misses 1 by less is rounding, not a sentinel's share


@dataclass
class PageCaption:
    """What one model wrote for one photo."""

    model: str  # the model's name, the same on all photos
    words: list  # T words
    alphas: np.ndarray | None = None  # (T, P), P = s * s locations; (T + 1, P) with <end>; None without attention
    log_prob: float | None = None  # natural logarithm of the caption's probability
    scores: dict = field(default_factory=dict)  # metric -> number, higher is better; empty without references


@dataclass
class PagePhoto:
    """A photo with what was written about it."""

    file_name: str
    image: np.ndarray  # (H, W, 3) uint8
    captions: list  # of `PageCaption`, at most one a model
    references: list = field(default_factory=list)  # captions by people, each a list of words


def write_page(path, photos, title, notes=(), photo_size=256):
    """
    Write the page, completely or not at all.

    :param path: HTML file to write
    Other arguments: as for `build_page`.
    :raises UserError: if the path is not an HTML file's, or the file cannot be written
    """
    check_page_path(path)
    page = build_page(photos, title, notes, photo_size)
    with atomic_path(path) as temporary:  # a file name that is not Unicode text would stop the encoding
        temporary.write_text(page, encoding="utf-8", errors="replace", newline="\n")


def check_page_path(path):
    """:raises UserError: if the path is not one of an HTML file (to be told before an hour of captioning)"""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: '{Path(path).suffix}' found, the page is an HTML file; name it with .html")
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; name an HTML file that is to be written")


def build_page(photos, title, notes=(), photo_size=256, bare=False):
    """
    Give the page as text. The page can sort by every score and by log-probability, filter by word, and show attention.

    :param photos: iterable of `PagePhoto`, read once, so that a generator need not keep all pixels in memory
    :param title: the page's heading
    :param notes: lines that stand below the title: which models, which photos
    :param photo_size: the longer side of a photo on the page, in pixels; larger ones are reduced to it
    :param bare: show the cards alone, without heading and controls, as part of another page
    :return: str
    :raises ValueError: if there are no photos, or a photo or its attention has the wrong shape
    """
    models, metrics, rows = [], [], []
    for photo in photos:
        for caption in photo.captions:
            models += [caption.model] if caption.model not in models else []
            metrics += [metric for metric in caption.scores if metric not in metrics]
        rows.append((replace(photo, image=None), {"jpeg": encode_photo(photo.image, photo_size)}))
    if not rows:
        raise ValueError("photos: there are none to show")
    content = [row | photo_content(photo, models, metrics) for photo, row in rows]
    captions = [caption for row in content for caption in row["captions"] if caption]
    attention = [caption["attention"] for caption in captions if caption["attention"]]

    style, *scripts = (
        Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("page.css", "attention.js", "page.js")
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["fingerprint"] = fingerprint
    return environment.get_template("page.html").render(
        title=title, bare=bare, notes=list(notes), models=models, metrics=metrics, num_photos=len(content),
        has_log_prob=any(caption["logProb"] is not None for caption in captions),
        has_references=any(row["references"] for row in content),
        has_attention=bool(attention), has_betas=any(each["betas"] for each in attention),
        data={"models": models, "metrics": metrics, "photos": content}, style=style, scripts=scripts,
    )  # fmt: skip


def photo_content(photo, models, metrics):
    """:return: dict of what the page's script knows of a photo, plain types only; a caption or None for each model"""
    captions = {caption.model: caption for caption in photo.captions}
    if len(captions) != len(photo.captions):
        raise ValueError(f"{photo.file_name}: a model has two captions; names of models must differ")
    return {
        "name": str(photo.file_name),
        "references": [" ".join(words) for words in photo.references],
        "captions": [caption_content(captions[m], metrics) if m in captions else None for m in models],
    }


def caption_content(caption, metrics):
    """:return: dict of a caption's words, numbers (None for what is missing or not finite) and attention"""
    return {
        "words": list(map(str, caption.words)),
        "logProb": finite(caption.log_prob, 4),
        "scores": [finite(caption.scores.get(metric), 4) for metric in metrics],
        "attention": None if caption.alphas is None else encode_attention(caption.alphas, len(caption.words)),
    }


def finite(number, digits):
    """:return: float; None for what JSON cannot hold"""
    return None if number is None or not math.isfinite(number) else round(float(number), digits)


def encode_photo(image, size):
    """:return: base64 of a JPEG whose longer side is at most `size` pixels, of (H, W, 3) uint8"""
    photo = Image.fromarray(check_image(image))
    photo.thumbnail((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def encode_attention(alphas, num_words):
    """
    Give attention as one byte per location, each word's brightest location 255, and what the brightest stands for.

    :param alphas: (T, P), or (T + 1, P) with the row of <end>, which is left out
    :param num_words: T
    :return: dict: `side` of the grid in locations, `weights` (base64 of T * P bytes), `peaks` (the T largest weights)
        and `betas`, the share of each word that did not go to the photo but to adaptive attention's sentinel
        (Lu et al. 2017, equation 13: what the locations' weights lack to 1); None where all went to the photo
    :raises ValueError: if the grid is not square or the words are not as many
    """
    grids = np.nan_to_num(square_grids(alphas).astype(np.float64))  # (T, s, s)
    if len(grids) not in (num_words, num_words + 1):
        raise ValueError(f"{num_words} words do not fit attention for {len(grids)}")
    weights = grids[:num_words].reshape(num_words, grids[0].size)  # (T, P)
    peaks = weights.max(axis=1, initial=0)  # (T,)
    scaled = 255 * weights / np.maximum(peaks, np.finfo(np.float64).tiny)[:, None]  # (T, P)
    betas = (1 - weights.sum(axis=1)).clip(0, 1)  # (T,)
    return {
        "side": grids.shape[1],
        "weights": base64.b64encode(np.rint(scaled).clip(0, 255).astype(np.uint8).tobytes()).decode(),
        "peaks": [round(float(peak), 4) for peak in peaks],
        "betas": [round(float(beta), 3) for beta in betas] if betas.max(initial=0) > LEAST_BETA else None,
    }


def fingerprint(text):
    """:return: how the page's security policy names a script or style of its own; the browser runs no others"""
    return Markup("'sha256-{}'").format(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())
