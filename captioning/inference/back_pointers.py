"""
Reading the captions of a search: each timestep leaves its words behind, with pointers to the beginnings that they
continue. At the end everything is copied from the device at once, and each caption is followed back to its first word.
"""

from itertools import islice
from typing import NamedTuple

import torch

from utils import UserError


class Hypothesis(NamedTuple):
    """A caption that a search found."""

    words: list  # ids, without <start> and <end>
    log_prob: float  # natural logarithm of its probability, <end> included if it was reached
    score: float  # what it was ranked by: log_prob, or its normalised form
    alphas: torch.Tensor | None  # (T, P), where the model looked for each of T words (and <end>), if asked for
    ended: bool  # False if it was cut off before <end>: at the longest length, or where the rules left no word

    def alphas_of_words(self):
        """:return: array (words, P), `alphas` without <end>; None without attention, or for a caption of no words"""
        return None if self.alphas is None or not self.words else self.alphas[: len(self.words)].float().numpy()


class Step(NamedTuple):
    """What one timestep leaves behind, on the device: n photos that are still searched, k places in each beam."""

    photos: torch.Tensor  # (n,), which photos they are
    parents: torch.Tensor  # (n, k), the place in the beam before whose caption each place continues
    words: torch.Tensor  # (n, k), the word that it adds
    totals: torch.Tensor  # (n, k), log-probability of the caption so far; -inf for an empty place
    alphas: torch.Tensor | None  # (n * k, P), where the model looked from each place of the beam before


class Place(NamedTuple):
    """Where a caption's last word stands: in place `k` of the beam of a timestep's row."""

    step: int
    row: int
    k: int


EMPTY = Place(-1, 0, 0)  # the caption without words, from which all begin


def read_captions(steps, rules, num_photos, normalisation="none", reward=0.0, n_best=1):
    """
    Read and rank what a search found.

    :param steps: list of `Step`, one for each timestep
    :param rules: `search.Rules`
    :param normalisation, reward, n_best: as for `search.beam_search`
    :return: list of num_photos lists of `Hypothesis`, best first; captions that were cut off come after the others
    :raises UserError: if the model's logits were not finite
    """
    trail = Trail(steps, rules)
    found = [[] for _ in range(num_photos)]  # for each photo: (ended, score, place of the last word)
    for t, photos in enumerate(trail.photos):
        for row, photo in enumerate(photos):
            ended = [place for place in trail.beam(t, row) if trail.has_ended(place)]
            cut = trail.cut_off(t, row, ended)
            for place in ended + cut:
                length, total = place.step + 1, trail.total(place)
                score = {"none": total, "length": total / max(length, 1), "reward": total + reward * length}
                found[photo].append((place in ended, score[normalisation], place))
    if not all(found):
        raise UserError("the model's logits are not finite: its training has failed; take an earlier checkpoint")
    # Sorting is stable: among equals, the one that was found first is best.
    best = [sorted(captions, key=lambda one: (not one[0], -one[1]))[:n_best] for captions in found]
    alphas = trail.read_alphas([place for captions in best for _, _, place in captions])
    return [
        [
            Hypothesis(trail.words_before(place) if ended else trail.words_to(place), trail.total(place), score,
                       next(alphas), ended)
            for ended, score, place in captions
        ]
        for captions in best
    ]  # fmt: skip


class Trail:
    """All that the timesteps of a search left behind, as lists: `words[t][row][k]`."""

    def __init__(self, steps, rules):
        self.steps, self.rules = steps, rules
        self.photos = copy_to_lists([step.photos for step in steps])
        self.parents = copy_to_lists([step.parents for step in steps])
        self.words = copy_to_lists([step.words for step in steps])
        self.totals = copy_to_lists([step.totals for step in steps])
        self.row_of = [{photo: row for row, photo in enumerate(photos)} for photos in self.photos]

    def beam(self, t, row):
        """:return: list of the places of a beam that hold a caption"""
        places = [Place(t, row, k) for k in range(len(self.totals[t][row]))]
        return [place for place in places if self.total(place) > -torch.inf]

    def has_ended(self, place):
        return self.words[place.step][place.row][place.k] == self.rules.end

    def total(self, place):
        """:return: float, log-probability of the caption whose last word stands there"""
        return 0.0 if place == EMPTY else self.totals[place.step][place.row][place.k]

    def parent(self, place):
        """:return: the place of the word before"""
        if place.step == 0:
            return EMPTY
        photo = self.photos[place.step][place.row]
        return Place(place.step - 1, self.row_of[place.step - 1][photo], self.parents[place.step][place.row][place.k])

    def cut_off(self, t, row, ended):
        """:return: list of the places of captions that end a step before without <end>, since none may continue"""
        stuck = all(total == -torch.inf for total in self.totals[t][row])  # the rules leave no word
        last = t == self.rules.max_length
        if not stuck and not last:
            return []
        before = [EMPTY]
        if t > 0:
            beam = self.beam(t - 1, self.row_of[t - 1][self.photos[t][row]])
            before = [place for place in beam if not self.has_ended(place)]
        if last:
            completed = {self.parent(place) for place in ended}
            return [place for place in before if place not in completed]
        return [max(before, key=self.total)]

    def path(self, place):
        """:return: list of the places of a caption's words, from the first to this one"""
        places = []
        while place != EMPTY:
            places.append(place)
            place = self.parent(place)
        return places[::-1]

    def words_to(self, place):
        return [self.words[t][row][k] for t, row, k in self.path(place)]

    def words_before(self, place):
        return self.words_to(self.parent(place))

    def read_alphas(self, places):
        """Yield for each caption's last place where the model looked for its words, (T, P) on the CPU, or None."""
        if self.steps[0].alphas is None:
            yield from [None] * len(places)
            return
        first_row = [0]  # of each timestep's alphas, once all of them are joined
        for step in self.steps:
            first_row.append(first_row[-1] + len(step.alphas))
        rows, sizes = [], []
        for place in places:
            path = self.path(place)
            rows += [first_row[t] + row * len(self.parents[t][row]) + self.parents[t][row][k] for t, row, k in path]
            sizes.append(len(path))
        joined = torch.cat([step.alphas for step in self.steps])  # (rows of all timesteps, P)
        chosen = joined[torch.tensor(rows, dtype=torch.long, device=joined.device)].cpu()  # (words of all captions, P)
        yield from chosen.split(sizes)


def copy_to_lists(tensors):
    """Copy tensors from the device, all at once. :return: a nested list for each"""
    rows = iter(torch.cat(tensors).tolist())
    return [list(islice(rows, len(tensor))) for tensor in tensors]
