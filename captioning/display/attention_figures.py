"""
Where the model looked for each word of a caption, drawn over the photo.

No function here knows a model; they take arrays and words, and return a matplotlib `Figure`.
"""

import math
import textwrap

import numpy as np
from matplotlib.figure import Figure
from skimage.transform import pyramid_expand, resize

from captioning.display.arrays import check_image, square_grids
from captioning.display.fonts import families_for
from captioning.screen import printable

PANELS_A_ROW = 6
FULL_LIGHT = 4.0  # times the mean: weights up to which no panel is lit fully, so that even attention looks even


def attention_figure(image, words, alphas, smooth=True, betas=None):
    """
    Draw where the model looked for each word (Xu et al. 2015, figure 3): the photo, then one panel per word.

    A panel keeps the photo as it is where the word's attention is highest, and takes light and colour from the rest in
    proportion. The number below it is the highest weight, in multiples of the mean; below `FULL_LIGHT`, the whole panel
    is dimmer, since the model looked nowhere in particular.

    :param image: (H, W, 3) uint8, the photo as the encoder saw it
    :param words: the caption, a list of T words
    :param alphas: (T, P) or (T, s, s) attention weights, P = s * s; None for a model without attention
    :param smooth: blend between the grid's locations; otherwise every location is a square
    :param betas: (T,) share of attention that went to the sentinel and not to the photo (Lu et al. 2017), or None
    :return: Figure; without `alphas` it holds the photo and the caption alone
    :raises ValueError: if the shapes do not fit together
    """
    image, words = check_image(image), list(map(printable, words))  # matplotlib cannot draw half a character
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
    title = "\n".join(textwrap.wrap(caption, 18 * columns))
    figure.suptitle(title, fontsize=14, parse_math=False, fontfamily=families_for(caption))
    panels = figure.subplots(rows, columns, squeeze=False).flat
    show_photo(next(panels), image, "")
    for t, (word, alpha) in enumerate(zip(words, alphas, strict=True)):
        title = word if betas is None else f"{word}\nβ = {betas[t]:.2f}"
        light = upscale_attention(alpha, image.shape[:2], smooth)  # (H, W)
        panel = next(panels)
        show_photo(panel, spotlight(image, light, FULL_LIGHT / alpha.size), title, fontsize=13 if len(word) < 15 else 9)
        panel.set_xlabel(f"up to {alpha.max() * alpha.size:.1f} × the mean", fontsize=8)
    for panel in panels:
        panel.set_axis_off()
    return figure


def upscale_attention(alpha, size, smooth=True):
    """
    Stretch one attention map over the photo, edge to edge.

    :param alpha: (s, s) weights
    :param size: (height, width) of the photo in pixels
    :param smooth: blend between locations; otherwise every pixel has the weight of the location it lies in
    :return: (height, width) floats
    """
    alpha = np.asarray(alpha, dtype=np.float64)
    if not smooth:
        rows, columns = (np.arange(length) * len(alpha) // length for length in size)
        return alpha[np.ix_(rows, columns)]
    factor = max(2, math.ceil(max(size) / len(alpha)))
    return resize(pyramid_expand(alpha, upscale=factor), size, order=1, anti_aliasing=False)


def spotlight(image, light, least_peak=0.0):
    """
    Light the photo where the attention is: as it is there, dim and grey where there is none.

    :param image: (H, W, 3) uint8
    :param light: (H, W) weights of any scale, at least 0
    :param least_peak: what is below this weight is not lit fully, even if it is the largest
    :return: (H, W, 3) uint8
    """
    light = (light / max(light.max(), least_peak, np.finfo(np.float64).tiny))[:, :, None]  # (H, W, 1)
    dim = 0.3 * image.mean(axis=2, keepdims=True)  # (H, W, 1)
    return (light * image + (1 - light) * dim).astype(np.uint8)


def show_photo(axes, image, title, fontsize=11, cmap=None, extent=None):
    """Put a picture into `axes`, without ticks; the title is plain text, whatever signs it holds."""
    axes.imshow(image, cmap=cmap, extent=extent)
    axes.set_title(title, fontsize=fontsize, parse_math=False, fontfamily=families_for(title))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
