"""
Writing what training reads: for each split the photos in an HDF5 file, captions, lengths and references in JSON, and
one word map for all.
"""

import contextlib
import itertools
import json
import re
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from tqdm import tqdm

from captioning.preparation.annotated_photo import SPLITS
from captioning.preparation.photos import photo_reader
from captioning.preparation.vocabulary import draw_captions, encode
from captioning.storage.files import atomic_path
from captioning.storage.hdf5 import new_hdf5
from utils import UserError

ENDINGS = {"IMAGES": "hdf5", "CAPTIONS": "json", "CAPLENS": "json", "REFERENCES": "json"}  # of each split's files


class Layout(NamedTuple):
    """What the files are called, and the sizes of what is in them."""

    folder: Path
    base: str  # what their names share, such as coco_5_cap_per_img_5_min_word_freq
    captions_per_image: int
    max_len: int  # of a caption, in words
    image_size: int  # width and height, in pixels


class WrittenSplit(NamedTuple):
    """What a split's files hold."""

    photos: list  # of AnnotatedPhoto, those that could be read
    captions: list  # lists of words, those of a photo one after the other


def write_files(splits, word_map, layout, seed, workers, left_out):
    """
    Write the dataset. Its files get their names together at the end, the word map last: no reader takes what an
    interrupted run leaves for a dataset.

    :param splits: dict from split to its list of AnnotatedPhoto, each with its path
    :param word_map: word -> id
    :param seed: of the draw of captions
    :param workers: number of processes that read photos
    :param left_out: LeftOut, which gets the photos that cannot be read
    :return: dict from split to WrittenSplit
    :raises UserError: if the disk is too small, too many photos cannot be read, or a worker is killed
    """
    require_space(sum(map(len, splits.values())), layout)
    paths = [photo.path for split in SPLITS for photo in splits[split]]
    try:
        with photo_reader(workers) as read_photos, contextlib.ExitStack() as new_files:
            pixels = read_photos(paths, layout.image_size)
            written = fill_files(splits, word_map, pixels, layout, seed, left_out, new_files)
            left_out.save()
            # Until the new word map has its name, nothing here looks finished, and no file of an older run stays.
            remove_old_files(layout, [split for split in SPLITS if split not in written])
            remove_features(layout)
    except BrokenProcessPool:
        raise UserError("workers: one was killed, most likely for lack of memory; run with fewer --workers") from None
    return written


def require_space(num_photos, layout):
    """:raises UserError: if the folder's disk cannot hold so many photos"""
    needed, free = num_photos * 3 * layout.image_size**2, shutil.disk_usage(layout.folder).free
    print(f"{num_photos} photos at {layout.image_size} x {layout.image_size} pixels take {needed / 1e9:.2f} GB")
    if needed > free:
        raise UserError(
            f"output_folder: {layout.folder} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed"
        )


def fill_files(splits, word_map, pixels, layout, seed, left_out, new_files):
    """
    Write all files under temporary names.

    :param pixels: iterator over all splits' photos, as `write_images` takes it
    :param new_files: ExitStack; when it ends, the files get their names, the first one last
    Other parameters and result: as for `write_files`.
    """

    def new_file(kind, ending):
        return new_files.enter_context(atomic_path(layout.folder / f"{kind}_{layout.base}.{ending}"))

    def write_json(kind, content):
        new_file(kind, "json").write_text(json.dumps(content), encoding="utf-8")

    written = {}
    write_json("WORDMAP", word_map)
    for split, photos in splits.items():
        if not photos:
            print(f"{split} has no photos, so no files are written for it")
            continue
        photos = write_images(new_file(f"{split}_IMAGES", "hdf5"), photos, pixels, layout, left_out)
        if not photos:
            left_out.save()
            raise UserError(f"image_folder: no photo of {split} can be read; {left_out.path} says why")
        captions = draw_captions(photos, layout.captions_per_image, layout.max_len, f"{seed} {split}")
        write_json(f"{split}_CAPTIONS", [encode(words, word_map, layout.max_len) for words in captions])
        write_json(f"{split}_CAPLENS", [len(words) + 2 for words in captions])  # with <start> and <end>
        write_json(f"{split}_REFERENCES", [reference(photo) for photo in photos])
        written[split] = WrittenSplit(photos, captions)
    return written


def write_images(path, photos, pixels, layout, left_out):
    """
    Write one split's photos, contiguous and not compressed, so that training can read any of them at once.

    :param path: of the HDF5 file
    :param photos: list of I AnnotatedPhoto
    :param pixels: iterator whose next I items belong to them: (3, S, S) uint8, or why a photo cannot be read
    :return: list of the AnnotatedPhoto that are in the file
    """
    shape = (3, layout.image_size, layout.image_size)
    kept = []
    with new_hdf5(path) as file:
        file.attrs["captions_per_image"] = layout.captions_per_image
        images = file.create_dataset("images", (len(photos), *shape), dtype=np.uint8)
        pixels = tqdm(itertools.islice(pixels, len(photos)), photos[0].split, len(photos), unit="photo", disable=None)
        for item, photo in zip(pixels, photos, strict=True):
            if isinstance(item, str):
                left_out.add(photo, item)
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


def reference(photo):
    """
    :return: dict of what scoring needs to know of a photo: all its captions as its real words
    """
    content = {"image_id": photo.image_id, "file_name": photo.file_name, "captions": photo.captions}
    if photo.boxes is not None:
        content["boxes"] = photo.boxes
    return content


def remove_old_files(layout, splits):
    """Remove the word map of an older run, and its files of these splits."""
    names = [f"{split}_{kind}_{layout.base}.{ending}" for split in splits for kind, ending in ENDINGS.items()]
    for name in [f"WORDMAP_{layout.base}.json", *names]:
        (layout.folder / name).unlink(missing_ok=True)


def remove_features(layout):
    """Remove the features that captioning/features.py has kept of the dataset's photos as they were before."""
    # Of no dataset whose name begins with all of this one's.
    ours = re.compile(rf"({'|'.join(SPLITS)})_FEATURES_{re.escape(layout.base)}_((?!_min_word_freq_).)+\.hdf5")
    paths = [path for path in layout.folder.iterdir() if ours.fullmatch(path.name)]
    if paths:
        size = sum(path.lstat().st_size for path in paths)
        print(f"Removed features of the photos before, {size / 1e9:.2f} GB: {', '.join(path.name for path in paths)}")
    for path in paths:
        path.unlink(missing_ok=True)
