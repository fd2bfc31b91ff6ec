"""Cached features are the encoder's own, are found again only where they are right, and never half written."""

import shutil
from collections import namedtuple

import h5py
import numpy as np
import pytest
import torch

from captioning import features
from captioning.features import build_loader, cache_features
from captioning.networks.backbones import load_backbone
from captioning.storage.files import atomic_path
from captioning.training.augmentation import Augmentation, View
from datasets import BatchOrder, CaptionDataset
from models import Encoder
from utils import UserError


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder("squeezenet1_1").train()  # as train.py has it: frozen all the same


@pytest.fixture
def counted(encoder, monkeypatch):
    """:return: list to which each photo that the encoder sees is added"""
    photos, forward = [], encoder.backbone.forward

    def count(images):
        photos.extend(range(len(images)))
        return forward(images)

    monkeypatch.setattr(encoder.backbone, "forward", count)
    return photos


def features_of(path):
    with h5py.File(path, "r") as file:
        return file["features"][:]


def files_beside(made):
    return sorted(path.name for path in made.folder.iterdir())


def test_the_cache_holds_what_the_encoder_gives(make_files, encoder):
    made = make_files(photos=7, side=64)
    found = features_of(cache_features(encoder, made.paths.images, "cpu", batch_size=3))
    assert found.dtype == np.float16
    with torch.no_grad():
        for i in range(0, 7, 3):
            expected = encoder.grid(torch.from_numpy(made.images[i : i + 3]))
            assert np.array_equal(found[i : i + 3], expected.numpy())
    assert found.std(axis=0).max() > 0  # the photos differ


def test_features_of_changed_copies_are_cached_and_are_the_same_each_time(make_files, encoder, counted):
    made = make_files(photos=5, side=64)
    dataset = CaptionDataset(*made.arguments)
    augmentation = Augmentation(crop_min_scale=0.5, flip=0.5, colour=0.2).train()
    one, two = (View(number, augmentation, dataset) for number in (1, 2))
    plain = cache_features(encoder, made.paths.images, "cpu")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second = (cache_features(encoder, made.paths.images, "cpu", batch_size=3, view=view) for view in (one, two))
    assert torch.equal(torch.rand(1), expected)  # the caller's random numbers stay as they are

    with torch.no_grad():
        for start in (0, 3):
            photos = one.change(torch.from_numpy(made.images[start : start + 3]), start)
            assert np.array_equal(features_of(first)[start : start + 3], encoder.grid(photos).numpy())
    assert len({features_of(path).tobytes() for path in (plain, first, second)}) == 3
    counted.clear()
    assert cache_features(encoder, made.paths.images, "cpu", view=View(1, augmentation, dataset)) == first
    assert not counted
    milder = View(1, Augmentation(crop_min_scale=0.6, flip=0.5, colour=0.2).train(), dataset)
    assert cache_features(encoder, made.paths.images, "cpu", view=milder) != first


def test_a_copy_is_not_mirrored_where_a_caption_says_left_or_right(make_files):
    made = make_files(photos=6, side=64)
    dataset = CaptionDataset(*made.arguments)
    dataset.word_map["left"] = int(dataset.captions[0, 1])  # a word of the first photo
    view = View(1, Augmentation(flip=1.0).train(), dataset)
    images = torch.from_numpy(made.images)
    mirrored = [torch.equal(a, b) for a, b in zip(view.change(images, 0), (images / 255).flip(3), strict=True)]
    says_left = [(dataset.captions[2 * i : 2 * i + 2] == dataset.word_map["left"]).any() for i in range(6)]
    assert mirrored == [not says for says in says_left]
    assert mirrored.count(False) >= 1


def test_a_loader_reads_the_copies_in_turn(make_files, encoder):
    made = make_files(photos=5, side=64)
    augmentation = Augmentation(crop_min_scale=0.5).train()
    data = made.folder, made.name, "TRAIN", encoder, torch.device("cpu")
    for epoch in range(3):
        order = BatchOrder(np.full(5, 9), 5, views=2)
        order.set_epoch(epoch)
        loader, _ = build_loader(*data, order=order, views=lambda dataset: [View(1, augmentation, dataset)])
        [batch] = loader
        views = [features_of(path) for path in loader.dataset.sources]
        for image, view, photo in zip(batch.images, batch.views, batch.photos, strict=True):
            assert view == (photo + epoch) % 2
            assert np.array_equal(image, views[view][photo])


