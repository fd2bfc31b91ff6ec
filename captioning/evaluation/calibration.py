"""
Can a model's confidence be trusted? How often it is right when it says 70%, and the softmax temperature that corrects
it (Guo et al. 2017, "On Calibration of Modern Neural Networks").

What is judged is the next word under teacher forcing: its probability against how often it is the true one. The logits
of all words of a split would not fit in memory (COCO: 300,000 x 9,000), so the decoder's outputs are kept, which are
some twenty times smaller, and the logits are computed from them again, a few thousand rows at a time.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

BINS = 15  # as in the paper
ROWS = 2048  # words whose logits are in memory at a time
COLDEST, HOTTEST = 0.01, 100.0  # temperatures between which the best is looked for
TOLERANCE = 1e-4  # relative precision of the temperature that is found


class Reliability(NamedTuple):
    """How good predictions are, and how sure they were. Bins are equally wide, of the confidence from 0 to 1."""

    loss: float  # mean cross entropy, in nats
    accuracies: torch.Tensor  # (BINS,), share of right predictions, 0 in an empty bin
    confidences: torch.Tensor  # (BINS,), mean probability of the predicted word, 0 in an empty bin
    counts: torch.Tensor  # (BINS,), predictions

    @property
    def expected_calibration_error(self):
        """Mean gap between confidence and accuracy, bins weighted by their predictions (equation 3)."""
        gaps = (self.accuracies - self.confidences).abs()
        return (self.counts * gaps).sum().item() / self.counts.sum().item()


def collect_outputs(captioner, loader, resident=None):
    """
    Walk through a split under teacher forcing.

    :param captioner: `Captioner`
    :param loader, resident: as for `Captioner.caption_split`
    :return: of all M words of a split's captions, with <end>: the decoder's outputs (M, output_dim) and the words (M,)
    """
    outputs, targets = zip(*captioner.teacher_forced(loader, resident), strict=True)
    return torch.cat(outputs), torch.cat(targets)


@torch.no_grad()
def fit_temperature(logits_of, outputs, targets):
    """
    Give the temperature T that minimises the cross entropy of softmax(logits / T) (section 4.2).

    :param logits_of: function of outputs (R, output_dim) to logits (R, vocab_size), such as `decoder.scores`
    :param outputs, targets: (M, output_dim) and (M,), of `collect_outputs`
    :return: float, `COLDEST` to `HOTTEST`
    """

    def loss(log_temperature):
        return mean_loss(logits_of, outputs, targets, math.exp(log_temperature))

    # The cross entropy is convex in 1 / T, so it has one minimum; on a logarithmic scale the steps are relative ones.
    bounds = (math.log(COLDEST), math.log(HOTTEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": TOLERANCE})
    return math.exp(found.x)


def mean_loss(logits_of, outputs, targets, temperature):
    """:return: float, the mean cross entropy of softmax(logits / temperature), in nats"""
    total = 0.0
    for logits, words in logits_in_parts(logits_of, outputs, targets):
        total += F.cross_entropy(logits / temperature, words, reduction="sum").item()
    return total / len(targets)


@torch.no_grad()
def measure(logits_of, outputs, targets, temperature=1.0):
    """
    Give how good and how sure the predictions are at a temperature.

    :param logits_of, outputs, targets: as for `fit_temperature`
    :param temperature: by which the logits are divided
    :return: `Reliability`
    """
    loss = 0.0
    right, confidence, counts = torch.zeros(3, BINS, dtype=torch.float64)
    for logits, words in logits_in_parts(logits_of, outputs, targets):
        logits = logits / temperature  # (R, vocab_size)
        loss += F.cross_entropy(logits, words, reduction="sum").item()
        sure, predicted = logits.softmax(dim=1).max(dim=1)  # (R,), (R,)
        sure, hit = sure.double().cpu(), (predicted == words).double().cpu()  # (R,), (R,)
        bins = (sure * BINS).ceil().long().clamp(1, BINS) - 1  # (R,), upper ends belong to a bin, as in section 2
        right.index_add_(0, bins, hit)
        confidence.index_add_(0, bins, sure)
        counts.index_add_(0, bins, torch.ones_like(sure))
    filled = counts.clamp_min(1)
    return Reliability(loss / len(targets), right / filled, confidence / filled, counts)


def logits_in_parts(logits_of, outputs, targets):
    """Yield the logits (R, vocab_size) of some rows at a time, and their words (R,)."""
    for rows, words in zip(outputs.split(ROWS), targets.split(ROWS), strict=True):
        yield logits_of(rows).float(), words
