"""An accelerated decoder computes what the plain one does: losses, gradients and captions."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from decoder_checks import suiting
from plain_models import captions, grid
from torch import nn

from captioning.inference.search import Rules, beam_search
from captioning.networks.network_parts import WithoutRandomWeights
from captioning.networks.registry import DECODERS, build_decoder
from captioning.speed import accelerate as accelerating
from captioning.speed import shared_products
from captioning.speed.accelerate import FASTER, accelerate
from models import Attention

QUICK_CLASSES = [quick for classes in FASTER.values() for quick in classes.values()]
SIZES = {"embed_dim": 7, "decoder_dim": 7, "encoded_image_size": 3, "dropout": 0.0}
DEEPER = {"decoder_layers": 2, "attention_heads": 7}


@pytest.fixture(params=DECODERS)
def plain_and_quick(request):
    """A decoder of every kind, in plain PyTorch, and the same accelerated."""
    torch.manual_seed(0)
    deeper = suiting(request.param, DEEPER)
    plain = build_decoder({"decoder": request.param, "fast_cpu": False} | SIZES | deeper, 11, 6)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return plain, accelerate(copy.deepcopy(plain))


def loss_and_gradients(decoder, features, rows, lengths, **options):
    decoder.zero_grad()
    features.grad = None
    torch.manual_seed(0)
    decoded = decoder(features, rows, lengths, **options)
    loss = F.cross_entropy(decoded.logits, decoded.targets)
    if decoded.alphas is not None:
        loss = loss + ((1 - decoded.alphas.sum(dim=1)) ** 2).mean()
    if decoded.location_log_probs is not None:
        loss = loss + decoded.location_log_probs.mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "features": features.grad.clone()} | gradients


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        size = tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=max(tolerance * size, 2e-7), msg=name)


@pytest.mark.parametrize("size", [(3, 3), (4, 7)], ids=str)
@pytest.mark.parametrize("shared_photos", [False, True])
def test_losses_and_gradients_are_the_same(plain_and_quick, size, shared_photos):
    plain, quick = plain_and_quick
    rows, lengths = captions(6)
    image_rows = torch.tensor([0, 0, 1, 1, 2, 2]) if shared_photos else None
    batch = grid(3 if shared_photos else 6, size).requires_grad_(), rows, lengths
    expected = loss_and_gradients(plain, *batch, image_rows=image_rows)
    for _ in range(2):  # nothing is kept from one step to the next
        assert_same(loss_and_gradients(quick, *batch, image_rows=image_rows), expected)


@pytest.mark.parametrize("way", FASTER)
def test_each_way_alone_gives_the_same(way):
    torch.manual_seed(0)
    plain = build_decoder({"decoder": "soft", "fast_cpu": False} | SIZES, 11, 6)
    batch = grid(6).requires_grad_(), *captions(6)
    expected = loss_and_gradients(plain, *batch)
    assert_same(loss_and_gradients(accelerate(plain, ways=(way,)), *batch), expected)


@pytest.mark.parametrize("frozen", ["decode_step", "attention", ".bias", "embedding"])
def test_frozen_parts_change_no_other_gradient(plain_and_quick, frozen):
    plain, quick = plain_and_quick
    for decoder in plain_and_quick:
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(frozen not in name)
    batch = grid(6).requires_grad_(), *captions(6)
    assert_same(loss_and_gradients(quick, *batch), loss_and_gradients(plain, *batch))


def test_half_precision_is_as_exact_as_in_the_plain_decoder(plain_and_quick):
    plain, quick = plain_and_quick
    if hasattr(plain, "expected_share"):
        plain.expected_share = quick.expected_share = 1.0  # the draws of two precisions would differ
    batch = grid(6).requires_grad_(), *captions(6)
    expected = loss_and_gradients(plain, *batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, rounded = loss_and_gradients(quick, *batch), loss_and_gradients(plain, *batch)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        error, plain_error = (found[name] - tensor).norm(), (rounded[name] - tensor).norm()
        assert error <= 2 * plain_error + 0.05 * tensor.norm() + 2e-3, name


def test_captions_are_the_same(plain_and_quick):
    plain, quick = plain_and_quick
    rules = Rules(start=9, end=10, max_length=9)
    for one, other in zip(
        beam_search(plain.eval(), grid(4), rules, beam_size=3, n_best=3),
        beam_search(quick.eval(), grid(4), rules, beam_size=3, n_best=3),
        strict=True,
    ):
        assert [hypothesis.words for hypothesis in one] == [hypothesis.words for hypothesis in other]


def test_the_state_dict_keeps_its_names(plain_and_quick):
    plain, quick = plain_and_quick
    assert list(quick.state_dict()) == list(plain.state_dict())
    quick.load_state_dict(plain.state_dict())


def test_every_layer_shares_its_products(plain_and_quick):
    """All but what only scales."""
    _, quick = plain_and_quick
    for module in quick.modules():
        if list(module.parameters(recurse=False)) and not isinstance(module, nn.ModuleList | nn.LayerNorm):
            assert type(module) in QUICK_CLASSES, type(module)


def test_a_failed_pass_leaves_no_sharing_behind(plain_and_quick):
    _, quick = plain_and_quick
    rows, lengths = captions(4)
    with pytest.raises(IndexError):
        quick(grid(4), rows + 100, lengths)
    assert shared_products.sharing() is None


def test_what_ctrl_c_leaves_open_is_closed_by_the_next_pass(monkeypatch):
    """As in a notebook, whose process goes on: the pass's copies of the weights would stay for good."""
    decoder = accelerate(build_decoder({"decoder": "show_tell", "fast_cpu": False} | SIZES, 11, 6))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(decoder), "step", interrupt)
        decoder(grid(4), *captions(4))
    decoder(grid(4), *captions(4))
    assert shared_products.sharing() is None