def test_training_sees_the_same_features_with_the_cache_and_without(make_files, encoder):
    made = make_files(photos=5, side=64)
    path = cache_features(encoder, made.paths.images, "cpu")
    plain, cached = CaptionDataset(*made.arguments), CaptionDataset(*made.arguments)
    cached.use_features(path)
    items = [7, 0, 3]
    with torch.no_grad():
        expected = encoder.features(plain.collate([plain[i] for i in items]).images)
        found = encoder.features(cached.collate([cached[i] for i in items]).images)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # other batches may round otherwise


def test_a_valid_cache_is_used_again(make_files, encoder, counted, capsys):
    made = make_files(photos=7, side=64)
    path = cache_features(encoder, made.paths.images, "cpu")
    assert len(counted) >= 7
    counted.clear()
    before = path.read_bytes()
    capsys.readouterr()
    assert cache_features(encoder, made.paths.images, "cpu") == path
    assert not counted
    assert path.read_bytes() == before
    assert path.name in capsys.readouterr().out  # and it says so


def test_the_size_is_announced_before_anything_is_computed(make_files, encoder, counted, capsys):
    made = make_files(photos=7, side=64)
    cache_features(encoder, made.paths.images, "cpu")
    said = capsys.readouterr().out
    assert "7 photos" in said and "GB" in said


def test_other_weights_have_a_file_of_their_own(make_files, encoder):
    made = make_files(photos=4, side=64)
    first = cache_features(encoder, made.paths.images, "cpu")
    expected = features_of(first)
    with torch.no_grad():
        next(encoder.parameters())[0, 0, 0, 0] += 0.5
    second = cache_features(encoder, made.paths.images, "cpu")
    assert second != first
    assert not np.array_equal(features_of(second), expected)
    assert np.array_equal(features_of(first), expected)


def test_changed_batch_statistics_are_other_weights(make_files):
    made = make_files(photos=4, side=64)
    encoder = Encoder("mobilenet_v3_small")
    first = cache_features(encoder, made.paths.images, "cpu")
    dict(encoder.named_buffers())["backbone.features.0.1.running_mean"].add_(0.1)
    assert cache_features(encoder, made.paths.images, "cpu") != first


def test_the_decoders_side_of_the_encoder_shares_the_cache(make_files, encoder, counted):
    # The grid's size and the 1 x 1 convolution come after what is cached.
    made = make_files(photos=4, side=64)
    first = cache_features(encoder, made.paths.images, "cpu")
    other = Encoder("squeezenet1_1", encoded_image_size=5, encoder_dim=9)
    load_backbone(other, encoder.backbone.state_dict())
    assert cache_features(other, made.paths.images, "cpu") == first


def test_other_networks_have_a_file_of_their_own(make_files, encoder):
    made = make_files(photos=4, side=64)
    paths = {cache_features(e, made.paths.images, "cpu") for e in (encoder, Encoder("squeezenet1_0"))}
    assert len(paths) == 2


def test_features_of_a_network_of_timms_lie_beside_the_data_too(make_files):
    made = make_files(photos=3, side=64)
    encoder = Encoder("timm/convnext_atto")
    path = cache_features(encoder, made.paths.images, "cpu")
    assert path.parent == made.folder and "_timm_convnext_atto_" in path.name
    with torch.no_grad():
        assert np.array_equal(features_of(path), encoder.grid(torch.from_numpy(made.images)).numpy())


def test_other_images_under_the_same_name_are_noticed(make_files, encoder):
    made = make_files(photos=4, side=64)
    first = cache_features(encoder, made.paths.images, "cpu")
    again = make_files(photos=4, side=64, seed=1)
    second = cache_features(encoder, again.paths.images, "cpu")
    assert second != first
    with torch.no_grad():
        expected = encoder.grid(torch.from_numpy(again.images))
    assert np.array_equal(features_of(second), expected.numpy())


def test_the_splits_have_files_of_their_own(make_files, encoder):
    paths = {cache_features(encoder, make_files(split, photos=3, side=64).paths.images, "cpu")
             for split in ("TRAIN", "VAL", "TEST")}  # fmt: skip
    assert len(paths) == 3


