"""A page of captions says what it was given and cannot be broken by it. (How it behaves: test_pages_in_browser.py.)"""

import base64
import io
import json
import re

import numpy as np
import pytest
import skimage.data
from page_samples import METRICS, bump, drawn_photos
from PIL import Image

from captioning.display.html_page import PageCaption, PagePhoto, build_page, write_page
from utils import UserError


def content(page):
    """What the page's script will read."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def weights_of(attention):
    """(T, P) bytes of a caption's attention."""
    return np.frombuffer(base64.b64decode(attention["weights"]), np.uint8).reshape(-1, attention["side"] ** 2)


def test_the_page_holds_every_word_and_number_that_it_was_given():
    photos = drawn_photos(3, ("soft", "adaptive"))
    data = content(build_page(photos, "title"))
    assert data["models"] == ["soft", "adaptive"]
    assert data["metrics"] == list(METRICS)
    for photo, row in zip(photos, data["photos"], strict=True):
        assert row["name"] == photo.file_name
        assert row["references"] == [" ".join(words) for words in photo.references]
        for caption, told in zip(photo.captions, row["captions"], strict=True):
            assert told["words"] == caption.words
            assert told["logProb"] == pytest.approx(caption.log_prob, abs=1e-4)
            assert told["scores"] == pytest.approx([caption.scores[metric] for metric in METRICS], abs=1e-4)


def test_a_photo_is_in_the_page_once_as_a_small_jpeg():
    image = skimage.data.astronaut()  # 512 x 512
    page = build_page([PagePhoto("a.png", image, [PageCaption("m", ["a"]), PageCaption("n", ["b"])])], "title")
    [row] = content(page)["photos"]
    assert page.count(row["jpeg"]) == 1
    jpeg = Image.open(io.BytesIO(base64.b64decode(row["jpeg"])))
    assert (jpeg.format, jpeg.size) == ("JPEG", (256, 256))
    smaller = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(np.asarray(jpeg) - smaller).mean() < 5


def test_a_photo_keeps_its_shape_and_is_never_enlarged():
    wide = np.zeros((100, 400, 3), np.uint8)
    small = np.zeros((20, 30, 3), np.uint8)
    rows = content(build_page([PagePhoto("w", wide, []), PagePhoto("s", small, [])], "title", photo_size=200))["photos"]
    assert [Image.open(io.BytesIO(base64.b64decode(row["jpeg"]))).size for row in rows] == [(200, 50), (30, 20)]


def test_attention_is_a_byte_per_location_and_can_be_read_back():
    alphas = np.random.default_rng(0).dirichlet(np.ones(49), size=4)  # (T, P)
    [row] = content(
        build_page([PagePhoto("a", np.zeros((8, 8, 3), np.uint8), [PageCaption("m", list("wxyz"), alphas)])], "t")
    )["photos"]
    attention = row["captions"][0]["attention"]
    assert attention["side"] == 7
    assert attention["betas"] is None  # all attention is on the photo
    back = weights_of(attention) / 255 * np.array(attention["peaks"])[:, None]
    assert np.abs(back - alphas).max() < alphas.max() / 400  # half a step of 255, and the peak's rounding


def test_what_attention_lacks_to_one_is_beta():
    alphas = np.stack([bump(3, 3, share=0.25), bump(9, 9, share=1.0), np.zeros(196)])
    photo = PagePhoto("a", np.zeros((8, 8, 3), np.uint8), [PageCaption("adaptive", list("abc"), alphas)])
    attention = content(build_page([photo], "t"))["photos"][0]["captions"][0]["attention"]
    assert attention["betas"] == pytest.approx([0.75, 0, 1], abs=1e-3)
    assert weights_of(attention).max(axis=1).tolist() == [255, 255, 0]  # a word that did not look at all stays dark


def test_half_precision_attention_has_no_beta():
    alphas = np.random.default_rng(0).dirichlet(np.ones(196), size=3).astype(np.float16)
    photo = PagePhoto("a", np.zeros((8, 8, 3), np.uint8), [PageCaption("m", list("abc"), alphas)])
    assert content(build_page([photo], "t"))["photos"][0]["captions"][0]["attention"]["betas"] is None


