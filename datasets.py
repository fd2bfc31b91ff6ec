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

from captioning.split_files import load_references_of_split, load_split, name_files
from captioning.storage.hdf5 import map_rows
from utils import UserError


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
        """Called by the DataLoader, so that `to` can copy to a GPU while the GPU computes."""
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
        self.files = name_files(data_folder, data_name, self.split)
        content = load_split(self.files)
        self.num_photos, self.image_size = content.num_photos, content.image_size
        self.captions_per_image, self.word_map = content.captions_per_image, content.word_map
        self.captions, self.lengths = content.captions, content.lengths
        self.max_words = self.captions.shape[1] - 2  # longest caption that the files have room for
        self.image_file, self.reference_file = self.files.images, self.files.references
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
            self.load_references()  # now: without a file of them, they are the captions' present words
            ids = np.zeros(len(self.word_map), dtype=np.min_scalar_type(len(word_map)))  # old id -> new id
            for word, index in self.word_map.items():
                ids[index] = word_map.get(word, word_map["<unk>"])
            self.captions, self.word_map = ids[self.captions], word_map

    @property
    def references(self):
        """:return: a dict for each photo, see `split_files.load_reference_file`"""
        if self._references is None:
            self.load_references()
        return self._references

    def load_references(self):
        """
        Read the references now, not when they are first asked for. The tutorial's own files have none; there, each
        photo's encoded captions take their place.

        :raises UserError: if the file is broken, or belongs to other photos
        """
        references = load_references_of_split(self.files, self.num_photos)
        self._references = self.captions_as_references() if references is None else references

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
        :param item: place of the item; of view number v, plus v times the number of items, see `BatchOrder`
        :return: (photo's place in the split, image or features, captions (n, max_length), lengths (n,), view)
        """
        if self.rows is None and self.read:
            self.rows = [map_rows(source, self.source_name) for source in self.sources]
        view, item = divmod(item, len(self))
        view = view % len(self.sources)  # there is only one of the photos themselves
        c = self.captions_per_image
        if self.image_major:
            photo, chosen = item, slice(item * c, (item + 1) * c)
        else:
            photo, chosen = item // c, slice(item, item + 1)
        try:
            image = self.rows[view][photo] if self.read else np.empty(0, dtype=np.float16)
            return photo, image, self.captions[chosen], self.lengths[chosen], view
        except OSError as error:
            raise UserError(
                f"{self.sources[view]}: photo {photo} cannot be read ({error}); make the file again"
            ) from None

    def __getstate__(self):
        """What is sent to a worker: everything but the open file."""
        return {**self.__dict__, "rows": None}

    def collate(self, items):
        """:return: a `Batch` of a list of items"""
        photos, images, captions, lengths, views = zip(*items, strict=True)
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
    Which items make each batch, drawn again in each epoch; a function of the seed and the epoch alone.

    With `bucket`, captions of about the same length share a batch, which stays full to its last timestep: the shuffled
    items are sorted within pools of 50 batches, and the batches shuffled again.

    With several views, each item is shown in one of them, the next one in each epoch.

    Of several processes, each gets its share of every batch. Where the last batch is too short for all of them, a
    process without a share gets an item that does not count, as every process has to take part in every step.
    """

    def __init__(self, lengths, batch_size, bucket=False, seed=0, rank=0, world_size=1, views=1):
        """
        :param lengths: (items,), of each item's caption (its longest, if it has several)
        :param batch_size: items in a batch, of all processes together
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
            full = len(self.lengths) // self.batch_size  # number of full batches; a shorter one stays the last
            batches = [batches[i] for i in random.permutation(full)] + batches[full:]
        for batch in batches[self.start :]:
            share = batch[self.rank :: self.world_size]
            share = share if len(share) else batch[:1]
            view = (share + self.epoch) % self.views
            yield (share + view * len(self.lengths)).tolist()

    def has_share(self, i):
        """:return: whether this process has a share of the epoch's batch i; if not, what it gets must not count"""
        return self.rank < min(self.batch_size, len(self.lengths) - i * self.batch_size)
