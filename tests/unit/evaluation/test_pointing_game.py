import pytest
import torch

from captioning.evaluation.pointing_game import Pointing, count_words, locations_inside, pointing_game
from utils import UserError

BOXES = [{"name": "star", "box": [0, 0, 64, 64]}, {"name": "star", "box": [192, 192, 256, 256]}]
BOXES += [{"name": "heart", "box": [128, 0, 256, 128]}]


def looks_at(*locations, size=16):
    """:return: (T, P), alphas whose strongest location is the given one at each word"""
    alphas = torch.full((len(locations), size), 0.01)
    alphas[range(len(locations)), list(locations)] = 0.5
    return alphas


def test_locations_count_as_inside_by_their_centre_rows_first():
    inside = locations_inside([(128, 0, 256, 64)], 4)  # locations of 64 pixels: the right half of the first row
    assert inside.view(4, 4).int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not locations_inside([(0, 0, 30, 30)], 4).any()  # no centre in it


def test_an_object_word_is_a_hit_in_any_box_of_its_object_and_chance_is_their_share_of_the_grid():
    counts = Pointing(0, 0, 0.0, 0)
    #                    a  star  near stars  hearts
    count_words(counts, ["a", "star", "near", "stars", "hearts"], looks_at(5, 15, 5, 5, 2), BOXES)
    assert (counts.words, counts.hits, counts.absent) == (3, 2, 0)
    assert counts.expected_hits == pytest.approx(2 / 16 + 2 / 16 + 4 / 16)


def test_a_word_for_an_object_that_is_not_there_counts_apart():
    counts = Pointing(0, 0, 0.0, 0)
    count_words(counts, ["circle"], looks_at(0), BOXES)
    assert counts == Pointing(0, 0, 0.0, 1)
    assert "0 of 0 object words" in str(counts)


class Split:
    """A loader without batches over photos that carry what `references` says."""

    def __init__(self, references):
        self.dataset = type("Dataset", (), {"references": references})

    def __iter__(self):
        return iter(())


def test_photos_without_boxes_are_refused():
    with pytest.raises(UserError, match="only the built-in dataset"):
        pointing_game(None, Split([{"captions": []}]))


@pytest.mark.parametrize(
    "boxes",
    [
        "star",
        [["star", [0, 0, 1, 1]]],
        [{"name": 1, "box": [0, 0, 1, 1]}],
        [{"name": "star", "box": [0, 0, 1]}],
        [{"name": "star", "box": [0, 0, 1, "x"]}],
        [{"name": "star", "box": [0, 0, 1, float("nan")]}],
    ],
)
def test_boxes_of_the_wrong_kind_are_refused_in_one_line(boxes):
    split = Split([{"captions": [], "boxes": BOXES}, {"captions": [], "boxes": boxes}])
    split.dataset.reference_file = "VAL_REFERENCES.json"
    with pytest.raises(UserError, match=r"VAL_REFERENCES.json: photo 1 has boxes that are not \{'name', 'box'"):
        pointing_game(None, split)
