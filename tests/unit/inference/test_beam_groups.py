"""Diverse beam search: equal to a slow one, plain beam search with one group, and captions that differ."""

import pytest
import torch
from plain_search import plain_diverse_search
from test_search import END, ToyDecoder, rescored, rules, same, searched  # noqa: F401  a fixture

from captioning.inference.search import beam_search
from utils import UserError


@pytest.mark.parametrize("beam_size, groups", [(2, 2), (6, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize("diversity", [0.0, 0.7, 20.0])
@pytest.mark.parametrize("options", [{}, {"min_length": 2}, {"no_repeat_ngram": 1, "forbidden": (0, 2)}])
def test_captions_are_those_of_the_algorithm_written_out(searched, beam_size, groups, diversity, options):  # noqa: F811
    decoder, photos = searched
    for max_length in (2, 6):
        r = rules(**options | {"max_length": max_length})
        found = beam_search(decoder, photos, r, beam_size, n_best=beam_size, groups=groups, diversity=diversity)
        best = beam_search(decoder, photos, r, beam_size, groups=groups, diversity=diversity)  # may stop earlier
        for i in range(len(photos)):
            expected = plain_diverse_search(decoder, photos[i : i + 1], r, beam_size, groups, diversity)
            assert [(h.words, h.ended) for h in found[i]] == [(words, ended) for words, _, ended in expected]
            assert [h.log_prob for h in found[i]] == pytest.approx([total for _, total, _ in expected], abs=1e-4)
            assert [h.words for h in best[i]] == [expected[0][0]]


@pytest.mark.parametrize("normalisation", ["none", "length", "reward"])
def test_one_group_is_plain_beam_search_whatever_the_diversity(searched, normalisation):  # noqa: F811
    decoder, photos = searched
    for n_best in (1, 4):
        plain = beam_search(decoder, photos, rules(max_length=7), 4, normalisation, 0.3, n_best, True)
        found = beam_search(decoder, photos, rules(max_length=7), 4, normalisation, 0.3, n_best, True, 1, 5.0)
        same(found, plain)


def test_groups_differ_more_the_more_it_costs_to_say_the_same():
    decoder, photos = ToyDecoder(vocab_size=30, end_bias=1.0), torch.arange(50)

    def different_words(**options):
        found = beam_search(decoder, photos, rules(max_length=8, end=4), 6, n_best=6, **options)
        return sum(len({word for caption in captions for word in caption.words}) for captions in found)

    plain = different_words()
    assert plain < different_words(groups=3, diversity=0.5) < different_words(groups=3, diversity=5.0)


def test_what_two_groups_find_counts_once():
    found = beam_search(ToyDecoder(), torch.arange(5), rules(), 4, n_best=4, groups=4, diversity=0.0)
    assert [len(captions) for captions in found] == [1] * 5  # without a cost all groups choose alike


def test_alphas_are_those_of_the_captions_own_group(searched):  # noqa: F811
    decoder, photos = searched
    options = {"n_best": 6, "keep_alphas": True, "groups": 3, "diversity": 1.0}
    together = beam_search(decoder, photos, rules(max_length=6), 6, **options)
    for i, captions in enumerate(together):
        for caption in captions:
            words = [*caption.words, END] if caption.ended else caption.words
            _, alphas = rescored(decoder, photos[i : i + 1], words)
            torch.testing.assert_close(caption.alphas, alphas, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beam_size, groups", [(5, 2), (3, 4), (4, 0)])
def test_groups_of_unequal_sizes_are_refused(beam_size, groups):
    with pytest.raises(UserError, match=f"groups: {groups} found, a number that divides beam_size"):
        beam_search(ToyDecoder(), torch.arange(1), rules(), beam_size, groups=groups)
