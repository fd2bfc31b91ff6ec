"""How a run recognises its data: it continues with the photos and captions that it began with, and with no others."""

import hashlib
from pathlib import Path

from captioning.features import read_images
from captioning.storage.hdf5 import open_hdf5
from datasets import CaptionDataset
from utils import UserError

SAMPLED_PHOTOS = 32  # of a split: to read all of COCO would take minutes


def open_validation_data(data_folder, data_name):
    """
    :return: `CaptionDataset` of the validation split
    :raises UserError: if there is none
    """
    path = Path(data_folder) / f"VAL_IMAGES_{data_name}.hdf5"
    if not path.exists():
        raise UserError(
            f"{path}: no such file; training validates on photos of its own after each epoch: let "
            "create_input_files.py put some aside (--val_share 0.1)"
        )
    return CaptionDataset(data_folder, data_name, "VAL", image_major=True)


def describe_data(dataset):
    """
    :param dataset: `CaptionDataset`
    :return: 16 hexadecimal digits that change with the captions, the photos' names, their number, size or pixels
    """
    digest = hashlib.sha256()
    digest.update(dataset.captions.tobytes())
    if dataset.reference_file.is_file():
        digest.update(dataset.reference_file.read_bytes())
    with open_hdf5(dataset.image_file, "images") as file:
        images = file["images"]  # (I, 3, S, S)
        digest.update(str(images.shape).encode())
        for i in range(0, len(images), 1 + len(images) // SAMPLED_PHOTOS):
            digest.update(read_images(images, i, i + 1).tobytes())
    return digest.hexdigest()[:16]


class UnchangedFiles:
    """Notices when a file is replaced while a run reads it: what comes after could not be compared with what was."""

    def __init__(self, dataset):
        """:param dataset: `CaptionDataset` whose files are to stay as they are"""
        files = dataset.files
        watched = (files.images, files.captions, files.lengths, files.references)
        self.before = {path: self.look(path) for path in watched}

    def look(self, path):
        """:return: what changes when a file is replaced or written to; None if it is gone"""
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def check(self):
        """:raises UserError: if one is not what it was"""
        for path, before in self.before.items():
            if self.look(path) != before:
                raise UserError(
                    f"{path}: was replaced during the run, so its scores could not be compared; put the old file back "
                    "and continue with --resume, or start a new run"
                )
