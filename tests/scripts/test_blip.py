"""blip.py with a small BLIP of random weights: it learns, writes, is scored, saved and taken up again."""

import copy
import csv
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, BlipForConditionalGeneration, BlipModel

import blip
import create_input_files
import view_captions
from blip import Caption, Eval, Finetune, New, main
from captioning.blip import fine_tuning as blip_training
from captioning.blip import transformer as blip_model
from captioning.blip.fine_tuning import build_fine_tuning
from captioning.blip.transformer import IGNORED, load_blip, new_blip
from captioning.evaluation import metrics
from captioning.preparation.photos import read_photo
from captioning.preparation.shapes import create_shapes
from captioning.storage.tensors import load_tensors
from datasets import CaptionDataset
from utils import UserError

pytestmark = pytest.mark.slow

WORDS = ["a", "red", "cat", "sat", "on", "my", "mat"]
NAME = "shapes_5_cap_per_img_0_min_word_freq"


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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of 24 + 6 + 6 drawn scenes of 64 pixels; :return: the options that name them"""
    folder = tmp_path_factory.mktemp("data")
    annotations = create_shapes(folder / "drawn", num_train=24, num_val=6, num_test=6, seed=1)
    create_input_files.main(
        create_input_files.Config(
            dataset="shapes", annotations=(str(annotations),), image_folder=str(folder / "drawn/images"),
            output_folder=str(folder), min_word_freq=0, image_size=64, workers=0,
        )
    )  # fmt: skip
    return {"data_folder": str(folder), "data_name": NAME}


@pytest.fixture(scope="module")
def untrained(data, tmp_path_factory):
    """The folder of a new, small BLIP."""
    folder = str(tmp_path_factory.mktemp("models") / "untrained")
    main(New(**data, output_folder=folder, image_size=64, patch_size=16, dim=64, layers=2, heads=4))
    return folder


@pytest.fixture(scope="module")
def trained(data, untrained, tmp_path_factory):
    """The folder of that BLIP when it has learned its 24 photos by heart, which validation on others would not keep."""
    folder = tmp_path_factory.mktemp("models") / "trained"
    main(quick(data, untrained, folder, epochs=60, stop_patience=60))
    learned = load_blip(untrained)
    learned.model.load_state_dict(load_tensors(folder / "training.pth")["model"])
    learned.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole_run(data, untrained, tmp_path_factory):
    """The folder of a training of two epochs that nothing stopped, and its options."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    options = {"epochs": 2, "save_minutes": 1e-9, "stop_metric": "CIDEr", "val_share": 1.0}
    main(quick(data, untrained, folder, **options))
    return folder, options


def quick(data, model, folder, **options):
    """Settings with which a new small BLIP learns quickly."""
    return Finetune(
        **{
            "model": model, "output_folder": str(folder), "batch_size": 8, "accumulate": 1, "lr": 4e-3,
            "captions_per_photo": 2, "label_smoothing": 0.0, "val_beam_size": 1, "val_share": 0.1, "device": "cpu",
        } | data | options
    )  # fmt: skip


def without_meteor(monkeypatch):
    """METEOR's Java takes seconds to start and a GB of memory."""
    monkeypatch.setattr(metrics, "meteor_scores", lambda truth, guess, meteor=None: (0.5, [0.5 for _ in guess]))


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


def test_fine_tuning_learns_what_is_on_each_photo(data, untrained, trained):
    """24 photos are learned by heart. Chance is what a caption of another photo scores."""
    split = CaptionDataset(*data.values(), "TRAIN", image_major=True)
    references = [photo["captions"] for photo in split.references]
    photos = torch.stack([torch.from_numpy(np.array(split[i][1])) for i in range(len(split))])

    def bleu4(model):
        return metrics.bleu4(references, [found.words for found in load_blip(model).search(photos, beam_size=3)])

    chance = metrics.bleu4(references, [captions[0] for captions in references[1:] + references[:1]])
    assert bleu4(untrained) < 0.05 < chance < 0.6
    assert bleu4(trained) > chance + 0.25


def test_fine_tuning_lowers_the_loss(data, untrained, trained):
    def perplexity(model):
        split = CaptionDataset(*data.values(), "TRAIN", image_major=True)
        split.with_references = True
        return load_blip(model).perplexity([split.collate([split[i] for i in range(len(split))])])

    before, after = perplexity(untrained), perplexity(trained)
    assert before > 30 and after < 4


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


