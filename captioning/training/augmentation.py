"""
Augmentation: each time a photo is seen it looks a little different, while its captions stay true.

All photos of a batch go together, on whatever device they are, each with random numbers of its own. Crop, rotation,
shear and perspective are one 3 x 3 matrix per photo, so that the photo is interpolated only once.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError

# A mirrored photo is no longer what these words say of it.
SIDE_WORDS = tuple(
    side + ending
    for side in ("left", "right")
    for ending in ("", "most", "hand", "-hand", "handed", "-handed", "side", "-side", "ward", "wards", "y", "ies")
)
ASPECT_RATIO = 4 / 3  # most that a crop is wider than high, or higher than wide, as in torchvision's
MAX_ROTATION = math.radians(30)  # all three are for a warp of strength 1
MAX_SHEAR = 0.2
MAX_PERSPECTIVE = 0.2  # the near side is then shown 1.5 times as large as the far one
LUMINANCE = (0.2989, 0.587, 0.114)  # how bright red, green and blue look (ITU-R BT.601)


class Augmentation(nn.Module):
    """
    Random crops, mirror images, colours, rotations and noise. As dropout does, it leaves photos alone in eval mode.

    The random numbers are torch's own, so `torch.manual_seed` repeats them.
    """

    def __init__(self, crop_min_scale=1.0, flip=0.0, colour=0.0, warp=0.0, noise=0.0):
        """
        The defaults change nothing.

        :param crop_min_scale: smallest share of the photo's area that a crop keeps (Szegedy et al. 2015); the crop is
            enlarged to the photo's size
        :param flip: probability that a photo is mirrored
        :param colour: brightness, contrast and saturation are each multiplied by 1 - colour to 1 + colour. The hue
            stays, because captions name colours.
        :param warp: strength of rotation, shear and perspective: 1 is up to 30 degrees
        :param noise: standard deviation of Gaussian noise, where a pixel goes from 0 to 1
        :raises UserError: if a setting is out of its range
        """
        super().__init__()
        settings = {"crop_min_scale": crop_min_scale, "flip": flip, "colour": colour, "warp": warp, "noise": noise}
        for name, value in settings.items():
            if not 0 <= value <= 1:
                raise UserError(f"{name}: {value} found, 0 to 1 expected")
        if crop_min_scale == 0:
            raise UserError("crop_min_scale: 0 found, a share of the photo's area such as 0.5 expected, or 1 for none")
        self.settings = settings
        self.crop_min_scale, self.flip, self.colour, self.warp, self.noise = settings.values()

    @property
    def active(self):
        """Whether photos are changed at all: then their features cannot be cached."""
        return self.crop_min_scale < 1 or any((self.flip, self.colour, self.warp, self.noise))

    @torch.no_grad()
    def forward(self, images, may_flip=None):
        """
        :param images: (B, 3, S, S) RGB, uint8 or float from 0 to 1; or one photo (3, S, S)
        :param may_flip: (B,) bool, False for photos that must not be mirrored; None if all may
        :return: float32 from 0 to 1, of the same shape
        """
        if images.ndim == 3:
            return self(images.unsqueeze(0), may_flip).squeeze(0)
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if not self.training or not self.active:
            return images
        with torch.autocast(images.device.type, enabled=False):  # half precision is too coarse for places
            return self.change(images, may_flip)

    def change(self, images, may_flip):
        """:return: the photos (B, 3, S, S), each changed in its own way"""
        if self.flip:
            chosen = torch.rand(len(images), device=images.device) < self.flip  # (B,)
            if may_flip is not None:
                chosen = chosen & torch.as_tensor(may_flip, device=images.device)
            images = torch.where(chosen.view(-1, 1, 1, 1), images.flip(3), images)
        if self.crop_min_scale < 1 or self.warp:
            crop = crop_matrices(len(images), self.crop_min_scale, images.device)  # (B, 3, 3)
            images = sample(images, crop @ warp_matrices(len(images), self.warp, images.device))
        if self.colour:
            images = jitter_colour(images, self.colour)
        if self.noise:
            images = images + self.noise * torch.randn_like(images)
        return images.clamp(0, 1)


class View:
    """A changed copy of each photo of a split, the same each time: its features can be cached."""

    def __init__(self, number, augmentation, dataset):
        """
        :param number: 1 for the first copy, 2 for the second, which is changed in another way ...
        :param augmentation: `Augmentation`
        :param dataset: `CaptionDataset` of the photos
        """
        self.number, self.augmentation = number, augmentation
        captions = torch.from_numpy(dataset.captions.astype(np.int64))  # (N_c * I, max_length)
        photos = torch.arange(dataset.num_photos).repeat_interleave(dataset.captions_per_image)  # (N_c * I,)
        self.may_flip = ~says_left_or_right(captions, dataset.word_map, photos)  # (I,)

    def change(self, images, first):
        """
        :param images: (B, 3, S, S) uint8, on the CPU
        :param first: place of the first of them in the split
        :return: (B, 3, S, S) float32 from 0 to 1
        """
        with torch.random.fork_rng(devices=()):  # training's own random numbers stay as they are
            torch.manual_seed(1_000_000_000 * self.number + first)
            return self.augmentation(images, self.may_flip[first : first + len(images)])

    def description(self):
        """:return: text that changes with what the photos look like"""
        return f"{self.number} {self.augmentation.settings} {self.may_flip.tolist()}"


def says_left_or_right(captions, word_map, image_rows=None):
    """
    Which photos must not be mirrored: those of which a caption of the batch says left or right.

    :param captions: (N, max_length), ids
    :param word_map: word -> id
    :param image_rows: (N,), the photo of each caption; None if each has its own
    :return: (B,) bool
    """
    ids = [word_map[word] for word in SIDE_WORDS if word in word_map]
    found = torch.isin(captions, torch.tensor(ids, dtype=captions.dtype, device=captions.device)).any(dim=1)  # (N,)
    if image_rows is None:
        return found
    counts = torch.zeros(int(image_rows.max()) + 1, device=captions.device)  # (B,)
    return counts.index_add(0, image_rows.to(captions.device), found.float()) > 0


def sample(images, matrices):
    """
    Look up each pixel of the new photos in the old ones, between whose pixels colours are interpolated.

    Outside of the old photo its edge goes on: a mirror image would show objects that are not there.
    :param images: (B, 3, S, S)
    :param matrices: (B, 3, 3), from homogeneous coordinates in the new photo to those in the old one; both go from
        -1 to 1, x to the right and y down
    :return: (B, 3, S, S)
    """
    size = images.shape[-1]
    along = (torch.arange(size, device=images.device) * 2 + 1) / size - 1  # (S,), the pixels' centres
    y, x = torch.meshgrid(along, along, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=2).view(-1, 3)  # (S * S, 3)
    places = points @ matrices.transpose(1, 2)  # (B, S * S, 3)
    grid = (places[..., :2] / places[..., 2:]).unflatten(1, (size, size))  # (B, S, S, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def crop_matrices(count, min_scale, device=None):
    """
    Crops of an area from `min_scale` to 1, of an aspect ratio from 3/4 to 4/3, anywhere in the photo.

    :return: (count, 3, 3), from the crop's coordinates to the photo's
    """
    area = uniform(count, min_scale, 1, device)  # (count,)
    widest = (1 / area).clamp(max=ASPECT_RATIO)  # wider than that, it would not fit into the photo
    ratio = widest ** uniform(count, -1, 1, device)  # (count,)
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    x, y = (1 - width) * uniform(count, -1, 1, device), (1 - height) * uniform(count, -1, 1, device)
    zero, one = torch.zeros_like(area), torch.ones_like(area)
    return matrices_of([width, zero, x], [zero, height, y], [zero, zero, one])


def warp_matrices(count, strength, device=None):
    """:return: (count, 3, 3), random shears and perspectives, then rotations, all about the centre"""
    angle = uniform(count, -MAX_ROTATION * strength, MAX_ROTATION * strength, device)  # (count,)
    shear_x, shear_y = (uniform(count, -MAX_SHEAR * strength, MAX_SHEAR * strength, device) for _ in range(2))
    tilt_x, tilt_y = (uniform(count, -MAX_PERSPECTIVE * strength, MAX_PERSPECTIVE * strength, device) for _ in range(2))
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rotate = matrices_of([angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero], [zero, zero, one])
    return rotate @ matrices_of([one, shear_x, zero], [shear_y, one, zero], [tilt_x, tilt_y, one])


def matrices_of(*rows):
    """:return: (count, 3, 3), of three rows of three (count,)"""
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def jitter_colour(images, strength):
    """
    Multiply brightness, contrast (distance from the mean grey) and saturation (distance from the pixel's own grey).

    :param images: (B, 3, S, S)
    :param strength: each factor is drawn from 1 - strength to 1 + strength, for each photo
    :return: (B, 3, S, S), perhaps outside of 0 to 1
    """
    factors = uniform((3, len(images), 1, 1, 1), 1 - strength, 1 + strength, images.device)
    brightness, contrast, saturation = factors  # (B, 1, 1, 1) each
    images = images * brightness
    images = torch.lerp(grey(images).mean(dim=(1, 2, 3), keepdim=True), images, contrast)
    return torch.lerp(grey(images), images, saturation)


def grey(images):
    """:return: (B, 1, S, S), the luminance of (B, 3, S, S)"""
    weights = torch.tensor(LUMINANCE, device=images.device).view(3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def uniform(shape, low, high, device=None):
    """:return: random numbers from `low` to `high`"""
    return low + (high - low) * torch.rand(shape, device=device)
