"""
From features to captions, word by word, over any decoder's `init_state`, `step` and `scores`.

A decoder says how likely each word is to come next. Which caption that makes is up to the search:
- greedy search takes the likeliest word each time;
- sampling draws a word by its probability;
- beam search keeps several beginnings, continues each of them, and returns the likeliest caption that it met;
- diverse beam search divides the beam into groups that avoid one another's words (beam_groups.py).

All photos of a batch are searched at once, and a photo that is done leaves the batch. Words are ids here; the caller
knows which id stands for which word. What the timesteps find stays on the device until the end, when back_pointers.py
reads it: a GPU works while Python runs ahead of it, so each timestep waits only once, to learn which photos continue.
"""

from dataclasses import dataclass

import torch

from captioning.inference.back_pointers import Step, read_captions
from captioning.inference.beam_groups import extend_groups, without_repeats
from models import select_rows
from utils import UserError

NORMALISATIONS = ("none", "length", "reward")


@dataclass(frozen=True)
class Rules:
    """What a caption must look like; the same for greedy search, sampling and beam search."""

    start: int  # id of <start>
    end: int  # id of <end>
    max_length: int = 50  # words; a caption that does not end after so many is cut off
    min_length: int = 0  # words; <end> cannot come before
    forbidden: tuple = ()  # ids that are never written, such as <unk>
    no_repeat_ngram: int = 0  # no sequence of this many words twice; 0 for no rule
    temperature: float = 1.0  # logits are divided by it: below 1 sharper, above 1 flatter

    def __post_init__(self):
        for field, least in (("max_length", 1), ("min_length", 0), ("no_repeat_ngram", 0), ("temperature", 1e-6)):
            if not getattr(self, field) >= least:  # NaN is refused too
                raise UserError(f"{field}: {getattr(self, field)} found, {least} or more expected")
        if self.min_length > self.max_length:
            raise UserError(f"min_length: {self.min_length} found, at most max_length ({self.max_length}) expected")

    def forbidden_row(self, logits):
        """:return: (vocab_size,), -inf for forbidden words, 0 for all others, as logits (R, vocab_size) have them"""
        row = logits.new_zeros(logits.shape[1], dtype=torch.float32)
        for word in self.forbidden:
            row[word].fill_(-torch.inf)  # `row[word] = ...` would copy a number from the CPU, and wait for it
        return row

    def log_probs(self, logits, forbidden_row, written):
        """
        Give the log-probabilities of the next word, -inf for words that the rules exclude.

        :param logits: (R, vocab_size), of the next word
        :param forbidden_row: (vocab_size,), from `forbidden_row`, which a search calls only once
        :param written: (R, t), the words so far
        :return: (R, vocab_size)
        """
        t, n = written.shape[1], self.no_repeat_ngram
        log_probs = (logits.float() / self.temperature).log_softmax(dim=1) + forbidden_row  # (R, vocab_size)
        if t < self.min_length:
            log_probs[:, self.end].fill_(-torch.inf)
        if 0 < n <= t:
            ngrams = written.unfold(1, n, 1)  # (R, t - n + 1, n)
            begun = (ngrams[:, :, :-1] == written[:, None, t - n + 1 :]).all(dim=2)  # (R, t - n + 1)
            times = torch.zeros_like(log_probs).scatter_add_(1, ngrams[:, :, -1], begun.float())  # (R, vocab_size)
            log_probs = log_probs.masked_fill(times > 0, -torch.inf)
        return log_probs


def greedy_search(decoder, features, rules, keep_alphas=False):
    """Take the likeliest word at each step. Arguments and result as for `sample_captions`."""
    return sample_captions(decoder, features, rules, top_k=1, keep_alphas=keep_alphas)


