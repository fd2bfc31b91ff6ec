"""The temperature that is found is the best one, and confidence is compared with accuracy as the paper says."""

import pytest
import torch
import torch.nn.functional as F

from captioning.evaluation.calibration import BINS, HOTTEST, fit_temperature, measure


def as_they_are(scores):
    return scores


@pytest.fixture
def calibrated():
    """Scores (M, V), and words drawn from the very distributions that they mean: no model could be more honest."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(60_000, 12, generator=generator)
    return scores, scores.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)


@pytest.mark.parametrize("factor", [3.0, 0.4, 1.0, 40.0])
def test_scores_that_were_multiplied_get_the_factor_as_their_temperature(calibrated, factor):
    scores, targets = calibrated
    assert fit_temperature(lambda rows: factor * rows, scores, targets) == pytest.approx(factor, rel=0.02)


def test_no_other_temperature_has_a_lower_loss(calibrated):
    scores, targets = calibrated
    scores, targets = 5 * scores[:3000], targets[:3000]  # not a whole number of blocks
    best = fit_temperature(as_they_are, scores, targets)
    losses = {t: F.cross_entropy(scores / t, targets).item() for t in (0.98 * best, best, 1.02 * best)}
    assert min(losses, key=losses.get) == best
    assert measure(as_they_are, scores, targets, best).loss == pytest.approx(losses[best], rel=1e-5)


def test_a_model_that_is_always_right_or_always_wrong_gets_a_temperature_too():
    scores = torch.eye(4)
    assert fit_temperature(as_they_are, scores, torch.arange(4)) < 0.1
    assert fit_temperature(as_they_are, scores, torch.arange(4).roll(1)) == pytest.approx(HOTTEST, rel=0.01)


def test_an_honest_model_has_next_to_no_calibration_error_and_an_overconfident_one_is_corrected(calibrated):
    scores, targets = calibrated
    assert measure(as_they_are, scores, targets).expected_calibration_error < 0.01
    overconfident = measure(as_they_are, 3 * scores, targets)
    assert overconfident.expected_calibration_error > 0.15
    assert measure(as_they_are, 3 * scores, targets, 3.0).expected_calibration_error < 0.01


def test_bins_are_those_of_a_plain_loop(calibrated):
    scores, targets = calibrated[0][:5000], calibrated[1][:5000]
    found = measure(as_they_are, scores, targets)
    sure, predicted = scores.softmax(dim=1).max(dim=1)
    error = 0.0
    for b in range(BINS):
        inside = (sure > b / BINS) & (sure <= (b + 1) / BINS)
        assert found.counts[b] == inside.sum()
        if inside.any():
            accuracy, confidence = (predicted == targets)[inside].double().mean(), sure[inside].double().mean()
            assert found.accuracies[b] == pytest.approx(accuracy.item(), abs=1e-6)
            assert found.confidences[b] == pytest.approx(confidence.item(), abs=1e-6)
            error += inside.double().mean() * (accuracy - confidence).abs()
    assert found.expected_calibration_error == pytest.approx(error.item(), abs=1e-6)
