"""Which captions can be learned, which words, and what helps when too few are left."""

from collections import Counter

import pytest

from captioning.preparation.annotated_photo import AnnotatedPhoto
from captioning.preparation.left_out import LeftOut
from captioning.preparation.vocabulary import (
    advised_min_word_freq,
    build_word_map,
    keep_captioned,
    unknown_share,
)
from utils import UserError

COUNTS = Counter({"a": 60, "dog": 30, "runs": 6, "far": 3, "away": 1})


def test_the_advised_frequency_is_the_largest_that_keeps_nine_tenths_of_the_words():
    assert [unknown_share(COUNTS, n) for n in (0, 1, 3, 6)] == [0, 0.01, 0.04, 0.1]
    assert advised_min_word_freq(COUNTS) == 29
    assert unknown_share(COUNTS, 29) <= 0.1 < unknown_share(COUNTS, 30)


def test_a_frequency_that_leaves_no_word_is_refused_with_one_that_does():
    with pytest.raises(UserError, match="min_word_freq: is 60, .* more than 60 times; give --min_word_freq 29"):
        build_word_map(COUNTS, 60)


def test_words_that_a_captioner_knows_are_kept_beside_the_frequent_ones():
    word_map = build_word_map(COUNTS, 6, known={"<pad>": 0, "<unk>": 1, "zebra": 2, "away": 3})
    assert list(word_map) == ["a", "away", "dog", "zebra", "<unk>", "<start>", "<end>", "<pad>"]
    assert list(word_map.values()) == [1, 2, 3, 4, 5, 6, 7, 0]


def keep(tmp_path, max_len, *captions):
    photos = [AnnotatedPhoto(i, f"{i}.jpg", captions=list(some)) for i, some in enumerate(captions)]
    return keep_captioned(photos, max_len, LeftOut(tmp_path / "left_out.csv", len(photos), 1.0))


def test_captions_that_are_all_too_long_are_told_with_the_length_that_would_do(tmp_path):
    captions = [["word"] * 9], [["word"] * 12]
    assert len(keep(tmp_path, 9, *captions)) == 1
    with pytest.raises(UserError, match=r"max_len: is 8, but all 2 captions .*9 to 12 words\); give --max_len 12"):
        keep(tmp_path, 8, *captions)


def test_a_caption_without_a_word_among_others_is_left_out_and_told(tmp_path, capsys):
    [kept] = keep(tmp_path, 5, [["a", "dog"], []])
    assert kept.captions == [["a", "dog"]]
    assert capsys.readouterr().out == "Captions without words: 1, left out; the first is of '0.jpg'\n"


def test_captions_without_a_word_are_told(tmp_path):
    with pytest.raises(UserError, match="annotations: none of the 2 photos has a caption with words"):
        keep(tmp_path, 8, [[]], [])
