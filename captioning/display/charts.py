"""Charts of numbers: how long captions are, and how far a model's confidence can be trusted."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from captioning.display.palette import ATTENTION, ENCODER, GREY


def length_histogram(lengths, max_len):
    """
    Draw how long captions are.

    :param lengths: dict of split -> the lengths of its captions, in words
    :param max_len: longest caption that is kept; those of twice the length and more are drawn as one
    :return: Figure
    """
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="words per caption", ylabel="captions")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    longest = min(max(map(max, lengths.values())), 2 * max_len)
    for split, values in lengths.items():
        counts = np.bincount(np.minimum(values, longest), minlength=longest + 1)
        axes.plot(np.arange(longest + 1), counts, drawstyle="steps-mid", label=split)
    axes.legend()
    return figure


def reliability_diagram(confidences, accuracies, counts, title):
    """
    Draw how far the model's confidence can be trusted (Guo et al. 2017, figure 1), and how often it has which.

    :param confidences: (B,) mean confidence in each of B equally wide bins from 0 to 1; any number in an empty bin
    :param accuracies: (B,) share of right predictions in each bin
    :param counts: (B,) predictions in each bin
    :param title: what was measured
    :return: Figure; its expected calibration error is their equation 3
    """
    confidences, accuracies, counts = (np.asarray(x, dtype=float) for x in (confidences, accuracies, counts))
    filled = counts > 0
    edges = np.linspace(0, 1, len(counts) + 1)[:-1][filled]
    confidences, accuracies, share = confidences[filled], accuracies[filled], counts[filled] / counts.sum()
    error = np.sum(share * np.abs(accuracies - confidences))
    width = 1 / len(counts)

    figure = Figure(figsize=(5, 6), layout="constrained")
    top, bottom = figure.subplots(2, height_ratios=(1, 3), sharex=True)
    top.bar(edges, share, width, align="edge", color=GREY, edgecolor="white")
    top.axvline(np.sum(share * confidences), color=ATTENTION, linestyle="--", label="mean confidence")
    top.axvline(np.sum(share * accuracies), color=ENCODER, label="accuracy")
    top.set(title=title, ylabel="share")
    top.legend(frameon=False, fontsize=9)
    bottom.bar(edges, accuracies, width, align="edge", color=ENCODER, edgecolor="white", label="accuracy")
    bottom.bar(
        edges, confidences - accuracies, width, accuracies, align="edge",
        color="none", edgecolor=ATTENTION, hatch="///", linewidth=0, label="gap to the confidence",
    )  # fmt: skip
    bottom.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    bottom.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    bottom.legend(frameon=False, loc="upper left", title=f"expected calibration error {error:.3f}")
    return figure
