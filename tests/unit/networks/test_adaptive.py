"""Spatial and adaptive attention compute what their paper's equations say."""

import functools

import pytest
import torch
from decoder_checks import (
    GRIDS,
    additive_scores,
    affine,
    assert_equations_hold,
    build,
    captions,
    grid,
    nothing,
    plain,
    stack,
    weighted_sum,
)

SETTINGS = {
    "one layer": {},
    "two layers": {"decoder_layers": 2},
    "tied": {"tie_weights": True, "decoder_dim": 7},
    "tanh": {"attention_nonlinearity": "tanh"},
}


def equations(p, a, words, adaptive, layers=1, squash=torch.relu):
    """Lu et al., equations 6 to 16. Besides scores and alphas it gives beta (T, 1), the sentinel's share."""
    state = nothing(p["decode_step.0.weight_hh"].shape[1], layers)
    v = [affine(p, "encode_cells", a_i).relu() for a_i in a]
    v_g = affine(p, "encode_image", sum(a) / len(a)).relu()
    keys = [affine(p, "attention.encoder_att", v_i) for v_i in v]
    scores, alphas, betas = [], [], []
    for word in words:
        x = torch.cat([p["embedding.weight"][word], v_g])
        last_h = state[-1][0]
        state = stack(p, "decode_step", x, state)
        h, m = state[-1]
        z = additive_scores(p, keys, h, squash)
        alpha = torch.cat(z).softmax(dim=0)  # of the grid alone, equation 7
        c = weighted_sum(alpha, v)
        beta = torch.zeros(1)
        if adaptive:
            s = affine(p, "sentinel_gate", x, last_h).sigmoid() * m.tanh()
            of_sentinel = additive_scores(p, [affine(p, "sentinel_att", s)], h, squash)
            beta = torch.cat([*z, *of_sentinel]).softmax(dim=0)[-1:]
            c = beta * s + (1 - beta) * c
        scores.append(affine(p, "fc", c + h))
        alphas.append((1 - beta) * alpha)
        betas.append(beta)
    return torch.stack(scores), torch.stack(alphas), torch.stack(betas)


def equations_of(name, settings):
    squash = torch.tanh if settings.get("attention_nonlinearity") == "tanh" else torch.relu
    layers = settings.get("decoder_layers", 1)
    return functools.partial(equations, adaptive=name == "adaptive", layers=layers, squash=squash)


@pytest.mark.parametrize("name", ["spatial", "adaptive"])
@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_scores_alphas_and_gradients_are_those_of_the_papers_equations(name, size):
    assert_equations_hold(equations_of(name, {}), build(name), size)


@pytest.mark.parametrize("name", ["spatial", "adaptive"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_so_they_are_with_other_settings(name, settings):
    assert_equations_hold(equations_of(name, SETTINGS[settings]), build(name, **SETTINGS[settings]))


def test_each_words_share_of_the_sentinel_can_be_told_from_its_alphas():
    decoder, features, (rows, lengths) = build("adaptive", spread=1.0), grid(4), captions(4)
    decoded = decoder(features, rows, lengths)
    slow = plain(equations_of("adaptive", {}), decoder, features, rows, lengths)
    shares = 1 - decoded.alphas.sum(dim=2)  # (N, T)
    for row, caption in enumerate(decoded.order.tolist()):
        betas = slow[caption][2].squeeze(1)
        torch.testing.assert_close(shares[row, : len(betas)], betas, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decoded.alphas[row, : len(betas)].sum(dim=1) + betas, torch.ones(len(betas)))
        assert (shares[row, len(betas) :] == 1).all()
    told = shares[decoded.alphas.sum(dim=2) > 0]
    assert told.min() < 0.1 < 0.4 < told.max()  # they do differ from word to word


def test_spatial_attention_has_no_sentinel():
    decoded = build("spatial")(grid(4), *captions(4))
    looked = decoded.alphas.sum(dim=2) > 0
    assert (1 - decoded.alphas.sum(dim=2))[looked].abs().max() < 1e-5
