"""The model's own captions are scored as the official scorer would, compared with one another, and learnt from."""

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import WORD_MAP
from pycocoevalcap.cider.cider import Cider
from torch import nn

import train
from captioning.training.losses import CaptionLoss
from captioning.training.run_log import RunLog
from captioning.training.self_critical import CiderD, SelfCritic, temperature_of
from datasets import Batch
from models import Decoded


def made_up_captions(count, shortest=2):
    return [random.choices("abcdefgh", k=random.randint(shortest, 9)) for _ in range(count)]


def test_the_scores_are_those_of_the_official_scorer():
    random.seed(0)
    references, captions = [made_up_captions(5) for _ in range(40)], made_up_captions(40)
    _, expected = Cider().compute_score(
        {i: [" ".join(words) for words in some] for i, some in enumerate(references)},
        {i: [" ".join(words)] for i, words in enumerate(captions)},
    )
    cider = CiderD(references)
    found = [cider([words], some)[0] for words, some in zip(captions, references, strict=True)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert cider(captions[:3], references[0]) == [cider([words], references[0])[0] for words in captions[:3]]


class Photos(nn.Module):
    """An encoder to which photos are features already."""

    def features(self, images):
        return images


@pytest.fixture
def made_up_run(tiny_decoder):
    """Three photos that say which of three words is right; a decoder; and what judges it."""
    words = ["cat", "dog", "ran"]
    dataset = SimpleNamespace(
        references=[{"captions": [["a", word], ["the", word, "sat"]]} for word in words], captions=torch.zeros(6, 8),
        word_map=WORD_MAP,
    )  # fmt: skip
    features = torch.eye(3, 6).view(3, 1, 1, 6).expand(3, 2, 2, 6)
    batch = Batch(features, torch.zeros(6, 8), torch.full((6,), 8), None, torch.arange(3), None)
    run = SimpleNamespace(
        encoder=Photos(), decoder=tiny_decoder(vocab_size=len(WORD_MAP)), word_map=WORD_MAP,
        device=torch.device("cpu"), autocast=contextlib.nullcontext(),
    )  # fmt: skip
    return run, batch, dataset


def test_drawn_captions_take_the_true_ones_place_and_are_compared_with_one_another(made_up_run):
    run, batch, dataset = made_up_run
    critic = SelfCritic(dataset, samples=4)
    torch.manual_seed(0)
    drawn, advantages, reward = critic.draw(run, batch)
    assert drawn.image_rows.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(drawn.captions) == len(drawn.lengths) == len(advantages) == 12
    assert not run.decoder.training  # what drew is what is taught
    words = {index: word for word, index in WORD_MAP.items()}
    scores = []
    for caption, length, photo in zip(drawn.captions.tolist(), drawn.lengths.tolist(), drawn.image_rows, strict=True):
        assert caption[0] == WORD_MAP["<start>"] and not any(caption[length:])
        assert length <= 8 and (caption[length - 1] == WORD_MAP["<end>"] or length == 7)
        references = [[*some, "<end>"] for some in dataset.references[photo]["captions"]]
        scores += critic.cider([[words[index] for index in caption[1:length]]], references)
    assert reward == pytest.approx(sum(scores) / 12)
    for i in range(12):
        others = [scores[j] for j in range(12) if j // 4 == i // 4 and j != i]
        assert advantages[i].item() == pytest.approx(scores[i] - sum(others) / 3, abs=1e-5)
    assert advantages.abs().max() > 0


def test_a_words_gradient_is_its_captions_advantage():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 7, generator=generator).requires_grad_()
    targets = torch.randint(0, 7, (6,), generator=generator)
    order = torch.tensor([2, 0, 1])  # captions of 3, 2 and 1 words
    decoded = Decoded(scores, targets, None, [3, 2, 1], order, None)
    advantages = torch.tensor([0.5, -1.0, 2.0])
    loss, _ = CaptionLoss(label_smoothing=0.1)(decoded, advantages=advantages)
    of_word = torch.tensor([2.0, 0.5, -1.0, 2.0, 0.5, 2.0])  # the rows' captions: 2 0 1, 2 0, 2
    log_probs = scores.log_softmax(dim=1)[range(6), targets]
    expected = torch.autograd.grad(-(of_word * log_probs).sum() / 6, scores)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], expected)


def test_unk_matches_no_word_not_even_a_references_unk(made_up_run):
    _, _, dataset = made_up_run
    dataset.references.append({"captions": [["<unk>"], ["mat", "<unk>"]]})
    critic = SelfCritic(dataset, samples=2)
    (alone, with_a, without), references = (["<unk>"], ["mat", "<unk>"], ["mat"]), critic.references[-1]
    assert critic.cider([alone], references) == [0.0]
    assert critic.cider([with_a], references)[0] < critic.cider([without], references)[0]


