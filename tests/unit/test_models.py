"""The decoders compute what a slow, obvious version of them computes, however their work is arranged."""

import pytest
import torch
import torch.nn.functional as F
from plain_models import END, START, captions, grid, plain_decoder
from torch.nn.utils.rnn import pack_padded_sequence

from models import DecoderWithAttention, DecoderWithHardAttention, select_rows
from utils import UserError

VARIANTS = {
    "plain": {},
    "no gate": {"gate": False},
    "tanh": {"nonlinearity": "tanh"},
    "two layers": {"layers": 2},
    "deep output": {"deep_output": True},
    "tied": {"tie_weights": True},
    "tied deep output": {"tie_weights": True, "deep_output": True, "decoder_dim": 4},
    "all together": {"gate": False, "nonlinearity": "tanh", "layers": 2, "deep_output": True, "tie_weights": True},
}
GRIDS = [(2, 2), (3, 3), (5, 5), (4, 7), (2, 4)]  # attention sees 3 x 3


def plain_loss(scores, alphas, targets, decode_lengths):
    """Cross entropy of the words, packed, plus the doubly stochastic term (equation 14)."""
    scores = pack_padded_sequence(scores, decode_lengths, batch_first=True).data
    targets = pack_padded_sequence(targets, decode_lengths, batch_first=True).data
    return F.cross_entropy(scores, targets) + ((1 - alphas.sum(dim=1)) ** 2).mean()


def loss_of(decoded):
    return F.cross_entropy(decoded.logits, decoded.targets) + ((1 - decoded.alphas.sum(dim=1)) ** 2).mean()


def gradients(loss, decoder, features):
    """:return: dict of gradients of the loss, of every parameter and of the features"""
    decoder.zero_grad()
    features.grad = None
    loss.backward()
    found = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    return found | {"features": features.grad.clone()}


