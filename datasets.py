"""
Batches of photos and captions from the files of create_input_files.py: the dataset, its batches and their order.

An item is a photo (or its cached features) with some of its captions: one for caption-major batches, all of them for
image-major ones. A batch joins items, so several captions may share one photo.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from captioning.storage.files import load_json
from captioning.storage.hdf5 import map_rows, open_hdf5
from utils import SPECIAL_WORDS, UserError


class Batch(NamedTuple):
    """B photos with N captions."""

    images: torch.Tensor  # (B, 3, 256, 256) uint8, or cached features (B, height, width, native_dim) float16
    captions: torch.Tensor  # (N, length of the longest), ids: <start> ... <end>, then <pad>
    lengths: torch.Tensor  # (N,), counting <start> and <end>
    image_rows: torch.Tensor | None  # (N,), the row of `images` of each caption; None if each has its own
    photos: torch.Tensor  # (B,), the photos' places in the split
    references: list | None  # B lists of captions, each a list of words; None in training
    views: torch.Tensor | None = None  # (B,), whose features these are: 0 of the photo, 1 of its first changed copy ...

    def to(self, device, resident=None):
        """
        Move images and captions. The rest is small, and the loop over timesteps needs the lengths on the CPU.

        :param resident: features of the split (views, I, height, width, native_dim) that are on the device already
        """
        images = self.images
        if resident is not None:
            images = resident[self.views.to(device, non_blocking=True), self.photos.to(device, non_blocking=True)]
        return self._replace(
            images=images.to(device, non_blocking=True), captions=self.captions.to(device, non_blocking=True)
        )

    def pin_memory(self):
        """Called by the DataLoader, so that `to` can copy to a GPU while it computes."""
        return self._replace(
            images=self.images.pin_memory(), captions=self.captions.pin_memory(), photos=self.photos.pin_memory(),
            views=self.views.pin_memory(),
        )  # fmt: skip


class CaptionDataset(Dataset):
    """
    One split of the files of create_input_files.py.

    Files are opened on first use, by each worker for itself, because their handles cannot be shared.
    """

    def __init__(self, data_folder, data_name, split, image_major=False):
        """
        :param data_folder: folder of the files
        :param data_name: what their names share, such as coco_5_cap_per_img_5_min_word_freq
        :param split: 'TRAIN', 'VAL' or 'TEST'
        :param image_major: an item is a photo with all its captions, not a caption with its photo
        :raises UserError: if a file is missing or broken, or if they do not belong together
        """
        self.split, self.image_major = split.upper(), image_major
        folder = Path(data_folder)
        self.image_file = folder / f"{self.split}_IMAGES_{data_name}.hdf5"
        word_map_file = folder / f"WORDMAP_{data_name}.json"
        if word_map_file.exists() and not self.image_file.exists():
            raise UserError(
                f"{self.image_file}: no such file, so {data_name} has no photos in {self.split}; add some to the "
                "annotations, or run create_input_files.py with --splits drawn"
            )
        with open_hdf5(self.image_file, "images") as file:
            self.num_photos, self.image_size = len(file["images"]), file["images"].shape[-1]
            self.captions_per_image = captions_per_image(file)
        self.word_map = load_word_map(word_map_file)

        caption_file = folder / f"{self.split}_CAPTIONS_{data_name}.json"
        length_file = folder / f"{self.split}_CAPLENS_{data_name}.json"
        self.captions = load_table(caption_file, dimensions=2)  # (N_c * I, max_length), ids
        self.lengths = load_table(length_file, dimensions=1)  # (N_c * I,)
        self.refuse_mixed_files(caption_file, length_file)
        self.max_words = self.captions.shape[1] - 2  # longest caption that the files have room for
        self.captions = self.captions.astype(np.min_scalar_type(len(self.word_map)))  # COCO's: 59 MB, not 236
        self.reference_file = folder / f"{self.split}_REFERENCES_{data_name}.json"
        self._references = None  # read when they are first asked for
        self.with_references = self.split != "TRAIN"  # whether batches hold them; in training nobody asks
        self.sources, self.source_name, self.read = [self.image_file], "images", True
        self.rows = None

    def use_features(self, *paths, read=True):
        """
        Let features stand in for the photos.

        :param paths: from `features.cache_features`: of the photos, and of their changed copies if there are any
        :param read: False if the batches need neither, because the features are on the GPU already
        """
        self.sources, self.source_name, self.read, self.rows = [*map(Path, paths)], "features", read, None

    def use_words(self, word_map):
        """Use another word map's ids for the captions, such as a model's; words that it lacks become <unk>."""
        if word_map != self.word_map:
            self.load_references()  # before: where there is no file of them, they are the captions' own words
            ids = np.zeros(len(self.word_map), dtype=np.min_scalar_type(len(word_map)))  # old id -> new id
            for word, index in self.word_map.items():
                ids[index] = word_map.get(word, word_map["<unk>"])
            self.captions, self.word_map = ids[self.captions], word_map

    def refuse_mixed_files(self, caption_file, length_file):
        """:raises UserError: if captions, lengths, photos and word map do not belong together"""
        expected = self.num_photos * self.captions_per_image
        if not len(self.captions) == len(self.lengths) == expected:
            raise UserError(
                f"{caption_file}: {len(self.captions)} captions and {len(self.lengths)} lengths ({length_file.name}) "
                f"found, {expected} expected for {self.num_photos} photos; the files are not of one run of "
                "create_input_files.py"
            )
        longest = self.captions.shape[1]
        if self.lengths.min() < 2 or self.lengths.max() > longest:
            found = f"{self.lengths.min()} to {self.lengths.max()}"
            raise UserError(f"{length_file}: lengths of {found} found, 2 to {longest} expected; make the files again")
        last_words = self.captions[np.arange(expected), self.lengths - 1]
        if self.captions.min() < 0 or self.captions.max() >= len(self.word_map):
            raise UserError(
                f"{caption_file}: word ids up to {self.captions.max()} found, the word map has {len(self.word_map)} "
                "words; they are not of one run of create_input_files.py"
            )
        if (last_words != self.word_map["<end>"]).any():
            raise UserError(f"{caption_file}: captions do not end where {length_file.name} says; make the files again")
        if (self.captions[:, 0] != self.word_map["<start>"]).any():
            raise UserError(f"{caption_file}: captions do not begin with <start>; make the files again")

    @property
    def references(self):
        """:return: a dict for each photo, see `load_reference_file`"""
        if self._references is None:
            self.load_references()
        return self._references

    def load_references(self):
        """
        Read the references now, not when they are first asked for. The tutorial's own files have none; there, each
        photo's encoded captions take their place.

        :raises UserError: if the file is broken, or belongs to other photos
        """
        path = self.reference_file
        if not path.exists() and not path.is_symlink():
            self._references = self.captions_as_references()
            return
        references = load_reference_file(path)
        if len(references) != self.num_photos:
            raise UserError(
                f"{path}: {len(references)} photos found, {self.num_photos} expected as in {self.image_file.name}; "
                "the files are not of one run of create_input_files.py"
            )
        self._references = references

    def captions_as_references(self):
        """:return: a dict for each photo, with the words of its encoded captions"""
        words = {index: word for word, index in self.word_map.items()}
        captions = [[words[i] for i in row[1 : n - 1]] for row, n in zip(self.captions, self.lengths, strict=True)]
        c = self.captions_per_image
        return [
            {"image_id": i, "file_name": str(i), "captions": captions[i * c : (i + 1) * c]}
            for i in range(self.num_photos)
        ]

    def item_lengths(self):
        """:return: (items,), length of each item's caption, or of its longest"""
        return self.lengths.reshape(len(self), -1).max(axis=1)

    def __len__(self):
        return self.num_photos if self.image_major else len(self.captions)

    def __getitem__(self, item):
        """
        :param item: its place, plus the number of items for each view before the wanted one, see `BatchOrder`
        :return: (photo's place in the split, view, image or features, captions (n, max_length), lengths (n,))
        """
        if self.rows is None and self.read:
            self.rows = [map_rows(source, self.source_name) for source in self.sources]
        view, item = divmod(item, len(self))
        view = view % len(self.sources)  # the photos themselves have but one
        c = self.captions_per_image
        if self.image_major:
            photo, chosen = item, slice(item * c, (item + 1) * c)
        else:
            photo, chosen = item // c, slice(item, item + 1)
        try:
            image = self.rows[view][photo] if self.read else np.empty(0, dtype=np.float16)
            return photo, view, image, self.captions[chosen], self.lengths[chosen]
        except OSError as error:
            raise UserError(
                f"{self.sources[view]}: photo {photo} cannot be read ({error}); make the file again"
            ) from None

    def __getstate__(self):
        """What is sent to a worker: everything but the open file."""
        return {**self.__dict__, "rows": None}

    def collate(self, items):
        """:return: a `Batch` of a list of items"""
        photos, views, images, captions, lengths = zip(*items, strict=True)
        lengths = torch.from_numpy(np.concatenate(lengths))  # (N,)
        captions = np.concatenate(captions)[:, : lengths.max()].astype(np.int64)  # (N, longest)
        image_rows = None
        if self.image_major:
            image_rows = torch.arange(len(photos)).repeat_interleave(self.captions_per_image)  # (N,)
        references = None
        if self.with_references:
            references = [self.references[photo]["captions"] for photo in photos]
        images, captions = torch.from_numpy(np.stack(images)), torch.from_numpy(captions)
        return Batch(images, captions, lengths, image_rows, torch.tensor(photos), references, torch.tensor(views))


