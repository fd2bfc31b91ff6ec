"""
Annotation files in, one list of photos with captions and splits out.

The layouts are in json_layouts.py and table_layouts.py.
"""

import random
import re
from pathlib import Path

from captioning.preparation.annotated_photo import SPLIT_NAMES
from captioning.preparation.json_layouts import read_json
from captioning.preparation.table_layouts import read_table
from utils import UserError


def read_annotations(paths, keep_splits=True):
    """
    Read one or several annotation files.

    A photo's split is what its entry says, else what its file's name says (`captions_val2017.json`), which is printed.

    :param paths: list of paths of .json, .jsonl, .csv, .tsv or .txt files
    :param keep_splits: False to forget the splits that the files name
    :return: list of AnnotatedPhoto in the files' order, each with all its captions as words; `split` is None where
        none is named
    :raises UserError: if a file does not hold what it should, or names a photo or an id twice
    """
    photos = []
    for path in map(Path, paths):
        found = read_json(path) if path.suffix.lower() in (".json", ".jsonl") else read_table(path)
        if not found:
            raise UserError(f"{path}: holds no photos; give a file with photos and their captions")
        refuse_duplicates(found, path)
        if keep_splits:
            complete_splits(found, path)
        else:
            for photo in found:
                photo.split = None
        photos += found
    return photos


def refuse_duplicates(photos, path):
    """:raises UserError: if two photos of one file have the same file name or the same id"""
    names, ids = set(), set()
    for photo in photos:
        if photo.file_name in names:
            raise UserError(f"{path}: photo {photo.file_name!r} is there twice; keep one entry of it")
        if photo.image_id in ids:
            raise UserError(f"{path}: two photos have the id {photo.image_id!r}; give each its own")
        names.add(photo.file_name)
        ids.add(photo.image_id)


def complete_splits(photos, path):
    """
    Where no photo of a file has a split, give all of them the one that the file's name tells, and say so.

    :raises UserError: if some have a split and others have none
    """
    without = [photo for photo in photos if photo.split is None]
    if not without:
        return
    if len(without) < len(photos):
        raise UserError(
            f"{path}: {len(without)} photos have no split, {without[0].file_name!r} first, the others have one; "
            "give every photo a split, or none"
        )
    split = split_of_file_name(path)
    if split:
        print(f"{path.name}: its name says {split}, so all of its {len(photos)} photos are; undo with --splits drawn")
    for photo in photos:
        photo.split = split


def split_of_file_name(path):
    """
    :return: TRAIN, VAL or TEST if the annotation file's name tells one of them, else None
    """
    words = re.findall("[a-z]+", path.stem.lower())
    splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return splits.pop() if len(splits) == 1 else None


def draw_splits(photos, val_share, test_share, seed):
    """
    Draw a split for each photo that has none. The draw depends on the seed and the file names, not on their order.

    :param val_share: share of these photos that become VAL, 0 to 1; likewise `test_share`
    """
    drawn = sorted((photo for photo in photos if photo.split is None), key=lambda photo: photo.file_name)
    random.Random(seed).shuffle(drawn)
    num_val, num_test = (number_drawn(share, len(drawn)) for share in (val_share, test_share))
    for i, photo in enumerate(drawn):
        photo.split = "VAL" if i < num_val else "TEST" if i < num_val + num_test else "TRAIN"


def number_drawn(share, count):
    """:return: how many of `count` photos a share is: of a handful, still one"""
    least = 1 if share and count >= 3 else 0
    return max(round(share * count), least)


def make_ids_unique(photos):
    """
    Where two photos of a split have one id, as those of two files that both count from 0, all take their file names.

    :param photos: list of the AnnotatedPhoto of one split
    """
    if len({photo.image_id for photo in photos}) < len(photos):
        print(f"{photos[0].split}: several photos have one id; their file names take the place of the ids")
        for photo in photos:
            photo.image_id = photo.file_name
