"""Hard attention looks at one cell. What a step gives if it does, the plain version computes for each cell."""

import pytest
import torch
import torch.nn.functional as F
from plain_models import END, START, captions, grid, plain_decoder

from models import DecoderWithHardAttention


def outputs_per_cell(decoder, features):
    """:return: scores after <start> if the context were each of the P cells (P, vocab_size), or alpha's mean; alpha"""
    rows, lengths = torch.tensor([[START, END]]), torch.tensor([2])
    per_cell = []
    for cell in range(9):
        one_hot = F.one_hot(torch.tensor([cell]), 9).float()
        scores, alphas, *_ = plain_decoder(decoder, features, rows, lengths, look=lambda t, alpha, w=one_hot: w)
        per_cell.append(scores[0, 0])
    expected_value, *_ = plain_decoder(decoder, features, rows, lengths)
    return torch.stack(per_cell).detach(), expected_value[0, 0].detach(), alphas[0, 0].detach()


def hard_scores(decoder, features, n):
    """:return: scores after <start> of n rows of one photo (n, vocab_size), log-probabilities of the locations (n,)"""
    state = decoder.init_state(features.expand(n, -1, -1, -1))
    output, _, state = decoder.step(torch.full((n,), START), state)
    return decoder.scores(output).detach(), state.location_log_prob.detach()


def chosen_cells(scores, per_cell):
    """:return: (n,), which cell each row looked at, and how far it is from that exactly"""
    distance, cell = (scores.unsqueeze(1) - per_cell).abs().amax(dim=2).min(dim=1)
    return cell, distance


@pytest.mark.parametrize("training", [True, False])
def test_hard_attention_draws_one_cell_and_knows_its_log_probability(tiny_decoder, training):
    torch.manual_seed(0)
    decoder = tiny_decoder(DecoderWithHardAttention, expected_share=0.0, inference="sample").train(training)
    features, n = grid(1, seed=3), 4000
    per_cell, _, alpha = outputs_per_cell(decoder, features)
    scores, log_probs = hard_scores(decoder, features, n)
    cells, distance = chosen_cells(scores, per_cell)
    assert distance.max() < 1e-4
    torch.testing.assert_close(log_probs, alpha[cells].log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cells.bincount(minlength=9) / n, alpha, rtol=0, atol=4 * 0.5 / n**0.5)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_hard_attention_in_training_takes_the_expected_value_in_its_share_of_steps(tiny_decoder, share):
    torch.manual_seed(0)
    decoder = tiny_decoder(DecoderWithHardAttention, expected_share=share).train()
    features, n = grid(1, seed=3), 2000
    per_cell, expected_value, _ = outputs_per_cell(decoder, features)
    scores, log_probs = hard_scores(decoder, features, n)
    is_expected = (scores - expected_value).abs().amax(dim=1) < 1e-4
    assert abs(is_expected.float().mean().item() - share) < 4 * 0.5 / n**0.5
    assert (log_probs[is_expected] == 0).all()  # nothing was drawn there
    assert (log_probs[~is_expected] < 0).all()
    if share < 1:
        assert chosen_cells(scores[~is_expected], per_cell)[1].max() < 1e-4


def test_hard_attention_at_inference_takes_the_likeliest_cell_or_the_expected_value(tiny_decoder):
    features = grid(1, seed=3)
    decoder = tiny_decoder(DecoderWithHardAttention).eval()
    per_cell, expected_value, alpha = outputs_per_cell(decoder, features)
    scores, _ = hard_scores(decoder, features, 3)
    assert (scores - per_cell[alpha.argmax()]).abs().max() < 1e-4
    decoder = tiny_decoder(DecoderWithHardAttention, inference="expectation").eval()
    scores, _ = hard_scores(decoder, features, 3)
    assert (scores - expected_value).abs().max() < 1e-4


def test_the_log_probabilities_of_locations_are_packed_like_the_words(tiny_decoder):
    torch.manual_seed(0)
    decoder, (rows, lengths) = tiny_decoder(DecoderWithHardAttention, expected_share=0.0), captions(5)
    decoded = decoder(grid(5), rows, lengths)
    assert decoded.location_log_probs.shape == decoded.targets.shape
    assert decoded.location_log_probs.requires_grad
    log_alphas = decoded.alphas.log()
    for t, log_probs in enumerate(decoded.location_log_probs.split(decoded.batch_sizes)):
        for row, log_prob in enumerate(log_probs):  # each is one of its row's own
            assert (log_alphas[row, t] - log_prob).abs().min() < 1e-5


def test_soft_attention_draws_no_locations(tiny_decoder):
    assert tiny_decoder()(grid(4), *captions(4)).location_log_probs is None
