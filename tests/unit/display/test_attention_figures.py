"""Attention lies where it belongs on the photo."""

import numpy as np
import pytest
from drawn_pictures import PHOTO, pictures
from matplotlib import font_manager
from matplotlib.text import Text

from captioning.display.attention_figures import attention_figure, spotlight, upscale_attention
from captioning.display.figure_files import save_figure

WORDS = ["a", "dog", "runs"]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize("side", [1, 2, 7, 8, 14, 64])
@pytest.mark.parametrize("size", [(56, 56), (60, 90), (17, 5)])
def test_unsmoothed_attention_gives_each_pixel_the_weight_of_its_location(side, size):
    alpha = np.random.default_rng(0).random((side, side))
    plain = [[alpha[y * side // size[0], x * side // size[1]] for x in range(size[1])] for y in range(size[0])]
    np.testing.assert_array_equal(upscale_attention(alpha, size, smooth=False), plain)


@pytest.mark.parametrize("side", [1, 2, 7, 8, 14, 64])
@pytest.mark.parametrize("size", [(56, 56), (60, 90), (17, 5)])
def test_smooth_attention_has_the_photos_size_and_stays_within_the_weights(side, size):
    alpha = np.random.default_rng(0).random((side, side)).astype(np.float32)
    light = upscale_attention(alpha, size)
    assert light.shape == size
    assert light.min() >= alpha.min() - 1e-6
    assert light.max() <= alpha.max() + 1e-6


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (100, 61)])
def test_attention_on_one_location_lights_that_part_of_the_photo(smooth, size):
    for row, column in [(0, 0), (3, 5), (7, 7), (4, 0)]:
        alpha = np.zeros((8, 8))
        alpha[row, column] = 1
        light = upscale_attention(alpha, size, smooth)
        ys, xs = np.mgrid[: size[0], : size[1]]
        inside = slice(None) if 0 < row < 7 and 0 < column < 7 else None
        y, x = (light * (ys + 0.5)).sum() / light.sum(), (light * (xs + 0.5)).sum() / light.sum()
        slack = 0.15 if inside else 0.5  # in locations; at the rim the blending can only go inwards
        assert y / size[0] * 8 == pytest.approx(row + 0.5, abs=slack)
        assert x / size[1] * 8 == pytest.approx(column + 0.5, abs=slack)


def test_spotlight_keeps_the_photo_where_the_light_is_and_takes_colour_and_light_elsewhere():
    image = np.tile(np.array([200, 100, 0], dtype=np.uint8), (1, 2, 1))
    np.testing.assert_array_equal(spotlight(image, np.array([[0.02, 0]])), [[[200, 100, 0], [30, 30, 30]]])


def test_spotlight_without_any_light_is_dim_everywhere():
    assert spotlight(PHOTO, np.zeros((60, 90))).max() < 200


def test_attention_figure_has_the_photo_and_a_lit_panel_for_each_word():
    alphas = np.zeros((3, 2, 2))
    alphas[0, 0, 0] = alphas[1, 0, 1] = alphas[2, 1, 0] = 1
    figure = attention_figure(PHOTO, WORDS, alphas, smooth=False)
    photo, *panels = pictures(figure)
    np.testing.assert_array_equal(photo, PHOTO)
    assert titles(figure)[1:] == WORDS
    for panel, (y, x) in zip(panels, [(0, 0), (0, 45), (30, 0)], strict=True):
        lit = panel[:, :, 0] == 200
        assert lit[y : y + 30, x : x + 45].all()
        assert lit.sum() == 30 * 45


def test_flat_and_square_attention_make_the_same_figure():
    alphas = np.random.default_rng(0).random((3, 4, 4))
    flat = attention_figure(PHOTO, WORDS, alphas.reshape(3, 16))
    square = attention_figure(PHOTO, WORDS, alphas)
    for one, other in zip(pictures(flat), pictures(square), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 2), (5, 1, 6), (6, 2, 4), (12, 3, 5), (17, 3, 6), (30, 6, 6)]
)
def test_panels_fill_rows_of_at_most_six_evenly(count, rows, columns):
    figure = attention_figure(PHOTO, ["word"] * count, np.ones((count, 4)))
    assert figure.axes[0].get_gridspec().get_geometry() == (rows, columns)
    assert len(pictures(figure)) == count + 1


def test_betas_stand_above_the_panels():
    figure = attention_figure(PHOTO, WORDS, np.ones((3, 4)), betas=np.array([0.1, 0.92, 0.5]))
    assert titles(figure)[1:] == ["a\nβ = 0.10", "dog\nβ = 0.92", "runs\nβ = 0.50"]


def test_a_model_without_attention_gets_the_photo_and_its_caption(tmp_path):
    figure = attention_figure(PHOTO, WORDS, None)
    assert len(pictures(figure)) == 1
    assert titles(figure) == ["a dog runs"]


@pytest.mark.parametrize("alphas", [None, np.ones((3, 4))])
def test_words_with_dollar_signs_are_drawn_as_they_are(tmp_path, alphas):
    figure = attention_figure(PHOTO, ["$\\frac$", "$", "averylongcompoundnoun" * 2], alphas)
    save_figure(figure, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("words", "alphas", "betas"),
    [
        (WORDS, np.ones((2, 4)), None),
        (WORDS, np.ones((3, 4)), [0.5]),
        (WORDS, np.ones((3, 5)), None),
        (WORDS, np.ones((3, 2, 3)), None),
        (WORDS, np.ones(3), None),
    ],
)
def test_attention_that_does_not_fit_is_refused(words, alphas, betas):
    with pytest.raises(ValueError, match="shape"):
        attention_figure(PHOTO, words, alphas, betas=betas)


@pytest.mark.parametrize("image", [PHOTO[:, :, 0], PHOTO / 255, PHOTO.transpose(2, 0, 1)])
def test_a_photo_of_the_wrong_kind_is_refused(image):
    with pytest.raises(ValueError, match=r"image: found .* expected uint8 of shape \(H, W, 3\)"):
        attention_figure(image, WORDS, np.ones((3, 4)))


def test_even_attention_stays_even_and_dim_and_each_panel_says_its_peak():
    alphas = np.stack([np.full(16, 1 / 16), np.eye(16)[5], np.linspace(0.9, 1.1, 16) / 16])
    figure = attention_figure(PHOTO, WORDS, alphas, smooth=False)
    _, even, sharp, nearly = (panel.astype(float) for panel in pictures(figure))
    assert np.ptp(even) == 0 and even.max() < 130  # of 200
    assert sharp.max() == 200
    assert np.ptp(nearly) < 20
    assert [axes.get_xlabel() for axes in figure.axes[1:]] == [
        "up to 1.0 × the mean", "up to 16.0 × the mean", "up to 1.1 × the mean",
    ]  # fmt: skip


def test_characters_that_no_font_has_are_named_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    attention_figure(PHOTO, ["狗"], np.full((1, 4), 0.25))
    assert "no font on this computer has 狗" in capsys.readouterr().err
    attention_figure(PHOTO, ["dog"], np.full((1, 4), 0.25))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("attention", [True, False])
def test_words_that_are_no_unicode_text_are_drawn_with_substitutes(tmp_path, attention):
    image = np.zeros((8, 8, 3), np.uint8)
    figure = attention_figure(image, ["half\ud800", "\x1b[31mred"], np.full((2, 4), 0.25) if attention else None)
    figure.savefig(tmp_path / "figure.png")
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any("half\ufffd" in text for text in texts) and not any("\x1b" in text for text in texts)
