"""What holds for every decoder: it learns, and runs wherever the others run; and the registry that knows them all."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from decoder_checks import (
    END,
    GRIDS,
    RULES,
    SMALL,
    START,
    VOCAB,
    assert_same,
    build,
    captions,
    gradients,
    grid,
    objective,
    suiting,
)

import train
from captioning.inference.search import beam_search, greedy_search
from captioning.networks.registry import DECODERS, SETTINGS, WITH_ATTENTION, build_decoder
from captioning.training.losses import CaptionLoss
from models import DecoderWithAttention, DecoderWithHardAttention, mean_features, select_rows
from utils import UserError

NEW = [name for name in DECODERS if name not in ("soft", "hard")]  # what models.py does not have
WITHOUT_ATTENTION = next(name for name in DECODERS if name not in WITH_ATTENTION)


def is_unseen_by_softmax(parameter):
    """Whether a parameter moves all scores of a softmax alike: a key's bias, or that of an additive score."""
    return parameter == "attention.full_att.bias" or parameter.endswith(".key.bias")


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("layers", [1, 2])
def test_step_unrolled_equals_forward(name, layers):
    decoder = build(name, **suiting(name, {"decoder_layers": layers})).eval()
    features, (rows, lengths) = grid(5, (4, 4)), captions(5)
    decoded = decoder(features, rows, lengths)
    scores = decoded.logits.split(decoded.batch_sizes)  # T of (n, vocab_size)
    for row, caption in enumerate(decoded.order.tolist()):
        state = decoder.init_state(features[caption : caption + 1])
        for t in range(lengths[caption] - 1):
            output, alpha, state = decoder.step(rows[caption, t : t + 1], state)
            assert_same(decoder.scores(output)[0], scores[t][row])
            assert (alpha is None) == (name not in WITH_ATTENTION)
            if alpha is not None:
                assert_same(alpha[0], decoded.alphas[row, t])


@pytest.mark.parametrize("name", NEW)
def test_a_states_rows_can_be_reordered_repeated_and_dropped(name):
    decoder = build(name, **suiting(name, {"decoder_layers": 2})).eval()
    words, chosen = torch.tensor([1, 2, 3]), torch.tensor([2, 0, 2, 1])
    first = decoder.init_state(grid(3, (2, 2)))
    *_, state = decoder.step(words, first)
    output, alpha, _ = decoder.step(words, state)
    output_chosen, alpha_chosen, _ = decoder.step(words[chosen], select_rows(state, chosen))
    torch.testing.assert_close(output_chosen, output[chosen])
    if alpha is not None:
        torch.testing.assert_close(alpha_chosen, alpha[chosen])


@pytest.mark.parametrize("name", DECODERS)
def test_two_photos_of_different_grids_can_be_decoded_in_turns(name):
    decoder, words = build(name).eval(), torch.tensor([1])
    expected, *_ = decoder.step(words, decoder.init_state(grid(1, (2, 2))))
    state = decoder.init_state(grid(1, (2, 2)))
    decoder.init_state(grid(1, (3, 3), seed=1))
    assert torch.equal(decoder.step(words, state)[0], expected)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("size", [(2, 2), (5, 5)], ids=str)
def test_captions_that_share_a_photo_give_what_each_gives_with_its_own(name, size):
    decoder, features, (rows, lengths) = build(name), grid(3, size).requires_grad_(), captions(7)
    image_rows = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    caption_major = decoder(features[image_rows], rows, lengths)
    loss = objective(caption_major.logits, caption_major.alphas, caption_major.targets)
    expected = gradients(loss, decoder, features)
    image_major = decoder(features, rows, lengths, image_rows)
    loss = objective(image_major.logits, image_major.alphas, image_major.targets)
    found = gradients(loss, decoder, features)

    assert torch.equal(image_major.targets, caption_major.targets)
    assert_same(image_major.logits, caption_major.logits)
    if name in WITH_ATTENTION:
        assert_same(image_major.alphas, caption_major.alphas)
    for parameter in expected:
        assert_same(found[parameter], expected[parameter])


@pytest.mark.parametrize("name", DECODERS)
def test_the_gradient_of_the_words_reaches_every_parameter(name):
    torch.manual_seed(0)
    decoder, (rows, lengths) = build(name, **({"hard_expected_share": 1.0} if name == "hard" else {})), captions(8)
    decoded = decoder(grid(8), rows, lengths)
    F.cross_entropy(decoded.logits, decoded.targets).backward()
    for parameter, values in decoder.named_parameters():
        if is_unseen_by_softmax(parameter):
            assert values.grad.abs().max() < 1e-6
        else:
            assert values.grad.abs().max() > 1e-4, parameter