class BatchOrder(Sampler):
    """
    Which items make each batch, drawn again each epoch; a function of the seed and the epoch alone.

    With `bucket`, captions of about the same length share a batch, which stays full to its last timestep: the shuffled
    items are sorted within pools of 50 batches, and the batches shuffled again.

    With several views, each item is shown in one of them, the next one in each epoch.

    Of several processes, each gets its share of every batch. Where the last one is too short for all of them, a process
    without a share gets an item that only stands in, as every process has to take part in every step.
    """

    def __init__(self, lengths, batch_size, bucket=False, seed=0, rank=0, world_size=1, views=1):
        """
        :param lengths: (items,), of each item's caption (its longest, if it has several)
        :param batch_size: items a batch, over all processes together
        :param rank, world_size: this process and their number
        :param views: of each photo: itself, and changed copies of it
        """
        self.lengths, self.batch_size, self.bucket, self.seed = np.asarray(lengths), batch_size, bucket, seed
        self.rank, self.world_size, self.views = rank, world_size, views
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch, start=0):
        """Choose the epoch, and the batch to start it with (to resume within one)."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self):
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        if self.bucket:
            pool = 50 * self.batch_size
            pools = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = np.concatenate([some[np.argsort(self.lengths[some], kind="stable")] for some in pools])
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.bucket:
            whole = len(self.lengths) // self.batch_size  # a shorter one stays the last
            batches = [batches[i] for i in random.permutation(whole)] + batches[whole:]
        for batch in batches[self.start :]:
            share = batch[self.rank :: self.world_size]
            share = share if len(share) else batch[:1]
            view = (share + self.epoch) % self.views
            yield (share + view * len(self.lengths)).tolist()

    def has_share(self, i):
        """:return: whether this process has a share of the epoch's batch i; if not, what it gets must not count"""
        return self.rank < min(self.batch_size, len(self.lengths) - i * self.batch_size)


