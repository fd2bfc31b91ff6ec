"""Preprocessing: photos and captions in, HDF5 and JSON files for training out.

    python create_input_files.py                      # the built-in dataset, drawn on the spot
    python create_input_files.py --dataset flickr8k --annotations dataset_flickr8k.json --image_folder images

`datasets.py` reads what this writes; so does the field's tutorial, whose names and layout these are.
"""

import collections
import contextlib
import csv
import itertools
import json
import os
import random
import re
import shutil
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from captioning.command_line import check_command_line, check_fields, run_script
from utils import CaptionLength, Count, CountOrZero, ImageSize, Seed, Share, UserError, Workers


@dataclass
class Config:
    dataset: str = "shapes"  # names the files: shapes (built in), coco, flickr8k, flickr30k, or a name of your own
    annotations: tuple[str, ...] | str | None = None  # JSON (Karpathy's, COCO's) or CSV/TSV files; none: draw shapes
    image_folder: str | None = None  # where the photos lie; none: images/ beside the annotations
    output_folder: str | None = None  # where the files go; none: data/<dataset>
    captions_per_image: Count = 5  # captions stored of a photo: drawn if it has more, repeated if it has fewer
    min_word_freq: CountOrZero = 5  # words that the training captions hold no more than this often become <unk>
    max_len: CaptionLength = 50  # longest caption, in words; longer ones are left out, as references they stay
    image_size: ImageSize = 256  # width and height of the stored photos, in pixels
    workers: Workers | None = None  # processes that read photos; none: one a core, 0: this process alone
    seed: Seed = 0  # of the draws of captions and splits, and of the built-in dataset
    max_unreadable: Share = 0.01  # share of missing or damaged photos, 0 to 1, above which the run ends
    val_share: Share = 0.1  # share of photos drawn for validation where the annotations name no split, 0 to 1
    test_share: Share = 0.1  # share of photos drawn for testing where the annotations name no split, 0 to 1


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

import h5py
import numpy as np
from tqdm import tqdm

from captioning.display.charts import length_histogram
from captioning.display.figure_files import save_figure
from captioning.preparation.annotations import SPECIAL_WORDS, SPLITS, read_annotations
from captioning.preparation.photos import photo_reader
from captioning.preparation.shapes import create_shapes
from captioning.storage.files import atomic_path, remove_leftovers
from captioning.storage.hdf5 import new_hdf5

KINDS = {"IMAGES": "hdf5", "CAPTIONS": "json", "CAPLENS": "json", "REFERENCES": "json"}  # of files, for each split


def main(config):
    check_config(config)
    output_folder = Path(config.output_folder or f"data/{config.dataset}")
    base = f"{config.dataset}_{config.captions_per_image}_cap_per_img_{config.min_word_freq}_min_word_freq"
    remove_leftovers(output_folder, rf"[A-Z_]+_{re.escape(base)}\.(hdf5|json|csv|png)")

    annotations = config.annotations or [create_shapes(output_folder, seed=config.seed)]
    annotations = [annotations] if isinstance(annotations, str | Path) else annotations
    image_folder = Path(config.image_folder or Path(annotations[0]).parent / "images")
    photos = read_annotations(annotations, config.val_share, config.test_share, config.seed)
    if not image_folder.is_dir():
        raise UserError(f"image_folder: {image_folder} is no folder; give the one that the photos lie in")
    make_folder(output_folder)

    report = Report(output_folder / f"UNREADABLE_{base}.csv", len(photos), config.max_unreadable)
    paths = find_photos(photos, image_folder, report)
    photos = keep_captioned([photo for photo in photos if photo.file_name in paths], config.max_len, report)
    report.check()
    splits = {split: [photo for photo in photos if photo.split == split] for split in SPLITS}
    if not splits["TRAIN"]:
        raise UserError("annotations: no photo to train on is left; expected some with the split 'train'")
    word_map = build_word_map(splits["TRAIN"], config.min_word_freq)

    try:
        made = write_files(splits, paths, word_map, output_folder, base, config, report)
    except BrokenProcessPool:
        raise UserError("workers: one was killed, most likely for want of memory; run with fewer --workers") from None
    summarize(made, word_map, config, report, output_folder / f"CAPTION_LENGTHS_{base}.png")
    print(f"Written to {output_folder} under the name {base}")


def check_config(config):
    """:raises UserError: if a field of the config makes no sense"""
    check_fields(config)
    if config.val_share + config.test_share >= 1:
        raise UserError("val_share, test_share: leave no photos to train on; expected less than 1 together")
    if not re.fullmatch(r"[\w. -]+", config.dataset):
        raise UserError(f"dataset: is {config.dataset!r}, expected letters, digits, - or _: it names the files")
    if not config.annotations and config.dataset != "shapes":
        raise UserError(f"annotations: none given for {config.dataset!r}; give --annotations and --image_folder")


