"""
Several models that write one caption together: at each step their probabilities of the next word are averaged.

An `Ensemble` is itself a decoder (`init_state`, `step`, `scores`), so every search of search.py works with it.
"""

import math
from itertools import islice

import torch
from torch import nn


class Encoders(nn.Module):
    """The encoders of several models, asked as one."""

    def __init__(self, encoders):
        """:param encoders: list of `Encoder`, one for each model"""
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.shared = all(same_backbone(encoder, encoders[0]) for encoder in encoders[1:])

    def features(self, images):
        """
        :param images: photos, or cached features of the backbone that all share
        :return: tuple of features (N, height, width, encoder_dim), one for each model
        """
        if self.frozen and images.dtype != torch.float16:
            images = self.grid(images)  # once for all models
        return tuple(encoder.features(images) for encoder in self.encoders)

    def grid(self, images):
        """The photos through the convolutions that all models share; see `Encoder.grid`."""
        return self.encoders[0].grid(images)

    @property
    def frozen(self):
        """Whether one cache of features serves all models: they share their convolutions, and none trains them."""
        return self.shared and all(encoder.frozen for encoder in self.encoders)

    @property
    def name(self):
        return self.encoders[0].name

    @property
    def native_dim(self):
        return self.encoders[0].native_dim

    @property
    def backbone(self):
        return self.encoders[0].backbone

    @property
    def mean(self):
        return self.encoders[0].mean


def same_backbone(one, other):
    """:return: whether two encoders have the same convolutions, weights included"""
    if one.name != other.name:
        return False
    theirs = other.backbone.state_dict()
    return all(torch.equal(tensor, theirs[key]) for key, tensor in one.backbone.state_dict().items())


class EnsembleState(tuple):
    """The tensors of several decoders' states; like theirs, it can be made again of other tensors."""

    @classmethod
    def _make(cls, parts):
        return cls(parts)


class Ensemble(nn.Module):
    """Decoders with the same words, whose probabilities are averaged at each step."""

    def __init__(self, decoders):
        """:param decoders: list of decoders, of any kinds and sizes, whose word ids mean the same"""
        super().__init__()
        self.decoders = nn.ModuleList(decoders)

    def init_state(self, features):
        """
        :param features: tuple of (N, height, width, encoder_dim), one for each decoder
        :return: `EnsembleState`
        """
        states = [decoder.init_state(own) for decoder, own in zip(self.decoders, features, strict=True)]
        return self.join(states)

    def step(self, words, state):
        """
        :param words: (N,), ids of the previous words
        :return: output (N, sum of the output_dims), alpha (N, P): the mean, or None if the decoders' grids differ or
            one has no attention; the new state
        """
        steps = [decoder.step(words, own) for decoder, own in zip(self.decoders, self.split(state), strict=True)]
        outputs, alphas, states = zip(*steps, strict=True)
        self.output_dims = [output.shape[1] for output in outputs]
        grids = {None if alpha is None else alpha.shape for alpha in alphas}
        alpha = torch.stack(alphas).mean(dim=0) if len(grids) == 1 and None not in grids else None  # (N, P)
        return torch.cat(outputs, dim=1), alpha, self.join(states)

    def scores(self, output):
        """
        Average the probabilities. A temperature is applied to what this gives, so after averaging: the ensemble is one
        distribution, and its temperature means the same as a single model's.

        :param output: (M, sum of the output_dims)
        :return: (M, vocab_size), logarithm of the mean probability
        """
        parts = output.split(self.output_dims, dim=1)
        log_probs = [d.scores(part).float().log_softmax(dim=1) for d, part in zip(self.decoders, parts, strict=True)]
        return torch.stack(log_probs).logsumexp(dim=0) - math.log(len(log_probs))  # (M, vocab_size)

    def join(self, states):
        """:return: one state, with the tensors of several after one another"""
        self.kinds = [(type(state), len(state)) for state in states]
        return EnsembleState(part for state in states for part in state)

    def split(self, state):
        """:return: list of the decoders' states, of one that `join` made"""
        parts = iter(state)
        return [kind._make(islice(parts, size)) for kind, size in self.kinds]
