"""A captioner turns photos into sentences, under the rules that it is given."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import WORD_MAP
from saved_model import save_model

from captioning.inference.search import Rules, beam_search
from captioning.inference.trained_model import Captioner, load_captioner
from captioning.networks.ensemble import Ensemble
from captioning.networks.registry import AdaptiveAttention, ShowAndTell
from datasets import Batch
from models import DecoderWithHardAttention, Encoder
from utils import UserError

RULES = Rules(start=8, end=9, max_length=7)


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


@pytest.fixture
def batch():
    """Three photos with two captions each, of different lengths."""
    captions = torch.tensor(
        [[8, 1, 2, 9, 0], [8, 3, 9, 0, 0], [8, 4, 5, 6, 9], [8, 2, 9, 0, 0], [8, 1, 1, 9, 0], [8, 9, 0, 0, 0]]
    )
    lengths = torch.tensor([4, 3, 5, 3, 4, 2])
    images = torch.randn(3, 2, 2, 6, generator=torch.Generator().manual_seed(2))
    return Batch(images, captions, lengths, torch.arange(3).repeat_interleave(2), torch.arange(3), None)


def test_perplexity_is_that_of_the_decoders_own_teacher_forcing_over_all_batches(make_captioner, batch):
    captioner = make_captioner()
    decoded = captioner.decoder(batch.images, batch.captions, batch.lengths, batch.image_rows)
    expected = math.exp(F.cross_entropy(decoded.logits, decoded.targets).item())
    first = batch._replace(
        images=batch.images[:1], captions=batch.captions[:2], lengths=batch.lengths[:2], image_rows=torch.tensor([0, 0])
    )
    rest = batch._replace(
        images=batch.images[1:], captions=batch.captions[2:], lengths=batch.lengths[2:],
        image_rows=batch.image_rows[2:] - 1,
    )  # fmt: skip
    assert captioner.perplexity([batch]) == pytest.approx(expected, rel=1e-5)
    assert captioner.perplexity([first, rest]) == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def members(tiny_decoder):
    """Decoders of four kinds, one with another number of layers."""
    return [
        tiny_decoder(layers=2).eval(),
        tiny_decoder(DecoderWithHardAttention, seed=1).eval(),
        tiny_decoder(AdaptiveAttention, seed=2, decoder_dim=8).eval(),
        tiny_decoder(seed=3).eval(),
    ]


def test_an_ensemble_of_one_and_one_of_twins_write_what_the_model_writes(members, images):
    for decoder in members:
        [alone] = zip(*beam_search(decoder, images, RULES, 3, keep_alphas=True), strict=True)
        for copies in (1, 2):
            together = beam_search(Ensemble([decoder] * copies), (images,) * copies, RULES, 3, keep_alphas=True)
            for one, [both] in zip(alone, together, strict=True):
                assert both.words == one.words and both.log_prob == pytest.approx(one.log_prob, abs=1e-4)
                torch.testing.assert_close(both.alphas, one.alphas)


def test_an_ensemble_averages_probabilities_step_by_step(members, images):
    ensemble = Ensemble(members)
    state, states = ensemble.init_state((images,) * 4), [decoder.init_state(images) for decoder in members]
    for word in (8, 1, 5):
        words = torch.full((4,), word)
        output, alpha, state = ensemble.step(words, state)
        probabilities, alphas = [], []
        for i, decoder in enumerate(members):
            own, own_alpha, states[i] = decoder.step(words, states[i])
            probabilities.append(decoder.scores(own).softmax(dim=1))
            alphas.append(own_alpha)
        torch.testing.assert_close(ensemble.scores(output).exp(), sum(probabilities) / 4)
        torch.testing.assert_close(alpha, sum(alphas) / 4)


def test_an_ensemble_searches_many_photos_as_it_searches_one(members, images):
    ensemble = Ensemble(members)
    batched = beam_search(ensemble, (images,) * 4, RULES, 3)
    for i, [best] in enumerate(batched):
        [[single]] = beam_search(ensemble, (images[i : i + 1],) * 4, RULES, 3)
        assert single.words == best.words and single.log_prob == pytest.approx(best.log_prob, abs=1e-4)


def test_an_ensemble_shows_no_attention_where_its_models_have_none_or_other_grids(tiny_decoder, members, images):
    for other in (tiny_decoder(encoded_image_size=2), ShowAndTell(11, 6, embed_dim=7, decoder_dim=7)):
        [[best], *_] = beam_search(Ensemble([members[0], other.eval()]), (images,) * 2, RULES, keep_alphas=True)
        assert best.alphas is None


def test_several_checkpoints_caption_together_and_their_caches_only_if_they_see_alike(tmp_path):
    first = save_model(tmp_path / "a.pth", 1)
    save_model(tmp_path / "b.pth", 2)
    save_model(tmp_path / "c.pth", 3, backbone=first.backbone)
    photos = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for other, shared in (("b.pth", False), ("c.pth", True)):
        paths = [tmp_path / "a.pth", tmp_path / other]
        captioner, _, path = load_captioner(paths)
        assert path == paths[0] and captioner.encoder.frozen == shared
        alone = [load_captioner(path)[0] for path in paths]
        features = tuple(one.encoder.features(photos) for one in alone)
        expected = beam_search(Ensemble([one.decoder for one in alone]), features, captioner.rules(5, {})[0], 2)
        found = captioner.search(photos, 2, max_length=5)
        assert [best.words for [best] in found] == [best.words for [best] in expected]
        assert found[0][0].log_prob == pytest.approx(expected[0][0].log_prob, abs=1e-3)
    one, _, _ = load_captioner([tmp_path / "a.pth"])
    assert isinstance(one.encoder, Encoder)


def test_models_that_cannot_caption_together_are_refused(tmp_path):
    save_model(tmp_path / "a.pth", 1)
    save_model(tmp_path / "words.pth", 2, word_map={**WORD_MAP, "bird": 10})
    save_model(tmp_path / "size.pth", 3, image_size=32)
    with pytest.raises(UserError, match="words.pth: its word map differs"):
        load_captioner([tmp_path / "a.pth", tmp_path / "words.pth"])
    with pytest.raises(UserError, match="size.pth: photos of 32 px found, 64 px expected"):
        load_captioner([tmp_path / "a.pth", tmp_path / "size.pth"])


def test_a_word_map_that_is_of_no_use_is_refused(tmp_path):
    save_model(tmp_path / "a.pth", 1)
    with pytest.raises(UserError, match="^word_map: 'nosuch.json' found, but it is for checkpoints of the tutorial"):
        load_captioner(tmp_path / "a.pth", word_map_file="nosuch.json")
