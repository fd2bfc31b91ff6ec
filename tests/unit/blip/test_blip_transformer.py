"""BLIP's transformer with its words: what it sees, learns from, writes and saves is what the library's own would."""

import copy
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, BlipForConditionalGeneration, BlipModel

from blip import Finetune
from captioning.blip import transformer as blip_model
from captioning.blip.fine_tuning import build_fine_tuning
from captioning.blip.transformer import IGNORED, load_blip, new_blip
from utils import UserError

pytestmark = pytest.mark.slow

WORDS = ["a", "red", "cat", "sat", "on", "my", "mat"]


def build(spread=0.3, **sizes):
    """A small BLIP whose random weights are far enough from zero to matter."""
    torch.manual_seed(0)
    made = new_blip(WORDS, **{"image_size": 32, "patch_size": 8, "dim": 16, "layers": 2, "heads": 2} | sizes)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(0, spread)
    return made


@pytest.fixture(scope="module")
def small():
    return build()


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", [32, 20, 77])
def test_pixels_are_what_the_librarys_processor_makes_of_a_photo(small, side):
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = small.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(small.pixels(images), expected, atol=0.016, rtol=0)  # a level of 255, and a little


def test_captions_start_as_the_model_starts_to_write_and_unknown_words_are_spelled(small):
    ids, mask = small.spell([["a", "red", "cat"], ["my", "xylophone"], ["<unk>", "mat"]])
    pieces = [small.processor.tokenizer.convert_ids_to_tokens(row) for row in ids]
    assert pieces[0][:6] == ["[DEC]", "a", "red", "cat", "[SEP]", "[PAD]"]
    assert pieces[1][:4] == ["[DEC]", "my", "x", "##y"] and pieces[1][-1] == "[SEP]"
    assert pieces[2][:4] == ["[DEC]", "[UNK]", "mat", "[SEP]"]
    assert mask.sum(dim=1).tolist() == [5, 12, 4]
    assert small.processor.tokenizer.decode(ids[1][1:12], skip_special_tokens=True) == "my xylophone"
    assert small.spell([WORDS], max_pieces=3)[0].shape == (1, 5)


def test_the_loss_is_that_of_each_next_piece_given_the_ones_before(small, images):
    ids, mask = small.spell([["a", "red", "cat"], ["my", "mat"], ["on", "my", "red", "mat"]])
    scores, targets = small.predict(small.see(images), ids, mask)
    losses = []
    for image, row, length in zip(small.pixels(images), ids, mask.sum(dim=1), strict=True):
        for t in range(1, length):  # the model sees the beginning alone: no padding, nothing of what comes
            logits = small.model(pixel_values=image[None], input_ids=row[None, :t]).logits[0, -1]
            losses.append(-logits.log_softmax(dim=0)[row[t]])
    loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    official = small.model(
        pixel_values=small.pixels(images), input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)
    ).loss
    torch.testing.assert_close(loss, official, atol=1e-5, rtol=1e-5)


def test_greedy_choice_takes_the_likeliest_piece_at_each_step(small, images):
    found = small.search(images, beam_size=1, max_length=6)
    alone = [small.search(image[None], beam_size=1, max_length=6)[0] for image in images]
    assert [sentence.words for sentence in found] == [sentence.words for sentence in alone]
    text = small.model.config.text_config
    for image, sentence in zip(images, found, strict=True):
        row, log_prob = [text.bos_token_id], 0.0
        while row[-1] != text.sep_token_id and len(row) <= 6:
            logits = small.model(pixel_values=small.pixels(image[None]), input_ids=torch.tensor([row])).logits[0, -1]
            best = logits.log_softmax(dim=0).max(dim=0)
            row, log_prob = [*row, best.indices.item()], log_prob + best.values.item()
        ended = row[-1] == text.sep_token_id
        written = small.processor.tokenizer.decode(row[1:], skip_special_tokens=True)
        assert sentence.words == blip_model.tokenize(written) and sentence.ended == ended
        assert sentence.log_prob == pytest.approx(log_prob, abs=1e-4)


def test_a_beam_that_holds_everything_finds_the_likeliest_caption(small, images):
    text = small.model.config.text_config
    vocab_size, end = text.vocab_size, text.sep_token_id
    [found] = small.search(images[:1], beam_size=vocab_size, max_length=2)
    seen = small.see(images[:1])
    starts = torch.tensor([[text.bos_token_id, i] for i in range(vocab_size)])  # (V, 2)
    with torch.no_grad():
        logits = small.model.text_decoder(starts, encoder_hidden_states=seen.expand(vocab_size, -1, -1)).logits
    log_probs = logits.log_softmax(dim=2)  # (V, 2, V)
    totals = log_probs[0, 0][:, None] + log_probs[:, 1]  # (V, V)
    totals[end] = log_probs[0, 0, end]  # it ended at once
    assert found.log_prob == pytest.approx(totals.max().item(), abs=1e-4)


def test_captions_are_those_of_the_librarys_own_generate(small, images):
    ids = small.model.generate(pixel_values=small.pixels(images), num_beams=3, max_new_tokens=8, length_penalty=1.0)
    texts = small.processor.batch_decode(ids, skip_special_tokens=True)
    found = small.search(images, beam_size=3, max_length=8, normalisation="length")
    assert [sentence.words for sentence in found] == [blip_model.tokenize(text) for text in texts]