def test_features_of_half_precision_are_kept_apart(make_files, encoder):
    made = make_files(photos=4, side=64)
    plain = cache_features(encoder, made.paths.images, "cpu")
    half = cache_features(encoder, made.paths.images, "cpu", autocast=torch.autocast("cpu", dtype=torch.bfloat16))
    assert plain != half
    one, other = features_of(plain).astype(np.float32), features_of(half).astype(np.float32)
    assert 0 < np.abs(one - other).max() < 0.1 * np.abs(one).max()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other rows", "other checksums", "text checksums"])
def test_a_damaged_cache_is_computed_again(make_files, encoder, damage):
    made = make_files(photos=4, side=64)
    path = cache_features(encoder, made.paths.images, "cpu")
    expected = features_of(path)
    if damage == "other rows":
        with h5py.File(path, "w") as file:
            file["features"] = expected[:-1]
    elif damage.endswith("checksums"):
        with h5py.File(path, "r+") as file:
            file.attrs["checksums"] = {"other": np.zeros(0, np.uint32), "text": "all is well"}[damage.split()[0]]
    else:
        content = path.read_bytes()
        path.write_bytes({"truncated": content[:-5000], "empty": b"", "text": b"hello" * 100}[damage])
    assert cache_features(encoder, made.paths.images, "cpu") == path
    assert np.array_equal(features_of(path), expected)


def test_a_cache_with_rows_of_zeros_is_computed_again(make_files, encoder, capsys):
    made = make_files(photos=7, side=64)
    path = cache_features(encoder, made.paths.images, "cpu", batch_size=3)
    expected = features_of(path)
    with h5py.File(path, "r+") as file:
        file["features"][5] = 0
    capsys.readouterr()
    assert cache_features(encoder, made.paths.images, "cpu", batch_size=3) == path
    assert np.array_equal(features_of(path), expected)
    assert f"{path}: is damaged" in capsys.readouterr().out


def test_of_a_large_cache_blocks_all_over_the_file_are_compared(make_files, encoder, monkeypatch):
    made = make_files(photos=40, side=64)
    path = cache_features(encoder, made.paths.images, "cpu")
    expected = features_of(path)
    monkeypatch.setattr(features, "MOST_CHECKED", expected.nbytes // 4)
    monkeypatch.setattr(features, "MOST_BLOCKS", 7)  # of 6 photos, the last of 4
    path.unlink()
    cache_features(encoder, made.paths.images, "cpu")
    with h5py.File(path, "r+") as file:
        file["features"][26:] = 0  # as a third of a file whose writer was killed
    cache_features(encoder, made.paths.images, "cpu")
    assert np.array_equal(features_of(path), expected)


def test_a_cache_from_before_there_were_checksums_is_computed_again_and_said_once(make_files, encoder, capsys):
    made = make_files(photos=7, side=64)
    path = cache_features(encoder, made.paths.images, "cpu")
    with h5py.File(path, "r+") as file:
        del file.attrs["checksums"]
    capsys.readouterr()
    for _ in range(2):
        cache_features(encoder, made.paths.images, "cpu")
    assert capsys.readouterr().out.count("has no checksums, as those that older versions made") == 1


def test_features_in_any_order_of_memory_are_cached(make_files, encoder):
    """A GPU's convolutions may give the channels first, and a checksum wants the numbers one after the other."""
    made = make_files(photos=3, side=64)
    encoder.backbone.register_forward_hook(lambda _, inputs, output: output.contiguous())
    path = cache_features(encoder, made.paths.images, "cpu")
    with h5py.File(made.paths.images) as images, h5py.File(path) as cached, torch.no_grad():
        expected = encoder.grid(torch.from_numpy(images["images"][:])).numpy()
        np.testing.assert_array_equal(cached["features"][:], expected)


def test_a_cache_may_be_a_link_to_another_disk(make_files, encoder, counted, tmp_path):
    made = make_files(photos=4, side=64)
    path = cache_features(encoder, made.paths.images, "cpu")
    elsewhere = path.rename(tmp_path / "elsewhere.hdf5")
    path.symlink_to(elsewhere)
    counted.clear()
    assert cache_features(encoder, made.paths.images, "cpu") == path
    assert not counted


def test_a_link_to_another_file_is_replaced_and_the_file_is_not_written_to(make_files, encoder, tmp_path):
    made = make_files(photos=4, side=64)
    path = cache_features(encoder, made.paths.images, "cpu")
    expected = features_of(path)
    for content in (b"precious", None):
        path.unlink()
        path.symlink_to(tmp_path / "precious")
        if content is None:
            (tmp_path / "precious").unlink()
        else:
            (tmp_path / "precious").write_bytes(content)
        cache_features(encoder, made.paths.images, "cpu")
        assert not path.is_symlink() and np.array_equal(features_of(path), expected)
        assert (tmp_path / "precious").exists() == (content is not None)
        assert content is None or (tmp_path / "precious").read_bytes() == content


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(make_files, encoder, monkeypatch):
    made = make_files(photos=40, side=64)
    before = files_beside(made)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100_000))  # 40 x 3 x 3 x 512 x 2 bytes
    with pytest.raises(UserError, match=r"0\.00 GB are free.*needs 0\.00 GB.*--no_cache_features") as raised:
        cache_features(encoder, made.paths.images, "cpu")
    assert "\n" not in str(raised.value)
    assert files_beside(made) == before


