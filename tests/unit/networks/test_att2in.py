"""Att2in computes what its paper's equations say."""

import functools

import pytest
import torch
from decoder_checks import GRIDS, additive_scores, affine, assert_equations_hold, build, weighted_sum


def equations(p, a, words, squash=torch.relu):
    """Rennie et al., the attention model Att2in: each gate, and each of the candidate's two units, by itself."""
    d = p["from_state.weight"].shape[1]
    features = [affine(p, "encode_locations", a_i).relu() for a_i in a]
    keys = [affine(p, "attention.encoder_att", feature) for feature in features]
    h, c = torch.zeros(d), torch.zeros(d)
    scores, alphas = [], []
    for word in words:
        alpha = torch.cat(additive_scores(p, keys, h, squash)).softmax(dim=0)
        seen = affine(p, "from_context", weighted_sum(alpha, features))
        said = affine(p, "from_word", p["embedding.weight"][word]) + affine(p, "from_state", h)
        i, f, o = (said[k * d : (k + 1) * d].sigmoid() for k in range(3))
        units = torch.stack([said[3 * d : 4 * d] + seen[:d], said[4 * d :] + seen[d:]])
        c = i * units.max(dim=0).values + f * c
        h = o * c.tanh()
        scores.append(affine(p, "fc", h))
        alphas.append(alpha)
    return torch.stack(scores), torch.stack(alphas)


@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_scores_alphas_and_gradients_are_those_of_the_papers_equations(size):
    assert_equations_hold(equations, build("att2in"), size)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"attention_nonlinearity": "tanh"}, {"squash": torch.tanh}),
        ({"tie_weights": True, "decoder_dim": 7}, {}),
    ],
    ids=["the paper's tanh", "tied"],
)
def test_so_they_are_with_other_settings(settings, options):
    assert_equations_hold(functools.partial(equations, **options), build("att2in", **settings))