@torch.no_grad()
def sample_captions(decoder, features, rules, top_k=0, top_p=1.0, generator=None, keep_alphas=False):
    """
    Draw a caption for each photo, word by word.

    :param features: (N, height, width, encoder_dim), or what `decoder.init_state` takes
    :param rules: `Rules`
    :param top_k: draw among this many likeliest words; 0 for all, 1 for greedy search
    :param top_p: draw among the likeliest words that hold this probability together (nucleus, Holtzman et al. 2020)
    :param generator: a seeded torch.Generator on the features' device, to draw the same again
    :param keep_alphas: whether the hypotheses tell where the model looked
    :return: list of N `Hypothesis`
    :raises UserError: if the model's logits are not finite
    """
    state = decoder.init_state(features)
    num_photos, device = len(state[0]), state[0].device
    photos = torch.arange(num_photos, device=device)  # (n,), those whose caption continues
    words = torch.full((num_photos,), rules.start, device=device)  # (n,)
    written = words.new_zeros(num_photos, 0)  # (n, t)
    totals = torch.zeros(num_photos, device=device)  # (n,), log-probability of what is written
    steps = []

    for t in range(rules.max_length + 1):  # the last step only tells whether max_length words are followed by <end>
        output, alpha, state = decoder.step(words, state)
        logits = decoder.scores(output)  # (n, vocab_size)
        if t == 0:
            forbidden_row = rules.forbidden_row(logits)  # (vocab_size,)
        log_probs = rules.log_probs(logits, forbidden_row, written)  # (n, vocab_size)
        stuck = log_probs.amax(dim=1) == -torch.inf  # (n,), the rules leave no word
        words = choose(log_probs.masked_fill(stuck.unsqueeze(1), 0.0), top_k, top_p, generator)  # (n,)
        totals = totals + log_probs.gather(1, words.unsqueeze(1)).squeeze(1)  # (n,), -inf where stuck
        one_place = words.unsqueeze(1)  # (n, 1): to be read like a beam of one
        steps.append(
            Step(photos, torch.zeros_like(one_place), one_place, totals.unsqueeze(1), alpha if keep_alphas else None)
        )

        running = ((words != rules.end) & ~stuck).nonzero().squeeze(1)  # (n',); the wait for the device
        if len(running) == 0:
            break
        written = torch.cat([written, one_place], dim=1)
        if len(running) < len(photos):
            photos, words, written, totals = (part[running] for part in (photos, words, written, totals))
            state = select_rows(state, running)
    return [caption for [caption] in read_captions(steps, rules, num_photos)]


def choose(log_probs, top_k, top_p, generator):
    """:return: (n,), a word for each row of log_probs (n, vocab_size), drawn as `sample_captions` describes"""
    if top_k == 1:
        return log_probs.argmax(dim=1)
    if top_k:
        least = log_probs.topk(min(top_k, log_probs.shape[1]), dim=1).values[:, -1:]  # (n, 1)
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    if top_p < 1:
        ordered, words = log_probs.softmax(dim=1).sort(dim=1, descending=True)  # (n, vocab_size)
        beyond = ordered.cumsum(dim=1) - ordered >= top_p  # the word that crosses top_p is still in
        beyond[:, 0].fill_(False)  # a top_p that float32 rounds to 0 leaves the likeliest
        log_probs = log_probs.masked_fill(beyond.scatter(1, words, beyond), -torch.inf)
    return log_probs.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)


