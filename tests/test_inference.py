"""A captioner turns photos into sentences, under the rules that it is given."""

import pytest
import torch
from conftest import WORD_MAP

from inference import Captioner


class Grids(torch.nn.Module):
    """Stands in for an encoder: it is given features already."""

    frozen = True

    def __init__(self, size=6):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.size = size

    def features(self, images):
        return images.float()[..., : self.size]


@pytest.fixture
def make_captioner(tiny_decoder):
    """A function that builds a captioner of ten words; `images` may be any (N, 2, 2, 6)."""

    def build(seed=0, **options):
        return Captioner(Grids(), tiny_decoder(vocab_size=len(WORD_MAP), seed=seed, **options).eval(), WORD_MAP)

    return build


@pytest.fixture
def images():
    return torch.randn(4, 2, 2, 6, generator=torch.Generator().manual_seed(1))


def insist(captioner, word):
    """Make `word` by far the likeliest at any time."""
    with torch.no_grad():
        captioner.decoder.fc.bias[WORD_MAP[word]] += 50
    return captioner


def test_unk_is_written_unless_it_is_never_to_be(make_captioner, images):
    captioner = insist(make_captioner(), "<unk>")
    for [best] in captioner.search(images, 1, max_length=3):
        assert captioner.sentence(best) == ["<unk>"] * 3
    for [best] in captioner.search(images, 1, max_length=3, never_unk=True):
        assert "<unk>" not in captioner.sentence(best)
    for drawn in captioner.sample(images, max_length=3, never_unk=True):
        assert "<unk>" not in captioner.sentence(drawn)


def test_a_caption_has_its_least_and_at_most_its_longest_length(make_captioner, images):
    captioner = insist(make_captioner(), "<end>")
    assert [len(best.words) for [best] in captioner.search(images, 2)] == [0] * 4
    assert [len(best.words) for [best] in captioner.search(images, 2, min_length=4)] == [4] * 4
    assert [len(drawn.words) for drawn in captioner.sample(images, min_length=4)] == [4] * 4
    captioner = insist(make_captioner(), "cat")
    assert [len(best.words) for [best] in captioner.search(images, 2, max_length=2, min_length=2)] == [2] * 4


def test_no_words_are_said_twice_where_that_is_forbidden(make_captioner, images):
    captioner = insist(make_captioner(), "cat")
    for [best] in captioner.search(images, 2, max_length=5, no_repeat_ngram=1):
        assert len(set(best.words)) == len(best.words)


def test_the_search_gives_what_its_options_ask_for(make_captioner, images):
    captioner = make_captioner()
    found = captioner.search(images, 3, n_best=2, normalisation="length", keep_alphas=True)
    assert [len(some) for some in found] == [2] * 4
    best = found[0][0]
    assert best.score == pytest.approx(best.log_prob / (len(best.words) + best.ended))
    assert best.alphas.shape == (len(best.words) + best.ended, 9)
    rewarded = captioner.search(images, 3, normalisation="reward", reward=100.0, max_length=8)
    for [best] in rewarded:
        assert best.score == pytest.approx(best.log_prob + 100 * (len(best.words) + best.ended), rel=1e-5)


def test_sampling_one_word_is_greedy_a_low_temperature_comes_close_and_a_seed_repeats(make_captioner, images):
    captioner = make_captioner()
    greedy = [h.words for h in captioner.sample(images, max_length=6, top_k=1)]
    assert greedy == [h.words for [h] in captioner.search(images, 1, max_length=6)]
    assert greedy == [h.words for h in captioner.sample(images, max_length=6, temperature=1e-3)]
    first, second = (
        [h.words for h in captioner.sample(images, max_length=6, top_p=0.9, generator=torch.Generator().manual_seed(3))]
        for _ in range(2)
    )
    assert first == second != greedy


def test_an_option_that_nobody_has_is_refused(make_captioner, images):
    with pytest.raises(TypeError, match="beams"):
        make_captioner().search(images, beams=3)