def test_perplexity_is_that_of_the_words_whatever_pieces_they_have(small, images):
    references = [[["a", "red", "cat"], ["xylophone"]], [["my", "mat"]]]

    class Loader(list):
        pass

    batch = type("Batch", (), {"images": images[:2], "references": references})
    log_probs = 0.0
    for image, captions in zip(images, references, strict=False):
        for caption in captions:
            log_probs += small.log_probs(small.see(image[None]), *small.spell([caption])).item()
    assert small.perplexity(Loader([batch])) == pytest.approx(np.exp(-log_probs / (4 + 2 + 3)), rel=1e-4)


def test_gradient_checkpointing_changes_no_gradient(small, images):
    def gradients(**options):
        other = copy.deepcopy(small)
        run = build_fine_tuning(Finetune(**options), other, total_steps=10)
        run.train_mode()
        scores, targets = other.predict(other.see(images), *other.spell([["a", "cat"], ["my", "mat"], ["red"]]))
        F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
        return {name: parameter.grad for name, parameter in other.model.named_parameters()}

    plain, checkpointed = gradients(), gradients(gradient_checkpointing=True)
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_captions_are_the_same_before_saving_and_after_loading(small, images, tmp_path):
    small.save(tmp_path / "model")
    loaded = load_blip(tmp_path / "model")
    assert loaded.search(images, beam_size=3, max_length=8) == small.search(images, beam_size=3, max_length=8)
    assert not [path for path in (tmp_path / "model").iterdir() if path.name.startswith(".")]
    model = BlipForConditionalGeneration.from_pretrained(tmp_path / "model", local_files_only=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "model", local_files_only=True)
    photo = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    ids = model.generate(**processor(photo, return_tensors="pt"), num_beams=3, max_new_tokens=8, length_penalty=0.0)
    words = small.search(images[:1], beam_size=3, max_length=8)[0].words
    assert blip_model.tokenize(processor.decode(ids[0], skip_special_tokens=True)) == words


def test_a_model_that_cannot_be_written_leaves_the_old_one(small, tmp_path, monkeypatch):
    small.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(small.processor, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space left"):
        small.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_references_that_the_model_has_no_places_for_do_not_count(small, images):
    long = ["a"] * 100
    both = type("Batch", (), {"images": images[:1], "references": [[["a", "red", "cat"], long]]})
    one = type("Batch", (), {"images": images[:1], "references": [[["a", "red", "cat"]]]})
    assert small.perplexity([both]) == pytest.approx(small.perplexity([one]))
    only = type("Batch", (), {"images": images[:1], "references": [[long]]})
    with pytest.raises(UserError, match="references: none has at most 62 pieces"):
        small.perplexity([only])


def test_without_a_network_one_line_says_what_to_download_and_where_to_put_it(monkeypatch):
    name = "Salesforce/no-such-model-here"
    advice = "run `hf download Salesforce/no-such-model-here --local-dir no-such-model-here`, copy that folder here"
    monkeypatch.setattr(blip_model, "hf_hub_url", lambda *_: "http://127.0.0.1:9/config.json")  # nobody listens there
    with pytest.raises(UserError, match="cannot be reached") as refused:
        load_blip(name)
    monkeypatch.setattr(blip_model.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as offline:
        load_blip(name)
    for error in (refused, offline):
        assert advice in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_holds_no_captioning_blip_is_refused_in_one_line(small, tmp_path):
    def line(folder):
        with pytest.raises(UserError, match=f"model: '{folder}'") as error:
            load_blip(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in line(tmp_path / "empty")
    small.save(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in line(tmp_path / "cut")
    small.save(tmp_path / "other")
    BlipModel(small.model.config).save_pretrained(tmp_path / "other")  # BLIP's other half, which compares
    assert "is not a BLIP model that writes captions" in line(tmp_path / "other")


def test_a_caption_longer_than_the_model_can_write_is_refused(small, images):
    with pytest.raises(UserError, match="max_length: 64 found, at most 63 expected"):
        small.search(images, max_length=64)


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("text_config", "num_hidden_layers", 10**6, "1000000 found"),
        ("vision_config", "num_hidden_layers", 10**6, "1000000 found"),
        ("text_config", "num_hidden_layers", -1, "-1 found"),
        ("text_config", "num_attention_heads", 0, "0 found"),
        ("vision_config", "hidden_size", 10**9, "1000000000 found"),
        ("text_config", "bos_token_id", 10**6, "1000000 found"),
        ("text_config", "sep_token_id", None, "None found"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_before_a_model_is_built(small, tmp_path, part, name, value, said):
    small.save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config[part][name] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"model: {part}: {name}: {said}"):
        load_blip(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(small, tmp_path, name):
    small.save(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        load_blip(tmp_path)


def test_weights_that_are_no_numbers_are_refused(small, tmp_path):
    small.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("attention.output.dense.weight"))
    weights[name][0] = math.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has values that are not finite numbers"):
        load_blip(tmp_path)
