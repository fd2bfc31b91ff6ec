"""
The files of one split, as create_input_files.py writes them: their names, and their content, which is checked before
anything is made of it. A file that is broken, or that belongs to other photos, is refused with one line.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from captioning.storage.files import load_json
from captioning.storage.hdf5 import open_hdf5
from utils import SPECIAL_WORDS, UserError


class SplitFiles(NamedTuple):
    """Paths of a split's files. The word map is that of all splits."""

    images: Path
    captions: Path
    lengths: Path
    references: Path  # which the tutorial's own datasets do not have
    word_map: Path


class SplitContent(NamedTuple):
    """I photos, each with N_c captions."""

    num_photos: int  # I
    image_size: int  # width and height, in pixels
    captions_per_image: int  # N_c
    word_map: dict  # word -> id
    captions: np.ndarray  # (I * N_c, max_length), ids: <start> ... <end>, then <pad>; those of a photo in a row
    lengths: np.ndarray  # (I * N_c,), counting <start> and <end>


def name_files(data_folder, data_name, split):
    """
    :param data_folder: folder of the files
    :param data_name: what their names share, such as coco_5_cap_per_img_5_min_word_freq
    :param split: 'TRAIN', 'VAL' or 'TEST'
    :return: `SplitFiles`
    """
    folder = Path(data_folder)
    return SplitFiles(
        images=folder / f"{split}_IMAGES_{data_name}.hdf5",
        captions=folder / f"{split}_CAPTIONS_{data_name}.json",
        lengths=folder / f"{split}_CAPLENS_{data_name}.json",
        references=folder / f"{split}_REFERENCES_{data_name}.json",
        word_map=folder / f"WORDMAP_{data_name}.json",
    )


def load_split(files):
    """
    Read all but the photos themselves and the references.

    :param files: `SplitFiles`
    :return: `SplitContent`
    :raises UserError: if a file is missing or broken, or if they do not belong together
    """
    if files.word_map.exists() and not files.images.exists():
        split, data_name = files.images.stem.split("_IMAGES_", maxsplit=1)
        raise UserError(
            f"{files.images}: no such file, so {data_name} has no photos in {split}; add some to the annotations, or "
            "run create_input_files.py with --splits drawn"
        )
    with open_hdf5(files.images, "images") as file:
        num_photos, image_size = len(file["images"]), file["images"].shape[-1]
        per_image = captions_per_image(file)
    word_map = load_word_map(files.word_map)
    captions = load_table(files.captions, dimensions=2)  # (I * N_c, max_length)
    lengths = load_table(files.lengths, dimensions=1)  # (I * N_c,)
    content = SplitContent(num_photos, image_size, per_image, word_map, captions, lengths)
    refuse_mixed_files(files, content)
    return content._replace(captions=captions.astype(np.min_scalar_type(len(word_map))))  # COCO's: 59 MB, not 236


def refuse_mixed_files(files, content):
    """:raises UserError: if captions, lengths, photos and word map do not belong together"""
    captions, lengths, word_map = content.captions, content.lengths, content.word_map
    expected = content.num_photos * content.captions_per_image
    if not len(captions) == len(lengths) == expected:
        raise UserError(
            f"{files.captions}: {len(captions)} captions and {len(lengths)} lengths ({files.lengths.name}) found, "
            f"{expected} expected for {content.num_photos} photos; the files are not of one run of "
            "create_input_files.py"
        )
    longest = captions.shape[1]
    if lengths.min() < 2 or lengths.max() > longest:
        found = f"{lengths.min()} to {lengths.max()}"
        raise UserError(f"{files.lengths}: lengths of {found} found, 2 to {longest} expected; make the files again")
    if captions.min() < 0 or captions.max() >= len(word_map):
        raise UserError(
            f"{files.captions}: word ids up to {captions.max()} found, the word map has {len(word_map)} words; they "
            "are not of one run of create_input_files.py"
        )
    last_words = captions[np.arange(expected), lengths - 1]  # (I * N_c,)
    if (last_words != word_map["<end>"]).any():
        raise UserError(f"{files.captions}: captions do not end where {files.lengths.name} says; make the files again")
    if (captions[:, 0] != word_map["<start>"]).any():
        raise UserError(f"{files.captions}: captions do not begin with <start>; make the files again")
    places = np.arange(longest)  # (max_length,)
    special = np.isin(captions, [word_map[word] for word in ("<pad>", "<start>", "<end>")])  # (I * N_c, max_length)
    if (special & (places > 0) & (places < lengths[:, None] - 1)).any():
        raise UserError(f"{files.captions}: captions have <pad>, <start> or <end> within; make the files again")


