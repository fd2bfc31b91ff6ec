"""
Caption photos: `python caption.py --img photo.jpg` prints the sentence and draws where the model looked for each word.
The figure opens in a window; without a display it is written to a file.

Name several photos, a folder, or a pattern in quotes ('holiday/**/*.jpg'), and each photo gets a line. `--output` keeps
the captions, and its ending says how: .csv (image, caption), .json (everything), .html (a page with attention). Photos
that cannot be read are named and skipped. `--sample` draws words by chance instead of searching for the likeliest
caption; several checkpoints after `--model` decide together, as an ensemble.
"""

import csv
import glob
import math
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import pages
from figures import attention_figure, save_figure, show_or_save
from inference import load_captioner
from photos import FORMATS, photo_reader
from utils import UserError, atomic_path, choose_device, run_script, save_json

PAGES = (".html", ".htm")
ANY_NAME = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name may be no text; it keeps its bytes

PAGES = (".html", ".htm")
ANY_NAME = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name may be no text; it keeps its bytes


@dataclass
class Config:
    img: tuple[str, ...]  # photos to caption: files, folders, or patterns such as 'holiday/*.jpg'
    model: tuple[str, ...] = ()  # checkpoints of train.py, several for an ensemble; default the newest runs/*/best.pth
    output: str | None = None  # also write the captions here: .csv, .json or .html
    beam_size: int = 5  # captions that the search keeps; 1 is greedy choice
    normalisation: str = "none"  # how finished captions are ranked: none, length (mean over words) or reward
    reward: float = 0.0  # added to the log-probability for each word, with --normalisation reward
    n_best: int = 1  # captions a photo, best first; at most beam_size
    sample: bool = False  # draw each word by its probability instead of searching
    top_k: int = 0  # draw among this many likeliest words; 0 for all
    top_p: float = 1.0  # draw among the likeliest words that hold this probability together
    seed: int | None = None  # draw the same again (for the same photos and batch_size); default another draw each time
    temperature: float = 1.0  # of the softmax: below 1 the likely words get likelier, above 1 they come closer
    min_length: int = 0  # shortest caption, in words
    max_length: int = 50  # longest caption, in words
    no_repeat_ngram: int = 0  # no sequence of this many words twice in a caption; 0 for no rule
    no_unk: bool = False  # never write <unk>
    alphas: bool = False  # put where the model looked into the .json file
    dont_smooth: bool = False  # show the attention figure's cells as they are
    figure: str | None = None  # write the attention figure here; default a window, or outputs/ without a display
    batch_size: int = 32  # photos that are captioned at once
    workers: int | None = None  # processes that read photos; 0: this one alone; default one a core, if there are many
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one


class Captioned(NamedTuple):
    """A photo with its captions."""

    path: Path
    image: np.ndarray  # (3, S, S) uint8
    captions: list  # of dicts, best first: caption, words, log_prob, perplexity, score
    alphas: np.ndarray | None  # (T, P), where the model looked for each word of the best caption


def main(config):
    paths = find_photos(config.img)
    alone = len(config.img) == 1 and paths == [Path(config.img[0])]  # one photo, called by its name
    drawn = alone and (config.figure is not None or config.output is None)
    suffix = Path(config.output or "").suffix.lower()
    check(config, suffix, drawn)

    device = choose_device(config.device)
    captioner, checkpoint, model = load_captioner(config.model, device)
    models = [str(path) for path in config.model or (model,)]
    keep_alphas = drawn or config.alphas or suffix in PAGES
    photos = caption_photos(captioner, paths, checkpoint["image_size"], config, keep_alphas)
    photos = show(photos, config, alone, drawn)  # a photo is read, captioned and shown when a line below asks for it
    if suffix in PAGES:
        name = " + ".join(Path(path).parent.name for path in models)
        rows = (on_page(photo, name) for photo in photos)
        pages.write_page(config.output, rows, f"Captions by {name}", ["Model: " + ", ".join(models)])
    else:
        rows = [as_dict(photo, config.alphas) for photo in photos]
        if suffix == ".json":
            save_json({"models": models, "options": asdict(config), "photos": rows}, config.output)
        elif suffix == ".csv":
            with atomic_path(config.output) as part, part.open("w", newline="", **ANY_NAME) as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerows([("image", "caption"), *((row["file"], row["caption"]) for row in rows)])
    if config.output:
        print(f"Captions: {config.output}")


