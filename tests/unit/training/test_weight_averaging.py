"""The mean of a run's weights over time: what it is, what it leaves alone, where it is used, and how it is taken up."""

import pytest
import torch
from kill_training import equal

import train
from captioning.inference.trained_model import load_captioner
from captioning.storage.tensors import load_checkpoint
from captioning.training.weight_averaging import WeightAverage, trained_tensors
from models import DecoderWithAttention, Encoder

AVERAGES = [("--ema_decay", "0.9"), ("--average_last", "2")]


@pytest.fixture
def model():
    """An encoder that is fine-tuned from its third block on, and a decoder."""
    torch.manual_seed(0)
    encoder, decoder = Encoder("resnet18", encoder_dim=8), DecoderWithAttention(10, 8, 4, 4, 4)
    encoder.pretrained = True
    encoder.fine_tune(True, first_block=3)
    return encoder, decoder


def steps(encoder, decoder, number):
    """Yield after each step of training on random photos, which also changes batch normalisation's statistics."""
    parameters = [one for module in (encoder, decoder) for one in module.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    encoder.train()
    for seed in range(number):
        photos = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        captions = torch.tensor([[8, 1, 2, 9], [8, 3, 9, 0]])
        optimizer.zero_grad()
        decoder(encoder.features(photos), captions, torch.tensor([4, 3])).logits.square().mean().backward()
        optimizer.step()
        yield seed


def snapshot(encoder, decoder):
    """:return: all weights and statistics as float64"""
    states = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    return {f"{part}.{name}": tensor.double() for part, state in states.items() for name, tensor in state.items()}


def test_the_moving_average_is_that_of_the_formula_written_out(model):
    average = WeightAverage(*model, ema_decay=0.5)
    expected = snapshot(*model)
    for step in steps(*model, 8):
        average.after_step()
        decay = min(0.5, (1 + step) / (10 + step))  # 0.1, 0.18, 0.25, ...
        for name, tensor in snapshot(*model).items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    with average.in_place():
        found = snapshot(*model)
    assert "encoder.backbone.layer3.0.bn1.running_mean" in average.moving  # statistics are averaged too
    for name in found:
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_the_mean_over_the_last_epochs_is_that_of_their_last_weights(model):
    average = WeightAverage(*model, average_last=3)
    ends = []
    for epoch in steps(*model, 5):
        ends.append(snapshot(*model))
        average.end_epoch(epoch)
        average.end_epoch(epoch)  # as a run does that is resumed before its validation
        with average.in_place():
            found = snapshot(*model)
        for name in found:
            if not name.endswith("num_batches_tracked"):
                expected = torch.stack([end[name] for end in ends[-3:]]).mean(dim=0)
                torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def test_what_is_frozen_is_neither_kept_nor_touched(model):
    encoder, decoder = model
    decoder.fine_tune_embeddings(False)
    names = WeightAverage(encoder, decoder, ema_decay=0.5).moving
    assert not any(name.startswith(("encoder.backbone.layer1", "encoder.backbone.layer2")) for name in names)
    assert "decoder.embedding.weight" not in names and "decoder.fc.weight" in names
    encoder.fine_tune(False)
    assert list(trained_tensors(encoder)) == ["project.weight", "project.bias"]
    assert WeightAverage(encoder, decoder).moving == {}  # by default nothing is copied at all


def test_after_the_block_the_model_has_its_own_weights_again_to_the_bit_whatever_happened(model):
    average = WeightAverage(*model, ema_decay=0.5)
    for _ in steps(*model, 2):
        average.after_step()
    before = snapshot(*model)
    with pytest.raises(ZeroDivisionError), average.in_place() as own:
        assert not equal(snapshot(*model), before)
        assert all(torch.equal(own[name].double(), before[name]) for name in own)
        raise ZeroDivisionError
    assert equal(snapshot(*model), before)


@pytest.mark.parametrize("options", AVERAGES)
def test_validation_and_best_use_the_mean_and_training_goes_on_without_it(training, monkeypatch, options):
    seen, validate = [], train.validate

    def watch(run, *rest):
        seen.append({name: tensor.clone() for name, tensor in run.decoder.state_dict().items()})
        return validate(run, *rest)

    plain = load_checkpoint(training("plain", "--epochs", 3) / "last.pth")
    monkeypatch.setattr(train, "validate", watch)
    folder = training("averaged", "--epochs", 3, *options)
    best, last = load_checkpoint(folder / "best.pth"), load_checkpoint(folder / "last.pth")
    assert equal(last["decoder"], plain["decoder"])  # validation disturbs nothing
    assert equal(best["decoder"], seen[best["progress"]["epoch"] - 1])
    assert not equal(seen[-1], last["decoder"])
    captioner, _, _ = load_captioner(folder)
    assert equal(captioner.decoder.state_dict(), best["decoder"])


def test_the_mean_of_the_last_two_epochs_lies_between_them(training):
    one, two = (load_checkpoint(training("run", "--epochs", n) / "last.pth") for n in (1, 2))
    folder = training("averaged", "--epochs", 2, "--average_last", 2, "--seed", 0)
    ends = load_checkpoint(folder / "last.pth")["average"]["epoch_ends"]
    assert sorted(ends) == [0, 1]
    for name, tensor in one["decoder"].items():
        assert torch.equal(ends[0][f"decoder.{name}"], tensor)
        assert torch.equal(ends[1][f"decoder.{name}"], two["decoder"][name])


TUNED = ("--encoder", "shufflenet_v2_x0_5", "--fine_tune_encoder", "--fine_tune_from_step", "7")  # within epoch 2


@pytest.mark.parametrize("more", [(), TUNED, ("--tie_weights",)])
@pytest.mark.parametrize("options", AVERAGES)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(training, options, more):
    whole = load_checkpoint(training("whole", "--epochs", 3, *options, *more) / "last.pth")
    folder = training("parts", "--epochs", 2, *options, *more)
    starts = [(folder / f"{name}.pth").rename(folder / f"{name}_of_two.pth") for name in ("last", "best")]
    for start in starts:  # best.pth has the mean, and the weights to go on with
        training("parts", "--resume", start, "--epochs", 3, *options, *more)
        parts = load_checkpoint(folder / "last.pth")
        for name in ("encoder", "decoder", "average", "optimizer"):
            assert equal(parts[name], whole[name]), name


def test_a_run_that_had_no_average_gets_one_from_where_it_is_resumed(training):
    folder = training("run", "--epochs", 1)
    training("run", "--resume", "auto", "--epochs", 2, "--ema_decay", "0.9")
    assert load_checkpoint(folder / "last.pth")["average"]["steps"] == 6
    training("run", "--resume", "auto", "--epochs", 3, "--ema_decay", "0")
    assert load_checkpoint(folder / "last.pth")["average"] == {"steps": 0, "moving": {}, "epoch_ends": {}}
