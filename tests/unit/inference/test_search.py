"""Searches find what going through every sequence finds, for many photos at once, and keep their rules."""

import pytest
import torch
from plain_search import plain_beam_search as plain_batched_search
from plain_search import plain_sample
from torch.utils._python_dispatch import TorchDispatchMode
from toy_decoder import END, START, VOCAB, ToyDecoder, rescored, rules, seeded

from captioning.inference.search import beam_search, greedy_search, sample_captions
from models import DecoderWithAttention, DecoderWithHardAttention


@pytest.fixture(params=["toy", "soft attention", "hard attention"])
def searched(request, tiny_decoder):
    """:return: a decoder, and features of six photos"""
    if request.param == "toy":
        return ToyDecoder(), torch.arange(6)
    cls = DecoderWithAttention if request.param == "soft attention" else DecoderWithHardAttention
    decoder = tiny_decoder(cls, vocab_size=VOCAB, layers=2, deep_output=True, spread=1.0).eval()
    return decoder, torch.randn(6, 2, 2, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def every_sequence(decoder, photo, r):
    """:return: list of (words, log-probability, True) of all captions of one photo that end and that the rules allow"""
    found = []

    def allowed(written, index):
        if index in r.forbidden or (index == r.end and len(written) < r.min_length):
            return False
        longer, n = [*written, index], r.no_repeat_ngram
        ngrams = [tuple(longer[i : i + n]) for i in range(len(longer) - n + 1)] if n else []
        return len(set(ngrams)) == len(ngrams)

    def continue_with(written, total, state):
        output, _, state = decoder.step(torch.tensor([written[-1] if written else START]), state)
        log_probs = (decoder.scores(output)[0] / r.temperature).log_softmax(dim=0).tolist()
        for index, log_prob in enumerate(log_probs):
            if not allowed(written, index):
                continue
            if index == r.end:
                found.append((written, total + log_prob, True))
            elif len(written) < r.max_length:
                continue_with([*written, index], total + log_prob, state)

    continue_with([], 0.0, decoder.init_state(photo))
    return found


def ranked(sequences, normalisation="none", reward=0.0):
    """Best first: what ended before what did not, then by score; <end> counts as a word."""

    def score(sequence):
        words, log_prob, ended = sequence
        length = len(words) + ended
        return {"none": log_prob, "length": log_prob / length, "reward": log_prob + reward * length}[normalisation]

    return [(*sequence, score(sequence)) for sequence in sorted(sequences, key=lambda one: (not one[2], -score(one)))]


RULES = {
    "none": {},
    "min_length": {"min_length": 2},
    "forbidden": {"forbidden": (START, 2)},
    "no word twice": {"no_repeat_ngram": 1},
    "no pair twice": {"no_repeat_ngram": 2, "max_length": 5, "forbidden": (START, 1)},
    "sharper": {"temperature": 0.4},
    "flatter": {"temperature": 3.0},
    "all": {"min_length": 1, "forbidden": (START,), "no_repeat_ngram": 1, "temperature": 2.0},
}


@pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("normalisation", ["none", "length", "reward"])
def test_a_wide_beam_finds_what_going_through_every_sequence_finds(searched, options, normalisation):
    decoder, photos = searched
    photos, r = photos[:2], rules(**options)
    for n_best in (1, 5):
        found = beam_search(decoder, photos, r, 1300, normalisation, reward=0.7, n_best=n_best)
        for i in range(len(photos)):
            expected = ranked(every_sequence(decoder, photos[i : i + 1], r), normalisation, 0.7)[:n_best]
            assert [h.words for h in found[i]] == [words for words, *_ in expected]
            assert [h.ended for h in found[i]] == [ended for _, _, ended, _ in expected]
            assert [h.log_prob for h in found[i]] == pytest.approx([e[1] for e in expected], abs=1e-4)
            assert [h.score for h in found[i]] == pytest.approx([e[3] for e in expected], abs=1e-4)


@torch.no_grad()
def plain_beam_search(decoder, photo, beam_size, r):
    """One photo, in lists: the best `beam_size` beginnings at each step; one that ends gives up its place."""
    beams, done = [([], 0.0, decoder.init_state(photo))], []
    for _ in range(r.max_length + 1):
        candidates = []
        for written, total, state in beams:
            output, _, new_state = decoder.step(torch.tensor([written[-1] if written else START]), state)
            for index, log_prob in enumerate(decoder.scores(output)[0].log_softmax(dim=0).tolist()):
                candidates.append(([*written, index], total + log_prob, new_state))
        candidates.sort(key=lambda candidate: -candidate[1])
        before, beams = beams, []
        for written, total, state in candidates[: beam_size - len(done)]:
            if written[-1] == r.end:
                done.append((written[:-1], total, True))
            else:
                beams.append((written, total, state))
    completed = [words for words, _, _ in done]
    return ranked(done + [(words, total, False) for words, total, _ in before if words not in completed])


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
@pytest.mark.parametrize("max_length", [2, 8])
def test_a_narrow_beam_keeps_the_same_beginnings_as_a_plain_one(searched, beam_size, max_length):
    decoder, photos = searched
    r = rules(max_length=max_length)
    every = beam_search(decoder, photos, r, beam_size, n_best=beam_size)
    best = beam_search(decoder, photos, r, beam_size)  # may stop earlier
    for i in range(len(photos)):
        expected = plain_beam_search(decoder, photos[i : i + 1], beam_size, r)
        assert [(h.words, h.ended) for h in every[i]] == [(words, ended) for words, _, ended, _ in expected]
        assert [h.log_prob for h in every[i]] == pytest.approx([e[1] for e in expected], abs=1e-4)
        assert best[i][0].words == expected[0][0]
        assert len(best[i]) == 1


def test_a_beam_of_one_equals_greedy_choice(searched):
    decoder, photos = searched
    r = rules(max_length=12)
    for one, other in zip(beam_search(decoder, photos, r, 1), greedy_search(decoder, photos, r), strict=True):
        assert one[0].words == other.words
        assert one[0].ended == other.ended
        assert one[0].log_prob == pytest.approx(other.log_prob, abs=1e-4)


def test_greedy_choice_takes_the_likeliest_word_each_time(searched):
    decoder, photos = searched
    for i, found in enumerate(greedy_search(decoder, photos, rules(max_length=6))):
        words = [*found.words, END] if found.ended else found.words
        for t, index in enumerate(words):
            others = [rescored(decoder, photos[i : i + 1], [*words[:t], k])[0][-1] for k in range(VOCAB)]
            assert index == max(range(VOCAB), key=others.__getitem__)


@pytest.mark.parametrize("normalisation", ["none", "length", "reward"])
def test_a_batch_is_searched_like_one_photo_at_a_time(searched, normalisation):
    decoder, photos = searched
    options = {"beam_size": 3, "normalisation": normalisation, "reward": 0.3, "n_best": 3, "keep_alphas": True}
    together = beam_search(decoder, photos, rules(max_length=9), **options)
    for i in range(len(photos)):
        (alone,) = beam_search(decoder, photos[i : i + 1], rules(max_length=9), **options)
        assert [h.words for h in together[i]] == [h.words for h in alone]
        for one, other in zip(together[i], alone, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)
            torch.testing.assert_close(one.alphas, other.alphas, rtol=1e-4, atol=1e-5)


def test_photos_that_end_at_different_times_keep_their_own_captions():
    decoder, photos = ToyDecoder(seed=3, spread=3.0), torch.arange(40)
    found = beam_search(decoder, photos, rules(max_length=15), 4)
    assert len({len(best.words) for best, *_ in found}) > 3
    for photo, (best, *_) in zip(photos, found, strict=True):
        assert best.words == plain_beam_search(decoder, photo.view(1), 4, rules(max_length=15))[0][0]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_beam_that_never_ends_gives_its_best_unfinished_caption(beam_size):
    decoder, photos = ToyDecoder(end_bias=-1000.0), torch.arange(3)
    for photo, found in zip(photos, beam_search(decoder, photos, rules(), beam_size), strict=True):
        expected = plain_beam_search(decoder, photo.view(1), beam_size, rules())[0]
        assert not found[0].ended
        assert found[0].words == expected[0] and len(found[0].words) == 4
        assert found[0].log_prob == pytest.approx(expected[1], abs=1e-4)


def test_a_caption_that_ended_goes_before_a_likelier_one_that_was_cut_off():
    decoder = ToyDecoder(spread=0.1, end_bias=-3.0)  # ending is never the likeliest word
    (found,) = beam_search(decoder, torch.arange(1), rules(max_length=3), 200, n_best=200)
    ended = [h.ended for h in found]
    assert ended == sorted(ended, reverse=True) and True in ended and False in ended
    assert min(h.log_prob for h in found if h.ended) < max(h.log_prob for h in found if not h.ended)


def test_a_beam_that_the_rules_leave_no_word_gives_its_best_unfinished_caption():
    # Three words may be written, each once, and the caption must have four.
    r = rules(max_length=8, min_length=4, no_repeat_ngram=1, forbidden=(START,))
    (found,) = beam_search(ToyDecoder(), torch.arange(1), r, 3)
    assert sorted(found[0].words) == [1, 2, 3] and not found[0].ended


@pytest.mark.parametrize("normalisation", ["none", "length", "reward"])
def test_n_best_are_sorted_and_their_log_probabilities_are_those_of_their_words(searched, normalisation):
    decoder, photos = searched
    found = beam_search(decoder, photos, rules(max_length=6), 5, normalisation, 0.4, n_best=4)
    for i, hypotheses in enumerate(found):
        assert 1 <= len(hypotheses) <= 4
        assert len({tuple(h.words) for h in hypotheses}) == len(hypotheses)
        for h in hypotheses:
            words = [*h.words, END] if h.ended else h.words
            log_prob = sum(rescored(decoder, photos[i : i + 1], words)[0])
            assert h.log_prob == pytest.approx(log_prob, abs=1e-4)
            score = {"none": log_prob, "length": log_prob / len(words), "reward": log_prob + 0.4 * len(words)}
            assert h.score == pytest.approx(score[normalisation], abs=1e-4)
        scores = [h.score for h in hypotheses if h.ended]
        assert scores == sorted(scores, reverse=True)


def test_a_reward_for_each_word_makes_captions_longer():
    decoder, photos = ToyDecoder(end_bias=2.0), torch.arange(30)

    def mean_length(**options):
        found = beam_search(decoder, photos, rules(max_length=20), 8, **options)
        return sum(len(best.words) for best, *_ in found) / len(photos)

    assert mean_length() < mean_length(normalisation="reward", reward=1.0)
    assert mean_length() < mean_length(normalisation="length")


@pytest.mark.parametrize("search", ["beam", "sample", "greedy"])
@pytest.mark.parametrize("layers", [1, 2])
def test_alphas_are_those_of_running_the_words_again(tiny_decoder, search, layers):
    decoder = tiny_decoder(vocab_size=VOCAB, layers=layers, spread=1.0).eval()
    photos, r = torch.randn(5, 2, 2, 6, generator=torch.Generator().manual_seed(1)), rules(max_length=8)
    if search == "beam":
        found = beam_search(decoder, photos, r, 4, n_best=4, keep_alphas=True)
    elif search == "sample":
        found = [[h] for h in sample_captions(decoder, photos, r, generator=seeded(0), keep_alphas=True)]
    else:
        found = [[h] for h in greedy_search(decoder, photos, r, keep_alphas=True)]
    for i, hypotheses in enumerate(found):
        for h in hypotheses:
            words = [*h.words, END] if h.ended else h.words
            _, alphas = rescored(decoder, photos[i : i + 1], words)
            assert h.alphas.shape == (len(words), 9)
            torch.testing.assert_close(h.alphas, alphas, rtol=1e-4, atol=1e-5)


def test_alphas_are_left_out_where_nobody_asks_or_there_are_none():
    photos = torch.arange(2)
    for decoder, keep in ((ToyDecoder(), False), (ToyDecoder(alphas=False), True)):
        assert all(best.alphas is None for best, *_ in beam_search(decoder, photos, rules(), 2, keep_alphas=keep))
        assert all(h.alphas is None for h in greedy_search(decoder, photos, rules(), keep_alphas=keep))


def test_a_caption_may_have_max_length_words_and_end_after_them():
    photos = torch.arange(50)
    lengths = []
    for h in sample_captions(ToyDecoder(end_bias=-1.0), photos, rules(max_length=5), generator=seeded(0)):
        assert len(h.words) == 5 or (h.ended and len(h.words) < 5)
        lengths.append((len(h.words), h.ended))
    assert (5, True) in lengths and (5, False) in lengths
    decoder = ToyDecoder()
    longer = beam_search(decoder, photos, rules(max_length=12), 4)
    for photo, [best] in zip(photos, longer, strict=True):
        if best.ended and best.words:
            [[same]] = beam_search(decoder, photo.view(1), rules(max_length=len(best.words)), 4)
            assert same.ended and same.words == best.words


def test_the_log_probability_of_a_sample_is_that_of_its_words(searched):
    decoder, photos = searched
    for i, h in enumerate(sample_captions(decoder, photos, rules(temperature=1.5, max_length=6), generator=seeded(0))):
        words = [*h.words, END] if h.ended else h.words
        log_prob = sum(rescored(decoder, photos[i : i + 1], words, temperature=1.5)[0])
        assert h.log_prob == pytest.approx(log_prob, abs=1e-4)


def test_searches_keep_no_graph(tiny_decoder):
    decoder = tiny_decoder(vocab_size=VOCAB).eval()
    photos = torch.randn(2, 3, 3, 6, requires_grad=True)
    (best, *_), _ = beam_search(decoder, photos, rules(), 2, keep_alphas=True)
    assert not best.alphas.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("normalisation", ["none", "length", "reward"])
def test_captions_are_those_of_the_plain_search_to_the_bit(searched, options, normalisation):
    decoder, photos = searched
    keep = not isinstance(decoder, ToyDecoder)
    for n_best, beam_size, max_length in ((1, 1, 3), (1, 4, 9), (3, 3, 9)):
        r = rules(**options | {"max_length": max_length})
        found = beam_search(decoder, photos, r, beam_size, normalisation, 0.3, n_best, keep)
        same(found, plain_batched_search(decoder, photos, r, beam_size, normalisation, 0.3, n_best, keep))


@pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("drawn", [{}, {"top_k": 1}, {"top_k": 3, "top_p": 0.8}])
def test_samples_are_those_of_the_plain_way_to_the_bit(searched, options, drawn):
    decoder, photos = searched
    for max_length in (3, 9):
        r = rules(**options | {"max_length": max_length})
        found, expected = (
            [[h] for h in sample(decoder, photos, r, generator=seeded(5), keep_alphas=True, **drawn)]
            for sample in (sample_captions, plain_sample)
        )
        same(found, expected)


def same(found, expected):
    """Compare lists of hypotheses for each photo, without any tolerance."""
    for some, others in zip(found, expected, strict=True):
        assert [h._replace(alphas=None) for h in some] == [h._replace(alphas=None) for h in others]
        for one, other in zip(some, others, strict=True):
            assert one.alphas is other.alphas or torch.equal(one.alphas, other.alphas)


class Waits(TorchDispatchMode):
    """Counts what makes Python wait for a GPU: operations whose result it must read before it continues."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.number += by_mask or name in ("nonzero", "_local_scalar_dense", "masked_select", "equal", "unique")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", ["beam", "groups", "sample"])
def test_a_timestep_waits_for_the_device_once(tiny_decoder, search, monkeypatch):
    decoder = tiny_decoder(vocab_size=VOCAB, spread=1.0).eval()
    photos = torch.randn(6, 2, 2, 6, generator=torch.Generator().manual_seed(0))
    r = rules(max_length=9, min_length=2, forbidden=(START,), no_repeat_ngram=3)
    steps = []
    step = decoder.step
    monkeypatch.setattr(decoder, "step", lambda words, state: steps.append(len(words)) or step(words, state))
    with Waits() as waits:
        if search == "beam":
            beam_search(decoder, photos, r, 3, n_best=3)
        elif search == "groups":
            beam_search(decoder, photos, r, 4, n_best=4, groups=2)
        else:
            sample_captions(decoder, photos, r, generator=seeded(0))
    assert len(steps) > 4 and len(set(steps)) > 1  # photos left at different times
    assert waits.number == len(steps)


def test_a_state_that_a_step_hands_back_as_it_was_is_not_moved_while_all_photos_continue_with():
    class Constant(ToyDecoder):
        seen = []

        def step(self, words, state):
            self.seen.append(state[0])
            return super().step(words, state)

    beam_search(Constant(end_bias=-1000.0), torch.arange(3), rules(max_length=5), 2)
    assert len({id(photos) for photos in Constant.seen}) == 1
