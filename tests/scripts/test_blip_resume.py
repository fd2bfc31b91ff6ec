"""blip.py takes a fine-tuning up again only from a sound file, and replaces nothing unasked."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from blip import Caption, Finetune, main
from captioning.blip.fine_tuning import build_fine_tuning
from captioning.blip.transformer import IGNORED, new_blip
from utils import UserError


def small_blip():
    torch.manual_seed(0)
    return new_blip(["a", "red", "cat"], image_size=32, patch_size=8, dim=16, layers=1, heads=2)


@pytest.fixture
def saved():
    """:return: a fine-tuning at its beginning, and what another one had saved after a step"""
    run = build_fine_tuning(Finetune(), small_blip(), total_steps=10)
    ids, mask = run.blip.spell([["a", "cat"]])
    seen = run.blip.see(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    scores, targets = run.blip.predict(seen, ids, mask)
    F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
    run.optimizer.step()
    run.schedule.step()
    run.step = 1
    return build_fine_tuning(Finetune(), small_blip(), total_steps=10), run.state_dict()


def first_moment(state):
    return state["optimizer"]["state"][0]


def spoil_stride(state):
    first_moment(state)["exp_avg"] = torch.zeros(1).expand(first_moment(state)["exp_avg"].shape)


def spoil_shape(state):
    first_moment(state)["exp_avg"] = torch.zeros(1)


def spoil_order(state):
    state["optimizer"]["param_groups"][0]["params"].reverse()


def spoil_step(state):
    state["progress"]["step"] = 2**63


def spoil_kind(state):
    state["schedule"] = []


def spoil_optimizer(state):
    state["optimizer"] = torch.ones(3)


def spoil_config(state):
    nested = []
    for _ in range(40):
        nested = [nested, nested]
    state["config"]["lr"] = nested


def test_a_fine_tuning_is_taken_up_with_the_moments_that_were_saved(saved):
    run, state = saved
    run.load_state_dict(state)
    assert run.step == 1
    assert torch.equal(run.optimizer.state_dict()["state"][0]["exp_avg"], first_moment(state)["exp_avg"])
    assert run.optimizer.param_groups[0]["lr"] == state["optimizer"]["param_groups"][0]["lr"]


def test_moments_without_strides_are_copied_into_memory_of_our_own(saved):
    run, state = saved
    spoil_stride(state)
    run.load_state_dict(state)
    parameter = run.trained[0]
    assert run.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()


@pytest.mark.parametrize("spoil", [spoil_shape, spoil_order, spoil_step, spoil_kind, spoil_optimizer, spoil_config])
def test_a_damaged_file_is_refused_in_one_line_before_anything_is_taken(saved, spoil):
    run, state = saved
    before = {name: tensor.clone() for name, tensor in run.blip.model.state_dict().items()}
    spoil(state)
    with pytest.raises(UserError) as error:
        run.load_state_dict(state)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert all(torch.equal(before[name], tensor) for name, tensor in run.blip.model.state_dict().items())


def test_a_second_fine_tuning_does_not_replace_the_first(tmp_path):
    (tmp_path / "training.pth").write_bytes(b"the first")
    with pytest.raises(UserError, match="--resume.*--output_folder.*--overwrite"):
        main(Finetune(output_folder=str(tmp_path), device="cpu"))
    with pytest.raises(UserError, match="resume, overwrite: both found"):
        main(Finetune(output_folder=str(tmp_path), device="cpu", resume=True, overwrite=True))
    assert (tmp_path / "training.pth").read_bytes() == b"the first"


def test_captions_do_not_replace_a_file_that_is_there(tmp_path):
    output = tmp_path / "captions.csv"
    output.write_text("mine")
    with pytest.raises(UserError, match=re.escape("captions.csv is there already")):
        main(Caption(("photo.jpg",), output=str(output), device="cpu"))
    assert output.read_text() == "mine"


def test_perplexity_counts_the_loss_of_all_words_of_a_long_caption():
    blip = small_blip()
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    caption = ["a", "red", "cat"] * 20  # 60 pieces: the model has room for 62
    loss = -blip.log_probs(blip.see(images), *blip.spell([caption], 62)).item()
    batch = SimpleNamespace(images=images, references=[[caption]])
    assert blip.perplexity([batch]) == pytest.approx(torch.tensor(loss / 61).exp().item(), rel=1e-4)


def test_more_pieces_than_the_model_has_positions_for_are_refused():
    with pytest.raises(UserError, match="max_pieces: 63 found, at most 62 expected"):
        small_blip().check_pieces(63)


@pytest.mark.parametrize("side", [20, 77])
def test_photos_are_resized_as_the_bytes_of_the_cpu_are(side):
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blip = small_blip()
    look = blip.processor.image_processor
    mean, std = torch.tensor([look.image_mean, look.image_std]).view(2, 3, 1, 1)
    levels = (blip.pixels(images) * std + mean) * 255
    expected = F.interpolate(images, size=(32, 32), mode="bicubic", antialias=True)
    assert (levels - expected).abs().max() < 1.01
