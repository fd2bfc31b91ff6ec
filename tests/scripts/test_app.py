"""app.py captions a photo that is dropped on its page, and says in one sentence what is wrong with another file."""

import numpy as np
import pytest
from PIL import Image
from saved_model import save_model

pytest.importorskip("gradio", reason="gradio is not installed (requirements-app.txt)")

from app import Config, build_app, caption_photo, load_models, show_captions  # noqa: E402


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("soft", "other")):
        save_model(folder / f"{name}.pth", seed)
    return load_models([folder / "soft.pth", folder / "other.pth"], "cpu")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_each_model_captions_the_photo_with_probability_and_attention(models, photo):
    captioned = caption_photo(models, photo)
    assert [caption.model for caption in captioned.captions] == ["soft", "other"]
    for caption in captioned.captions:
        assert caption.log_prob < 0
        assert caption.alphas is None or len(caption.alphas) == len(caption.words)
    height, width, _ = captioned.image.shape
    assert width == 64 and height in (42, 43)


def test_a_model_without_attention_captions_the_photo(tmp_path, photo):
    save_model(tmp_path / "blind.pth", 0, decoder="show_tell", attention_dim=512)
    [caption] = caption_photo(load_models([tmp_path / "blind.pth"], "cpu"), photo, beam_size=2).captions
    assert caption.words and caption.alphas is None


@pytest.mark.parametrize("sample", [False, True])
def test_several_captions_come_best_first(models, photo, sample):
    captions = caption_photo(models[:1], photo, beam_size=4, n_best=3, sample=sample).captions
    log_probs = [caption.log_prob for caption in captions]
    assert len(log_probs) == 3
    assert log_probs == sorted(log_probs, reverse=True)


def test_a_low_temperature_draws_what_greedy_choice_writes(models, photo):
    [drawn] = caption_photo(models[:1], photo, sample=True, temperature=0.001).captions
    [greedy] = caption_photo(models[:1], photo, beam_size=1).captions
    assert drawn.words == greedy.words


def test_a_file_that_is_no_photo_gives_one_sentence_with_its_name_alone(models, tmp_path):
    broken = tmp_path / "<b>.jpg"
    broken.write_bytes(b"no photo")
    shown = show_captions(models, broken)
    assert shown.startswith('<p role="alert">&lt;b&gt;.jpg: cannot be read as a photo (')
    assert str(tmp_path) not in shown


def test_without_a_photo_nothing_is_shown(models):
    assert show_captions(models, None) == ""


def test_only_this_computer_may_open_the_page_and_nothing_is_reported(models):
    assert Config().host == "127.0.0.1"
    app = build_app(models)
    assert not app.analytics_enabled
    assert app.delete_cache == (600, 600)
