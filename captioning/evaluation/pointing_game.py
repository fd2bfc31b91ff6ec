"""
Does attention look at what the word says? On the built-in dataset every object has a box, so it can be counted.

The pointing game (Zhang et al. 2016): a word that names an object is a hit if the centre of the location with the
largest alpha lies in a box of that object.
"""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from captioning.preparation.shapes import IMAGE_SIZE, object_name
from utils import UserError


@dataclass
class Pointing:
    """Counts over the words that name an object of the photo."""

    words: int  # that name an object which is in the photo
    hits: int  # of them, whose strongest location lies in a box of the object
    expected_hits: float  # if the location were drawn at random
    absent: int  # words that name an object which the photo does not have; in none of the other counts

    def __str__(self):
        return (
            f"pointing game: {self.hits} of {self.words} object words ({self.hits / max(self.words, 1):.1%}) look into "
            f"the object's box; by chance {self.expected_hits / max(self.words, 1):.1%} would; {self.absent} more name "
            "an object that is not there"
        )


def pointing_game(captioner, loader, resident=None, beam_size=5, max_length=None, **options):
    """
    Caption a split of the built-in dataset, and see where the model looked at its object words.

    :param captioner: `Captioner` of a model with attention
    :param loader, resident: as `features.build_loader` gives them
    :param options: of the search, as for `search.Rules`
    :return: `Pointing`
    :raises UserError: if the split has no boxes, or the model no attention
    """
    check_boxes(loader.dataset)
    references = loader.dataset.references
    counts = Pointing(0, 0, 0.0, 0)
    for batch in tqdm(loader, desc="pointing game", leave=False, disable=None):
        images = batch.to(captioner.device, resident).images
        found = captioner.search(images, beam_size, max_length, keep_alphas=True, **options)
        for photo, [best, *_] in zip(batch.photos.tolist(), found, strict=True):
            if best.alphas is None:
                raise UserError("pointing: the model has no attention; give one that has")
            count_words(counts, captioner.sentence(best), best.alphas.float(), references[photo]["boxes"])
    return counts


def check_boxes(dataset):
    """
    :param dataset: `CaptionDataset`
    :raises UserError: unless each photo has a list of boxes, each with a `name` and four finite numbers
    """
    for i, photo in enumerate(dataset.references):
        if "boxes" not in photo:
            raise UserError("pointing: the split has no boxes of objects; only the built-in dataset has them")
        boxes = photo["boxes"]
        if not isinstance(boxes, list) or not all(map(is_box, boxes)):
            raise UserError(
                f"{dataset.reference_file}: photo {i} has boxes that are not {{'name', 'box': [left, top, right, "
                "bottom]}; run create_input_files.py again"
            )


def is_box(content):
    """:return: whether it is {"name": text, "box": four finite numbers}"""
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return False
    corners = content.get("box")
    if not isinstance(corners, list) or len(corners) != 4:
        return False
    return all(type(number) in (int, float) and math.isfinite(number) for number in corners)


def count_words(counts, words, alphas, boxes):
    """
    :param counts: `Pointing`, which is added to
    :param words: T words of a caption
    :param alphas: (T or more, P), where the model looked at each
    :param boxes: list of dicts with `name` and `box` (left, top, right, bottom, in pixels of the drawn image)
    """
    side = round(alphas.shape[1] ** 0.5)
    for word, alpha in zip(words, alphas, strict=False):
        name = object_name(word)
        if name is None:
            continue
        own_boxes = [one["box"] for one in boxes if one["name"] == name]
        if not own_boxes:
            counts.absent += 1
            continue
        inside = locations_inside(own_boxes, side)  # (P,)
        counts.words += 1
        counts.hits += int(inside[alpha.argmax()])
        counts.expected_hits += inside.float().mean().item()


def locations_inside(boxes, side):
    """
    :param boxes: list of (left, top, right, bottom) in pixels
    :param side: of the grid, in locations
    :return: (P,), whether the centre of each location lies in one of the boxes
    """
    centres = (torch.arange(side) + 0.5) * IMAGE_SIZE / side  # (side,), in pixels
    y, x = torch.meshgrid(centres, centres, indexing="ij")  # (side, side), the grid's rows and columns
    inside = torch.zeros(side, side, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        inside |= (left <= x) & (x < right) & (top <= y) & (y < bottom)
    return inside.flatten()
