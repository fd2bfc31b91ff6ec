"""
Pictures: attention panels, histograms, reliability diagrams. (The drawings that explain the model: drawings.py.)

No function here knows a model; they take arrays and words, and return a matplotlib `Figure`. Nothing touches pyplot,
which picks a window system for the whole process, until a window is really opened in `show_or_save`.
"""

import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from skimage.transform import pyramid_expand, resize

from captioning.storage.files import atomic_path
from utils import UserError

# One colour for one idea, in every drawing (after Okabe and Ito: told apart by the colour-blind too).
ENCODER, ATTENTION, LSTM, WORD, GREY = "#0072B2", "#D55E00", "#009E73", "#A8528C", "#6B6B6B"
PANELS_A_ROW = 6


def attention_figure(image, words, alphas, smooth=True, betas=None):
    """
    Draw where the model looked for each word (Xu et al. 2015, figure 3): the photo, then one panel a word.

    A panel keeps the photo as it is where the word's attention is highest, and takes light and colour from the rest
    in proportion.

    :param image: (H, W, 3) uint8, the photo as the encoder saw it
    :param words: the caption, a list of T words
    :param alphas: (T, P) or (T, s, s) attention weights, P = s * s; None for a model without attention
    :param smooth: blend between the grid's cells; otherwise every cell is a square
    :param betas: (T,) share of attention that went to the sentinel and not to the photo (Lu et al. 2017), or None
    :return: Figure; without `alphas` it holds the photo and the caption alone
    :raises ValueError: if the shapes do not fit together
    """
    image = check_image(image)
    caption = " ".join(words)
    if alphas is None:
        figure = Figure(figsize=(5, 5 * image.shape[0] / image.shape[1] + 0.5), layout="constrained")
        show_photo(figure.subplots(), image, "\n".join(textwrap.wrap(caption, 48)), fontsize=13)
        return figure
    alphas = square_grids(alphas)  # (T, s, s)
    if len(alphas) != len(words) or (betas is not None and len(betas) != len(words)):
        raise ValueError(f"{len(words)} words do not fit attention of shape {alphas.shape} and the betas")

    rows = math.ceil((len(words) + 1) / PANELS_A_ROW)
    columns = math.ceil((len(words) + 1) / rows)  # as few as will do, so that the last row is fuller
    height = 2.2 * image.shape[0] / image.shape[1] + (0.35 if betas is None else 0.6)
    figure = Figure(figsize=(2.2 * columns, height * rows + 0.4), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(caption, 18 * columns)), fontsize=14, parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    show_photo(next(panels), image, "")
    for t, (word, alpha) in enumerate(zip(words, alphas, strict=True)):
        title = word if betas is None else f"{word}\nβ = {betas[t]:.2f}"
        light = upscale_attention(alpha, image.shape[:2], smooth)  # (H, W)
        show_photo(next(panels), spotlight(image, light), title, fontsize=13 if len(word) < 15 else 9)
    for panel in panels:
        panel.set_axis_off()
    return figure


def upscale_attention(alpha, size, smooth=True):
    """
    Stretch one attention map over the photo, edge to edge.

    :param alpha: (s, s) weights
    :param size: (height, width) of the photo in pixels
    :param smooth: blend between cells; otherwise every pixel has the weight of the cell it lies in
    :return: (height, width) floats
    """
    alpha = np.asarray(alpha, dtype=np.float64)
    if not smooth:
        rows, columns = (np.arange(length) * len(alpha) // length for length in size)
        return alpha[np.ix_(rows, columns)]
    factor = max(2, math.ceil(max(size) / len(alpha)))
    return resize(pyramid_expand(alpha, upscale=factor), size, order=1, anti_aliasing=False)


def spotlight(image, light):
    """
    Light the photo where the attention is: as it is there, dim and grey where there is none.

    :param image: (H, W, 3) uint8
    :param light: (H, W) weights of any scale, at least 0
    :return: (H, W, 3) uint8
    """
    light = (light / max(light.max(), np.finfo(np.float64).tiny))[:, :, None]  # (H, W, 1)
    dim = 0.3 * image.mean(axis=2, keepdims=True)  # (H, W, 1)
    return (light * image + (1 - light) * dim).astype(np.uint8)


def length_histogram(lengths, max_len):
    """
    Draw how long captions are.

    :param lengths: dict of split -> the lengths of its captions, in words
    :param max_len: longest caption that is kept; those of twice the length and more are drawn as one
    :return: Figure
    """
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="words a caption", ylabel="captions")
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


def save_figure(figure, path):
    """
    Write a figure, whole or not at all.

    :param figure: matplotlib Figure
    :param path: file to write; its suffix is the format (.png, .pdf, .svg ...)
    :raises UserError: if the suffix is not a picture format, or the file cannot be written
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path}: '{path.suffix}' is not a picture format; use .png, .pdf or .svg")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)


def show_or_save(figure, path):
    """
    Open a window with the figure and wait until it is closed; where there is no screen, write the file instead.

    :param figure: matplotlib Figure
    :param path: file to write when no window can be opened
    :return: the path if it was written, None if the figure was shown
    :raises UserError: as in `save_figure`
    """
    from matplotlib import pyplot  # here only: it settles on a window system for the whole process

    try:
        window = pyplot.figure(figsize=figure.get_size_inches())
    except Exception:  # each window system has its own way to say that there is no screen
        window = None
    if window is None or window.canvas.required_interactive_framework is None:
        if window:
            pyplot.close(window)
        save_figure(figure, path)
        return path
    canvas = window.canvas
    canvas.figure = figure  # the picture takes the place of pyplot's empty one
    figure.set_canvas(canvas)
    pyplot.show()
    return None


def check_image(image):
    """Give the photo as an array, or a ValueError where it is not (H, W, 3) uint8."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: found {image.dtype} of shape {image.shape}, expected uint8 of shape (H, W, 3)")
    return image


def square_grids(alphas):
    """Give (T, P) or (T, s, s) attention as (T, s, s)."""
    alphas = np.asarray(alphas)
    side = math.isqrt(math.prod(alphas.shape[1:]))
    if alphas.ndim not in (2, 3) or alphas.size != len(alphas) * side * side:
        raise ValueError(f"alphas: found shape {alphas.shape}, expected (T, P) of square grids or (T, s, s)")
    return alphas.reshape(-1, side, side)


def show_photo(axes, image, title, fontsize=11, cmap=None, extent=None):
    """Put a picture into `axes`, without ticks; the title is plain text, whatever signs it holds."""
    axes.imshow(image, cmap=cmap, extent=extent)
    axes.set_title(title, fontsize=fontsize, parse_math=False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
