"""The drawings show the numbers that they are given, and can be saved."""

import numpy as np
import pytest
from drawn_pictures import PHOTO, pictures
from matplotlib.colors import to_rgb
from PIL import Image

from captioning.display import model_diagrams
from captioning.display.charts import reliability_diagram
from captioning.display.figure_files import save_figure
from captioning.display.palette import ATTENTION


def test_encoder_grid_marks_the_location_at_its_place():
    figure = model_diagrams.encoder_grid_figure(PHOTO, size=6, location=(1, 4))
    marked = figure.axes[1].patches[0]
    assert (marked.get_x(), marked.get_y(), marked.get_width(), marked.get_height()) == (59.5, 9.5, 15, 10)
    assert len(figure.axes[1].lines) == 2 * 5


def test_attention_step_shows_the_softmax_of_the_scores():
    scores = np.random.default_rng(0).normal(size=(3, 3))
    pictured = pictures(model_diagrams.attention_step_diagram(PHOTO, scores, "dog"))
    np.testing.assert_array_equal(pictured[1], scores)
    np.testing.assert_allclose(pictured[2], np.exp(scores) / np.exp(scores).sum())


def test_beam_search_tree_marks_the_path_of_the_best_complete_hypothesis():
    steps = [
        [(["a"], -1.0), (["the"], -2.0)],
        [(["a", "dog"], -1.5), (["the", "<end>"], -3.0)],
        [(["a", "dog", "<end>"], -2.5), (["a", "dog", "runs"], -1.6)],
    ]
    axes = model_diagrams.beam_search_tree(steps).axes[0]
    texts = [text for text in axes.texts if text.get_text() and "−" not in text.get_text()]
    drawn = {(text.get_text(), text.get_position()[0]) for text in texts}
    assert drawn == {
        ("<start>", 0.75), ("a", 2.25), ("the", 2.25), ("dog", 3.75), ("<end>", 3.75), ("<end>", 5.25), ("runs", 5.25),
    }  # fmt: skip
    winners = [box for box in axes.patches if box.get_facecolor() == to_rgb(ATTENTION) + (1,)]
    assert sorted(box.get_x() for box in winners) == [1.75, 3.25, 4.75]  # a, dog, <end>
    with pytest.raises(ValueError, match="none"):
        model_diagrams.beam_search_tree([])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: model_diagrams.encoder_grid_figure(PHOTO),
        lambda: model_diagrams.attention_step_diagram(PHOTO, np.eye(3), "$"),
        lambda: model_diagrams.beam_search_tree([[(["$"], -1.0), (["<end>"], -2.0)]]),
        lambda: model_diagrams.architecture_diagram(PHOTO, ["$", "cat"]),
        lambda: reliability_diagram([0.5], [0.2], [3], "t"),
    ],
)
def test_every_drawing_can_be_saved(tmp_path, draw):
    save_figure(draw(), tmp_path / "drawing.png")
    with Image.open(tmp_path / "drawing.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
