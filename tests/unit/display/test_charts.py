"""Charts show the numbers that they are given."""

import numpy as np

from captioning.display.charts import length_histogram, reliability_diagram


def test_length_histogram_has_a_line_for_each_split_and_gathers_what_is_far_too_long():
    axes = length_histogram({"TRAIN": [3, 3, 5], "VAL": [4, 99]}, 10).axes[0]
    train, val = (line.get_ydata() for line in axes.lines)
    assert train[[3, 5]].tolist() == [2, 1] and train.sum() == 3
    assert val[[4, 20]].tolist() == [1, 1] and len(val) == 21


def test_reliability_diagram_states_the_expected_calibration_error():
    figure = reliability_diagram([np.nan, 0.5, 0.9], [np.nan, 0.4, 0.6], [0, 30, 10], "t")
    top, bottom = figure.axes
    assert bottom.get_legend().get_title().get_text().endswith(f"{0.75 * 0.1 + 0.25 * 0.3:.3f}")
    assert [(round(bar.get_x(), 3), bar.get_height()) for bar in top.patches] == [(0.333, 0.75), (0.667, 0.25)]


def test_lengths_on_the_axis_are_whole_numbers():
    axes = length_histogram({"TRAIN": [1, 2, 3]}, 3).axes[0]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