@pytest.mark.parametrize("name", DECODERS)
def test_eight_captions_are_learnt_by_heart_each_from_its_own_photo(name):
    sizes = {"embed_dim": 24, "decoder_dim": 32, "attention_dim": 16, "encoded_image_size": 2, "dropout": 0.0,
             "residual_dropout": 0.0}  # fmt: skip
    torch.manual_seed(0)
    decoder = build_decoder({"decoder": name} | suiting(name, sizes), VOCAB, 8)
    features = grid(8, (2, 2), encoder_dim=8)
    rows = torch.randint(1, START, (8, 7), generator=torch.Generator().manual_seed(0))
    rows[:, 0], rows[:, -1], lengths = START, END, torch.full((8,), 7)
    loss_function = CaptionLoss(doubly_stochastic_weight=0.0)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.005 if name == "transformer" else 0.02)
    for _ in range(60):
        loss, cross_entropy = loss_function(decoder(features, rows, lengths))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Without the photo, the best would be to know all eight and guess which: log(8) / 6 = 0.35 a word.
    assert cross_entropy < 0.1
    if name != "hard":  # which has also to look at its likeliest cell instead of the expected value
        found = greedy_search(decoder.eval(), features, RULES)
        assert [best.words for best in found] == rows[:, 1:-1].tolist()


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_choice_and_beam_search_run_on_every_decoder(name):
    decoder, features = build(name, spread=1.0).eval(), grid(4, (4, 4))
    alone = greedy_search(decoder, features, RULES, keep_alphas=True)
    beam_of_one = beam_search(decoder, features, RULES, beam_size=1, keep_alphas=True)
    beam = beam_search(decoder, features, RULES, beam_size=3, n_best=3, keep_alphas=True)
    for photo in range(4):
        best = beam_of_one[photo][0]
        assert best.words == alone[photo].words
        assert best.log_prob == pytest.approx(alone[photo].log_prob, abs=1e-4)
        for hypothesis in beam[photo]:
            # What the search says of a caption is what teacher forcing says of it.
            words = [START, *hypothesis.words, *([END] if hypothesis.ended else [])]
            decoded = decoder(features[photo : photo + 1], torch.tensor([words]), torch.tensor([len(words)]))
            scores = decoded.logits.log_softmax(dim=1)
            assert scores[range(len(words) - 1), words[1:]].sum().item() == pytest.approx(hypothesis.log_prob, abs=1e-3)
            if name not in WITH_ATTENTION:
                assert hypothesis.alphas is None
            else:
                torch.testing.assert_close(hypothesis.alphas, decoded.alphas[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_the_mean_is_that_of_the_resized_grid(size):
    features = grid(2, size)
    resized = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), 3)
    torch.testing.assert_close(mean_features(features, 3), resized.mean(dim=(2, 3)))


@pytest.mark.parametrize("name", NEW)
def test_half_precision_and_cached_features_are_taken(name):
    decoder, features, (rows, lengths) = build(name), grid(5, (2, 2)).half(), captions(5)
    expected = decoder(features.float(), rows, lengths)
    assert_same(decoder(features, rows, lengths).logits, expected.logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder(features, rows, lengths)
    loss = F.cross_entropy(found.logits.float(), found.targets)
    torch.testing.assert_close(loss, F.cross_entropy(expected.logits, expected.targets), rtol=0.02, atol=0.02)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", DECODERS)
def test_each_dropout_a_decoder_has_makes_training_random_and_nothing_else(name):
    rows, lengths = captions(4)
    for field in suiting(name, dict.fromkeys(["dropout", "embedding_dropout", "state_dropout", "residual_dropout"])):
        settings = {field: 0.5} | ({"hard_expected_share": 1.0} if name == "hard" else {})
        decoder = build(name, **settings).train()
        one, other = (decoder(grid(4), rows, lengths).logits for _ in range(2))
        assert not torch.equal(one, other), field
        decoder.eval()
        one, other = (decoder(grid(4), rows, lengths).logits for _ in range(2))
        assert torch.equal(one, other), field


# The registry


@pytest.mark.parametrize("name", DECODERS)
def test_a_config_without_the_newer_fields_gets_their_defaults(name):
    decoder = build_decoder({"decoder": name, "epochs": 3, "encoder": "resnet18"}, VOCAB, 8)
    assert type(decoder) is DECODERS[name]
    assert decoder.embedding.weight.shape == (VOCAB, 512)
    assert decoder.fc.weight.shape == (VOCAB, 512)
    assert decoder.dropout.p == 0.5 and decoder.embedding_dropout.p == 0.0
    assert decoder.encoded_image_size == 14
    everything = {field: setting.default for field, setting in SETTINGS.items()}
    again = build_decoder({"decoder": name} | everything, VOCAB, 8)
    again.load_state_dict(decoder.state_dict())


@pytest.mark.parametrize(("name", "layers"), [("soft", 1), ("show_tell", 1), ("adaptive", 1), ("transformer", 3)])
def test_the_number_of_layers_is_the_decoders_own_unless_it_is_given(name, layers):
    def parts(**settings):
        sizes = {"decoder": name, "embed_dim": 8, "decoder_dim": 8}
        return sum(parameter.numel() for parameter in build_decoder(sizes | settings, VOCAB, 8).parameters())

    assert parts() == parts(decoder_layers=layers) < parts(decoder_layers=layers + 1)


def test_the_oldest_configs_mean_soft_attention():
    assert type(build_decoder({}, VOCAB, 8)) is DecoderWithAttention


def test_defaults_are_those_of_the_training_script():
    config = dataclasses.asdict(train.Config())
    for field, setting in SETTINGS.items():
        assert config.get(field, setting.default) == setting.default, field


def test_each_setting_reaches_its_decoder():
    settings = suiting("hard", SMALL) | {
        "embedding_dropout": 0.1, "state_dropout": 0.2, "decoder_layers": 2, "gate": False, "deep_output": True,
        "attention_nonlinearity": "tanh", "embedding_max_norm": 3.0, "tie_weights": True, "hard_expected_share": 0.25,
        "hard_inference": "sample",
    }  # fmt: skip
    assert settings.keys() == {field for field, setting in SETTINGS.items() if "hard" in setting.decoders}
    decoder = build_decoder(settings | {"decoder": "hard"}, VOCAB, 4)
    assert type(decoder) is DecoderWithHardAttention
    assert decoder.embedding.weight.shape == (VOCAB, 7) and decoder.embedding_max_norm == 3.0
    assert decoder.attention.decoder_att.weight.shape == (6, 6)
    assert (decoder.dropout.p, decoder.embedding_dropout.p, decoder.state_dropout.p) == (0.0, 0.1, 0.2)
    assert (decoder.expected_share, decoder.inference, decoder.encoded_image_size) == (0.25, "sample", 3)
    assert len(decoder.decode_step) == 2 and decoder.f_beta is None and decoder.deep_output
    assert decoder.attention.nonlinearity is torch.tanh and decoder.fc.weight is decoder.embedding.weight


def test_an_unknown_decoder_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=f"decoder: 'lstm' found, .*{', '.join(DECODERS)}"):
        build_decoder({"decoder": "lstm"}, VOCAB, 8)


