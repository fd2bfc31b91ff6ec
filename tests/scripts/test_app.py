"""app.py captions a photo that is dropped on its page, and says in one sentence what is wrong with another file."""

import math
import socket
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saved_model import save_model

gradio = pytest.importorskip("gradio", reason="gradio is not installed (requirements-app.txt)")

from app import Config, build_app, caption_photo, load_models, serve, show_captions, uploaded_file  # noqa: E402
from captioning.config_fields import check_fields  # noqa: E402
from utils import UserError  # noqa: E402


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


@pytest.mark.parametrize(
    "settings, found",
    [((0,), "beam_size: 0"), ((10**6,), "beam_size: 1000000"), ((2.5,), "beam_size: 2.5"), (("5",), "beam_size: "),
     ((math.nan,), "beam_size: nan"), ((None,), "beam_size: None"), (([5],), "beam_size: "),
     ((5, -1), "n_best: -1"),
     ((5, 10**6, True), "n_best: 1000000"), ((5, 1.5, True), "n_best: 1.5"), ((5, 1, "yes"), "sample: "),
     ((5, 1, True, math.nan), "temperature: nan"), ((5, 1, True, None), "temperature: None"),
     ((5, 1, False, 1e-320), "temperature: 1e-320")],
)  # fmt: skip
def test_a_setting_that_the_page_cannot_make_gives_one_sentence(models, photo, settings, found):
    shown = show_captions(models, photo, *settings)
    assert shown.startswith(f'<p role="alert">{found}') and "expected</p>" in shown


def test_only_photos_that_were_uploaded_are_shown(tmp_path):
    folder, outside = tmp_path / "uploads", tmp_path / "outside.png"
    (folder / "1").mkdir(parents=True)
    outside.touch()
    (folder / "link.png").symlink_to(outside)
    upload = types.SimpleNamespace(path=str(folder / "1/photo.png"))
    assert uploaded_file(upload, folder) == upload.path
    assert uploaded_file(None, folder) is None
    for path in (outside, folder / "../outside.png", folder / "link.png", "nul\0.png", "x" * 5000, Path("/")):
        with pytest.raises(gradio.Error, match="was not uploaded"):
            uploaded_file(types.SimpleNamespace(path=str(path)), folder)


def test_the_page_passes_on_no_photo_from_elsewhere_and_its_settings_as_they_are(models, photo):
    components = {
        component.label: component for component in build_app(models).blocks.values() if hasattr(component, "label")
    }
    with pytest.raises(gradio.Error, match="was not uploaded"):
        components["Photo"].preprocess(types.SimpleNamespace(path=str(photo)))
    assert components["Beam size"].preprocess("many") == "many"
    beam_size, n_best = components["Beam size"].maximum, components["Captions of each model"].maximum
    assert len(caption_photo(models[:1], photo, beam_size, n_best).captions) == n_best


def test_a_photo_of_hundreds_of_megapixels_or_with_damaged_notes_is_shown(models, tmp_path):
    Image.new("L", (16000, 12000)).save(tmp_path / "large.jpg")
    Image.new("RGB", (40, 30)).save(tmp_path / "notes.png", exif=b"Exif\0\0no TIFF file")
    for name in ("large.jpg", "notes.png"):
        assert caption_photo(models[:1], tmp_path / name, 1).image.shape == (48, 64, 3)


def test_a_port_that_no_computer_has_is_refused():
    with pytest.raises(UserError, match="port: 70000 found, a whole number from 1 to 65,535 expected"):
        check_fields(Config(port=70000))


def test_without_a_photo_nothing_is_shown(models):
    assert show_captions(models, None) == ""


def test_the_pages_address_is_told(models, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = build_app(models)
    serve(app, Config(port=port), wait=False)
    app.close()
    assert f"Open http://127.0.0.1:{port}/ in a browser; Ctrl-C here ends it" in capsys.readouterr().out


def test_only_this_computer_may_open_the_page_and_nothing_is_reported(models):
    assert Config().host == "127.0.0.1"
    app = build_app(models)
    assert not app.analytics_enabled
    assert app.delete_cache == (600, 600)
