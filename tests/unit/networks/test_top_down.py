"""Top-Down attention computes what its paper's equations say."""

import functools

import pytest
import torch
from decoder_checks import (
    GRIDS,
    additive_scores,
    affine,
    assert_equations_hold,
    build,
    lstm,
    nothing,
    stack,
    weighted_sum,
)


def equations(p, a, words, layers=1, squash=torch.relu):
    """Anderson et al., equations 2 to 7."""
    d = p["attention_lstm.weight_hh"].shape[1]
    v = [affine(p, "encode_locations", a_i).relu() for a_i in a]
    keys = [affine(p, "attention.encoder_att", v_i) for v_i in v]
    [(h1, m1)], language = nothing(d, 1), nothing(d, layers)
    scores, alphas = [], []
    for word in words:
        h2 = language[-1][0]
        x1 = torch.cat([h2, sum(v) / len(v), p["embedding.weight"][word]])  # 2
        h1, m1 = lstm(p, "attention_lstm", x1, h1, m1)
        alpha = torch.cat(additive_scores(p, keys, h1, squash)).softmax(dim=0)  # 3, 4
        x2 = torch.cat([weighted_sum(alpha, v), h1])  # 5, 6
        language = stack(p, "language_lstm", x2, language)
        scores.append(affine(p, "fc", language[-1][0]))  # 7
        alphas.append(alpha)
    return torch.stack(scores), torch.stack(alphas)


@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_scores_alphas_and_gradients_are_those_of_the_papers_equations(size):
    assert_equations_hold(equations, build("top_down"), size)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"attention_nonlinearity": "tanh"}, {"squash": torch.tanh}),
        ({"decoder_layers": 2}, {"layers": 2}),
        ({"tie_weights": True, "decoder_dim": 7}, {}),
    ],
    ids=["the paper's tanh", "two layers", "tied"],
)
def test_so_they_are_with_other_settings(settings, options):
    assert_equations_hold(functools.partial(equations, **options), build("top_down", **settings))