def test_the_row_of_end_is_left_out_and_any_other_mismatch_is_refused():
    image = np.zeros((8, 8, 3), np.uint8)
    alphas = np.random.default_rng(0).dirichlet(np.ones(9), size=4)
    photo = PagePhoto("a", image, [PageCaption("m", ["a", "b", "c"], alphas)])
    assert weights_of(content(build_page([photo], "t"))["photos"][0]["captions"][0]["attention"]).shape == (3, 9)
    empty = PagePhoto("a", image, [PageCaption("m", [], alphas[:1])])  # <end> came first
    assert weights_of(content(build_page([empty], "t"))["photos"][0]["captions"][0]["attention"]).shape == (0, 9)
    with pytest.raises(ValueError, match="2 words do not fit attention for 4"):
        build_page([PagePhoto("a", image, [PageCaption("m", ["a", "b"], alphas)])], "t")
    with pytest.raises(ValueError, match="square"):
        build_page([PagePhoto("a", image, [PageCaption("m", ["a", "b"], alphas[:2, :8])])], "t")


def test_numbers_that_json_cannot_hold_are_left_out():
    caption = PageCaption("m", ["a"], log_prob=float("-inf"), scores={"BLEU-4": float("nan"), "CIDEr": 1.5})
    page = build_page([PagePhoto("a", np.zeros((8, 8, 3), np.uint8), [caption])], "t")
    [told] = content(page)["photos"][0]["captions"]
    assert (told["logProb"], told["scores"]) == (None, [None, 1.5])


def test_a_generator_of_photos_will_do_and_nothing_given_is_changed():
    photos = drawn_photos(3)
    assert build_page((photo for photo in photos), "title") == build_page(photos, "title")
    assert all(photo.image.shape == (256, 256, 3) for photo in photos)


def test_a_photo_may_lack_a_model_but_not_have_it_twice():
    image = np.zeros((8, 8, 3), np.uint8)
    photos = [PagePhoto("a", image, [PageCaption("m", ["x"])]), PagePhoto("b", image, [PageCaption("n", ["y"])])]
    rows = content(build_page(photos, "t"))["photos"]
    assert [[bool(caption) for caption in row["captions"]] for row in rows] == [[True, False], [False, True]]
    with pytest.raises(ValueError, match="two captions"):
        build_page([PagePhoto("a", image, [PageCaption("m", ["x"]), PageCaption("m", ["y"])])], "t")


def test_no_photos_are_an_error():
    with pytest.raises(ValueError, match="none to show"):
        build_page([], "title")


def test_nothing_can_break_out_of_its_place(tmp_path):
    evil = "</script><script>window.hacked = 1</script><img src=x onerror=hacked=1>{{ 7 * 7 }}"
    page = build_page(
        [PagePhoto(evil, np.zeros((8, 8, 3), np.uint8), [PageCaption(evil, [evil])], [[evil]])], evil, [evil]
    )
    assert "<script>window" not in page
    assert "<img src=x" not in page
    assert "49" not in re.sub(r'id="data">.*?</script>|sha256-[^\']*', "", page, flags=re.DOTALL)
    data = content(page)
    assert data["models"] == [data["photos"][0]["name"]] == data["photos"][0]["references"] == [evil]


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_page(path, drawn_photos(1), "one")
    before = path.read_bytes()
    good, bad = drawn_photos(2)
    bad.image = bad.image.astype(float)
    with pytest.raises(ValueError, match="uint8"):
        write_page(path, [good, bad], "two")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_only_an_html_file_is_written(tmp_path):
    with pytest.raises(UserError, match=r"page\.txt: '\.txt' found"):
        write_page(tmp_path / "page.txt", drawn_photos(1), "title")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_page(tmp_path / "folder.html", drawn_photos(1), "title")


def test_names_that_are_no_unicode_text_do_not_stop_the_page(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    photo = PagePhoto(name, np.zeros((8, 8, 3), np.uint8), [PageCaption("m", ["a"])])
    write_page(tmp_path / "page.html", [photo], name)
    assert content((tmp_path / "page.html").read_text(encoding="utf-8"))["photos"][0]["name"] == name