def test_what_is_pushed_is_as_likely_as_it_was_when_it_was_drawn(made_up_run, tiny_decoder):
    run, batch, dataset = made_up_run
    run.decoder = tiny_decoder(vocab_size=len(WORD_MAP), dropout=0.5, embedding_dropout=0.5)
    torch.manual_seed(0)
    drawn, _, _ = SelfCritic(dataset, samples=4).draw(run, batch)
    logits = [
        run.decoder(batch.images, drawn.captions, drawn.lengths, drawn.image_rows).logits for _ in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(*logits, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_words_that_are_never_drawn_gain_nothing_from_what_is_pushed_down(made_up_run, temperature):
    run, batch, dataset = made_up_run
    critic = SelfCritic(dataset, samples=4, temperature=temperature)
    drawn, _, _ = critic.draw(run, batch)
    decoded = run.decoder(batch.images, drawn.captions, drawn.lengths, drawn.image_rows)
    as_drawn = critic.as_drawn(decoded)
    expected = (decoded.logits / temperature).softmax(dim=1)
    expected[:, [WORD_MAP["<pad>"], WORD_MAP["<start>"]]] = 0
    expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(as_drawn.logits.softmax(dim=1), expected)

    loss, _ = CaptionLoss()(as_drawn, advantages=torch.full((12,), -1.0))  # every caption is pushed down
    (of_logits,) = torch.autograd.grad(loss, decoded.logits)
    assert (of_logits[:, [WORD_MAP["<pad>"], WORD_MAP["<start>"]]] == 0).all()
    assert of_logits.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 1.0), ({"label_smoothing": 0.1}, 0.6), ({"label_smoothing": 0.1, "self_critical_temperature": 1.0}, 1.0)],
)
def test_after_smoothed_labels_fewer_odd_words_are_drawn(options, expected):
    assert temperature_of(train.Config(**options)) == expected


def test_beside_a_reward_there_is_no_doubly_stochastic_term():
    logits, targets = torch.randn(3, 7), torch.tensor([1, 2, 3])
    decoded = Decoded(logits, targets, torch.rand(1, 3, 4), [1, 1, 1], torch.tensor([0]), None)
    losses = [CaptionLoss(weight)(decoded, advantages=torch.ones(1))[0] for weight in (0.0, 1.0)]
    assert losses[0] == losses[1]


def test_the_reward_rises(made_up_run):
    run, batch, dataset = made_up_run
    critic, loss_function = SelfCritic(dataset, samples=5), CaptionLoss(doubly_stochastic_weight=0.0)
    optimizer = torch.optim.Adam(run.decoder.parameters(), lr=0.03)
    torch.manual_seed(0)
    rewards = []
    for _ in range(120):
        drawn, advantages, reward = critic.draw(run, batch)
        decoded = run.decoder(batch.images, drawn.captions, drawn.lengths, drawn.image_rows)
        optimizer.zero_grad()
        loss_function(critic.as_drawn(decoded), advantages=advantages)[0].backward()
        optimizer.step()
        rewards.append(reward.item())
    assert sum(rewards[-10:]) / 10 > 2 + sum(rewards[:10]) / 10


def test_train_goes_over_to_the_models_own_captions(make_files, tmp_path, monkeypatch):
    make_files("TRAIN", photos=6, side=64)
    make_files("VAL", photos=2, side=64, seed=1)
    config = train.Config(
        str(tmp_path), "tiny", str(tmp_path / "run"), encoder="squeezenet1_1", encoder_weights="none",
        encoded_image_size=2, embed_dim=4, decoder_dim=4, attention_dim=4, batch_size=2, epochs=2, val_beam_size=1,
        image_major=True, self_critical_from_epoch=2, self_critical_samples=3, device="cpu",
    )  # fmt: skip
    told = []
    monkeypatch.setattr(RunLog, "numbers", lambda _, values, step: told.extend((name, step) for name in values))
    train.main(config)
    assert [step for name, step in told if name == "train/cross_entropy"] == [3]
    assert [step for name, step in told if name == "train/reward"] == [6]


def test_rewards_begin_with_fresh_moments_and_a_rate_of_their_own(make_files, tmp_path, monkeypatch, capsys):
    make_files("TRAIN", photos=6, side=64)
    make_files("VAL", photos=2, side=64, seed=1)
    options = {
        "data_folder": str(tmp_path), "data_name": "tiny", "run_folder": str(tmp_path / "run"), "batch_size": 2,
        "encoder": "squeezenet1_1", "encoder_weights": "none", "encoded_image_size": 2, "embed_dim": 4,
        "decoder_dim": 4, "attention_dim": 4, "val_beam_size": 1, "image_major": True, "device": "cpu",
        "schedule": "cosine", "decoder_lr": 1e-2, "self_critical_from_epoch": 2, "self_critical_lr": 1e-3,
    }  # fmt: skip
    rates, scores = [], iter([0.5, 0.4, 0.6, 0.3])
    monkeypatch.setattr(
        train, "validate", lambda *_: ({"val_loss": 1.0, "BLEU-4": next(scores), "val_cut": 0}, None)
    )  # fmt: skip
    step = torch.optim.Adam.step

    def watched(self, *arguments):
        result = step(self, *arguments)
        group = self.param_groups[0]
        rates.append((group["lr"], int(self.state[group["params"][0]]["step"])))
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    train.main(train.Config(epochs=3, **options))
    assert [steps for _, steps in rates] == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert rates[0][0] == 1e-2 and rates[2][0] == pytest.approx(0) and rates[3][0] == pytest.approx(1e-3)
    assert capsys.readouterr().out.count("before the rewards") == 1  # 0.4 is below 0.5, 0.6 is not
    train.main(train.Config(epochs=4, resume="auto", **options))
    assert [steps for _, steps in rates[9:]] == [7, 8, 9] and 0 < rates[9][0] < 1e-3
    assert capsys.readouterr().out.count("before the rewards") == 1
