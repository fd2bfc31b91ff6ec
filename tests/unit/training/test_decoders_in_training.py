"""Every decoder can be trained, resumed, rewarded, taken to other words, and can write with the others."""

import pytest
import torch
from conftest import WORD_MAP
from kill_training import equal

from captioning.inference.trained_model import load_captioner
from captioning.networks.registry import ADDITIVE, DECODERS, WITH_ATTENTION
from captioning.storage.tensors import load_checkpoint

pytestmark = pytest.mark.slow

OWN_OPTIONS = {
    "att2in": ["--attention_nonlinearity", "tanh"],
    "transformer": ["--attention_heads", 2, "--decoder_layers", 2, "--tie_weights"],
}
REWARDS = ["--image_major", "--self_critical_from_epoch", 2, "--self_critical_samples", 2]


def options_of(name):
    attention_dim = [] if name in ADDITIVE else ["--attention_dim", 512]  # the default: others do not have it
    return ["--decoder", name, "--dropout", 0.3, "--embedding_dropout", 0.1, *attention_dim, *OWN_OPTIONS.get(name, [])]


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "hard"])  # it cannot be rewarded
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_that_was_interrupted_during_rewards_ends_as_one_that_was_not(training, name, precision):
    options = [*options_of(name), *REWARDS, "--precision", precision]
    whole = training("whole", *options, "--epochs", 3)
    training("parts", *options, "--epochs", 2)
    parts = training("parts", *options, "--epochs", 3, "--resume", "auto")
    one, other = load_checkpoint(whole / "last.pth"), load_checkpoint(parts / "last.pth")
    assert equal(one["decoder"], other["decoder"]) and equal(one["optimizer"], other["optimizer"])


@pytest.mark.parametrize("name", DECODERS)
def test_scheduled_sampling_and_an_encoder_that_is_trained_go_with_every_decoder(training, name):
    folder = training("run", *options_of(name), "--teacher_forcing", "linear", "--teacher_forcing_floor", 0.0,
                      "--fine_tune_encoder")  # fmt: skip
    assert load_checkpoint(folder / "last.pth")["progress"]["step"] == 12


@pytest.mark.parametrize("name", DECODERS)
def test_a_trained_decoder_starts_a_run_with_other_words_which_keep_their_rows(training, make_files, name):
    folder = training("run", *options_of(name), "--epochs", 1)
    words = {word: i for i, word in enumerate(["<pad>", "bird", *(word for word in WORD_MAP if word != "<pad>")])}
    captions = [[words["<start>"], words["bird"], words["cat"], words["<end>"]]] * 12
    for split in ("TRAIN", "VAL"):
        make_files(split, photos=6, side=64, word_map=words, captions=captions, lengths=[4] * 12)
    other = training("other", *options_of(name), "--start_from", folder / "best.pth", "--epochs", 1,
                     "--decoder_lr", "1e-12")  # fmt: skip
    old, new = (load_checkpoint(path)["decoder"] for path in (folder / "best.pth", other / "last.pth"))
    for key, tensor in old.items():
        kept = new[key]
        if key in ("embedding.weight", "fc.weight", "fc.bias"):
            kept, tensor = (
                torch.stack([rows[ids[word]] for word in WORD_MAP]) for rows, ids in ((kept, words), (tensor, WORD_MAP))
            )
        torch.testing.assert_close(kept, tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_it_writes_together_with_soft_attention_and_says_where_both_looked(training, name):
    folders = [training("soft", "--epochs", 1), training(name + "_run", *options_of(name), "--epochs", 1)]
    captioner, *_ = load_captioner([folder / "best.pth" for folder in folders])
    photos = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for [best] in captioner.search(photos, beam_size=2, keep_alphas=True):
        assert best.log_prob < 0
        assert (best.alphas is None) == (name not in WITH_ATTENTION)
