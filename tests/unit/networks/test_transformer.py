"""The transformer computes what its paper's equations say, all at once, step by step and in every search."""

import functools
import math

import pytest
import torch
from decoder_checks import (
    END,
    GRIDS,
    RULES,
    START,
    affine,
    assert_equations_hold,
    assert_same,
    build,
    captions,
    gradients,
    grid,
    objective,
    weighted_sum,
)

from captioning.inference.search import beam_search, greedy_search
from captioning.networks.ensemble import Ensemble
from models import CaptionDecoder
from utils import UserError

# Vaswani et al., one vector and one head at a time; all words before are read anew at each step.


def normalised(p, name, x):
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def position(t, dim):
    """Section 3.5."""
    waves = [(math.sin, math.cos)[i % 2](t / 10_000 ** (2 * (i // 2) / dim)) for i in range(dim)]
    return torch.tensor(waves)


def look(p, name, asking, seen, heads):
    """:return: what a vector finds in a list of others, and its weights (heads, S); equation 1 and section 3.2.2"""
    query, d = affine(p, f"{name}.query", asking), len(asking) // heads
    keys, values = ([affine(p, f"{name}.{kind}", x) for x in seen] for kind in ("key", "value"))
    found, weights = [], []
    for own in (slice(head * d, (head + 1) * d) for head in range(heads)):
        scores = torch.stack([query[own] @ key[own] for key in keys]) / math.sqrt(d)
        weights.append(scores.softmax(dim=0))
        found.append(weighted_sum(weights[-1], [value[own] for value in values]))
    return affine(p, f"{name}.output", *found), torch.stack(weights)


def equations(p, a, words, layers, heads=2):
    dim = p["norm_of_output.weight"].shape[0]
    photo = [normalised(p, "norm_of_grid", affine(p, "encode_locations", a_i)) for a_i in a]
    embedded = [p["embedding.weight"][word] for word in words]
    if "encode_words.weight" in p:
        embedded = [affine(p, "encode_words", x) for x in embedded]
    scores, alphas = [], []
    for t in range(len(words)):
        x = [embedded[i] * math.sqrt(dim) + position(i, dim) for i in range(t + 1)]
        for layer in (f"layers.{i}" for i in range(layers)):
            normed = [normalised(p, f"{layer}.norm_before_words", one) for one in x]
            x = [x[i] + look(p, f"{layer}.read_words", normed[i], normed[: i + 1], heads)[0] for i in range(t + 1)]
            seen = [
                look(p, f"{layer}.read_photo", normalised(p, f"{layer}.norm_before_photo", one), photo, heads)
                for one in x
            ]
            x = [one + found for one, (found, _) in zip(x, seen, strict=True)]
            normed = [normalised(p, f"{layer}.norm_before_thought", one) for one in x]
            x = [
                one + affine(p, f"{layer}.think.2", affine(p, f"{layer}.think.0", n).relu())
                for one, n in zip(x, normed, strict=True)
            ]
        scores.append(affine(p, "fc", normalised(p, "norm_of_output", x[-1])))
        alphas.append(seen[-1][1].mean(dim=0))  # of the last layer
    return torch.stack(scores), torch.stack(alphas)


@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_scores_alphas_and_gradients_are_those_of_the_papers_equations(size):
    two_layers = functools.partial(equations, layers=2)
    assert_equations_hold(two_layers, build("transformer", decoder_layers=2), size)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"layers": 3}),
        ({"decoder_layers": 1, "attention_heads": 3}, {"layers": 1, "heads": 3}),
        ({"decoder_layers": 1, "tie_weights": True, "decoder_dim": 7, "attention_heads": 7}, {"layers": 1, "heads": 7}),
    ],
    ids=["three layers", "three heads", "tied"],
)
def test_so_they_are_with_other_settings(settings, options):
    assert_equations_hold(functools.partial(equations, **options), build("transformer", **settings))


@pytest.mark.parametrize("fast_cpu", [False, True])
def test_all_steps_at_once_give_the_loss_and_gradients_of_one_after_another(fast_cpu):
    decoder, (rows, lengths) = build("transformer", fast_cpu=fast_cpu), captions(6)
    features, image_rows = grid(3, (5, 5)).requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 2])

    def loss_and_gradients():
        decoded = decoder(features, rows, lengths, image_rows)
        loss = objective(decoded.logits, decoded.alphas, decoded.targets)
        return loss, decoded.alphas, gradients(loss, decoder, features)

    loss, alphas, found = loss_and_gradients()
    decoder.take_steps = functools.partial(CaptionDecoder.take_steps, decoder)  # a loop over `step`
    stepwise_loss, stepwise_alphas, expected = loss_and_gradients()
    torch.testing.assert_close(loss, stepwise_loss, rtol=1e-5, atol=0)
    assert_same(alphas, stepwise_alphas)
    for parameter in expected:
        assert_same(found[parameter], expected[parameter])


