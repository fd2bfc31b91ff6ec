"""Attention's scores within `shared_products` are those of the plain formula, and so are all gradients."""

import pytest
import torch

from captioning.speed.attention_scores import score_cells
from captioning.speed.shared_products import Linear, shared_products

N, P, DIM = 5, 6, 7


@pytest.fixture
def tensors(large_attention):
    torch.manual_seed(0)
    keys, weight = torch.randn(N, P, DIM, requires_grad=True), torch.randn(3, DIM, DIM, requires_grad=True)
    return keys, weight, Linear(DIM, 1)


def losses(keys, weight, layer, nonlinearity=torch.relu_, sizes=(N, N, 3, 1), context=None):
    """A recurrence: each timestep's query follows from the last one's scores, and captions end one after another."""
    keys = keys * 1.5  # not a leaf, as in a decoder
    query, total = torch.ones(N, DIM, dtype=keys.dtype), []
    with context or torch.enable_grad():
        for t, n in enumerate(sizes):
            keys, query = keys[:n], query[:n]
            alpha = score_cells(keys, query, layer, nonlinearity).softmax(dim=1)  # (n, P)
            total.append(alpha.square().sum().float())
            query = torch.tanh((alpha.unsqueeze(1) @ keys.detach()).squeeze(1) @ weight[t % 3])  # (n, DIM)
    return torch.stack(total)


@pytest.mark.parametrize(
    "part", [1, 4 * P * DIM, 8 * P * DIM, 1_000_000], ids=["less than one", "one", "two", "all at once"]
)
def test_scores_and_gradients_are_those_of_the_formula(tensors, monkeypatch, part):
    monkeypatch.setattr("captioning.speed.attention_scores.PART", part)
    keys, weight, layer = tensors
    wanted = [keys, weight, *layer.parameters()]
    plain, shared = losses(*tensors), losses(*tensors, context=shared_products())
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(plain.sum(), wanted)
    for found, gradient in zip(torch.autograd.grad(shared.sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def test_gradients_of_one_graph_can_be_asked_for_twice(tensors):
    keys, _, layer = tensors
    shared = losses(*tensors, context=shared_products())
    for loss, plain in zip(shared, losses(*tensors), strict=True):
        expected = torch.autograd.grad(plain, [keys, layer.weight], retain_graph=True)
        found = torch.autograd.grad(loss, [keys, layer.weight], retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_keys_of_other_values_at_each_step_are_not_taken_for_one_another(tensors):
    keys, _, layer = tensors
    query = torch.ones(N, DIM)

    def loss(context):
        with context:
            return sum(score_cells(keys * i, query, layer, torch.relu_).square().sum() for i in range(1, 4))

    plain, shared = loss(torch.enable_grad()), loss(shared_products())
    torch.testing.assert_close(shared, plain)
    torch.testing.assert_close(torch.autograd.grad(shared, keys), torch.autograd.grad(plain, keys))


def test_more_rows_than_before_are_keys_of_their_own(tensors):
    keys, _, layer = tensors
    query = torch.ones(N, DIM)
    with shared_products():
        few, all_of_them = (score_cells(keys[:n], query[:n], layer, torch.relu_) for n in (2, N))
    plain = score_cells(keys, query, layer, torch.relu_)
    torch.testing.assert_close(all_of_them, plain)
    found = torch.autograd.grad(few.sum() + all_of_them.square().sum(), keys)
    torch.testing.assert_close(found, torch.autograd.grad(plain[:2].sum() + plain.square().sum(), keys))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float64, 1e-6)], ids=str
)
def test_other_precisions_give_nearly_the_same_scores_and_gradients(tensors, dtype, tolerance):
    keys, weight, layer = (part.to(dtype) for part in (tensors[0].detach(), tensors[1].detach(), tensors[2]))
    keys.requires_grad_(), weight.requires_grad_()
    wanted = [keys, layer.weight]
    plain, shared = losses(keys, weight, layer), losses(keys, weight, layer, context=shared_products())
    torch.testing.assert_close(shared, plain, rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad(plain.sum(), wanted)
    for found, gradient in zip(torch.autograd.grad(shared.sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=2.5 * tolerance, atol=2.5 * tolerance)


@pytest.mark.parametrize("case", ["tanh", "frozen keys", "without gradients", "few numbers"])
def test_what_does_not_gain_is_left_to_the_formula(tensors, monkeypatch, case):
    monkeypatch.setattr("captioning.speed.attention_scores.SharedKeys", None)  # whoever used it would fail
    keys, weight, layer = tensors
    nonlinearity = torch.tanh_ if case == "tanh" else torch.relu_
    keys = keys.detach() if case == "frozen keys" else keys
    if case == "few numbers":
        monkeypatch.setattr("captioning.speed.attention_scores.ENOUGH", P * DIM + 1)
    with torch.set_grad_enabled(case != "without gradients"):
        shared = losses(keys, weight, layer, nonlinearity, context=shared_products())
    torch.testing.assert_close(shared, losses(keys, weight, layer, nonlinearity))


@pytest.mark.parametrize("nonlinearity", [torch.relu_, torch.tanh_])
def test_a_search_scores_its_rows_in_parts(tensors, monkeypatch, nonlinearity):
    keys, weight, layer = tensors
    query = weight[0, :N]
    plain = score_cells(keys, query, layer, nonlinearity)
    monkeypatch.setattr("captioning.speed.attention_scores.PART", 8 * P * DIM)
    with torch.no_grad():
        torch.testing.assert_close(score_cells(keys, query, layer, nonlinearity), plain.detach())
