"""Layers within `shared_products` give what they give outside, also those that no decoder here has."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from captioning.speed.shared_products import SharingLinear, gains_from_onednn, linear, shared_products


class Recurrence(nn.Module):
    """A layer that is used at each of three timesteps, after a first one of its own kind."""

    def __init__(self, make_layer):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer = make_layer(), make_layer()

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x.square().sum()


def gradients(module, context):
    module.zero_grad()
    with context:
        loss = module(torch.linspace(-1, 1, 15).view(3, 5))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda: SharingLinear(5, 5),
        lambda: SharingLinear(5, 5, bias=False),
        lambda: weight_norm(SharingLinear(5, 5)),  # its weight is another tensor at each use
    ],
    ids=["with a bias", "without a bias", "with weight normalisation"],
)
def test_a_layer_has_the_gradients_that_it_has_outside(make_layer):
    module = Recurrence(make_layer)
    expected = gradients(module, torch.enable_grad())
    for found, wanted in zip(gradients(module, shared_products()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 65, 300])
@pytest.mark.parametrize("uses", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"]
)
def test_a_large_layer_has_the_same_gradients_whatever_the_number_of_rows(rows, uses, dtype, tolerance):
    torch.manual_seed(0)
    layer, x = SharingLinear(1000, 1000), torch.randn(uses, rows, 1000, requires_grad=True)  # large enough for oneDNN
    layer.to(dtype), nn.init.normal_(layer.bias)

    def run(context):
        with context:
            outputs = [layer(part.to(dtype)[: max(1, rows - i)]) for i, part in enumerate(x)]  # ever fewer rows
        output = torch.cat(outputs).float()
        return output.detach(), *torch.autograd.grad(output.square().sum(), [x, layer.weight, layer.bias])

    context = shared_products()
    for a, b in zip(run(context), run(torch.enable_grad()), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    [shared] = context.layers.values()  # it did go its own way
    assert (shared.ordered is not None) == (uses > 1 and gains_from_onednn(layer.weight, ordered=True))


def test_one_weight_with_two_biases_keeps_them_apart():
    weight, one, other = (torch.randn(size, requires_grad=True) for size in ((5, 5), 5, 5))
    x = torch.randn(3, 5)
    expected = torch.autograd.grad((F.linear(x, weight, one) * F.linear(x, weight, other)).sum(), [weight, one, other])
    with shared_products():
        product = linear(x, weight, one) * linear(x, weight, other)
    found = torch.autograd.grad(product.sum(), [weight, one, other])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
