"""
Can a model's confidence be trusted? How often it is right when it says 70 %, and the softmax temperature that mends it
(Guo et al. 2017, "On Calibration of Modern Neural Networks").

What is judged is the next word under teacher forcing: its probability against how often it is the true one. Scores of
all words of a split would not fit in memory (COCO: 300,000 x 9,000), so the decoder's outputs are kept, which are some
twenty times smaller, and the scores are made anew a few thousand rows at a time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

BINS = 15  # as in the paper
ROWS = 2048  # words whose scores are in memory at a time
COLDEST, HOTTEST = 0.01, 100.0  # temperatures between which the best is looked for


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


def collect(captioner, loader, resident=None):
    """
    :param captioner: `inference.Captioner`
    :param loader, resident: as for `Captioner.caption_split`
    :return: of all M words of a split's captions, with <end>: the decoder's outputs (M, output_dim) and the words (M,)
    """
    outputs, targets = zip(*captioner.teacher_forced(loader, resident), strict=True)
    return torch.cat(outputs), torch.cat(targets)


@torch.no_grad()
def fit_temperature(scores, outputs, targets, tolerance=1e-4):
    """
    Find the temperature T that minimises the cross entropy of softmax(scores / T) (section 4.2).

    The cross entropy is convex in b = 1 / T: its slope is the mean of E[s] - s_true, with E over the model's own
    distribution, and its curvature the mean of that distribution's Var[s]. So Newton's method needs a handful of
    passes; where a step would leave the bracket that the slopes have given so far, the bracket is halved instead.
    :param scores: function of outputs (R, output_dim) to scores (R, vocab_size), such as `decoder.scores`
    :param outputs, targets: (M, output_dim) and (M,), of `collect`
    :param tolerance: relative precision of the temperature
    :return: float, `COLDEST` to `HOTTEST`
    """
    low, high, b = 1 / HOTTEST, 1 / COLDEST, 1.0
    while high / low > 1 + tolerance:
        slope, curvature = 0.0, 0.0
        for s, true in batches(scores, outputs, targets):
            p = (b * s).softmax(dim=1)  # (R, vocab_size)
            mean = (p * s).sum(dim=1, keepdim=True)  # (R, 1)
            slope += (mean - s.gather(1, true.unsqueeze(1))).sum().item()
            curvature += (p * (s - mean) ** 2).sum().item()
        low, high = (low, b) if slope > 0 else (b, high)
        proposal = b - slope / curvature if curvature > 0 else 0.0
        if abs(proposal - b) < tolerance * b:
            return 1 / proposal
        b = proposal if low < proposal < high else (low * high) ** 0.5
    return 1 / b


@torch.no_grad()
def measure(scores, outputs, targets, temperature=1.0):
    """
    :param scores, outputs, targets: as for `fit_temperature`
    :param temperature: by which the scores are divided
    :return: `Reliability`
    """
    loss = 0.0
    right, confidence, counts = torch.zeros(3, BINS, dtype=torch.float64)
    for s, true in batches(scores, outputs, targets):
        s = s / temperature  # (R, vocab_size)
        loss += F.cross_entropy(s, true, reduction="sum").item()
        sure, predicted = s.softmax(dim=1).max(dim=1)  # (R,)
        sure, hit = sure.double().cpu(), (predicted == true).double().cpu()  # (R,)
        bins = (sure * BINS).ceil().long().clamp(1, BINS) - 1  # (R,), upper ends belong to a bin, as in section 2
        right.index_add_(0, bins, hit)
        confidence.index_add_(0, bins, sure)
        counts.index_add_(0, bins, torch.ones_like(sure))
    filled = counts.clamp_min(1)
    return Reliability(loss / len(targets), right / filled, confidence / filled, counts)


def batches(scores, outputs, targets):
    """Yield the scores (R, vocab_size) of some rows at a time, and their words (R,)."""
    for rows, true in zip(outputs.split(ROWS), targets.split(ROWS), strict=True):
        yield scores(rows).float(), true
