"""Augmented photos differ as was asked, each in its own way, and stay true to their captions."""

import contextlib
import math

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from captioning.training.augmentation import (
    ASPECT_RATIO,
    LUMINANCE,
    Augmentation,
    crop_matrices,
    jitter_colour,
    sample,
    says_left_or_right,
    warp_matrices,
)
from utils import UserError

EVERYTHING = {"crop_min_scale": 0.5, "flip": 0.5, "colour": 0.3, "warp": 0.5, "noise": 0.05}
EACH = [{name: value} for name, value in EVERYTHING.items()]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def photos(count=8, size=16):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def test_nothing_asked_for_changes_nothing():
    images = photos()
    assert torch.equal(Augmentation()(images), images / 255)
    assert torch.equal(Augmentation()(images / 255), images / 255)
    assert not Augmentation().active


@pytest.mark.parametrize("settings", [*EACH, EVERYTHING], ids=str)
def test_the_result_is_a_batch_of_floats_from_0_to_1(settings):
    images = photos()
    for given in (images, images / 255, images.to(memory_format=torch.channels_last)):
        before = given.clone()
        found = Augmentation(**settings)(given)
        assert found.shape == images.shape
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1
        assert not torch.equal(found, images / 255)
        assert torch.equal(given, before)  # the photos that were given are left as they were


@pytest.mark.parametrize("settings", [*EACH, EVERYTHING], ids=str)
def test_eval_mode_leaves_photos_alone(settings):
    augment = Augmentation(**settings)
    assert augment.active
    images = photos()
    assert torch.equal(augment.eval()(images), images / 255)


@pytest.mark.parametrize("settings", [*EACH, EVERYTHING], ids=str)
def test_a_seed_repeats_it_and_another_does_not(settings):
    images, augment = photos(), Augmentation(**settings)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(augment(images))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("settings", [{**one, "flip": 0.0} for one in EACH if "flip" not in one], ids=str)
def test_each_photo_gets_its_own_draw(settings):
    same = photos(1).expand(8, -1, -1, -1)
    found = Augmentation(**settings)(same)
    for i in range(8):
        for j in range(i):
            assert not torch.allclose(found[i], found[j])


