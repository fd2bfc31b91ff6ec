"""A decoder whose scores are random but fixed, to search with, and what searches are compared with."""

from typing import NamedTuple

import torch

from captioning.inference.search import Rules

VOCAB, START, END = 5, 0, 4


class ToyState(NamedTuple):
    photos: torch.Tensor  # (N,)
    history: torch.Tensor  # (N,)


class ToyDecoder:
    """
    A decoder whose scores are random, but fixed for each photo and all words before.

    The history is a whole number that each word changes, so batched and single searches see the very same scores.
    """

    rows = 10007

    def __init__(self, seed=0, spread=2.0, end_bias=0.0, alphas=True, vocab_size=VOCAB):
        generator = torch.Generator().manual_seed(seed)
        self.table = spread * torch.randn(self.rows, vocab_size, generator=generator)
        self.table[:, END] += end_bias
        self.looks = torch.rand(self.rows, 6, generator=generator).softmax(dim=1) if alphas else None

    def init_state(self, photos):
        return ToyState(photos, 7 * photos)  # (N,), (N,)

    def step(self, words, state):
        photos, history = state
        history = (history * 31 + words * 17 + photos + 3) % self.rows
        return history, None if self.looks is None else self.looks[history], ToyState(photos, history)

    def scores(self, history):
        return self.table[history].clone()


def rules(**options):
    return Rules(**{"start": START, "end": END, "max_length": 4} | options)


@torch.no_grad()
def rescored(decoder, photo, ids, temperature=1.0):
    """Run ids through the decoder one by one. :return: their log-probabilities (T,), alphas (T, P) or None"""
    state, word = decoder.init_state(photo), torch.tensor([START])
    log_probs, alphas = [], []
    for index in ids:
        output, alpha, state = decoder.step(word, state)
        log_probs.append((decoder.scores(output)[0] / temperature).log_softmax(dim=0)[index].item())
        alphas.append(alpha)
        word = torch.tensor([index])
    return log_probs, None if alphas[0] is None else torch.cat(alphas)


def seeded(seed):
    return torch.Generator().manual_seed(seed)
