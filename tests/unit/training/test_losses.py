"""What training minimises is what the papers write, and the estimator for hard attention is right on average."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from captioning.training.losses import CaptionLoss, top_k_accuracy
from models import Decoded, DecoderWithAttention, DecoderWithHardAttention

START, END = 9, 10
BATCH_SIZES = [3, 2, 1]  # captions of 3, 2 and 1 words to predict


def decoded_by_hand(vocab_size=7, cells=4, drawn=False, attention=True, seed=0):
    """A `Decoded` of three captions with random numbers, 6 words in all."""
    generator = torch.Generator().manual_seed(seed)
    alphas = torch.rand(3, 3, cells, generator=generator).softmax(dim=2)
    for row, length in enumerate([3, 2, 1]):
        alphas[row, length:] = 0
    return Decoded(
        logits=torch.randn(6, vocab_size, generator=generator).requires_grad_(),
        targets=torch.randint(0, vocab_size, (6,), generator=generator),
        alphas=alphas.requires_grad_() if attention else None,
        batch_sizes=BATCH_SIZES,
        order=torch.arange(3),
        location_log_probs=-torch.rand(6, generator=generator).requires_grad_() if drawn else None,
    )


def per_caption(packed):
    """Sums of 6 packed numbers over the captions: the rows of the timesteps are 0 1 2, 0 1, 0."""
    return torch.stack([packed[0] + packed[3] + packed[5], packed[1] + packed[4], packed[2]])


def test_cross_entropy_is_the_mean_over_all_words():
    decoded = decoded_by_hand(attention=False)
    loss, cross_entropy = CaptionLoss()(decoded)
    by_hand = -decoded.logits.softmax(dim=1)[range(6), decoded.targets].log().mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(cross_entropy, by_hand.detach())
    assert not cross_entropy.requires_grad


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_is_torchs_own(smoothing):
    decoded = decoded_by_hand(attention=False)
    loss, cross_entropy = CaptionLoss(label_smoothing=smoothing)(decoded)
    expected = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(decoded.logits, decoded.targets)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, decoded.logits)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, decoded.logits)[0])
    # What is reported stays the cross entropy itself, so that runs can be compared.
    torch.testing.assert_close(cross_entropy, F.cross_entropy(decoded.logits, decoded.targets).detach())


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
def test_the_doubly_stochastic_term_by_hand(weight):
    decoded = decoded_by_hand()
    loss, cross_entropy = CaptionLoss(doubly_stochastic_weight=weight)(decoded)
    by_hand = 0.0
    for caption in decoded.alphas.tolist():
        for cell in range(4):
            by_hand += (1 - sum(timestep[cell] for timestep in caption)) ** 2 / (3 * 4)
    assert (loss - cross_entropy).item() == pytest.approx(weight * by_hand, rel=1e-5, abs=1e-6)


def test_the_reinforce_and_entropy_terms_by_hand():
    decoded = decoded_by_hand(drawn=True)
    loss_function = CaptionLoss(0.0, reinforce_weight=0.7, entropy_weight=0.05).eval()
    loss_function.load_state_dict({"baseline": torch.tensor(-3.0)})
    loss, cross_entropy = loss_function(decoded)
    word_log_probs = decoded.logits.log_softmax(dim=1)[range(6), decoded.targets]
    rewards, locations = per_caption(word_log_probs), per_caption(decoded.location_log_probs)
    entropy = -sum(a * torch.tensor(a).log().item() for a in decoded.alphas.flatten().tolist() if a > 0)
    by_hand = -(0.7 * ((rewards + 3.0) * locations).sum() + 0.05 * entropy) / 6
    torch.testing.assert_close(loss - cross_entropy, by_hand, rtol=1e-4, atol=1e-5)

    # The reward is a number to the estimator: scores feel the cross entropy alone.
    found = torch.autograd.grad(loss, decoded.logits, retain_graph=True)[0]
    expected = torch.autograd.grad(F.cross_entropy(decoded.logits, decoded.targets), decoded.logits)[0]
    torch.testing.assert_close(found, expected)
    found = torch.autograd.grad(loss, decoded.location_log_probs)[0]
    weights = (-0.7 * (rewards + 3.0) / 6).detach()
    torch.testing.assert_close(found, weights[[0, 1, 2, 0, 1, 0]])


def test_the_baseline_is_a_moving_average_of_the_rewards():
    loss_function = CaptionLoss().train()
    expected = 0.0
    for seed in range(3):
        decoded = decoded_by_hand(drawn=True, seed=seed)
        rewards = per_caption(decoded.logits.log_softmax(dim=1)[range(6), decoded.targets])
        expected = 0.9 * expected + 0.1 * rewards.mean().item()
        loss_function(decoded)
        assert loss_function.state_dict()["baseline"].item() == pytest.approx(expected, rel=1e-5)
    loss_function.eval()
    loss_function(decoded_by_hand(drawn=True, seed=9))
    assert loss_function.state_dict()["baseline"].item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_not_judged_by_a_baseline_that_it_is_part_of():
    decoded = decoded_by_hand(drawn=True)
    training, evaluation = CaptionLoss().train(), CaptionLoss().eval()
    torch.testing.assert_close(training(decoded)[0], evaluation(decoded)[0])


def test_the_gradient_stays_finite_where_attention_is_certain(tiny_decoder):
    torch.manual_seed(0)
    decoder = tiny_decoder(DecoderWithHardAttention)
    with torch.no_grad():
        decoder.attention.full_att.weight.mul_(1000)
    decoded = decoder(torch.randn(4, 3, 3, 6), torch.tensor([[START, 1, 2, END]]).repeat(4, 1), torch.tensor([4] * 4))
    assert (decoded.alphas == 0).any()  # in float32 the others' share is nothing
    CaptionLoss()(decoded)[0].backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.isfinite().all(), name


# A problem whose gradient is known: one caption of two words, four cells, so 4 x 4 sequences of locations (5 x 5 if
# a step may take the expected value instead). The objective is the expected log-likelihood of the caption.

CAPTION, LENGTHS = torch.tensor([[START, 3, END]]), torch.tensor([3])
SIZES = {"encoder_dim": 3, "embed_dim": 3, "decoder_dim": 4, "attention_dim": 3, "encoded_image_size": 2, "dropout": 0}


class ToldDecoder(DecoderWithAttention):
    """Looks where it is told: `cells` has a location for each timestep, or None for the expected value."""

    def look(self, alpha, state):
        cell = self.cells.pop(0)
        self.log_probs.append(torch.zeros(()) if cell is None else alpha[0, cell].log())
        return (alpha if cell is None else F.one_hot(torch.tensor([cell]), 4).float()), state


def attention_gradient(decoder):
    """:return: one vector of the gradients of all parameters that say where to look"""
    return torch.cat([p.grad.flatten() for name, p in decoder.named_parameters() if name.startswith("attention.")])


def exact_gradient(decoder, features, expected_share):
    """
    Of minus the expected log-likelihood a word, summed over every sequence of locations with its probability.

    :return: the gradient, and the expected log-likelihood of the caption
    """
    told = ToldDecoder(11, **SIZES)
    told.load_state_dict(decoder.state_dict())
    objective, total = torch.zeros(()), 0.0
    choices = [0, 1, 2, 3] if expected_share == 0 else [None, 0, 1, 2, 3]
    for sequence in itertools.product(choices, repeat=2):
        told.cells, told.log_probs = list(sequence), []
        log_likelihood = -F.cross_entropy(*told(features, CAPTION, LENGTHS)[:2], reduction="sum")
        drawn = sum(cell is not None for cell in sequence)
        probability = (1 - expected_share) ** drawn * expected_share ** (2 - drawn) * sum(told.log_probs).exp()
        objective = objective + probability * log_likelihood
        total += probability.item()
    assert total == pytest.approx(1)
    (-objective / 2).backward()
    return attention_gradient(told), objective.item()


def estimates(decoder, features, baseline, weight=1.0, batches=100, rows=400):
    """:return: (batches, parameters), gradients of the loss of batches of the one caption"""
    loss_function = CaptionLoss(0.0, reinforce_weight=weight, entropy_weight=0.0).eval()
    loss_function.load_state_dict({"baseline": torch.tensor(baseline)})
    found = []
    for _ in range(batches):
        decoder.zero_grad()
        decoded = decoder(features, CAPTION.expand(rows, -1), LENGTHS.expand(rows), torch.zeros(rows, dtype=torch.long))
        loss_function(decoded)[0].backward()
        found.append(attention_gradient(decoder))
    return torch.stack(found)


@pytest.mark.parametrize("expected_share", [0.0, 0.5])
def test_reinforce_is_unbiased_and_a_baseline_lowers_its_variance(tiny_decoder, expected_share):
    decoder = tiny_decoder(DecoderWithHardAttention, expected_share=expected_share, spread=1.0, **SIZES).train()
    features = 2 * torch.randn(1, 2, 2, 3, generator=torch.Generator().manual_seed(5))
    exact, mean_reward = exact_gradient(decoder, features, expected_share)

    def errors(found):
        """:return: how far the mean of the samples is from the truth, and how far chance alone puts it"""
        return (found.mean(dim=0) - exact).norm(), (found.var(dim=0).sum() / len(found)).sqrt()

    torch.manual_seed(0)
    without, with_baseline = estimates(decoder, features, 0.0), estimates(decoder, features, mean_reward)
    for found in (without, with_baseline):
        error, by_chance = errors(found)
        assert error < 2 * by_chance
    assert with_baseline.var(dim=0).sum() < 0.7 * without.var(dim=0).sum()

    # The samples are enough to tell: what is a little too strong, or missing, is seen.
    assert errors(with_baseline)[1] < 0.05 * exact.norm()
    for weight in (0.0, 0.5):
        error, by_chance = errors(estimates(decoder, features, mean_reward, weight))
        assert error > 4 * by_chance


@pytest.mark.parametrize(("k", "share"), [(1, 0.25), (2, 0.5), (3, 0.5), (4, 1.0), (5, 1.0)])
def test_top_k_accuracy_by_hand(k, share):
    scores = torch.tensor([[5.0, 4, 3, 2, 1, 0]]).repeat(4, 1)
    targets = torch.tensor([0, 1, 3, 3])  # the 1st, 2nd, 4th and 4th highest
    assert top_k_accuracy(scores, targets, k).item() == share
