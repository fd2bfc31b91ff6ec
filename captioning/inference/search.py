"""
From features to captions: greedy choice, sampling and beam search, over any decoder's `init_state`, `step`, `scores`.

Everything is batched: all photos of a batch are searched at once, and a photo that is done leaves the batch.
Words are ids here; which id is which word is the business of the caller.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from models import select_rows
from utils import UserError

NORMALISATIONS = ("none", "length", "reward")


class Hypothesis(NamedTuple):
    """A caption that a search found."""

    words: list  # ids, without <start> and <end>
    log_prob: float  # natural logarithm of its probability, <end> included if it was reached
    score: float  # what it was ranked by: log_prob, or its normalised form
    alphas: torch.Tensor | None  # (T, P), where the model looked for each of T words (and <end>), if asked for
    ended: bool  # False if the longest length cut it off before <end>


@dataclass(frozen=True)
class Rules:
    """What a caption must look like; the same for greedy choice, sampling and beam search."""

    start: int  # id of <start>
    end: int  # id of <end>
    max_length: int = 50  # steps: words, and <end>
    min_length: int = 0  # words; <end> cannot come before
    forbidden: tuple = ()  # ids that are never written, such as <unk>
    no_repeat_ngram: int = 0  # no sequence of this many words twice; 0 for no rule
    temperature: float = 1.0  # scores are divided by it: below 1 sharper, above 1 flatter

    def __post_init__(self):
        for field, least in (("max_length", 1), ("min_length", 0), ("no_repeat_ngram", 0), ("temperature", 1e-6)):
            if getattr(self, field) < least:
                raise UserError(f"{field}: {getattr(self, field)} found, {least} or more expected")

    def log_probs(self, scores, written):
        """
        :param scores: (R, vocab_size), the decoder's scores of the next word
        :param written: (R, t), the words so far
        :return: log-probabilities (R, vocab_size), -inf for what the rules exclude
        """
        t = written.shape[1]
        log_probs = (scores.float() / self.temperature).log_softmax(dim=1)
        if self.forbidden:
            log_probs[:, list(self.forbidden)] = -torch.inf
        if t < self.min_length:
            log_probs[:, self.end] = -torch.inf
        n = self.no_repeat_ngram
        if 0 < n <= t:
            ngrams = written.unfold(1, n, 1)  # (R, t - n + 1, n)
            begun = (ngrams[:, :, :-1] == written[:, None, t - n + 1 :]).all(dim=2)  # (R, t - n + 1)
            rows, places = begun.nonzero(as_tuple=True)
            log_probs[rows, ngrams[rows, places, -1]] = -torch.inf
        return log_probs


def greedy(decoder, features, rules, keep_alphas=False):
    """The likeliest word at each step. Arguments and result as for `sample`."""
    return sample(decoder, features, rules, top_k=1, keep_alphas=keep_alphas)


@torch.no_grad()
def sample(decoder, features, rules, top_k=0, top_p=1.0, generator=None, keep_alphas=False):
    """
    Draw a caption for each photo, word by word.

    :param features: (N, height, width, encoder_dim), or what `decoder.init_state` takes
    :param rules: `Rules`
    :param top_k: draw among this many likeliest words; 0 for all, 1 for greedy choice
    :param top_p: draw among the likeliest words that hold this probability together (nucleus, Holtzman et al. 2020)
    :param generator: a seeded torch.Generator on the features' device, to draw the same again
    :param keep_alphas: whether the hypotheses tell where the model looked
    :return: list of N hypotheses
    """
    state = decoder.init_state(features)
    num_photos, device = len(state[0]), state[0].device
    photos = torch.arange(num_photos, device=device)  # (n,), those whose caption still runs
    words = torch.full((num_photos,), rules.start, device=device)  # (n,)
    written = words.new_zeros(num_photos, 0)  # (n, t)
    totals = torch.zeros(num_photos, device=device)  # (n,)
    looked = None  # (n, t, P)
    captions = [None] * num_photos

    for t in range(rules.max_length):
        output, alpha, state = decoder.step(words, state)
        log_probs = rules.log_probs(decoder.scores(output), written)  # (n, vocab_size)
        stuck = log_probs.amax(dim=1) == -torch.inf  # (n,), the rules leave no word
        words = choose(log_probs.masked_fill(stuck.unsqueeze(1), 0.0), top_k, top_p, generator)  # (n,)
        totals = totals + log_probs.gather(1, words.unsqueeze(1)).squeeze(1).masked_fill(stuck, 0.0)
        written = torch.cat([written, words.unsqueeze(1)], dim=1)
        if keep_alphas and alpha is not None:
            looked = alpha.unsqueeze(1) if looked is None else torch.cat([looked, alpha.unsqueeze(1)], dim=1)

        leaves = (words == rules.end) | (t == rules.max_length - 1) | stuck
        for row in leaves.nonzero().flatten().tolist():
            total, ids = totals[row].item(), written[row, :-1] if stuck[row] else written[row]
            captions[photos[row]] = hypothesis(ids, total, total, looked, row, rules)
        stays = ~leaves
        if not stays.any():
            break
        photos, words, written, totals = photos[stays], words[stays], written[stays], totals[stays]
        state = select_rows(state, stays)
        looked = None if looked is None else looked[stays]
    return captions


def choose(log_probs, top_k, top_p, generator):
    """:return: (n,), a word for each row of log_probs (n, vocab_size), drawn as `sample` describes"""
    if top_k == 1:
        return log_probs.argmax(dim=1)
    if top_k:
        least = log_probs.topk(min(top_k, log_probs.shape[1]), dim=1).values[:, -1:]  # (n, 1)
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    if top_p < 1:
        ordered, words = log_probs.softmax(dim=1).sort(dim=1, descending=True)  # (n, vocab_size)
        beyond = ordered.cumsum(dim=1) - ordered >= top_p  # the word that crosses top_p is still in
        log_probs = log_probs.masked_fill(beyond.scatter(1, words, beyond), -torch.inf)
    return log_probs.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)


@torch.no_grad()
def beam_search(decoder, features, rules, beam_size=5, normalisation="none", reward=0.0, n_best=1, keep_alphas=False):
    """
    Keep the `beam_size` likeliest beginnings of a caption at each step, for all photos at once.

    A beginning that ends leaves the beam, which then goes on with one place less, as in the paper's code; a photo is
    done when its beam is empty, or when nothing in it can beat the best that ended.
    :param features: (N, height, width, encoder_dim), or what `decoder.init_state` takes
    :param rules: `Rules`
    :param normalisation: how finished captions are ranked, <end> counted as a word: 'none' by log-probability,
        'length' by its mean over the words, 'reward' by log-probability plus `reward` for each word
    :param n_best: number of hypotheses a photo, best first; at most beam_size
    :param keep_alphas: whether the hypotheses tell where the model looked
    :return: list of N lists of hypotheses; if none ended within max_length, the best unfinished
    """
    if normalisation not in NORMALISATIONS:
        raise UserError(f"normalisation: '{normalisation}' found, one of {', '.join(NORMALISATIONS)} expected")
    if beam_size < 1:
        raise UserError(f"beam_size: {beam_size} found, 1 or more expected")
    state = decoder.init_state(features)
    state = state._make(part.repeat_interleave(beam_size, dim=0) for part in state)
    num_photos, device = len(state[0]) // beam_size, state[0].device
    photos = torch.arange(num_photos, device=device)  # (n,), those that are still searched
    words = torch.full((num_photos, beam_size), rules.start, device=device)  # (n, k)
    written = words.new_zeros(num_photos, beam_size, 0)  # (n, k, t)
    totals = torch.full((num_photos, beam_size), -torch.inf, device=device)  # (n, k), -inf for an empty place
    totals[:, 0] = 0.0  # all beams begin alike: one stands for all
    room = torch.full((num_photos,), beam_size, device=device)  # (n,), places that are left
    best_ended = torch.full((num_photos,), -torch.inf, device=device)  # (n,)
    looked = None  # (n, k, t, P)
    found = [[] for _ in range(num_photos)]

    def keep(i, j, steps):
        total = totals[i, j].item()
        score = {"none": total, "length": total / max(steps, 1), "reward": total + reward * steps}[normalisation]
        found[photos[i]].append(
            hypothesis(written[i, j], total, score, None if looked is None else looked[i], j, rules)
        )

    for t in range(rules.max_length):
        before = state
        output, alpha, state = decoder.step(words.flatten(), state)
        log_probs = rules.log_probs(decoder.scores(output), written.flatten(0, 1))  # (n * k, vocab_size)
        vocab_size = log_probs.shape[1]
        candidates = (totals.unsqueeze(2) + log_probs.unflatten(0, totals.shape)).flatten(1)  # (n, k * vocab_size)
        best, index = candidates.topk(beam_size, dim=1)  # (n, k), best first
        for i in (best[:, 0] == -torch.inf).nonzero().flatten().tolist():  # the rules leave no word to go on with
            keep(i, totals[i].argmax().item(), t)
        totals = best.masked_fill(torch.arange(beam_size, device=device) >= room.unsqueeze(1), -torch.inf)
        parents, words = index // vocab_size, index % vocab_size  # (n, k)

        rows = (torch.arange(len(photos), device=device).unsqueeze(1) * beam_size + parents).flatten()  # (n * k,)
        written = torch.cat([written.flatten(0, 1)[rows].unflatten(0, words.shape), words.unsqueeze(2)], dim=2)
        if keep_alphas and alpha is not None:
            alpha = alpha.unsqueeze(1)  # (n * k, 1, P)
            past = alpha if looked is None else torch.cat([looked.flatten(0, 1), alpha], dim=1)  # (n * k, t + 1, P)
            looked = past[rows].unflatten(0, words.shape)  # (n, k, t + 1, P)

        alive = totals > -torch.inf
        ended = (words == rules.end) & alive  # (n, k)
        for i, j in (alive if t == rules.max_length - 1 else ended).nonzero().tolist():
            keep(i, j, t + 1)

        best_ended = torch.maximum(best_ended, totals.masked_fill(~ended, -torch.inf).amax(dim=1))
        room = room - ended.sum(dim=1)
        totals = totals.masked_fill(ended, -torch.inf)
        stays = totals.amax(dim=1) > -torch.inf  # (n,)
        if normalisation == "none" and n_best == 1:
            stays &= totals.amax(dim=1) > best_ended  # a log-probability can only fall
        if not stays.any():
            break
        # What a step hands back as it was does not change over time, and is the same for all beginnings of a photo.
        state = state._make(new if new is old else new[rows] for new, old in zip(state, before, strict=True))
        if not stays.all():
            photos, room, best_ended, totals = photos[stays], room[stays], best_ended[stays], totals[stays]
            words, written = words[stays], written[stays]
            looked = None if looked is None else looked[stays]
            kept = stays.repeat_interleave(beam_size)
            state = select_rows(state, kept)

    if not all(found):
        raise UserError(
            "the model's scores are not finite numbers: its training has failed; take an earlier checkpoint"
        )
    # What ended goes before what was cut off; sorting is stable, so among equals the one found first is best.
    return [sorted(some, key=lambda h: (not h.ended, -h.score))[:n_best] for some in found]


def hypothesis(written, log_prob, score, looked, row, rules):
    """Build the `Hypothesis` of one row: its ids (t,), and its part of `looked` (rows, t, P)."""
    ids = written.tolist()
    ended = ids[-1:] == [rules.end]
    alphas = None if looked is None else looked[row, : len(ids)].cpu()
    return Hypothesis(ids[:-1] if ended else ids, log_prob, score, alphas, ended)