class WithoutCache:
    """A transformer that keeps nothing but the words, and reads all of them anew at each step."""

    def __init__(self, decoder):
        self.decoder, self.scores = decoder, decoder.scores

    def init_state(self, features):
        return State([features, torch.empty(len(features), 0, dtype=torch.long)])

    def step(self, words, state):
        features, before = state
        words = torch.cat([before, words.unsqueeze(1)], dim=1)
        outputs, alphas, _ = self.decoder.read(words, self.decoder.init_state(features))
        return outputs[:, -1], alphas[:, -1], State([features, words])


class State(tuple):
    @classmethod
    def _make(cls, parts):
        return cls(parts)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_search_finds_the_same_captions_without_the_cache(beam_size):
    decoder = build("transformer", spread=1.5).eval()
    with torch.no_grad():
        decoder.fc.bias[END] += 2
    options = {"beam_size": beam_size, "n_best": beam_size, "keep_alphas": True}
    found = beam_search(decoder, grid(5), RULES, **options)
    expected = beam_search(WithoutCache(decoder), grid(5), RULES, **options)
    assert len({len(one.words) for one in sum(expected, [])}) > 1  # they end at different times
    for one, other in zip(sum(found, []), sum(expected, []), strict=True):
        assert one.words == other.words
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        torch.testing.assert_close(one.alphas, other.alphas, rtol=1e-4, atol=1e-5)


def test_a_batch_gives_what_each_photo_gives_alone():
    decoder, features = build("transformer", spread=0.8).eval(), grid(5)
    together = beam_search(decoder, features, RULES, beam_size=3)
    for photo in range(5):
        [[alone]] = beam_search(decoder, features[photo : photo + 1], RULES, beam_size=3)
        assert together[photo][0].words == alone.words
        assert together[photo][0].log_prob == pytest.approx(alone.log_prob, abs=1e-4)


def test_with_an_lstm_it_writes_captions_of_their_mean_probability():
    decoders = [build("transformer", spread=1.0).eval(), build("soft", spread=1.0).eval()]
    features = grid(3)
    for photo, (best, *_) in enumerate(beam_search(Ensemble(decoders), (features, features), RULES, beam_size=3)):
        words = torch.tensor([[START, *best.words, *[END] * best.ended]])
        length = torch.tensor([words.shape[1]])
        logits = [decoder(features[photo : photo + 1], words, length).logits for decoder in decoders]
        mean = torch.stack([one.softmax(dim=1) for one in logits]).mean(dim=0)  # (T, vocab_size)
        log_prob = mean.log().gather(1, words[0, 1:].unsqueeze(1)).sum().item()
        assert best.log_prob == pytest.approx(log_prob, abs=1e-3)


def test_its_own_words_are_mixed_in_one_after_another():
    decoder, (rows, lengths) = build("transformer").eval(), captions(4)
    with torch.no_grad():
        decoder.fc.weight.mul_(1000)  # so sure that a word that is drawn is the likeliest one
    decoded = decoder(grid(4), rows, lengths, teacher_forcing=0.0)
    logits = decoded.logits.split(decoded.batch_sizes)  # T of (n, vocab_size)
    for row, caption in enumerate(decoded.order.tolist()):
        state, word = decoder.init_state(grid(4)[caption : caption + 1]), torch.tensor([START])
        for t in range(lengths[caption] - 1):
            output, _, state = decoder.step(word, state)
            assert_same(logits[t][row], decoder.scores(output)[0])
            word = decoder.scores(output).argmax(dim=1)


def test_one_head_or_the_mean_of_all_tells_where_it_looked():
    batch = grid(4), *captions(4)
    alphas = [build("transformer", attention_heads=3, shown_head=head)(*batch).alphas for head in (None, 1, 2, 3)]
    assert not torch.allclose(alphas[1], alphas[2], atol=0.01)
    assert_same(torch.stack(alphas[1:]).mean(dim=0), alphas[0])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"attention_heads": 4}, r"attention_heads: 4 found, a divisor of decoder_dim \(6\) expected"),
        ({"shown_head": 3}, r"shown_head: 3 found, at most attention_heads \(2\) expected"),
        ({"shown_head": 0}, "shown_head: 0 found"),
    ],
    ids=str,
)
def test_heads_that_cannot_be_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        build("transformer", **settings)


def test_positions_never_run_out():
    decoder, length = build("transformer").eval(), 700
    rows = torch.full((1, length), 5)
    rows[0, 0] = START
    logits = decoder(grid(1), rows, torch.tensor([length])).logits
    assert logits.isfinite().all()
    assert not torch.allclose(logits[-1], logits[-2])  # the same word, but at another position


def test_under_autocast_the_cache_is_as_exact_as_the_parallel_pass():
    decoder, features = build("transformer").eval(), grid(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for best in greedy_search(decoder, features, RULES):
            assert math.isfinite(best.log_prob)
        state = decoder.init_state(features)
        *_, state = decoder.step(torch.full((5,), START), state)
    assert state.word_keys.dtype == state.grid_keys.dtype == torch.bfloat16