def assert_same(found, expected):
    """To 1e-5 of the tensor's largest number, in float32; what is nothing but rounding noise may differ."""
    size = expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=max(1e-5 * size, 2e-7))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_teacher_forcing_equals_the_plain_loop(tiny_decoder, variant, size):
    options = VARIANTS[variant]
    decoder = tiny_decoder(**options).train()
    features = grid(6, size).requires_grad_()
    rows, lengths = captions(6)

    scores, alphas, targets, decode_lengths = plain_decoder(decoder, features, rows, lengths, **options)
    expected_loss = plain_loss(scores, alphas, targets, decode_lengths)
    expected = gradients(expected_loss, decoder, features)
    decoded = decoder(features, rows, lengths)
    loss = loss_of(decoded)
    found = gradients(loss, decoder, features)

    assert_same(decoded.logits, pack_padded_sequence(scores, decode_lengths, batch_first=True).data)
    assert_same(decoded.alphas, alphas)
    assert_same(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_same(found[name], expected[name])


def test_targets_and_scores_are_packed_longest_caption_first(tiny_decoder):
    rows = torch.tensor([[START, 1, END, 0, 0], [START, 2, 3, 4, END], [START, 5, 6, END, 0]])
    decoded = tiny_decoder()(grid(3), rows, torch.tensor([3, 5, 4]))
    assert decoded.order.tolist() == [1, 2, 0]
    assert decoded.batch_sizes == [3, 3, 2, 1]
    assert decoded.targets.tolist() == [2, 5, 1, 3, 6, END, 4, END, END]
    assert decoded.logits.shape == (9, 11)
    assert decoded.alphas.shape == (3, 4, 9)


def test_padding_beyond_the_longest_caption_changes_nothing(tiny_decoder):
    decoder, (rows, lengths) = tiny_decoder(), captions(5)
    padded = F.pad(rows, (0, 7))
    for one, other in zip(decoder(grid(5), rows, lengths), decoder(grid(5), padded, lengths), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [DecoderWithAttention, DecoderWithHardAttention])
def test_alphas_sum_to_one_and_are_zero_after_the_end(tiny_decoder, cls):
    decoder, (rows, lengths) = tiny_decoder(cls), captions(7)
    decoded = decoder(grid(7), rows, lengths)
    for row, caption in enumerate(decoded.order.tolist()):
        last = lengths[caption] - 1
        torch.testing.assert_close(decoded.alphas[row, :last].sum(dim=1), torch.ones(last))
        assert (decoded.alphas[row, last:] == 0).all()


@pytest.mark.parametrize("size", [(3, 3), (5, 5), (2, 2)], ids=str)
def test_captions_that_share_a_photo_give_the_same_gradients_as_each_with_its_own(tiny_decoder, size):
    decoder = tiny_decoder()
    features = grid(3, size).requires_grad_()
    rows, lengths = captions(7)
    image_rows = torch.tensor([0, 0, 1, 1, 1, 2, 2])

    caption_major = decoder(features[image_rows], rows, lengths)
    expected_loss = loss_of(caption_major)
    expected = gradients(expected_loss, decoder, features)
    image_major = decoder(features, rows, lengths, image_rows)
    loss = loss_of(image_major)
    found = gradients(loss, decoder, features)

    assert torch.equal(image_major.order, caption_major.order)
    assert torch.equal(image_major.targets, caption_major.targets)
    assert_same(image_major.logits, caption_major.logits)
    assert_same(image_major.alphas, caption_major.alphas)
    assert_same(loss, expected_loss)
    for name in expected:
        assert_same(found[name], expected[name])


def test_gradients_of_several_batches_add_up(tiny_decoder):
    decoder = tiny_decoder(layers=2)
    batches = [(grid(4, seed=i).requires_grad_(), *captions(4, seed=i)) for i in range(3)]
    separate = [gradients(loss_of(decoder(*batch)), decoder, batch[0]) for batch in batches]
    expected = {name: sum(some[name] for some in separate) for name, _ in decoder.named_parameters()}

    decoder.zero_grad()
    for batch in batches:
        loss_of(decoder(*batch)).backward()
    for name, parameter in decoder.named_parameters():
        assert_same(parameter.grad, expected[name])

    decoder.zero_grad()
    sum(loss_of(decoder(*batch)) for batch in batches).backward()
    for name, parameter in decoder.named_parameters():
        assert_same(parameter.grad, expected[name])


def test_asking_for_some_gradients_first_leaves_the_others_right(tiny_decoder):
    decoder, features = tiny_decoder(), grid(4).requires_grad_()
    expected = gradients(loss_of(decoder(features, *captions(4))), decoder, features)
    loss = loss_of(decoder(features, *captions(4)))
    (of_features,) = torch.autograd.grad(loss, features, retain_graph=True)
    assert_same(of_features, expected["features"])
    found = gradients(loss, decoder, features)
    for name in expected:
        assert_same(found[name], expected[name])


@pytest.mark.parametrize("frozen", ["decode_step", "attention", "f_beta", ".bias"])
def test_frozen_parts_change_no_other_gradient(tiny_decoder, frozen):
    decoder, features = tiny_decoder(), grid(4).requires_grad_()
    expected = gradients(loss_of(decoder(features, *captions(4))), decoder, features)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(frozen not in name)
    found = gradients(loss_of(decoder(features, *captions(4))), decoder, features)
    assert found.keys() == {name for name in expected if frozen not in name}
    for name in found:
        assert_same(found[name], expected[name])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cls", [DecoderWithAttention, DecoderWithHardAttention])
def test_step_unrolled_equals_forward(tiny_decoder, cls, variant):
    decoder = tiny_decoder(cls, **VARIANTS[variant]).eval()
    features, (rows, lengths) = grid(6, (4, 4)), captions(6)
    decoded = decoder(features, rows, lengths)
    scores = decoded.logits.split(decoded.batch_sizes)  # T of (n, vocab_size)
    for row, caption in enumerate(decoded.order.tolist()):
        state = decoder.init_state(features[caption : caption + 1])
        for t in range(lengths[caption] - 1):
            output, alpha, state = decoder.step(rows[caption, t : t + 1], state)
            assert_same(decoder.scores(output)[0], scores[t][row])
            assert_same(alpha[0], decoded.alphas[row, t])


@pytest.mark.parametrize("cls", [DecoderWithAttention, DecoderWithHardAttention])
def test_a_states_rows_can_be_reordered_repeated_and_dropped(tiny_decoder, cls):
    decoder = tiny_decoder(cls, layers=2).eval()
    words, chosen = torch.tensor([1, 2, 3]), torch.tensor([2, 0, 2, 1])
    *_, state = decoder.step(words, decoder.init_state(grid(3, (2, 2))))
    assert all(len(part) == 3 for part in state)
    output, alpha, _ = decoder.step(words, state)
    output_chosen, alpha_chosen, _ = decoder.step(words[chosen], select_rows(state, chosen))
    torch.testing.assert_close(output_chosen, output[chosen])
    torch.testing.assert_close(alpha_chosen, alpha[chosen])


@pytest.mark.parametrize("cls", [DecoderWithAttention, DecoderWithHardAttention])
def test_features_and_keys_do_not_change_from_step_to_step(tiny_decoder, cls):
    decoder = tiny_decoder(cls)
    first = decoder.init_state(grid(3))
    before = first.features.clone(), first.keys.clone()
    *_, state = decoder.step(torch.tensor([1, 2, 3]), first)
    assert state.features is first.features and state.keys is first.keys  # so that a search need not move them
    assert torch.equal(state.features, before[0]) and torch.equal(state.keys, before[1])


def test_cached_features_in_half_precision_are_taken(tiny_decoder):
    decoder, (rows, lengths) = tiny_decoder(), captions(4)
    features = grid(4).half()
    assert_same(decoder(features, rows, lengths).logits, decoder(features.float(), rows, lengths).logits)


@pytest.mark.parametrize("cls", [DecoderWithAttention, DecoderWithHardAttention])
def test_half_precision_gives_nearly_the_same_loss_and_gradients(tiny_decoder, cls):
    decoder = tiny_decoder(cls, layers=2, **({"expected_share": 1.0} if cls is DecoderWithHardAttention else {}))
    features, (rows, lengths) = grid(6, (2, 2)).requires_grad_(), captions(6)
    expected_loss = loss_of(decoder(features, rows, lengths))
    expected = gradients(expected_loss, decoder, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(decoder(features, rows, lengths))
    found = gradients(loss, decoder, features)
    torch.testing.assert_close(loss, expected_loss, rtol=0.02, atol=0.02)
    for name in expected:
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() <= 0.05 * expected[name].norm() + 1e-3, name


def test_dropout_is_on_the_output_the_embeddings_and_the_first_state(tiny_decoder):
    rows, lengths = captions(4)
    for where in ("dropout", "embedding_dropout", "state_dropout"):
        decoder = tiny_decoder(**{where: 0.5}).train()
        one, other = (decoder(grid(4), rows, lengths).logits for _ in range(2))
        assert not torch.equal(one, other), where
        decoder.eval()
        one, other = (decoder(grid(4), rows, lengths).logits for _ in range(2))
        assert torch.equal(one, other), where


def test_tied_weights_are_one_matrix(tiny_decoder):
    decoder = tiny_decoder(tie_weights=True)
    assert decoder.fc.weight is decoder.embedding.weight
    rows, lengths = captions(4)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    F.cross_entropy(decoder(grid(4), rows, lengths).logits, rows[0, :1].repeat(int((lengths - 1).sum()))).backward()
    optimizer.step()
    assert torch.equal(decoder.fc.weight, decoder.embedding.weight)

    again = tiny_decoder(tie_weights=True, seed=1)
    again.load_state_dict(decoder.state_dict())
    assert torch.equal(again(grid(4), rows, lengths).logits, decoder(grid(4), rows, lengths).logits)


def test_tied_weights_of_two_sizes_are_refused(tiny_decoder):
    with pytest.raises(UserError, match="tie_weights.*8.*7"):
        tiny_decoder(tie_weights=True, decoder_dim=8, embed_dim=7)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_embeddings_are_kept_below_their_maximum_norm(tiny_decoder, tie_weights):
    rows, lengths = captions(4)
    decoder = tiny_decoder(embedding_max_norm=0.7, tie_weights=tie_weights)
    with torch.no_grad():
        decoder.embedding.weight.mul_(10)
        decoder.embedding.weight[2] *= 1e-3
    before = decoder.embedding.weight.clone()
    loss_of(decoder(grid(4), rows, lengths)).backward()
    assert torch.equal(decoder.embedding.weight, before)  # only the optimizer changes weights
    assert decoder.embedding.weight.grad.isfinite().all()
    embedded = decoder.eval().embed(torch.arange(len(before)))
    renormed = torch.embedding_renorm_(before.clone(), torch.arange(len(before)), 0.7, 2.0)  # torch's own
    torch.testing.assert_close(embedded, renormed)
    assert torch.equal(embedded[2], before[2])  # a short one stays


def test_scheduled_sampling_at_rate_one_changes_nothing(tiny_decoder):
    decoder, (rows, lengths) = tiny_decoder(), captions(6)
    torch.manual_seed(0)
    expected = decoder(grid(6), rows, lengths).logits
    before = torch.get_rng_state()
    found = decoder(grid(6), rows, lengths, teacher_forcing=1.0).logits
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.8])
def test_scheduled_sampling_keeps_the_asked_share_of_true_words(tiny_decoder, rate):
    decoder = tiny_decoder().eval()
    n, true_word, other = 4000, 3, 6
    with torch.no_grad():
        decoder.fc.weight.zero_()
        decoder.fc.bias.zero_()
        decoder.fc.bias[other] = 100.0  # whatever is drawn, is this word
    kept = decoder.mix_words(torch.full((n,), true_word), torch.zeros(n, 7), rate)
    assert set(kept.tolist()) <= {true_word, other}
    assert abs((kept == true_word).float().mean().item() - rate) < 4 * 0.5 / n**0.5


