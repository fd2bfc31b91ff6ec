"""The encoder of models.py resizes its grid, and trains what it is told to, whatever its network is."""

import pytest
import torch
import torchvision
from random_networks import photos, scrambled

from captioning.networks.backbones import load_backbone
from models import Encoder, resize_grid


@pytest.fixture(scope="module")
def resnet_weights():
    torch.manual_seed(1)
    return scrambled(torchvision.models.resnet18()).state_dict()


def test_a_1x1_convolution_sets_encoder_dim():
    torch.manual_seed(0)
    encoder = Encoder("squeezenet1_1", encoded_image_size=4, encoder_dim=10).eval()
    assert encoder.encoder_dim == 10
    assert encoder(photos(2)).shape == (2, 4, 4, 10)
    location = encoder.grid(photos(2))[1, 2, 0].float()  # each goes through the same matrix by itself
    weight, bias = (p for name, p in encoder.named_parameters() if not name.startswith("backbone."))
    torch.testing.assert_close(encoder.features(photos(2))[1, 2, 0], weight.flatten(1) @ location + bias)
    assert all(p.requires_grad for p in (weight, bias))  # it is trained even where the network is frozen


@pytest.mark.parametrize(("old", "new"), [((8, 8), 14), ((14, 14), 8), ((5, 7), 3), ((3, 2), 4), ((6, 6), 6)])
def test_a_resized_location_is_the_mean_of_those_it_overlaps(old, new):
    features = torch.randn(2, *old, 3)
    resized = resize_grid(features, new)
    assert resized.shape == (2, new, new, 3)
    for y in range(new):
        for x in range(new):
            rows = [i for i in range(old[0]) if i * new < (y + 1) * old[0] and (i + 1) * new > y * old[0]]
            columns = [j for j in range(old[1]) if j * new < (x + 1) * old[1] and (j + 1) * new > x * old[1]]
            expected = torch.stack([features[:, i, j] for i in rows for j in columns]).mean(dim=0)
            torch.testing.assert_close(resized[:, y, x], expected)


def test_forward_is_the_features_resized():
    encoder = Encoder("squeezenet1_1", encoded_image_size=5).eval()
    with torch.no_grad():
        features = encoder.features(photos(2))  # 64 px make 3 x 3
        assert features.shape[1:3] != (5, 5)
        torch.testing.assert_close(encoder(photos(2)), resize_grid(features, 5), rtol=0, atol=0)


def test_bytes_and_floats_give_the_same_features():
    encoder = Encoder("squeezenet1_1").eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(photos(2)), encoder(photos(2).float() / 255), rtol=0, atol=0)


@pytest.mark.parametrize("encoder_dim", [None, 10])
def test_features_of_a_cached_grid_equal_those_of_the_photo(encoder_dim):
    encoder = Encoder("resnet18", encoder_dim=encoder_dim).eval()
    with torch.no_grad():
        grid = encoder.grid(photos(3))
        assert grid.dtype == torch.float16
        torch.testing.assert_close(encoder.features(grid), encoder.features(photos(3)), rtol=0, atol=0)
        torch.testing.assert_close(encoder(grid), encoder(photos(3)), rtol=0, atol=0)


def test_a_photos_features_do_not_depend_on_its_batch():
    encoder = Encoder("resnet18").train()
    with torch.no_grad():
        together = encoder.features(photos(4))
        for i in range(4):
            alone = encoder.features(photos(4)[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1], rtol=2e-3, atol=2e-3)


def test_a_frozen_encoder_has_no_gradient_and_keeps_its_statistics():
    encoder = Encoder("resnet18")
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    encoder.train()
    assert encoder.frozen
    assert not encoder.features(photos(4)).requires_grad
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert not any(m.training for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_fine_tuning_frees_blocks_2_to_4_of_pretrained_weights(resnet_weights):
    encoder = Encoder("resnet18")
    load_backbone(encoder, resnet_weights)
    encoder.fine_tune()
    encoder.train()
    free = {name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert free == {"layer2", "layer3", "layer4"}
    assert not encoder.frozen

    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    encoder.features(photos(4)).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == (name.split(".")[1] in free), name
    for key, tensor in encoder.state_dict().items():
        if "running" in key:  # frozen blocks keep their statistics, free ones learn them
            assert torch.equal(tensor, before[key]) == (key.split(".")[1] not in free), key


@pytest.mark.parametrize(("first", "free"), [(1, 5), (3, 2), (4, 1)])
def test_the_first_free_block_can_be_chosen(resnet_weights, first, free):
    encoder = Encoder("resnet18")
    load_backbone(encoder, resnet_weights)
    encoder.fine_tune(first_block=first)
    layers = {name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    expected = {1: {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}, 3: {"layer3", "layer4"}, 4: {"layer4"}}
    assert layers == expected[first]


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_fine_tuning_frees_everything_that_starts_from_nothing(name):
    encoder = Encoder(name)
    encoder.fine_tune()
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    encoder.train()
    assert all(m.training for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
    encoder.fine_tune(False)
    assert encoder.frozen
    assert not any(m.training for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_eval_mode_reaches_a_fine_tuned_encoder():
    encoder = Encoder("resnet18")
    encoder.fine_tune()
    encoder.train().eval()
    assert not any(module.training for module in encoder.modules())
