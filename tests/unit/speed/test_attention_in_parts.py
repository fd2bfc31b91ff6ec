"""Attention's scores within `shared_products` are those of the plain formula, and so are all gradients."""

import pytest
import torch

from captioning.speed import attention_in_parts
from captioning.speed.attention_in_parts import AttentionInParts
from captioning.speed.shared_products import shared_products
from models import Attention

N, P, DIM = 5, 6, 7


@pytest.fixture
def tensors(monkeypatch):
    monkeypatch.setattr(attention_in_parts, "ENOUGH", 1)
    torch.manual_seed(0)
    keys, weight = torch.randn(N, P, DIM, requires_grad=True), torch.randn(3, DIM, DIM, requires_grad=True)
    return keys, weight, Attention(DIM, DIM, DIM)


def faster(attention):
    """:return: the same attention, its scores in parts"""
    twin = AttentionInParts(DIM, DIM, DIM)
    twin.full_att, twin.nonlinearity = attention.full_att, attention.nonlinearity
    return twin


def losses(keys, weight, attention, sizes=(N, N, 3, 1), context=None):
    """A recurrence: each timestep's query follows from the last one's scores, and captions end one after another."""
    keys = keys * 1.5  # not a leaf, as in a decoder
    query, total = torch.ones(N, DIM, dtype=keys.dtype), []
    attention = faster(attention) if context else attention
    with context or torch.enable_grad():
        for t, n in enumerate(sizes):
            keys, query = keys[:n], query[:n]
            alpha = attention.scores(keys, query).softmax(dim=1)  # (n, P)
            total.append(alpha.square().sum().float())
            query = torch.tanh((alpha.unsqueeze(1) @ keys.detach()).squeeze(1) @ weight[t % 3])  # (n, DIM)
    return torch.stack(total)


@pytest.mark.parametrize(
    "part", [1, 4 * P * DIM, 8 * P * DIM, 1_000_000], ids=["less than one", "one", "two", "all at once"]
)
def test_scores_and_gradients_are_those_of_the_formula(tensors, monkeypatch, part):
    monkeypatch.setattr(attention_in_parts, "PART", part)
    keys, weight, attention = tensors
    wanted = [keys, weight, *attention.full_att.parameters()]
    plain, shared = losses(*tensors), losses(*tensors, context=shared_products())
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(plain.sum(), wanted)
    for found, gradient in zip(torch.autograd.grad(shared.sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def test_gradients_of_one_graph_can_be_asked_for_twice(tensors):
    keys, _, attention = tensors
    shared = losses(*tensors, context=shared_products())
    for loss, plain in zip(shared, losses(*tensors), strict=True):
        expected = torch.autograd.grad(plain, [keys, attention.full_att.weight], retain_graph=True)
        found = torch.autograd.grad(loss, [keys, attention.full_att.weight], retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_keys_of_other_values_at_each_step_are_not_taken_for_one_another(tensors):
    keys, _, attention = tensors
    query = torch.ones(N, DIM)

    def loss(attention, context):
        with context:
            return sum(attention.scores(keys * i, query).square().sum() for i in range(1, 4))

    plain, shared = loss(attention, torch.enable_grad()), loss(faster(attention), shared_products())
    torch.testing.assert_close(shared, plain)
    torch.testing.assert_close(torch.autograd.grad(shared, keys), torch.autograd.grad(plain, keys))


def test_more_rows_than_before_are_keys_of_their_own(tensors):
    keys, _, attention = tensors
    query = torch.ones(N, DIM)
    with shared_products():
        few, all_of_them = (faster(attention).scores(keys[:n], query[:n]) for n in (2, N))
    plain = attention.scores(keys, query)
    torch.testing.assert_close(all_of_them, plain)
    found = torch.autograd.grad(few.sum() + all_of_them.square().sum(), keys)
    torch.testing.assert_close(found, torch.autograd.grad(plain[:2].sum() + plain.square().sum(), keys))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float64, 1e-6)], ids=str
)
def test_other_precisions_give_nearly_the_same_scores_and_gradients(tensors, dtype, tolerance):
    keys, weight, attention = (part.to(dtype) for part in (tensors[0].detach(), tensors[1].detach(), tensors[2]))
    keys.requires_grad_(), weight.requires_grad_()
    wanted = [keys, attention.full_att.weight]
    plain, shared = losses(keys, weight, attention), losses(keys, weight, attention, context=shared_products())
    torch.testing.assert_close(shared, plain, rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad(plain.sum(), wanted)
    for found, gradient in zip(torch.autograd.grad(shared.sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=2.5 * tolerance, atol=2.5 * tolerance)


@pytest.mark.parametrize("case", ["tanh", "frozen keys", "without gradients", "few numbers"])
def test_what_does_not_gain_is_left_to_the_formula(tensors, monkeypatch, case):
    monkeypatch.setattr(attention_in_parts, "SharedKeys", None)  # whoever used it would fail
    keys, weight, attention = tensors
    attention.nonlinearity = torch.tanh if case == "tanh" else torch.relu
    keys = keys.detach() if case == "frozen keys" else keys
    if case == "few numbers":
        monkeypatch.setattr(attention_in_parts, "ENOUGH", P * DIM + 1)
    with torch.set_grad_enabled(case != "without gradients"):
        shared = losses(keys, weight, attention, context=shared_products())
    torch.testing.assert_close(shared, losses(keys, weight, attention))


@pytest.mark.parametrize("nonlinearity", [torch.relu, torch.tanh])
def test_a_search_scores_its_rows_in_parts(tensors, monkeypatch, nonlinearity):
    keys, weight, attention = tensors
    attention.nonlinearity = nonlinearity
    query = weight[0, :N]
    plain = attention.scores(keys, query)
    monkeypatch.setattr(attention_in_parts, "PART", 8 * P * DIM)
    with torch.no_grad():
        torch.testing.assert_close(faster(attention).scores(keys, query), plain.detach())