@pytest.mark.parametrize("settings", [*EACH, EVERYTHING], ids=str)
def test_everything_is_drawn_on_the_images_own_device(settings, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which "meta" has not
    images = torch.empty(4, 3, 16, 16, device="meta")  # which refuses to work with tensors from elsewhere
    found = Augmentation(**settings)(images, torch.ones(4, dtype=torch.bool, device="meta"))
    assert found.device.type == "meta"
    assert found.shape == images.shape


def test_autocast_does_not_make_places_coarse():
    images, augment = photos(4, 32), Augmentation(crop_min_scale=0.5, warp=1)
    expected = augment(images)
    torch.manual_seed(0)
    photos(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(images), expected)


def test_one_photo_may_come_alone():
    image = photos(1)[0]
    assert torch.equal(Augmentation(flip=1)(image), image.flip(2) / 255)
    assert torch.equal(Augmentation(flip=1)(image, False), image / 255)
    assert Augmentation(**EVERYTHING)(image).shape == (3, 16, 16)


def test_photos_are_mirrored_at_the_rate_asked_for_but_never_protected_ones():
    images = photos(4000, 4)
    may_flip = torch.rand(4000) < 0.5
    found = Augmentation(flip=0.3)(images, may_flip)
    mirrored = (found == images.flip(3) / 255).flatten(1).all(dim=1)
    unchanged = (found == images / 255).flatten(1).all(dim=1)
    assert (mirrored ^ unchanged).all()
    assert not mirrored[~may_flip].any()
    assert mirrored[may_flip].float().mean() == pytest.approx(0.3, abs=0.03)  # 3 standard deviations


def test_the_other_changes_never_mirror_a_photo():
    settings = {name: value for name, value in EVERYTHING.items() if name != "flip"}
    ramp = torch.linspace(0, 1, 16).expand(500, 3, 16, 16)  # dark on the left
    found = Augmentation(**settings)(ramp)
    assert (found[..., 8:].mean(dim=(1, 2, 3)) > found[..., :8].mean(dim=(1, 2, 3))).all()


WORDS = ["a", "dog", "to", "the", "left", "right", "leftmost", "right-hand", "leftover", "bright", "<pad>"]
WORDS += ["<unk>", "<start>", "<end>"]
WORD_MAP = {word: i for i, word in enumerate(WORDS)}
CAPTIONS = torch.tensor(
    [
        [WORD_MAP[word] for word in caption.split()]
        for caption in [
            "<start> a dog to the left <end>",
            "<start> a bright dog <unk> <end> <pad>",
            "<start> the leftover dog <end> <pad> <pad>",
            "<start> the right-hand dog <end> <pad> <pad>",
            "<start> leftmost <end> <pad> <pad> <pad> <pad>",
            "<start> right <end> <pad> <pad> <pad> <pad>",
        ]
    ]
)


def test_captions_that_say_left_or_right_protect_their_photo():
    assert says_left_or_right(CAPTIONS, WORD_MAP).tolist() == [True, False, False, True, True, True]


def test_one_caption_protects_a_photo_that_has_several():
    rows = torch.tensor([0, 1, 1, 2, 2, 0])
    assert says_left_or_right(CAPTIONS, WORD_MAP, rows).tolist() == [True, False, True]
    rows = torch.tensor([0, 1, 1, 0, 2, 3])
    assert says_left_or_right(CAPTIONS, WORD_MAP, rows).tolist() == [True, False, True, True]


def test_a_vocabulary_without_sides_protects_nothing():
    assert not says_left_or_right(CAPTIONS, {"a": 0, "dog": 1}).any()


@pytest.mark.parametrize("min_scale", [0.2, 0.5, 0.9])
def test_crops_keep_their_area_and_shape_within_bounds_and_stay_inside(min_scale):
    crops = crop_matrices(5000, min_scale)
    width, height = crops[:, 0, 0], crops[:, 1, 1]
    area = width * height
    assert min_scale <= area.min() < min_scale + 0.02
    assert 0.98 < area.max() <= 1
    assert area.mean() == pytest.approx((1 + min_scale) / 2, abs=0.02)
    ratio = width / height
    assert 1 / ASPECT_RATIO - 1e-5 <= ratio.min() < ratio.max() <= ASPECT_RATIO + 1e-5
    for axis, side in ((0, width), (1, height)):
        centre = crops[:, axis, 2]
        assert ((centre.abs() + side) <= 1 + 1e-5).all()
        free = side < 0.95
        places = centre[free] / (1 - side[free])  # -1 at one end, 1 at the other
        assert places.min() < -0.95
        assert places.max() > 0.95


def test_a_crop_shows_its_part_of_the_photo_enlarged():
    image = torch.rand(1, 3, 32, 32)
    matrix = torch.tensor([[[0.5, 0, -0.25], [0, 0.5, 0.5], [0, 0, 1]]])  # columns 4 to 20, rows 16 to 32
    expected = torch.nn.functional.interpolate(image[..., 16:, 4:20], size=(32, 32), mode="bilinear")
    found = sample(image, matrix)
    assert torch.allclose(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5)  # at its edge it looks beyond


def test_pixels_are_looked_up_where_the_matrix_says():
    images, matrices = torch.rand(3, 3, 8, 8), warp_matrices(3, 1.0) @ crop_matrices(3, 0.3)
    found = sample(images, matrices)
    for photo in range(3):
        for row in range(8):
            for column in range(8):
                x, y, w = (
                    matrices[photo] @ torch.tensor([(2 * column + 1) / 8 - 1, (2 * row + 1) / 8 - 1, 1])
                ).tolist()
                place = [((axis / w + 1) * 8 - 1) / 2 for axis in (x, y)]  # in pixels
                place = [min(max(axis, 0), 7) for axis in place]  # the edge goes on
                expected = torch.zeros(3)
                for i in range(2):
                    for j in range(2):
                        c, r = math.floor(place[0]) + i, math.floor(place[1]) + j
                        share = (1 - abs(place[0] - c)) * (1 - abs(place[1] - r))
                        if share:
                            expected += share * images[photo, :, r, c]
                assert torch.allclose(found[photo, :, row, column], expected, atol=1e-4)


def test_a_warp_turns_both_ways_within_its_strength_and_never_folds_the_photo():
    for strength in (0.1, 1.0):
        warps = warp_matrices(3000, strength)
        angles = torch.atan2(warps[:, 1, 0], warps[:, 0, 0])  # of the x axis, which the shear turns too
        most = math.radians(30 * strength) + math.atan(0.2 * strength)
        assert -most <= angles.min() < -0.6 * most
        assert 0.6 * most < angles.max() <= most
        corners = torch.tensor([[x, y, 1.0] for x in (-1, 1) for y in (-1, 1)])
        assert (corners @ warps[:, 2].T).min() > 0.5  # the distance stays positive
        assert torch.linalg.det(warps).min() > 0.8  # and so does the orientation


def test_a_warp_without_strength_is_the_identity():
    assert torch.allclose(warp_matrices(5, 0.0), torch.eye(3).expand(5, 3, 3))
    image = torch.rand(5, 3, 16, 16)
    assert torch.allclose(sample(image, warp_matrices(5, 0.0) @ crop_matrices(5, 1.0)), image, atol=1e-5)


def test_colours_change_as_in_torchvision_where_nothing_is_clipped():
    images = 0.4 + 0.2 * torch.rand(6, 3, 8, 8)
    found = jitter_colour(images, 0.3)
    torch.manual_seed(0)
    torch.rand(6, 3, 8, 8)  # as above, so that the same factors come next
    factors = 0.7 + 0.6 * torch.rand(3, 6)
    for image, result, (brightness, contrast, saturation) in zip(images, found, factors.T.tolist(), strict=True):
        expected = tv.adjust_brightness(image, brightness)
        expected = tv.adjust_contrast(expected, contrast)
        expected = tv.adjust_saturation(expected, saturation)
        assert torch.allclose(result, expected, atol=1e-3)  # its weights of red, green and blue are rounded


def test_colours_keep_their_hue():
    images = torch.tensor([0.8, 0.2, 0.2]).view(3, 1, 1).expand(50, 3, 4, 4)  # red
    found = Augmentation(colour=0.4)(images)
    assert torch.allclose(found[:, 1], found[:, 2], atol=1e-5)
    assert (found[:, 0] > found[:, 1]).all()
    assert sum(LUMINANCE) == pytest.approx(1, abs=1e-3)


def test_noise_has_the_standard_deviation_asked_for():
    noise = Augmentation(noise=0.05)(torch.full((20, 3, 64, 64), 0.5)) - 0.5
    assert noise.std().item() == pytest.approx(0.05, rel=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize(
    "settings", [{"crop_min_scale": 0}, {"crop_min_scale": 1.5}, {"flip": -0.1}, {"noise": 2}, {"warp": math.nan}]
)
def test_a_setting_out_of_range_is_named(settings):
    with pytest.raises(UserError, match=f"^{next(iter(settings))}: .* found, .* expected"):
        Augmentation(**settings)