def test_a_disk_that_fills_up_meanwhile_is_one_clear_line(make_files, encoder, monkeypatch):
    made = make_files(photos=40, side=64)
    before, forward, calls = files_beside(made), encoder.backbone.forward, []

    def full(images):
        calls.append(len(images))
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return forward(images)

    monkeypatch.setattr(encoder.backbone, "forward", full)
    with pytest.raises(UserError, match="No space left on device"):
        cache_features(encoder, made.paths.images, "cpu", batch_size=8)
    assert files_beside(made) == before


def test_a_file_that_may_not_grow_is_one_clear_line(make_files, encoder, small_files):
    made = make_files(photos=40, side=64)
    before = files_beside(made)
    small_files(20_000)
    with pytest.raises(UserError, match=r"FEATURES_.*could not be written \(File too large\).*--no_cache_features"):
        cache_features(encoder, made.paths.images, "cpu", batch_size=8)
    assert files_beside(made) == before


def test_what_a_killed_build_left_is_removed_but_not_what_another_is_building(make_files, encoder):
    made = make_files(photos=4, side=64)
    dead = made.folder / ".VAL_FEATURES_tiny_resnet18_0123456789ab.hdf5.123.tmp"  # even one of another network
    dead.write_bytes(b"half")
    with atomic_path(made.folder / "TRAIN_FEATURES_tiny_resnet18_0123456789ab.hdf5") as building:
        with h5py.File(building, "w", locking=False) as file:
            file["features"] = np.zeros(3)
        cache_features(encoder, made.paths.images, "cpu")
        assert building.exists() and not dead.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_nothing(make_files, encoder, monkeypatch, error):
    made = make_files(photos=40, side=64)
    before, forward, calls = files_beside(made), encoder.backbone.forward, []

    def interrupted(images):
        calls.append(len(images))
        if len(calls) > 3:
            raise error
        return forward(images)

    monkeypatch.setattr(encoder.backbone, "forward", interrupted)
    with pytest.raises(error):
        cache_features(encoder, made.paths.images, "cpu", batch_size=8)
    assert files_beside(made) == before

    monkeypatch.undo()
    path = cache_features(encoder, made.paths.images, "cpu", batch_size=8)  # and the next one is whole
    assert len(features_of(path)) == 40


def test_a_missing_image_file_is_named(tmp_path, encoder):
    with pytest.raises(UserError, match=r"TRAIN_IMAGES_x\.hdf5: no such file"):
        cache_features(encoder, tmp_path / "TRAIN_IMAGES_x.hdf5", "cpu")


def test_a_photo_that_cannot_be_read_is_one_clear_line(make_files, encoder):
    made = make_files(photos=4, side=64)
    with h5py.File(made.paths.images, "w") as file:
        file.attrs["captions_per_image"] = 2
        file.create_dataset("images", data=made.images, chunks=(1, 3, 64, 64), fletcher32=True)
        place = file["images"].id.get_chunk_info(2).byte_offset
    content = bytearray(made.paths.images.read_bytes())
    content[place] ^= 255
    made.paths.images.write_bytes(content)
    with pytest.raises(UserError, match=r"TRAIN_IMAGES_tiny\.hdf5"):
        cache_features(encoder, made.paths.images, "cpu")
