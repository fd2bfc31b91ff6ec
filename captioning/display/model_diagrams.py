"""
The drawings that explain the model: the encoder's grid, one step of attention, beam search, the whole architecture.

No function here knows a model; they take arrays and words, and return a matplotlib `Figure`.
"""

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, FancyBboxPatch, Rectangle

from captioning.display.arrays import check_image
from captioning.display.attention_figures import show_photo, spotlight, upscale_attention
from captioning.display.palette import ATTENTION, ENCODER, GREY, LSTM, WORD


def encoder_grid_figure(image, size=14, dimensions=2048, location=None):
    """
    Draw what the encoder makes of a photo: a grid of locations, each described by one vector.

    :param image: (H, W, 3) uint8
    :param size: locations on a side
    :param dimensions: of a location's vector
    :param location: (row, column) of the one that is pulled out, default the middle
    :return: Figure; the vector's colours stand for no real numbers
    """
    image = check_image(image)
    height, width = image.shape[:2]
    row, column = location or (size // 2, size // 2)
    figure = Figure(figsize=(10, 4.4 * max(0.8, height / width)), layout="constrained")
    left, right, vector = figure.subplots(1, 3, width_ratios=(5, 5, 2))
    show_photo(left, image, f"a photo of {width} × {height} pixels", fontsize=13)
    show_photo(right, image, f"becomes {size} × {size} locations", fontsize=13)
    draw_grid(right, image, size)
    top, bottom = ((r * height / size - 0.5) for r in (row, row + 1))
    start, end = ((c * width / size - 0.5) for c in (column, column + 1))
    right.add_patch(
        Rectangle((start, top), end - start, bottom - top, facecolor=(*to_rgb(ATTENTION), 0.4), edgecolor=ATTENTION,
                  linewidth=2.5, zorder=3)
    )  # fmt: skip

    vector.imshow(np.random.default_rng(3).exponential(size=(16, 1)), cmap="Blues", extent=(0.35, 0.65, 0, 1))
    vector.set(xlim=(0, 1), ylim=(0, 1), aspect="auto", xticks=[], yticks=[])
    vector.spines[:].set_visible(False)
    vector.add_patch(Rectangle((0.35, 0), 0.3, 1, fill=False, edgecolor=ATTENTION, linewidth=2.5, clip_on=False))
    vector.set_title("one vector", fontsize=13)
    vector.set_xlabel(f"{dimensions} dimensions\nper location", fontsize=13)
    for corner, y in ((top, 1), (bottom, 0)):
        line = ConnectionPatch((end, corner), (0.35, y), right.transData, vector.transData, color=ATTENTION)
        figure.add_artist(line)
    return figure


def attention_step_diagram(image, scores, word):
    """
    Draw one step of attention: scores, their softmax, and the part of the photo that makes the next word.

    :param image: (H, W, 3) uint8
    :param scores: (s, s) the scores e before the softmax (Xu et al. 2015, equation 4)
    :param word: the word that this step yields
    :return: Figure
    """
    image = check_image(image)
    scores = np.asarray(scores, dtype=np.float64)
    alpha = np.exp(scores - scores.max())
    alpha /= alpha.sum()  # (s, s)
    figure = Figure(figsize=(13, 4))
    panels = figure.subplots(1, 4, gridspec_kw={"wspace": 0.3, "left": 0.02, "right": 0.98, "bottom": 0.24})
    lit = spotlight(image, upscale_attention(alpha, image.shape[:2]))
    pictures = (
        (image, None, "features", r"$a_i$, one vector per location"),
        (scores, "PuOr_r", "scores", r"$e_{ti} = f_{att}(a_i, h_{t-1})$"),
        (alpha, "Oranges", "attention", r"$\alpha_{ti}$ = softmax$_i$($e_{ti}$), sums to 1"),
        (lit, None, f"context, for “{word}”", r"$z_t = \Sigma_i\, \alpha_{ti}\, a_i$"),
    )
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    for panel, (picture, cmap, title, formula) in zip(panels, pictures, strict=True):
        show_photo(panel, picture, title, fontsize=14, cmap=cmap, extent=extent)
        panel.set_xlabel(formula, fontsize=14)
    draw_grid(panels[0], image, len(scores))
    legend = panels[1].inset_axes((0.25, -0.23, 0.5, 0.05))
    figure.colorbar(panels[1].images[0], cax=legend, orientation="horizontal")
    arrow = {"arrowstyle": "-|>", "linewidth": 2, "color": GREY, "mutation_scale": 20}
    for panel in panels[:3]:
        panel.annotate("", (1.27, 0.5), (1.03, 0.5), xycoords="axes fraction", arrowprops=arrow)
    return figure


def beam_search_tree(steps):
    """
    Draw a beam search: every hypothesis that was kept at each step, with its score, and the winner's path.

    :param steps: for each step, a list of (words, score): the words so far, ending with `<end>` once complete, and the
        sum of their log-probabilities; a complete hypothesis is listed at the step where it was completed
    :return: Figure
    :raises ValueError: if there are no steps
    """
    if not steps:
        raise ValueError("steps: there are none to draw")
    complete = [hypothesis for step in steps for hypothesis in step if hypothesis[0][-1] == "<end>"]
    best = tuple(max(complete or steps[-1], key=lambda hypothesis: hypothesis[1])[0])
    rows = max(map(len, steps))
    figure = Figure(figsize=(1.5 * (len(steps) + 1), 0.9 * rows), layout="constrained")
    axes = drawing(figure, 1.5 * (len(steps) + 1), 0.9 * rows)
    places = {(): (0.75, 0.45 * rows)}
    draw_box(axes, places[()], 1, 0.42, "<start>", GREY)
    continued = {tuple(words[:-1]) for step in steps for words, _ in step}
    for t, step in enumerate(steps, start=1):
        ranked = sorted(step, key=lambda hypothesis: -hypothesis[1])
        for rank, (words, score) in enumerate(ranked):
            words = tuple(words)
            parent_x, parent_y = places[words[:-1]]
            x, y = places[words] = (1.5 * t + 0.75, 0.9 * (rows - 0.5 - rank) - 0.45 * (rows - len(ranked)))
            wins = best[:t] == words
            colour = ATTENTION if wins else LSTM if words[-1] == "<end>" else ENCODER
            faint = 1 if colour != ENCODER or words in continued or t == len(steps) else 0.35  # dropped
            draw_arrow(axes, (parent_x + 0.5, parent_y), (x - 0.5, y), ATTENTION if wins else GREY, 1 + 1.4 * wins)
            draw_box(axes, (x, y), 1, 0.42, words[-1], colour, faint)
            axes.text(x, y - 0.33, f"{score:.2f}".replace("-", "−"), ha="center", va="center", fontsize=9, color=GREY)
    return figure


def architecture_diagram(image, words):
    """
    Draw the whole model: encoder, features, and the decoder's first steps (Xu et al. 2015, section 3.1).

    :param image: (H, W, 3) uint8
    :param words: the first words of its caption, about three
    :return: Figure
    """
    image = check_image(image)
    width = 6.9 + 2.6 * len(words)
    figure = Figure(figsize=(width, 5.6), layout="constrained")
    axes = drawing(figure, width, 5.6)
    label = {"ha": "center", "va": "bottom", "fontsize": 13}
    axes.imshow(image, extent=(0.2, 2.2, 2, 4), zorder=2)
    axes.text(1.2, 4.15, "photo", **label)
    for k, tall in enumerate((2, 1.6, 1.2)):  # the blocks of a CNN: ever smaller
        draw_box(axes, (2.95 + 0.4 * k, 3), 0.28, tall, "", ENCODER)
    axes.text(3.35, 4.15, "encoder", color=ENCODER, **label)
    draw_arrow(axes, (2.27, 3), (2.78, 3), ENCODER)
    draw_arrow(axes, (3.93, 3), (4.42, 3), ENCODER)
    for layer in (2, 1, 0):  # the features: a grid of locations with depth
        for row in range(5):
            for column in range(5):
                corner = (4.48 + 0.24 * column + 0.1 * layer, 2.3 + 0.24 * row + 0.1 * layer)
                location = Rectangle(corner, 0.24, 0.24, facecolor="#CFE3F1", edgecolor=ENCODER, linewidth=0.7)
                axes.add_patch(location)
    axes.text(5.15, 4.15, "features $a_i$", color=ENCODER, **label)
    first = 8.0
    xs = [first + 2.6 * t for t in range(len(words))]
    axes.plot([5.1, 5.1, xs[-1]], [2.26, 0.3, 0.3], color=ENCODER, linewidth=1.8)
    draw_box(axes, (first - 1.9, 4.95), 1.2, 0.55, "<start>", WORD)
    draw_arrow(axes, (5.95, 3), (first - 0.65, 3), LSTM, 1.8, "$h_0$")
    for t, (x, word) in enumerate(zip(xs, words, strict=True)):
        draw_box(axes, (x, 1.15), 1.3, 0.6, "attention", ATTENTION)
        draw_box(axes, (x, 3), 1.3, 0.7, "LSTM", LSTM)
        draw_box(axes, (x, 4.95), 1.2, 0.55, word, WORD)
        draw_arrow(axes, (x, 0.3), (x, 0.85), ENCODER, 1.8)
        draw_arrow(axes, (x, 1.45), (x, 2.65), ATTENTION, 1.8, f"$z_{t + 1}$")
        draw_arrow(axes, (x, 3.35), (x, 4.67), LSTM, 1.8)
        before = x - 1.9 if t == 0 else x - 2.6  # where the word before stands, and the state leaves
        draw_arrow(axes, (before + 0.6, 4.8), (x - 0.35, 3.35), WORD, 1.8)
        draw_arrow(axes, (x - 1.5, 3), (x - 0.65, 1.3), LSTM, 1.8)
        if t + 1 < len(words):
            draw_arrow(axes, (x + 0.65, 3), (x + 1.95, 3), LSTM, 1.8, f"$h_{t + 1}$")
    axes.text(xs[-1] + 0.85, 3, "...", fontsize=20, color=LSTM, va="center")
    return figure


def draw_grid(axes, image, size):
    """Draw the lines of size x size locations over the photo in `axes`."""
    for k in range(1, size):
        axes.axvline(k * image.shape[1] / size - 0.5, color="white", linewidth=0.8)
        axes.axhline(k * image.shape[0] / size - 0.5, color="white", linewidth=0.8)


def drawing(figure, width, height):
    """Give axes for a drawing whose units are inches."""
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.set_axis_off()
    return axes


def draw_box(axes, centre, width, height, text, colour, alpha=1):
    """Draw a round-cornered box with a word in it."""
    corner = (centre[0] - width / 2, centre[1] - height / 2)
    box = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.1", alpha=alpha, zorder=3)
    box.set(facecolor=colour, edgecolor="none")
    axes.add_patch(box)
    colour = "white" if alpha == 1 else "black"
    axes.text(*centre, text, color=colour, fontsize=12, ha="center", va="center", parse_math=False, zorder=4)


def draw_arrow(axes, start, end, colour=GREY, linewidth=1.5, label=""):
    """Draw an arrow, with a label above its middle, or beside it where it is upright."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": linewidth, "mutation_scale": 14}
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0}, zorder=2)
    upright = start[0] == end[0]
    middle = ((start[0] + end[0]) / 2 + 0.1 * upright, (start[1] + end[1]) / 2 + 0.08 * (not upright))
    place = {"va": "center"} if upright else {"ha": "center", "va": "bottom"}
    axes.text(*middle, label, color=colour, fontsize=14, **place)
