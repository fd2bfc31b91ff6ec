"""On a GPU everything comes out as on the CPU. Every file of this folder is skipped where there is no GPU."""

import copy

import pytest
import torch
from decoder_checks import END, RULES, START, build, grid, suiting

from captioning.inference.search import beam_search
from captioning.networks.registry import DECODERS
from captioning.training.losses import CaptionLoss
from models import Encoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")]


@pytest.fixture(autouse=True)
def full_precision():
    """Products in float32 as the CPU does them, without TensorFloat-32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def loss_and_gradients(decoder, device):
    """:return: the loss of three captions, and the gradients of the decoder's parameters, on the CPU"""
    decoder = copy.deepcopy(decoder).to(device)
    features = grid(3).to(device)
    captions = torch.tensor([[START, 1, 2, 3, END], [START, 4, 5, END, 0], [START, 6, END, 0, 0]], device=device)
    lengths = torch.tensor([5, 4, 3])
    loss, _ = CaptionLoss().to(device)(decoder(features, captions, lengths))
    loss.backward()
    return loss.detach().cpu(), [parameter.grad.cpu() for parameter in decoder.parameters()]


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradients_are_the_cpus(name):
    decoder = build(name, **suiting(name, {"hard_expected_share": 1.0}))  # nothing is drawn
    torch.testing.assert_close(
        loss_and_gradients(decoder, "cuda"), loss_and_gradients(decoder, "cpu"), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", DECODERS)
def test_beam_search_writes_the_cpus_captions(name):
    decoder, features = build(name, spread=1.0).eval(), grid(4)
    found = [
        [
            [hypothesis.words for hypothesis in photo]
            for photo in beam_search(decoder.to(device), features.to(device), RULES, 3)
        ]
        for device in ("cpu", "cuda")
    ]
    assert found[0] == found[1]


def test_an_encoder_gives_the_cpus_features():
    torch.manual_seed(0)
    encoder = Encoder("shufflenet_v2_x0_5", "none", 3, 6).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(images)
        found = encoder.to("cuda")(images.to("cuda")).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