@torch.no_grad()
def beam_search(decoder, features, rules, beam_size=5, normalisation="none", reward=0.0, n_best=1, keep_alphas=False,
                groups=1, diversity=0.5):  # fmt: skip
    """
    Keep the `beam_size` likeliest beginnings of a caption at each step, for all photos at once.

    A beginning that ends leaves the beam, which then continues with one place fewer, as in the paper's code; a photo is
    done when its beam is empty, or when nothing in it can beat the best that ended.
    :param features: (N, height, width, encoder_dim), or what `decoder.init_state` takes
    :param rules: `Rules`
    :param normalisation: how finished captions are ranked, <end> counted as a word: 'none' by log-probability,
        'length' by its mean over the words, 'reward' by log-probability plus `reward` for each word
    :param n_best: number of hypotheses per photo, best first; at most beam_size
    :param keep_alphas: whether the hypotheses tell where the model looked
    :param groups: that the beam is divided into, for captions that differ; 1 is plain beam search
    :param diversity: cost, in nats, of a word that a group before has just chosen
    :return: list of N lists of `Hypothesis`; captions that were cut off come after those that ended. With several
        groups there may be fewer than n_best: what two groups find counts once.
    :raises UserError: if an argument makes no sense, or the model's logits are not finite
    """
    if normalisation not in NORMALISATIONS:
        raise UserError(f"normalisation: '{normalisation}' found, one of {', '.join(NORMALISATIONS)} expected")
    if beam_size < 1:
        raise UserError(f"beam_size: {beam_size} found, 1 or more expected")
    if groups < 1 or beam_size % groups:
        raise UserError(f"groups: {groups} found, a number that divides beam_size ({beam_size}) expected")
    state = decoder.init_state(features)
    state = state._make(part.repeat_interleave(beam_size, dim=0) for part in state)
    num_photos, device = len(state[0]) // beam_size, state[0].device
    photos = torch.arange(num_photos, device=device)  # (n,), those that are still searched
    words = torch.full((num_photos, beam_size), rules.start, device=device)  # (n, k)
    written = words.new_zeros(num_photos, beam_size, 0)  # (n, k, t)
    totals = torch.full((num_photos, beam_size), -torch.inf, device=device)  # (n, k), -inf for an empty place
    totals[:, :: beam_size // groups] = 0.0  # all places of a group begin alike, so one stands for all
    room = torch.full((num_photos, groups), beam_size // groups, device=device)  # (n, groups), places that are left
    best_ended = torch.full((num_photos,), -torch.inf, device=device)  # (n,)
    only_best = normalisation == "none" and n_best == 1
    steps = []

    for t in range(rules.max_length + 1):  # the last step only tells whether max_length words are followed by <end>
        output, alpha, new_state = decoder.step(words.flatten(), state)
        logits = decoder.scores(output)  # (n * k, vocab_size)
        if t == 0:
            forbidden_row = rules.forbidden_row(logits)  # (vocab_size,)
        log_probs = rules.log_probs(logits, forbidden_row, written.flatten(0, 1))  # (n * k, vocab_size)
        parents, words, totals = extend_groups(totals.unflatten(1, (groups, -1)), log_probs, room, diversity)  # (n, k)
        steps.append(Step(photos, parents, words, totals, alpha if keep_alphas else None))

        ended = (words == rules.end) & (totals > -torch.inf)  # (n, k)
        best_ended = torch.maximum(best_ended, totals.masked_fill(~ended, -torch.inf).amax(dim=1))  # (n,)
        room = room - ended.unflatten(1, (groups, -1)).sum(dim=2)  # (n, groups)
        totals = totals.masked_fill(ended, -torch.inf)  # (n, k)
        to_beat = best_ended if only_best else torch.full_like(best_ended, -torch.inf)  # a log-probability only falls
        running = (totals.amax(dim=1) > to_beat).nonzero().squeeze(1)  # (n',); the wait for the device
        if len(running) == 0:
            break
        rows = (running.unsqueeze(1) * beam_size + parents[running]).flatten()  # (n' * k,), of the beginnings kept
        all_running = len(running) == len(photos)
        if not all_running:
            photos, room, best_ended = photos[running], room[running], best_ended[running]
            words, totals = words[running], totals[running]
        written = torch.cat([written.flatten(0, 1)[rows].unflatten(0, words.shape), words.unsqueeze(2)], dim=2)
        # What a step returns unchanged, such as the features, is the same for all of a photo's beam: it stays.
        kept = [all_running and new is old for new, old in zip(new_state, state, strict=True)]
        state = state._make(new if stays else new[rows] for new, stays in zip(new_state, kept, strict=True))
    if groups == 1:
        return read_captions(steps, rules, num_photos, normalisation, reward, n_best)
    found = read_captions(steps, rules, num_photos, normalisation, reward, n_best=beam_size)
    return [without_repeats(captions)[:n_best] for captions in found]