@pytest.mark.parametrize(
    ("name", "field", "value", "hint"),
    [
        ("soft", "hard_inference", "sample", "hard"),
        ("soft", "hard_expected_share", 1.0, "hard"),
        (WITHOUT_ATTENTION, "gate", False, "soft or hard"),
        (WITHOUT_ATTENTION, "attention_dim", 64, "soft or hard or spatial or adaptive"),
        (WITHOUT_ATTENTION, "attention_nonlinearity", "tanh", "soft or hard or spatial or adaptive"),
        (WITHOUT_ATTENTION, "deep_output", True, "soft or hard"),
        ("spatial", "gate", False, "soft or hard"),
        ("spatial", "state_dropout", 0.1, "soft or hard or show_tell"),
        ("adaptive", "deep_output", True, "soft or hard"),
        ("adaptive", "hard_inference", "expectation", "hard"),
    ],
)
def test_a_setting_that_the_decoder_does_not_have_is_refused(name, field, value, hint):
    default = SETTINGS[field].default
    with pytest.raises(UserError) as refusal:
        build_decoder({"decoder": name, field: value}, VOCAB, 8)
    message = str(refusal.value)
    assert message.startswith(f"{field}: {value!r} found, {default!r} (the default) expected")
    assert f"'{name}'" in message and "\n" not in message
    choices = message.split("choose --decoder ")[1].split(" or ")
    assert set(hint.split(" or ")) <= set(choices) and name not in choices
    build_decoder({"decoder": name, field: default}, VOCAB, 8)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("hard", "hard_inference", "best"),
        ("hard", "hard_expected_share", 1.5),
        ("soft", "attention_nonlinearity", "sigmoid"),
        ("adaptive", "decoder_layers", 0),
        ("spatial", "dropout", -0.1),
        (WITHOUT_ATTENTION, "embed_dim", 0),
        ("soft", "embedding_max_norm", 0.0),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(name, field, value):
    with pytest.raises(UserError, match=f"{field}: .*found, .*expected"):
        build_decoder({"decoder": name, field: value}, VOCAB, 8)


@pytest.mark.parametrize("name", DECODERS)
def test_several_threads_give_the_same_gradients_each_time_to_the_last_bit(name, four_threads):
    decoder = build(name, encoder_dim=128)
    features = grid(8, (8, 8), encoder_dim=128).requires_grad_()
    rows, lengths = captions(40)
    photos = torch.arange(8).repeat_interleave(5)  # the gradients of five captions are added up in the photo's row

    def gradient():
        decoded = decoder(features, rows, lengths, photos)
        return torch.autograd.grad(objective(decoded.logits, decoded.alphas, decoded.targets), features)[0]

    torch.manual_seed(0)
    once = gradient()
    for _ in range(10):
        torch.manual_seed(0)
        assert torch.equal(gradient(), once)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
