"""
Preprocessing: photos and captions in, HDF5 and JSON files for training out.

    python create_input_files.py                      # the built-in dataset, drawn on the spot
    python create_input_files.py --dataset flickr8k --annotations dataset_flickr8k.json --image_folder images

`datasets.py` reads what this writes; so does the field's tutorial, whose names and layout these are.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioning.command_line import check_command_line, run_script
from captioning.config_fields import check_fields
from utils import (
    SPECIAL_WORDS,
    CaptionLength,
    CaptionsPerPhoto,
    CountOrZero,
    ImageSize,
    Seed,
    Share,
    UserError,
    Workers,
)


@dataclass
class Config:
    dataset: str = "shapes"  # names the files: shapes (built in), coco, flickr8k, flickr30k, or a name of your own
    annotations: tuple[str, ...] | str | None = None  # JSON, CSV or TSV, see docs/data.md; default: drawn shapes
    image_folder: str | None = None  # where the photos are; default images/ beside the annotations
    output_folder: str | None = None  # where the files go; default data/<dataset>
    captions_per_image: CaptionsPerPhoto = 5  # stored for each photo: drawn if it has more, repeated if it has fewer
    min_word_freq: CountOrZero = 5  # words that occur this often or less in the training captions become <unk>
    words_of: str | None = None  # checkpoint of a captioner whose words are kept too, for train.py's --start_from
    max_len: CaptionLength = 50  # longest caption, in words; longer ones are not trained on, but stay references
    image_size: ImageSize = 256  # width and height of the stored photos, in pixels
    workers: Workers | None = None  # processes that read photos; default one per core; 0 reads in this process
    seed: Seed = 0  # of the draws of captions and splits, and of the built-in dataset
    max_unreadable: Share = 0.01  # share of missing or damaged photos above which the run ends
    splits: Literal["named", "drawn"] = "named"  # as the annotations or their file's name say, else drawn; or all drawn
    val_share: Share = 0.1  # share of the photos that are drawn for validation
    test_share: Share = 0.1  # share of the photos that are drawn for testing


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

import numpy as np

from captioning.display.charts import length_histogram
from captioning.display.figure_files import save_figure
from captioning.preparation.annotated_photo import SPLITS
from captioning.preparation.annotations import draw_splits, make_ids_unique, read_annotations
from captioning.preparation.input_files import Layout, write_files
from captioning.preparation.left_out import LeftOut
from captioning.preparation.locating import locate_photos
from captioning.preparation.photos import num_cores
from captioning.preparation.shapes import create_shapes
from captioning.preparation.tokenizer import is_split_into_characters
from captioning.preparation.vocabulary import (
    MANY_UNKNOWN,
    advised_min_word_freq,
    build_word_map,
    count_words,
    keep_captioned,
    unknown_share,
)
from captioning.storage.files import check_not_an_input, remove_leftovers
from captioning.storage.folder_lock import sole_writer

SMALL_SIDE = 32  # pixels: most encoders halve a photo's side five times


def main(config):
    check_config(config)
    folder = Path(config.output_folder or f"data/{config.dataset}")
    make_folder(folder)
    with sole_writer(folder, "output_folder"):
        create_input_files(config, folder)


def create_input_files(config, folder):
    """
    Read annotations, find the photos, split them, choose the words, write the files.

    :param folder: Path of the output folder
    """
    base = f"{config.dataset}_{config.captions_per_image}_cap_per_img_{config.min_word_freq}_min_word_freq"
    own = rf"[A-Z_]+_{re.escape(base)}\.(hdf5|json|csv|png)"  # names of the files that are written
    for path in folder.iterdir():
        if re.fullmatch(own, path.name):
            check_not_an_input("output_folder", path, config.annotations or ())
    remove_leftovers(folder, own)

    annotations = config.annotations or (create_shapes(folder, seed=config.seed),)
    image_folder = Path(config.image_folder or Path(annotations[0]).parent / "images")
    photos = read_annotations(annotations, keep_splits=config.splits == "named")
    if not image_folder.is_dir():
        raise UserError(f"image_folder: {image_folder} is not a folder; give the one that the photos are in")

    if config.image_size < SMALL_SIDE:
        print(f"image_size: {config.image_size} pixels leave many encoders nothing to see; give {SMALL_SIDE} or more")

    left_out = LeftOut(folder / f"UNREADABLE_{base}.csv", len(photos), config.max_unreadable)
    photos = locate_photos(photos, image_folder, left_out)
    left_out.save()
    photos = keep_captioned(photos, config.max_len, left_out)
    draw_splits(photos, config.val_share, config.test_share, config.seed)
    splits = {split: [photo for photo in photos if photo.split == split] for split in SPLITS}
    check_splits(splits, config)
    for split in splits.values():
        make_ids_unique(split)

    counts = count_words(splits["TRAIN"])
    known = words_of_captioner(config.words_of) if config.words_of else ()
    word_map = build_word_map(counts, config.min_word_freq, known)
    layout = Layout(folder, base, config.captions_per_image, config.max_len, config.image_size)
    workers = num_cores() if config.workers is None else config.workers
    written = write_files(splits, word_map, layout, config.seed, workers, left_out)

    print_table(written, word_map, config.max_len)
    print_vocabulary(counts, word_map, config.min_word_freq, config.words_of)
    print_repeated(written["TRAIN"].photos, config.captions_per_image)
    left_out.summarize()
    lengths = {split: caption_lengths(files.photos) for split, files in written.items()}
    figure_path = folder / f"CAPTION_LENGTHS_{base}.png"
    save_figure(length_histogram(lengths, config.max_len), figure_path)
    print(f"Caption lengths: {figure_path}")
    print(f"Written to {folder} under the name {base}")


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


def check_splits(splits, config):
    """:raises UserError: if no photos are there to train on, or to choose the best epoch by"""
    counts = ", ".join(f"{len(photos)} in {split}" for split, photos in splits.items())
    for split, purpose in (("TRAIN", "train on"), ("VAL", "choose the best epoch by")):
        if not splits[split] and config.splits == "named":
            raise UserError(
                f"annotations: no photos to {purpose} ({counts}), as the annotations name their splits; add those of "
                f"{split}, or draw all splits again with --splits drawn"
            )
        if not splits[split]:
            raise UserError(
                f"val_share, test_share: no photos to {purpose} ({counts}); give at least three photos, and shares "
                "that leave some"
            )


def words_of_captioner(path):
    """
    :param path: of a checkpoint
    :return: the words that it knows
    :raises UserError: if it cannot be read
    """
    from captioning.storage.tensors import load_checkpoint  # here: it imports torch, which nothing else here needs

    return load_checkpoint(path)["word_map"]


def caption_lengths(photos):
    """:return: list of the number of words in each caption"""
    return [len(caption) for photo in photos for caption in photo.captions]


def print_table(written, word_map, max_len):
    """Print how many photos and captions each split has, and how long they are."""
    print(f"{'split':6}{'photos':>9}{'captions':>10}{'<unk>':>8}   words per caption (too long: left out)")
    for split, files in written.items():
        words = [word for caption in files.captions for word in caption]
        unknown = sum(word not in word_map for word in words) / len(words)
        lengths = caption_lengths(files.photos)
        too_long = sum(length > max_len for length in lengths)
        print(
            f"{split:6}{len(files.photos):9}{len(files.captions):10}{unknown:8.2%}   {min(lengths)} to {max(lengths)}, "
            f"mean {np.mean(lengths):.1f} ({too_long} longer than {max_len})"
        )


def print_repeated(photos, captions_per_image):
    """Print how many training photos have too few captions of their own."""
    few = sum(len(photo.captions) < captions_per_image for photo in photos)
    if few:
        print(
            f"{few} of the {len(photos)} photos of TRAIN have fewer than {captions_per_image} captions: some of theirs "
            "are there several times (--captions_per_image)"
        )


def print_vocabulary(counts, word_map, min_word_freq, words_of=None):
    """Print which words the vocabulary has, and what could be wrong with it."""
    others = f", and those of {words_of}" if words_of else ""
    print(
        f"Vocabulary: {len(word_map)} words, {len(SPECIAL_WORDS)} special ones among them; "
        f"words seen more than {min_word_freq} times in TRAIN{others}"
    )
    unknown = unknown_share(counts, min_word_freq)
    if unknown > MANY_UNKNOWN:
        print(
            f"{unknown:.0%} of the training words became <unk>; with --min_word_freq {advised_min_word_freq(counts)} "
            f"at most {MANY_UNKNOWN:.0%} would"
        )
    if is_split_into_characters(counts):
        print("Captions in a script without spaces between words: each character counts as a word")


if __name__ == "__main__":
    run_script(main, Config)