def check(config, suffix, drawn):
    """:raises UserError: if a setting, or several together, make no sense"""
    for name in ("beam_size", "n_best", "max_length", "batch_size", "min_length", "top_k", "workers", "seed"):
        value, least = getattr(config, name), name in ("beam_size", "n_best", "max_length", "batch_size")
        if value is not None and value < least:
            raise UserError(f"{name}: {value} found, {least:d} or more expected")
    given = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    of_search = ", ".join(sorted(given & {"beam_size", "normalisation", "reward", "n_best"}))
    of_sampling = ", ".join(sorted(given & {"top_k", "top_p", "seed"}))
    for wrong, message in (  # what decoding.py checks is left to it
        (not 0 < config.top_p <= 1, f"top_p: {config.top_p} found, more than 0 and at most 1 expected"),
        (config.sample and of_search, f"{of_search}: found with --sample, but for beam search; leave one of them out"),
        (not config.sample and of_sampling, f"{of_sampling}: found without --sample; add it"),
        ((config.normalisation == "reward") != ("reward" in given),
         "reward: goes with --normalisation reward, and that with it; give both or none"),
        (config.n_best > config.beam_size,
         f"n_best: {config.n_best} found, at most beam_size ({config.beam_size}) expected"),
        (config.min_length > config.max_length,
         f"min_length: {config.min_length} found, at most max_length ({config.max_length}) expected"),
        (config.output is not None and (Path(config.output).is_dir() or suffix not in (".csv", ".json", *PAGES)),
         f"output: '{config.output}' found, a file whose name ends in .csv, .json or .html expected"),
        (config.n_best > 1 and suffix in (".csv", *PAGES),
         f"n_best: {config.n_best} found, but a {suffix} file has one caption a photo; write a .json file"),
        (config.alphas and suffix != ".json", "alphas: are for a .json file; add --output captions.json"),
        (given & {"figure", "dont_smooth"} and not drawn,
         "figure, dont_smooth: are for one photo, called by its name; for more add --output captions.html"),
    ):  # fmt: skip
        if wrong:
            raise UserError(message)


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


def caption_photos(captioner, paths, size, config, keep_alphas):
    """
    Yield a `Captioned` for each photo that can be read, in order. The others are named on the error stream.

    :param size: width and height that the encoder wants, in pixels
    :raises UserError: if no photo can be read
    """
    generator = None if config.seed is None else torch.Generator(captioner.device).manual_seed(config.seed)
    workers = config.workers
    if workers is None:
        workers = min(os.cpu_count() or 1, len(paths) // 64)  # a process takes seconds to start
    try:
        with photo_reader(workers) as read_photos:
            photos = readable(paths, read_photos(paths, size))
            while batch := list(islice(photos, config.batch_size)):
                images = torch.from_numpy(np.stack([image for _, image in batch]))  # (N, 3, S, S)
                found = decode(captioner, images, config, generator, keep_alphas)
                for (path, image), hypotheses in zip(batch, found, strict=True):
                    captions, alphas = [describe(captioner, each) for each in hypotheses], hypotheses[0].alphas
                    if alphas is not None:  # without <end>; a caption of no words looked nowhere
                        alphas = alphas[: len(captions[0]["words"])].numpy() if captions[0]["words"] else None
                    yield Captioned(path, image, captions, alphas)
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


def decode(captioner, images, config, generator, keep_alphas):
    """:return: for each of images (N, 3, S, S) its hypotheses, best first"""
    rules = {name: getattr(config, name) for name in ("min_length", "no_repeat_ngram", "temperature")}
    options = rules | {"never_unk": config.no_unk, "keep_alphas": keep_alphas}
    if config.sample:
        options |= {"top_k": config.top_k, "top_p": config.top_p, "generator": generator}
        return [[drawn] for drawn in captioner.sample(images, config.max_length, **options)]
    options |= {"normalisation": config.normalisation, "reward": config.reward, "n_best": config.n_best}
    return captioner.search(images, config.beam_size, config.max_length, **options)


def describe(captioner, hypothesis):
    """:return: dict of what there is to say about a caption, plain types only"""
    words = captioner.sentence(hypothesis)
    steps = max(1, len(words) + hypothesis.ended)  # <end>, too, was to be foreseen
    numbers = {"log_prob": hypothesis.log_prob, "perplexity": math.exp(min(700, -hypothesis.log_prob / steps))}
    return {"caption": " ".join(words), "words": words, **numbers, "score": hypothesis.score}


def show(photos, config, alone, drawn):
    """Print each photo's captions, and draw its attention if `drawn`; then yield it on."""
    for photo in photos:
        for i, each in enumerate(photo.captions):
            numbers = f"log-probability {each['log_prob']:.2f}, perplexity {each['perplexity']:.2f} a word"
            start = "" if alone else f"{printable(photo.path)}: " if i == 0 else "    "
            print(f"{start}{each['caption']}", numbers, sep="\n" if alone else "  # ")
        if drawn:
            image, words = photo.image.transpose(1, 2, 0), photo.captions[0]["words"]
            figure = attention_figure(image, words, photo.alphas, smooth=not config.dont_smooth)
            path = config.figure or Path("outputs") / f"{photo.path.stem}_attention.png"
            written = save_figure(figure, path) or path if config.figure else show_or_save(figure, path)
            if written:
                print(f"Attention figure: {written}")
        yield photo


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


if __name__ == "__main__":
    run_script(main, Config)
