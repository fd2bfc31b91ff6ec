"""Attention lies where it belongs on the photo, pictures are whole files, and no screen is needed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drawn_pictures import PHOTO, pictures
from matplotlib.figure import Figure
from PIL import Image

from captioning.display import figures
from utils import UserError

WORDS = ["a", "dog", "runs"]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize("side", [1, 2, 7, 8, 14, 64])
@pytest.mark.parametrize("size", [(56, 56), (60, 90), (17, 5)])
def test_unsmoothed_attention_gives_each_pixel_the_weight_of_its_cell(side, size):
    alpha = np.random.default_rng(0).random((side, side))
    plain = [[alpha[y * side // size[0], x * side // size[1]] for x in range(size[1])] for y in range(size[0])]
    np.testing.assert_array_equal(figures.upscale_attention(alpha, size, smooth=False), plain)


@pytest.mark.parametrize("side", [1, 2, 7, 8, 14, 64])
@pytest.mark.parametrize("size", [(56, 56), (60, 90), (17, 5)])
def test_smooth_attention_has_the_photos_size_and_stays_within_the_weights(side, size):
    alpha = np.random.default_rng(0).random((side, side)).astype(np.float32)
    light = figures.upscale_attention(alpha, size)
    assert light.shape == size
    assert light.min() >= alpha.min() - 1e-6
    assert light.max() <= alpha.max() + 1e-6


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (100, 61)])
def test_attention_on_one_cell_lights_that_part_of_the_photo(smooth, size):
    for row, column in [(0, 0), (3, 5), (7, 7), (4, 0)]:
        alpha = np.zeros((8, 8))
        alpha[row, column] = 1
        light = figures.upscale_attention(alpha, size, smooth)
        ys, xs = np.mgrid[: size[0], : size[1]]
        inside = slice(None) if 0 < row < 7 and 0 < column < 7 else None
        y, x = (light * (ys + 0.5)).sum() / light.sum(), (light * (xs + 0.5)).sum() / light.sum()
        slack = 0.15 if inside else 0.5  # in cells; at the rim the blending can only go inwards
        assert y / size[0] * 8 == pytest.approx(row + 0.5, abs=slack)
        assert x / size[1] * 8 == pytest.approx(column + 0.5, abs=slack)


def test_spotlight_keeps_the_photo_where_the_light_is_and_takes_colour_and_light_elsewhere():
    image = np.tile(np.array([200, 100, 0], dtype=np.uint8), (1, 2, 1))
    np.testing.assert_array_equal(figures.spotlight(image, np.array([[0.02, 0]])), [[[200, 100, 0], [30, 30, 30]]])


def test_spotlight_without_any_light_is_dim_everywhere():
    assert figures.spotlight(PHOTO, np.zeros((60, 90))).max() < 200


def test_attention_figure_has_the_photo_and_a_lit_panel_for_each_word():
    alphas = np.zeros((3, 2, 2))
    alphas[0, 0, 0] = alphas[1, 0, 1] = alphas[2, 1, 0] = 1
    figure = figures.attention_figure(PHOTO, WORDS, alphas, smooth=False)
    photo, *panels = pictures(figure)
    np.testing.assert_array_equal(photo, PHOTO)
    assert titles(figure)[1:] == WORDS
    for panel, (y, x) in zip(panels, [(0, 0), (0, 45), (30, 0)], strict=True):
        lit = panel[:, :, 0] == 200
        assert lit[y : y + 30, x : x + 45].all()
        assert lit.sum() == 30 * 45


def test_flat_and_square_attention_make_the_same_figure():
    alphas = np.random.default_rng(0).random((3, 4, 4))
    flat = figures.attention_figure(PHOTO, WORDS, alphas.reshape(3, 16))
    square = figures.attention_figure(PHOTO, WORDS, alphas)
    for one, other in zip(pictures(flat), pictures(square), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 2), (5, 1, 6), (6, 2, 4), (12, 3, 5), (17, 3, 6), (30, 6, 6)]
)
def test_panels_fill_rows_of_at_most_six_evenly(count, rows, columns):
    figure = figures.attention_figure(PHOTO, ["word"] * count, np.ones((count, 4)))
    assert figure.axes[0].get_gridspec().get_geometry() == (rows, columns)
    assert len(pictures(figure)) == count + 1


def test_betas_stand_above_the_panels():
    figure = figures.attention_figure(PHOTO, WORDS, np.ones((3, 4)), betas=np.array([0.1, 0.92, 0.5]))
    assert titles(figure)[1:] == ["a\nβ = 0.10", "dog\nβ = 0.92", "runs\nβ = 0.50"]


def test_a_model_without_attention_gets_the_photo_and_its_caption(tmp_path):
    figure = figures.attention_figure(PHOTO, WORDS, None)
    assert len(pictures(figure)) == 1
    assert titles(figure) == ["a dog runs"]


@pytest.mark.parametrize("alphas", [None, np.ones((3, 4))])
def test_words_with_dollar_signs_are_drawn_as_they_are(tmp_path, alphas):
    figure = figures.attention_figure(PHOTO, ["$\\frac$", "$", "averylongcompoundnoun" * 2], alphas)
    figures.save_figure(figure, tmp_path / "a.png")


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
        figures.attention_figure(PHOTO, words, alphas, betas=betas)


@pytest.mark.parametrize("image", [PHOTO[:, :, 0], PHOTO / 255, PHOTO.transpose(2, 0, 1)])
def test_a_photo_of_the_wrong_kind_is_refused(image):
    with pytest.raises(ValueError, match=r"image: found .* expected uint8 of shape \(H, W, 3\)"):
        figures.attention_figure(image, WORDS, np.ones((3, 4)))


def test_length_histogram_has_a_line_for_each_split_and_gathers_what_is_far_too_long():
    axes = figures.length_histogram({"TRAIN": [3, 3, 5], "VAL": [4, 99]}, 10).axes[0]
    train, val = (line.get_ydata() for line in axes.lines)
    assert train[[3, 5]].tolist() == [2, 1] and train.sum() == 3
    assert val[[4, 20]].tolist() == [1, 1] and len(val) == 21


def test_reliability_diagram_states_the_expected_calibration_error():
    figure = figures.reliability_diagram([np.nan, 0.5, 0.9], [np.nan, 0.4, 0.6], [0, 30, 10], "t")
    top, bottom = figure.axes
    assert bottom.get_legend().get_title().get_text().endswith(f"{0.75 * 0.1 + 0.25 * 0.3:.3f}")
    assert [(round(bar.get_x(), 3), bar.get_height()) for bar in top.patches] == [(0.333, 0.75), (0.667, 0.25)]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".SVG", b"<?xml")])
def test_saving_writes_the_format_of_the_suffix(tmp_path, suffix, start):
    path = tmp_path / "folder" / f"picture{suffix}"
    figures.save_figure(figures.length_histogram({"TRAIN": [1, 2]}, 5), path)
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["picture.xyz", "picture"])
def test_saving_refuses_a_suffix_that_is_no_picture(tmp_path, name):
    with pytest.raises(UserError, match=r"not a picture format; use \.png"):
        figures.save_figure(figures.length_histogram({"TRAIN": [1, 2]}, 5), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def half(self, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(UserError, match="No space left"):
        figures.save_figure(figures.length_histogram({"TRAIN": [1, 2]}, 5), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a window would open")
@pytest.mark.parametrize("environment", [{}, {"MPLBACKEND": "agg"}, {"MPLBACKEND": "tkagg"}, {"DISPLAY": ":987"}])
def test_without_a_screen_the_figure_is_saved_and_pyplot_untouched_before(tmp_path, environment):
    code = """
import sys
from captioning.display import figures
figure = figures.length_histogram({"TRAIN": [1, 2]}, 5)
assert "matplotlib.pyplot" not in sys.modules
assert figures.show_or_save(figure, "picture.png") == "picture.png"
assert sys.modules["matplotlib.pyplot"].get_fignums() == []
"""
    home = Path(figures.__file__).parents[2]
    environment = {"PYTHONPATH": str(home), "HOME": str(tmp_path), "PATH": "", **environment}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment, cwd=tmp_path)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (1050, 525)


def test_with_a_screen_the_figure_is_shown_and_not_saved(tmp_path, monkeypatch):
    from matplotlib import pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    pyplot.switch_backend("agg")
    shown = []
    monkeypatch.setattr(FigureCanvasAgg, "required_interactive_framework", "a window system")
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.get_current_fig_manager().canvas.figure))
    figure = figures.length_histogram({"TRAIN": [1, 2]}, 5)
    assert figures.show_or_save(figure, tmp_path / "picture.png") is None
    pyplot.close("all")
    assert shown == [figure]
    assert list(tmp_path.iterdir()) == []