def make_folder(folder):
    """:raises UserError: if it cannot be made"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_folder: {folder} cannot be made ({error.strerror}); give another one") from None


class Report:
    """The photos that were left out and why, in a CSV file beside the data; no file when there are none."""

    def __init__(self, path, num_photos, max_unreadable):
        self.path, self.num_photos, self.max_unreadable = path, num_photos, max_unreadable
        self.rows, self.num_unreadable = [], 0

    def add(self, photo, reason, unreadable=True):
        self.rows.append((photo.split, photo.file_name, reason))
        self.num_unreadable += unreadable

    def check(self):
        """
        Write the file as it stands.

        :raises UserError: if too many photos are missing or damaged
        """
        self.path.unlink(missing_ok=True)
        if self.rows:
            with (
                atomic_path(self.path) as temporary,
                temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
            ):
                csv.writer(file).writerows([("split", "file_name", "reason"), *self.rows])
        if self.num_unreadable > self.max_unreadable * self.num_photos:
            raise UserError(
                f"image_folder: {self.num_unreadable} of {self.num_photos} photos are missing or cannot be read, at "
                f"most {self.max_unreadable:.1%} may be; {self.path} names them: mend them or raise max_unreadable"
            )


def find_photos(photos, image_folder, report):
    """
    :param photos: list of Photo
    :param image_folder: the folder that they lie in
    :param report: gets those that are not there
    :return: dict from file name to path
    """
    paths = {}
    for photo in photos:
        names = [name for name in (photo.file_name, photo.other_name) if name]
        try:
            paths[photo.file_name] = next(image_folder / name for name in names if (image_folder / name).exists())
        except StopIteration:
            report.add(photo, "missing")
        except (OSError, ValueError) as error:  # a name that the file system cannot hold
            report.add(photo, f"missing ({error})")
    return paths


def keep_captioned(photos, max_len, report):
    """
    :return: the photos that have a caption of 1 to `max_len` words; all captions without words are taken out
    """
    kept = []
    for photo in photos:
        photo.captions = [words for words in photo.captions if words]
        if any(len(words) <= max_len for words in photo.captions):
            kept.append(photo)
        else:
            report.add(photo, f"has no caption of 1 to {max_len} words", unreadable=False)
    return kept


def build_word_map(photos, min_word_freq):
    """
    Number the words that the training captions hold more than `min_word_freq` times.

    The field's tutorial counts the captions of all splits. Only those of TRAIN are counted here: a word that was
    never trained cannot be predicted, and scores on unseen photos should not be helped by having seen their words.

    :param photos: list of Photo, those of TRAIN
    :param min_word_freq: words that are as frequent as this, or rarer, become <unk>
    :return: dict from word to id: words from 1 in the order of the alphabet, <unk>, <start>, <end>, and <pad> 0
    :raises UserError: if no word is frequent enough
    """
    counts = collections.Counter(word for photo in photos for words in photo.captions for word in words)
    words = sorted(word for word, count in counts.items() if count > min_word_freq)
    if not words:
        raise UserError(
            f"min_word_freq: is {min_word_freq}, but no training word comes more often than "
            f"{max(counts.values())} times; give a smaller one"
        )
    word_map = {word: i for i, word in enumerate(words, start=1)}
    for special in ("<unk>", "<start>", "<end>"):
        word_map[special] = len(word_map) + 1
    word_map["<pad>"] = 0
    return word_map


def write_files(splits, paths, word_map, folder, base, config, report):
    """
    Write the dataset. Its files get their names together at the end, the word map last: no reader takes what an
    interrupted run leaves for a dataset.

    :param splits: dict from split to its list of Photo
    :param paths: dict from file name to path
    :return: dict from split to (its photos that could be read, its captions as lists of words), as they are stored
    :raises UserError: if the disk is too small or too many photos cannot be read
    """
    count = sum(map(len, splits.values()))
    needed, free = count * 3 * config.image_size**2, shutil.disk_usage(folder).free
    print(f"{count} photos at {config.image_size} x {config.image_size} pixels take {needed / 1e9:.2f} GB")
    if needed > free:
        raise UserError(f"output_folder: {folder} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed")

    made = {}
    all_paths = [paths[photo.file_name] for split in SPLITS for photo in splits[split]]
    with contextlib.ExitStack() as temporaries, photo_reader(num_workers(config.workers)) as read_photos:

        def new_file(name):  # is written now and gets its name when `temporaries` ends, the first one last
            return temporaries.enter_context(atomic_path(folder / name))

        new_file(f"WORDMAP_{base}.json").write_text(json.dumps(word_map), encoding="utf-8")
        pixels = read_photos(all_paths, config.image_size)
        for split, photos in splits.items():
            if not photos:
                print(f"No photos in {split}: left out")
                continue
            photos = write_images(new_file(f"{split}_IMAGES_{base}.hdf5"), photos, pixels, config, report)
            if not photos:
                report.check()
                raise UserError(f"image_folder: no photo of {split} can be read; {report.path} says why")
            captions = draw_captions(photos, config, random.Random(f"{config.seed} {split}"))
            encoded = [encode(words, word_map, config.max_len) for words in captions]
            for kind, content in (
                ("CAPTIONS", encoded),
                ("CAPLENS", [len(words) + 2 for words in captions]),
                ("REFERENCES", [reference(photo) for photo in photos]),
            ):
                new_file(f"{split}_{kind}_{base}.json").write_text(json.dumps(content), encoding="utf-8")
            made[split] = photos, captions
        report.check()
        # Until the new word map has its name, nothing here looks finished, and no file of an older run stays.
        old = [f"{split}_{kind}_{base}.{KINDS[kind]}" for split in SPLITS if split not in made for kind in KINDS]
        for name in [f"WORDMAP_{base}.json", *old]:
            (folder / name).unlink(missing_ok=True)
    return made


def num_workers(workers):
    """
    :return: `workers`, or if it is None the number of cores that this process may use
    """
    if workers is not None:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write_images(path, photos, pixels, config, report):
    """
    Write one split's photos, contiguous and not compressed, so that training can read any of them at once.

    :param path: of the HDF5 file
    :param photos: list of I Photo
    :param pixels: iterator whose next I items belong to them: (3, S, S) uint8, or why a photo cannot be read
    :return: list of the Photo that are in the file
    """
    shape = (3, config.image_size, config.image_size)
    kept = []
    with new_hdf5(path) as file:
        file.attrs["captions_per_image"] = config.captions_per_image
        images = file.create_dataset("images", (len(photos), *shape), dtype=np.uint8)
        pixels = tqdm(itertools.islice(pixels, len(photos)), photos[0].split, len(photos), unit="photo", disable=None)
        for item, photo in zip(pixels, photos, strict=True):
            if isinstance(item, str):
                report.add(photo, item)
            else:
                images[len(kept)] = item
                kept.append(photo)
    if len(kept) < len(photos):
        shorten(path, len(kept))
    return kept


def shorten(path, count):
    """Keep the first `count` photos of an HDF5 file: how many can be read is known only in the end."""
    with atomic_path(path) as temporary, h5py.File(path, locking=False) as old, new_hdf5(temporary) as new:
        new.attrs.update(old.attrs)
        images = new.create_dataset("images", (count, *old["images"].shape[1:]), dtype=np.uint8)
        for i in range(0, count, 256):
            images[i : i + 256] = old["images"][i : min(i + 256, count)]


def draw_captions(photos, config, rng):
    """
    Choose each photo's `captions_per_image` captions: a draw of those that it has, some twice if they are too few.

    :param rng: random.Random
    :return: list of captions, those of a photo one after the other
    """
    drawn = []
    for photo in photos:
        usable = [words for words in photo.captions if len(words) <= config.max_len]
        missing = config.captions_per_image - len(usable)
        if missing > 0:
            drawn += usable + [rng.choice(usable) for _ in range(missing)]
        else:
            drawn += rng.sample(usable, config.captions_per_image)
    return drawn


def encode(words, word_map, max_len):
    """
    :param words: list of at most `max_len` words
    :return: list of `max_len + 2` ids: <start>, the words, <end>, then <pad>
    """
    ids = [word_map.get(word, word_map["<unk>"]) for word in words]
    padding = [word_map["<pad>"]] * (max_len - len(words))
    return [word_map["<start>"], *ids, word_map["<end>"], *padding]


def reference(photo):
    """
    :return: dict of what scoring needs to know of a photo: all its captions as its real words
    """
    boxes = {} if photo.boxes is None else {"boxes": photo.boxes}
    return {"image_id": photo.image_id, "file_name": photo.file_name, "captions": photo.captions, **boxes}


def summarize(made, word_map, config, report, figure_path):
    """Print what was made and save the histogram of caption lengths."""
    print(f"{'split':6}{'photos':>9}{'captions':>10}{'<unk>':>8}   words a caption (too long: left out)")
    lengths = {}
    for split, (photos, captions) in made.items():
        words = [word for caption in captions for word in caption]
        unknown = sum(word not in word_map for word in words) / len(words)
        lengths[split] = [len(caption) for photo in photos for caption in photo.captions]
        too_long = sum(length > config.max_len for length in lengths[split])
        print(
            f"{split:6}{len(photos):9}{len(captions):10}{unknown:8.2%}   {min(lengths[split])} to "
            f"{max(lengths[split])}, mean {np.mean(lengths[split]):.1f} ({too_long} longer than {config.max_len})"
        )
    print(
        f"Vocabulary: {len(word_map)} words, {len(SPECIAL_WORDS)} special ones among them; "
        f"words seen more than {config.min_word_freq} times in TRAIN"
    )
    if report.num_unreadable:
        print(f"Missing or damaged photos: {report.num_unreadable}, left out")
    if len(report.rows) > report.num_unreadable:
        print(f"Photos without a usable caption: {len(report.rows) - report.num_unreadable}, left out")
    if report.rows:
        print(f"They are named in {report.path}")
    save_figure(length_histogram(lengths, config.max_len), figure_path)
    print(f"Caption lengths: {figure_path}")


if __name__ == "__main__":
    run_script(main, Config)