@pytest.mark.parametrize("how", ["killed at step 2", "killed after an epoch", "asked by a signal at step 2"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(data, untrained, whole_run, tmp_path, monkeypatch, how):
    whole, options = whole_run
    saves, save, draw = [], blip_training.save_checkpoint, blip_training.FineTuning.draw_captions

    def save_and_die(content, path):
        save(content, path)
        saves.append(path)
        if len(saves) == {"killed at step 2": 2, "killed after an epoch": 4}.get(how):  # an epoch has 3, and its own
            raise KeyboardInterrupt

    def draw_and_signal(run, references, photos, batch):
        if how.startswith("asked") and batch == 1:
            signal.raise_signal(signal.SIGTERM)
        return draw(run, references, photos, batch)

    monkeypatch.setattr(blip_training, "save_checkpoint", save_and_die)
    monkeypatch.setattr(blip_training.FineTuning, "draw_captions", draw_and_signal)
    with pytest.raises(KeyboardInterrupt):  # `Stopped` is one
        main(quick(data, untrained, tmp_path, **options))
    monkeypatch.undo()
    with pytest.raises(UserError, match="batch_size: 4 found, but the resumed run has 8"):
        main(quick(data, untrained, tmp_path, resume=True, **options | {"batch_size": 4}))
    assert load_tensors(tmp_path / "training.pth")["progress"]["step"] == (3 if "epoch" in how else 2)
    main(quick(data, untrained, tmp_path, resume=True, **options))
    states = [load_tensors(folder / "training.pth") for folder in (whole, tmp_path)]
    assert states[0]["progress"] == states[1]["progress"] and states[0]["progress"]["step"] == 6
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])
    best = [load_file(folder / "model.safetensors") for folder in (whole, tmp_path)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_a_frozen_vision_transformer_stays_as_it_is_and_accumulation_takes_fewer_steps(data, untrained, tmp_path):
    main(quick(data, untrained, tmp_path, freeze_vision=True, accumulate=2, epochs=1))
    state, before = load_tensors(tmp_path / "training.pth"), load_blip(untrained).model.state_dict()
    assert state["progress"]["step"] == 2  # of 3 batches
    for name, weights in state["model"].items():
        if name.startswith("vision_model") or name.endswith("position_embeddings.weight"):
            assert torch.equal(weights, before[name]) == name.startswith("vision_model")


def test_training_stops_when_captions_get_no_better(data, untrained, tmp_path, monkeypatch, capsys):
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(blip, "validate", lambda run, loader: next(scores))
    main(quick(data, untrained, tmp_path, epochs=9, stop_patience=2))
    assert re.findall(r"epoch (\d)", capsys.readouterr().out) == ["1", "2", "3", "4"]
    assert load_tensors(tmp_path / "training.pth")["progress"]["best_score"] == 0.3


def test_eval_prints_eval_pys_table_and_its_results_stand_in_view_captions(
    data, trained, tmp_path, capsys, monkeypatch
):
    without_meteor(monkeypatch)
    main(Eval(trained, **data, split=("test",), beam_sizes=(1, 2), output_folder=str(tmp_path), device="cpu"))
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["TEST"]) == ["1", "2"] and set(scores["TEST"]["2"]) == set(metrics.ALL)
    assert "TEST (6 photos)\n beam    BLEU-1" in printed and f"{scores['TEST']['2']['CIDEr']:.4f}" in printed
    results = tmp_path / "captions_TEST_beam2_results.json"
    split = CaptionDataset(*data.values(), "TEST", image_major=True)
    found = load_blip(trained).search(
        torch.stack([torch.from_numpy(np.array(split[i][1])) for i in range(6)]), beam_size=2
    )
    assert [row["caption"].split() for row in json.loads(results.read_text())] == [one.words for one in found]
    page = tmp_path / "page.html"
    view_captions.main(
        view_captions.Config(
            results=(str(results),), **data, split="TEST", scores=False, output=str(page), device="cpu"
        )
    )
    assert " ".join(found[3].words) in " ".join(re.findall(r'"([^"]*)"', page.read_text()))


def test_caption_writes_what_caption_py_writes(data, trained, tmp_path, capsys):
    folder = Path(data["data_folder"]) / "drawn" / "images"
    photos = sorted(folder.glob("test*"))
    output = tmp_path / "submission.csv"
    main(Caption((str(folder / "test*"),), trained, str(output), beam_size=2, batch_size=4, device="cpu"))
    rows = list(csv.reader(output.open(newline="")))
    pixels = torch.stack([torch.from_numpy(read_photo(path, 64)) for path in photos])
    expected = [" ".join(found.words) for found in load_blip(trained).search(pixels, beam_size=2)]
    assert rows == [["image", "caption"], *([str(path), text] for path, text in zip(photos, expected, strict=True))]
    capsys.readouterr()

    main(Caption((str(photos[0]),), trained, str(tmp_path / "one.json"), beam_size=2, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    [row] = json.loads((tmp_path / "one.json").read_text())["photos"]
    assert lines[0] == expected[0] == row["caption"] and f"log-probability {row['log_prob']:.2f}" in lines[1]
    assert set(row) == {"file", "caption", "words", "log_prob", "perplexity", "score", "n_best"}
    main(Caption((str(photos[0]),), trained, str(tmp_path / "one.html"), beam_size=2, device="cpu"))
    assert expected[0].split()[0] in (tmp_path / "one.html").read_text()


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Finetune(epochs=0), "epochs: 0 found, a whole number from 1 to 1,000,000 expected"),
        (Finetune(stop_metric="SPICE"), "stop_metric: 'SPICE' found"),
        (Finetune(label_smoothing=2), "label_smoothing: 2 found, a number from 0 to 1 expected"),
        (Finetune(data_folder="nowhere"), "no such file"),
        (Finetune(resume=True, output_folder="nowhere"), "nowhere/training.pth: no such file"),
        (Eval(beam_sizes=(0,)), "beam_sizes: 0 found"),
        (Eval(split=("DEV",)), "split: 'DEV' found"),
        (Caption(("photo.jpg",), normalisation="words"), "normalisation: 'words' found"),
        (Caption(("photo.jpg",), output="captions.txt"), "output: 'captions.txt' found"),
        (New(image_size=100), "image_size: 100 found, a multiple of patch_size (16) expected"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(config)


def test_a_caption_longer_than_the_model_can_write_is_refused(small, images):
    with pytest.raises(UserError, match="max_length: 64 found, at most 63 expected"):
        small.search(images, max_length=64)


def test_nothing_else_needs_transformers():
    root = Path(blip.__file__).parent
    for path in [*root.glob("*.py"), *root.glob("captioning/**/*.py")]:
        if path.name != "blip.py" and path.parent.name != "blip":
            imports = re.findall(
                r"^\s*(?:import|from) (?:transformers|huggingface_hub|blip|captioning.blip)", path.read_text(), re.M
            )
            assert not imports, f"{path.name}: {imports}"
