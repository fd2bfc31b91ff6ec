"""Files become batches whatever reads them, and each epoch has an order."""

import pickle

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import BatchOrder, CaptionDataset
from utils import UserError


def load(made, order=None, image_major=False, **options):
    """:return: all batches of a split"""
    dataset = CaptionDataset(*made.arguments, image_major=image_major)
    order = order or {"batch_size": 4}
    return list(DataLoader(dataset, collate_fn=dataset.collate, **order, **options))


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_caption_major_batch_has_a_photo_for_each_caption(make_files):
    made = make_files(photos=5, per_image=2)
    batches = load(made, {"batch_size": 3})
    assert [len(batch.captions) for batch in batches] == [3, 3, 3, 1]
    row = 0
    for batch in batches:
        n = len(batch.captions)
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (n, 3, 8, 8)
        assert batch.captions.dtype == batch.lengths.dtype == torch.int64
        assert batch.image_rows is None and batch.references is None  # this is the training split
        assert batch.captions.shape == (n, batch.lengths.max())
        for i in range(n):
            assert batch.photos[i] == row // 2
            assert np.array_equal(batch.images[i], made.images[row // 2])
            assert batch.lengths[i] == made.lengths[row]
            assert batch.captions[i].tolist() == made.captions[row][: batch.lengths.max()]
            row += 1
    assert row == 10


def test_an_image_major_batch_has_each_photo_once_with_all_its_captions(make_files):
    made = make_files(photos=5, per_image=2)
    (batch, other) = load(made, {"batch_size": 3}, image_major=True)
    assert np.array_equal(batch.images, made.images[:3])
    assert batch.photos.tolist() == [0, 1, 2] and other.photos.tolist() == [3, 4]
    assert batch.image_rows.tolist() == [0, 0, 1, 1, 2, 2] and other.image_rows.tolist() == [0, 0, 1, 1]
    assert batch.lengths.tolist() == made.lengths[:6]
    assert batch.captions.tolist() == [caption[: max(made.lengths[:6])] for caption in made.captions[:6]]


@pytest.mark.parametrize("split", ["VAL", "TEST"])
def test_batches_of_the_other_splits_bring_all_references(make_files, split):
    made = make_files(split)
    for image_major in (True, False):
        for batch in load(made, image_major=image_major):
            assert batch.references == [made.references[photo]["captions"] for photo in batch.photos]


def test_the_splits_name_may_be_written_small(make_files):
    made = make_files("VAL")
    assert len(CaptionDataset(made.folder, made.name, "val")) == 10


def test_items_are_counted_as_captions_or_as_photos(make_files):
    made = make_files(photos=5, per_image=2)
    assert len(CaptionDataset(*made.arguments)) == 10
    assert len(CaptionDataset(*made.arguments, image_major=True)) == 5


def test_moving_a_batch_leaves_the_lengths_on_the_cpu(make_files):
    batch = load(make_files("VAL"))[0]
    moved = batch.to("meta")
    assert moved.images.device.type == moved.captions.device.type == "meta"
    assert moved.lengths.device.type == "cpu"
    assert moved.references == batch.references


def test_a_batch_of_features_that_are_on_the_device_takes_them_by_their_photos(make_files):
    made = make_files("VAL", photos=5)
    resident = torch.randn(2, 5, 2, 2, 7)  # of the photos, and of a changed copy of each
    for image_major in (True, False):
        dataset, expected = (CaptionDataset(*made.arguments, image_major=image_major) for _ in range(2))
        dataset.use_features("not read.hdf5", "nor this.hdf5", read=False)
        items = [4, 1, 1 + len(dataset)]
        batch, plain = (d.collate([d[i] for i in items]) for d in (dataset, expected))
        moved = batch.to("cpu", resident)
        assert torch.equal(moved.images, resident[[0, 0, 1], plain.photos])
        assert torch.equal(moved.captions, plain.captions)
        assert moved.references == plain.references


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_several_workers_read_what_one_process_reads(make_files, start_method):
    made = make_files("VAL", photos=9)
    expected = load(made, image_major=True)
    dataset = CaptionDataset(*made.arguments, image_major=True)
    dataset[0]  # this process has the file open already; the workers must not share it
    found = DataLoader(dataset, 4, collate_fn=dataset.collate, num_workers=2, multiprocessing_context=start_method)
    assert_equal(found, expected)


def test_a_dataset_can_be_pickled_while_its_file_is_open(make_files):
    made = make_files(photos=20, side=32)
    dataset = CaptionDataset(*made.arguments)
    photo, image, *_ = dataset[3]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < made.images.nbytes / 2  # a worker is sent the captions, not the photos
    assert np.array_equal(pickle.loads(pickled)[3][1], image)


def test_compressed_files_are_read_too(make_files):
    made = make_files(photos=5)
    with h5py.File(made.paths.images, "w") as file:
        file.attrs["captions_per_image"] = 2
        file.create_dataset("images", data=made.images, chunks=(2, 3, 8, 8), compression="gzip")
    (batch,) = load(made, {"batch_size": 5}, image_major=True)
    assert np.array_equal(batch.images, made.images)


def test_the_length_of_an_item_is_that_of_its_longest_caption(make_files):
    made = make_files(photos=5, per_image=2)
    assert CaptionDataset(*made.arguments).item_lengths().tolist() == made.lengths
    longest = [max(made.lengths[i : i + 2]) for i in range(0, 10, 2)]
    assert CaptionDataset(*made.arguments, image_major=True).item_lengths().tolist() == longest


def test_cached_features_stand_in_for_the_images(make_files):
    made = make_files(photos=5)
    features = np.random.default_rng(1).random((5, 2, 2, 7)).astype(np.float16)
    with h5py.File(made.folder / "features.hdf5", "w") as file:
        file["features"] = features
    dataset = CaptionDataset(*made.arguments, image_major=True)
    dataset[0]  # a photo, before
    dataset.use_features(made.folder / "features.hdf5")
    batch = dataset.collate([dataset[4], dataset[1]])
    assert batch.images.dtype == torch.float16
    assert np.array_equal(batch.images, features[[4, 1]])
    assert batch.photos.tolist() == [4, 1]


def test_an_item_beyond_the_last_is_one_of_the_next_view(make_files):
    made = make_files(photos=5)
    views = np.random.default_rng(1).random((3, 5, 2, 2, 7)).astype(np.float16)
    paths = [made.folder / f"view_{number}.hdf5" for number in range(3)]
    for path, features in zip(paths, views, strict=True):
        with h5py.File(path, "w") as file:
            file["features"] = features
    dataset = CaptionDataset(*made.arguments)  # caption-major: 10 items
    without = dataset.collate([dataset[13]])
    dataset.use_features(*paths)
    batch = dataset.collate([dataset[3], dataset[13], dataset[29]])
    assert np.array_equal(batch.images, [views[0, 1], views[1, 1], views[2, 4]])
    assert batch.views.tolist() == [0, 1, 2] and batch.photos.tolist() == [1, 1, 4]
    assert torch.equal(batch.captions[0], batch.captions[1])
    assert np.array_equal(without.images[0], made.images[1])  # the photos themselves have one view


def test_files_of_the_tutorial_have_no_references_and_load(make_files):
    made = make_files("VAL", references=None)
    words = {index: word for word, index in made.word_map.items()}
    captions = [[words[i] for i in row[1 : n - 1]] for row, n in zip(made.captions, made.lengths, strict=True)]
    (batch,) = load(made, {"batch_size": 5}, image_major=True)
    assert batch.references == [captions[0:2], captions[2:4], captions[4:6], captions[6:8], captions[8:10]]


@pytest.mark.parametrize("given", [{}, {"references": None}])
def test_captions_can_be_said_in_another_models_words_and_references_stay_as_people_wrote_them(make_files, given):
    made = make_files("VAL", **given)
    other = {"<end>": 0, "<unk>": 1, "sat": 2, "<start>": 3, "cat": 4, "bird": 5, "<pad>": 6}
    dataset = CaptionDataset(*made.arguments)
    before = CaptionDataset(*made.arguments).references
    dataset.use_words(other)
    words = {index: word for word, index in made.word_map.items()}
    for row, translated in zip(made.captions, dataset.captions, strict=True):
        assert translated.tolist() == [other.get(words[i], other["<unk>"]) for i in row]
    assert dataset.references == before


def test_the_longest_caption_is_what_the_files_have_room_for(make_files):
    assert CaptionDataset(*make_files().arguments).max_words == 7


# What is refused.


def test_a_feature_file_that_is_missing_or_broken_is_named(make_files):
    made = make_files()
    for content in (None, "hello"):
        path = made.folder / "features.hdf5"
        if content:
            path.write_text(content)
        dataset = CaptionDataset(*made.arguments)
        dataset.use_features(path)
        with pytest.raises(UserError, match=r"features\.hdf5"):
            dataset[0]


def damage(path, name, photo):
    """Rewrite one photo of an HDF5 file with a checksum, and spoil it: the file opens, the photo cannot be read."""
    with h5py.File(path, "a") as file:
        rows, attributes = file[name][:], dict(file.attrs)
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        file.create_dataset(name, data=rows, chunks=(1, *rows.shape[1:]), fletcher32=True)
        place = file[name].id.get_chunk_info(photo).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_photo_is_one_clear_line(make_files, workers):
    made = make_files(photos=5)
    damage(made.paths.images, "images", 3)
    with pytest.raises(UserError, match=r"TRAIN_IMAGES_tiny\.hdf5: photo 3 cannot be read") as raised:
        load(made, num_workers=workers)
    assert "\n" not in str(raised.value) or workers  # a worker's traceback, which run_script leaves out


# The order of the items in an epoch.

LENGTHS = np.random.default_rng(0).integers(3, 30, 1003)


def epoch(order, *arguments):
    order.set_epoch(*arguments)
    return list(order)


@pytest.mark.parametrize("bucket", [False, True])
def test_every_item_comes_once_an_epoch(bucket):
    order = BatchOrder(LENGTHS, 32, bucket)
    for number in range(2):
        batches = epoch(order, number)
        assert len(batches) == len(order) == 32
        assert sorted(sum(batches, [])) == list(range(1003))
        assert sorted(map(len, batches)) == [11] + [32] * 31
        assert all(isinstance(item, int) for item in batches[0])


@pytest.mark.parametrize("bucket", [False, True])
def test_the_order_follows_from_seed_and_epoch_alone(bucket):
    one, same, other = (BatchOrder(LENGTHS, 32, bucket, seed) for seed in (1, 1, 2))
    np.random.seed(7)  # noqa: NPY002
    first = epoch(one, 0)
    np.random.seed(8)  # noqa: NPY002
    epoch(same, 5)
    assert epoch(same, 0) == first == epoch(one, 0)
    assert epoch(one, 1) != first
    assert epoch(other, 0) != first


def test_items_are_shuffled():
    (batch, *_) = epoch(BatchOrder(np.full(1000, 5), 100), 0)
    assert batch != sorted(batch)
    assert max(batch) > 800


def test_captions_in_a_bucket_are_of_nearly_one_length():
    def spread(bucket):
        batches = epoch(BatchOrder(LENGTHS, 32, bucket), 0)
        return np.array([np.ptp(LENGTHS[batch]) for batch in batches])

    assert spread(False).mean() > 20
    assert spread(True).mean() < 2
    means = [LENGTHS[batch].mean() for batch in epoch(BatchOrder(LENGTHS, 32, True), 0)]
    assert means != sorted(means) and means != sorted(means, reverse=True)  # the batches are shuffled again


def test_buckets_change_from_epoch_to_epoch():
    order = BatchOrder(LENGTHS, 32, bucket=True)
    one, other = ({frozenset(batch) for batch in epoch(order, number)} for number in (0, 1))
    assert len(one & other) < 5


@pytest.mark.parametrize("bucket", [False, True])
def test_processes_share_every_batch_without_overlap(bucket):
    whole = epoch(BatchOrder(LENGTHS, 32, bucket, seed=3), 4)
    shares = [epoch(BatchOrder(LENGTHS, 32, bucket, seed=3, rank=rank, world_size=4), 4) for rank in range(4)]
    assert [len(share) for share in shares] == [len(whole)] * 4
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(sum(parts, [])) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_every_item_is_shown_in_each_view_in_turn():
    items = len(LENGTHS)
    seen = [sorted(sum(epoch(BatchOrder(LENGTHS, 32, True, views=3), number), [])) for number in range(4)]
    views = [[item // items for item in sorted(some, key=lambda item: item % items)] for some in seen]
    assert [sorted(item % items for item in some) for some in seen] == [list(range(items))] * 4
    assert all({a, b, c} == {0, 1, 2} for a, b, c in zip(*views[:3], strict=True))
    assert views[3] == views[0]


def test_no_process_gets_an_empty_batch():
    for rank in range(2):
        assert all(epoch(BatchOrder(LENGTHS[:33], 32, rank=rank, world_size=2), 0))


@pytest.mark.parametrize("bucket", [False, True])
def test_an_epoch_can_be_resumed_within(bucket):
    order = BatchOrder(LENGTHS, 32, bucket)
    whole = epoch(order, 2)
    assert epoch(order, 2, 10) == whole[10:]
    assert epoch(order, 3) == epoch(BatchOrder(LENGTHS, 32, bucket), 3)  # the next epoch is a whole one


def test_a_loader_takes_the_order(make_files):
    made = make_files(photos=5)
    batches = load(made, {"batch_sampler": BatchOrder(made.lengths, 4, seed=1)})
    expected = epoch(BatchOrder(made.lengths, 4, seed=1), 0)
    assert [batch.photos.tolist() for batch in batches] == [[item // 2 for item in items] for items in expected]