def test_scheduled_sampling_draws_from_the_models_own_prediction(tiny_decoder):
    decoder, n = tiny_decoder().eval(), 20000
    output = torch.randn(1, 7)
    drawn = decoder.mix_words(torch.zeros(n, dtype=torch.long), output.expand(n, -1), 0.0)
    found = drawn.bincount(minlength=11) / n
    torch.testing.assert_close(found, decoder.scores(output)[0].detach().softmax(dim=0), rtol=0, atol=0.02)


def test_scheduled_sampling_shows_the_model_its_own_words(tiny_decoder):
    # A model that is certain of its next word: then the sampled words are known, and so is what follows.
    decoder = tiny_decoder().eval()
    with torch.no_grad():
        decoder.fc.weight.mul_(1000)
    features = grid(1)
    rows, lengths = torch.tensor([[START, 1, 2, 3, 4, END]]), torch.tensor([6])
    torch.manual_seed(0)
    mixed = decoder(features, rows, lengths, teacher_forcing=0.0)
    words, state, expected = torch.tensor([START]), decoder.init_state(features), []
    for _ in range(5):
        output, _, state = decoder.step(words, state)
        expected.append(decoder.scores(output))
        words = expected[-1].argmax(dim=1)
    assert_same(mixed.logits, torch.cat(expected))
    assert mixed.targets.tolist() == [1, 2, 3, 4, END]  # what is to be predicted stays the true words
    assert not torch.equal(mixed.logits[1:], decoder(features, rows, lengths).logits[1:])


def test_pretrained_embeddings_load_and_freeze(tiny_decoder):
    decoder, (rows, lengths) = tiny_decoder(), captions(4)
    table = torch.randn(11, 7)
    decoder.load_pretrained_embeddings(table)
    assert torch.equal(decoder.embedding.weight, table)
    decoder.fine_tune_embeddings(False)
    loss_of(decoder(grid(4), rows, lengths)).backward()
    assert decoder.embedding.weight.grad is None and decoder.fc.weight.grad is not None
    decoder.fine_tune_embeddings()
    loss_of(decoder(grid(4), rows, lengths)).backward()
    assert decoder.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(10, 7), (11, 6), (1, 7)])
def test_pretrained_embeddings_of_another_shape_are_refused(tiny_decoder, shape):
    decoder = tiny_decoder()
    before = decoder.embedding.weight.clone()
    with pytest.raises(RuntimeError, match="size mismatch"):
        decoder.load_pretrained_embeddings(torch.randn(*shape))
    assert torch.equal(decoder.embedding.weight, before)