def test_a_step_leaves_nothing_to_the_garbage_collector():
    """Weights and their gradients are large: one step's must go before the next one's come."""
    decoder = build_decoder({"decoder": "soft"}, 99, 32)
    gc.collect()
    gc.disable()
    before = shared_objects()  # what other tests of this process still hold
    try:
        decoded = decoder(torch.randn(2, 1, 1, 32), torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]]), torch.tensor([4, 3]))
        decoded.logits.sum().backward()
        assert len(shared_objects()) > len(before)
        del decoded
        assert len(shared_objects()) == len(before)
    finally:
        gc.enable()


def shared_objects():
    return [thing for thing in gc.get_objects() if type(thing) is shared_products._Shared]


def dot_product(attention, keys, query):
    return (keys @ query.unsqueeze(2)).squeeze(2)


def leaky(attention, keys, query):
    return attention.full_att(F.leaky_relu(keys + query.unsqueeze(1))).squeeze(2)


@pytest.mark.parametrize("scores", [dot_product, leaky])
def test_another_formula_in_models_is_trained_as_it_stands(monkeypatch, scores):
    """A reader changes `Attention.scores`: training must not go on with the old formula behind their back."""
    torch.manual_seed(0)
    plain = build_decoder({"decoder": "soft", "fast_cpu": False} | SIZES, 11, 6)
    quick = accelerate(copy.deepcopy(plain))
    batch = grid(6).requires_grad_(), *captions(6)
    of_the_paper = loss_and_gradients(quick, *batch)
    monkeypatch.setattr(Attention, "scores", scores)
    found = loss_and_gradients(quick, *batch)
    assert_same(found, loss_and_gradients(plain, *batch))
    assert not torch.allclose(found["features"], of_the_paper["features"], rtol=1e-3)


def test_a_decoder_of_shapes_only_is_left_alone_without_a_word(monkeypatch, capsys):
    """A checkpoint's decoder is built twice, first to compare shapes: what there is to say is said once."""
    monkeypatch.setattr(accelerating, "missing_operation", lambda: "_linear_pointwise")
    with torch.device("meta"), WithoutRandomWeights():
        decoder = build_decoder({"decoder": "soft"}, 11, 6)
    assert not any(type(module) in QUICK_CLASSES for module in decoder.modules())
    assert capsys.readouterr().out == ""


def test_fast_cpu_can_be_turned_off():
    decoder = build_decoder({"decoder": "soft", "fast_cpu": False}, 11, 6)
    assert not any(type(module) in QUICK_CLASSES for module in decoder.modules())


@pytest.mark.parametrize("name", ["_linear_pointwise", "_reorder_linear_weight", "_current_graph_task_id"])
def test_where_a_private_operation_is_missing_one_line_says_so_and_the_decoder_stays_plain(monkeypatch, capsys, name):
    class Without:
        def __init__(self, place):
            self.place = place

        def __getattr__(self, wanted):
            if wanted == name:
                raise AttributeError(wanted)
            return getattr(self.place, wanted)

    monkeypatch.setattr(torch.ops, "mkldnn", Without(torch.ops.mkldnn))
    monkeypatch.setattr(torch, "_C", Without(torch._C))
    assert accelerating.missing_operation() == name
    monkeypatch.undo()
    monkeypatch.setattr(accelerating, "missing_operation", lambda: name)
    decoder = accelerate(build_decoder({"decoder": "soft", "fast_cpu": False}, 11, 6))
    assert name in capsys.readouterr().out
    assert not any(type(module) in QUICK_CLASSES for module in decoder.modules())
