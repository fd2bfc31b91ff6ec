"""Show and Tell computes what its paper's equations say."""

import functools

import pytest
import torch
from decoder_checks import GRIDS, affine, assert_equations_hold, build, nothing, stack


def equations(p, a, words, layers):
    """Vinyals et al., equations 10 to 12: x_-1 is the photo, x_t a word, p_t+1 = LSTM(x_t)."""
    state = nothing(p["decode_step.0.weight_hh"].shape[1], layers)
    state = stack(p, "decode_step", affine(p, "embed_image", sum(a) / len(a)), state)
    scores = []
    for word in words:
        state = stack(p, "decode_step", p["embedding.weight"][word], state)
        scores.append(affine(p, "fc", state[-1][0]))
    return torch.stack(scores), None


@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_scores_and_gradients_are_those_of_the_papers_equations(size):
    assert_equations_hold(functools.partial(equations, layers=1), build("show_tell"), size)


@pytest.mark.parametrize("settings", [{"decoder_layers": 2}, {"tie_weights": True, "decoder_dim": 7}], ids=str)
def test_so_they_are_with_other_settings(settings):
    layers = settings.get("decoder_layers", 1)
    assert_equations_hold(functools.partial(equations, layers=layers), build("show_tell", **settings))