def load_references_of_split(files, num_photos):
    """
    :param files: `SplitFiles`
    :param num_photos: of the split
    :return: as of `load_reference_file`; None if there is no such file
    :raises UserError: if the file is broken, or belongs to other photos
    """
    path = files.references
    if not path.exists() and not path.is_symlink():
        return None
    references = load_reference_file(path)
    if len(references) != num_photos:
        raise UserError(
            f"{path}: {len(references)} photos found, {num_photos} expected as in {files.images.name}; the files are "
            "not of one run of create_input_files.py"
        )
    return references


def load_reference_file(path):
    """
    :return: list of dicts, one for each photo: 'image_id', 'file_name' and 'captions', lists of words
    :raises UserError: if the file holds anything else
    """
    references = load_json(path)
    if not isinstance(references, list) or not references:
        raise UserError(f"{path}: a list of photos expected; run create_input_files.py again")
    for i, photo in enumerate(references):
        if not is_reference(photo):
            raise UserError(
                f"{path}: photo {i} does not have an 'image_id', a 'file_name' and 'captions' as lists of words; run "
                "create_input_files.py again"
            )
    return references


def is_reference(photo):
    """:return: whether a reference file's entry has all that it must have"""
    return (
        isinstance(photo, dict)
        and isinstance(photo.get("image_id"), int | str)
        and isinstance(photo.get("file_name"), str)
        and isinstance(photo.get("captions"), list)
        and len(photo["captions"]) > 0
        and all(map(is_caption, photo["captions"]))
    )


def is_caption(words):
    """:return: whether this is a list of words, and not an empty one"""
    return isinstance(words, list) and len(words) > 0 and all(isinstance(word, str) and word.strip() for word in words)


def load_word_map(path):
    """
    :return: dict of word -> id
    :raises UserError: if the file is not a word map
    """
    word_map = load_json(path)
    check_word_map(word_map, path)
    return word_map


def check_word_map(word_map, source):
    """
    :param source: the file that it comes from
    :raises UserError: if it is not a word map
    """
    ids = list(word_map.values()) if isinstance(word_map, dict) else [None]
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise UserError(
            f"{source}: a word map gives each word an id of its own, from 0; make it with create_input_files.py"
        )
    for word in SPECIAL_WORDS:
        if word not in word_map:
            raise UserError(f"{source}: has no '{word}'; a word map needs {', '.join(SPECIAL_WORDS)}")
    if not all(isinstance(word, str) for word in word_map):
        raise UserError(f"{source}: its word map has words that are not text; get or make it again")


def load_table(path, dimensions):
    """
    :param dimensions: 1 for a list of numbers, 2 for lists of one length
    :return: int64 array of the whole numbers in a JSON file
    :raises UserError: if the file holds anything else
    """
    content = load_json(path)
    try:
        table = np.array(content)
        if table.ndim != dimensions or not np.issubdtype(table.dtype, np.integer):
            raise ValueError
    except ValueError:  # also rows of different lengths
        shape = "a list of whole numbers" if dimensions == 1 else "lists of whole numbers, all of one length"
        raise UserError(f"{path}: {shape} expected; make the file again with create_input_files.py") from None
    return table.astype(np.int64)


def captions_per_image(file):
    """
    :param file: open HDF5 file of photos
    :return: its attribute of that name
    :raises UserError: if it has none, or the attribute is not 1 or more
    """
    try:
        count = file.attrs["captions_per_image"]
    except Exception:  # missing, or damaged in one of many ways
        count = None
    if not isinstance(count, int | np.integer) or count < 1:
        raise UserError(
            f"{file.filename}: has no attribute 'captions_per_image' of 1 or more; run create_input_files.py again"
        )
    return int(count)