def load_word_map(path):
    """
    :return: dict of word -> id
    :raises UserError: if it is no word map
    """
    word_map = load_json(path)
    check_word_map(word_map, path)
    return word_map


def check_word_map(word_map, source):
    """:raises UserError: if it is no word map; `source` is the file that it comes from"""
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


def load_reference_file(path):
    """
    :return: list of dicts, one for each photo: 'image_id', 'file_name' and 'captions', lists of words
    :raises UserError: if the file holds anything else
    """

    def is_caption(words):
        return isinstance(words, list) and words and all(isinstance(word, str) and word.strip() for word in words)

    references = load_json(path)
    if not isinstance(references, list) or not references:
        raise UserError(f"{path}: a list of photos expected; run create_input_files.py again")
    for i, photo in enumerate(references):
        if not (
            isinstance(photo, dict)
            and isinstance(photo.get("image_id"), int | str)
            and isinstance(photo.get("file_name"), str)
            and isinstance(photo.get("captions"), list)
            and photo["captions"]
            and all(map(is_caption, photo["captions"]))
        ):
            raise UserError(
                f"{path}: photo {i} does not have an 'image_id', a 'file_name' and 'captions' as lists of words; run "
                "create_input_files.py again"
            )
    return references


def load_table(path, dimensions):
    """:return: int64 array of the numbers in a JSON file"""
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
