"""Sampling draws words by their probabilities, repeats itself with a seed, and keeps the rules."""

import math

import pytest
import torch
from toy_decoder import END, START, VOCAB, ToyDecoder, rules, seeded

from captioning.inference.search import greedy_search, sample_captions
from utils import UserError


@pytest.mark.parametrize("top_k", [0, 1])
def test_a_sample_that_the_rules_leave_no_word_stops_there(top_k):
    r = rules(max_length=8, min_length=4, no_repeat_ngram=1, forbidden=(START,))
    (found,) = sample_captions(ToyDecoder(), torch.arange(1), r, top_k=top_k)
    assert sorted(found.words) == [1, 2, 3] and not found.ended
    assert math.isfinite(found.log_prob)


@pytest.mark.parametrize("options", [{"min_length": 3}, {"forbidden": (START, 2)}, {"no_repeat_ngram": 2}])
def test_samples_and_greedy_choice_keep_the_rules(options):
    decoder, photos, r = ToyDecoder(end_bias=1.0), torch.arange(200), rules(max_length=10, **options)
    for h in sample_captions(decoder, photos, r, generator=seeded(0)) + greedy_search(decoder, photos, r):
        assert len(h.words) <= 10 and END not in h.words
        if h.ended:
            assert len(h.words) >= options.get("min_length", 0)
        assert not set(h.words) & set(options.get("forbidden", ()))
        if "no_repeat_ngram" in options:
            pairs = list(zip(h.words, h.words[1:]))  # noqa: B905  one is shorter
            assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("top_p", [1e-9, 1e-300])
def test_the_smallest_share_of_probability_leaves_the_likeliest_word(top_p):
    decoder, photos, r = ToyDecoder(), torch.arange(20), rules(max_length=5)
    found = sample_captions(decoder, photos, r, top_p=top_p, generator=seeded(0))
    assert [h.words for h in found] == [h.words for h in greedy_search(decoder, photos, r)]


def test_a_temperature_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="temperature: nan found"):
        rules(temperature=math.nan)


def test_a_seed_repeats_its_samples_and_leaves_the_global_generator_alone():
    decoder, photos = ToyDecoder(), torch.arange(20)
    before = torch.get_rng_state()
    one, again, other = (
        [h.words for h in sample_captions(decoder, photos, rules(max_length=8), generator=seeded(seed))]
        for seed in (1, 1, 2)
    )
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)


class OneWordDecoder(ToyDecoder):
    """The same known probabilities for every photo."""

    def __init__(self, probabilities):
        super().__init__(vocab_size=len(probabilities))
        self.table[:] = torch.tensor(probabilities).log()


PROBABILITIES = [0.05, 0.3, 0.1, 0.4, 0.15]


def first_words(n=5000, r=None, **options):
    """:return: (vocab_size,), shares of the words that n samples begin with"""
    found = sample_captions(
        OneWordDecoder(PROBABILITIES), torch.arange(n), r or rules(max_length=1), generator=seeded(0), **options
    )
    ids = torch.tensor([h.words[0] if h.words else END for h in found])
    return ids.bincount(minlength=VOCAB) / n


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {3}),
        ({"top_k": 3}, {3, 1, 4}),
        ({"top_k": 50}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.2}, {3}),  # the likeliest word is always in
        ({"top_p": 0.65}, {3, 1}),
        ({"top_p": 0.72}, {3, 1, 4}),  # the word that crosses the line is in
        ({"top_k": 4, "top_p": 0.9}, {3, 1, 4, 2}),
        ({"top_k": 2, "top_p": 0.9}, {3, 1}),
    ],
)
def test_samples_follow_the_probabilities_of_the_words_that_are_left(options, allowed):
    found = first_words(**options)
    expected = torch.tensor([p if i in allowed else 0.0 for i, p in enumerate(PROBABILITIES)])
    assert {i for i in range(VOCAB) if found[i] > 0} == allowed
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.02)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature):
    expected = torch.tensor(PROBABILITIES) ** (1 / temperature)
    found = first_words(r=rules(max_length=1, temperature=temperature))
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.02)
