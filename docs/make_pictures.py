"""
The pictures of README and docs: `python docs/make_pictures.py`. Two are made by the scripts themselves: photo.png by
`caption.py --figure`, with the model in pretrained/, and calibration.png by `eval.py --calibrate`.

The photo is scikit-image's sample "chelsea"; the scenes are those of the built-in dataset. With a checkpoint that was
trained on it (`--checkpoint runs/shapes/best.pth`) the result picture is made too: a test photo with its caption.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # it is run from anywhere

from captioning.command_line import run_script
from captioning.display.attention_figures import attention_figure, show_photo, spotlight, upscale_attention
from captioning.display.figure_files import save_figure
from captioning.display.model_diagrams import (
    architecture_diagram,
    attention_step_diagram,
    beam_search_tree,
    draw_arrow,
    draw_box,
    drawing,
    encoder_grid_figure,
)
from captioning.display.palette import ATTENTION, LSTM, WORD
from captioning.preparation.shapes import draw_scene, make_captions, make_scene
from captioning.storage.files import atomic_path
from utils import UserError

GRID = 14  # locations on a side
# A language of a few words for the beam search picture: what may follow which word, and how likely.
NEXT = {
    "<start>": {"a": 0.5, "the": 0.4, "one": 0.1},
    "a": {"cat": 0.4, "small": 0.35, "tabby": 0.25},
    "the": {"cat": 0.9, "tabby": 0.1},
    "one": {"cat": 0.6, "small": 0.4},
    "small": {"cat": 0.6, "tabby": 0.4},
    "tabby": {"cat": 0.9, "<end>": 0.1},
    "cat": {"sits": 0.45, "looks": 0.35, "<end>": 0.2},
    "sits": {"<end>": 0.9, "looks": 0.1},
    "looks": {"<end>": 0.8, "sits": 0.2},
}


@dataclass
class Config:
    folder: str = str(Path(__file__).parent)  # where the pictures go
    checkpoint: str | None = None  # of a model trained on the built-in dataset, for the result picture
    scene: int = 0  # which scene of the built-in dataset's test split is in the result picture


def main(config):
    folder = Path(config.folder)
    cat = Image.fromarray(skimage.data.chelsea()[:, 60:360])  # 300 x 300 pixels
    cat = np.asarray(cat.resize((256, 256), Image.Resampling.LANCZOS))  # (256, 256, 3), as the encoder sees photos
    save(architecture_diagram(cat, ["a", "tabby", "cat"]), folder / "architecture.png")
    save(encoder_grid_figure(cat, GRID, location=(8, 5)), folder / "encoder_grid.png")
    save(attention_step_diagram(cat, hand_made_scores((0.42, 0.42), 0.13), "eyes"), folder / "attention_step.png")
    save(soft_and_hard(cat), folder / "soft_and_hard.png")
    save(doubly_stochastic(), folder / "doubly_stochastic.png")
    save(teacher_forcing(), folder / "teacher_forcing.png")
    save(beam_search_tree(search(beam_size=3)), folder / "beam_search.png")
    save(built_in_dataset(), folder / "shapes.png")
    if config.checkpoint:
        save(result(config.checkpoint, config.scene), folder / "result.png")


def save(figure, path, width=1200):
    """Write a figure as a PNG of at most `width` pixels and 256 colours: a page loads all of them."""
    save_figure(figure, path)
    with Image.open(path) as image:
        image = image.convert("RGB")
    if image.width > width:
        image = image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)
    with atomic_path(path) as temporary:
        image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(temporary, format="PNG", optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} KB")


def hand_made_scores(place, width):
    """
    Scores as a trained model might give them: no model made them.

    :param place: (row, column) of the highest, from 0 to 1
    :param width: of the hill around it, 1 is the whole photo
    :return: (GRID, GRID)
    """
    centres = (np.arange(GRID) + 0.5) / GRID
    distance = (centres[:, None] - place[0]) ** 2 + (centres[None, :] - place[1]) ** 2  # (GRID, GRID)
    noise = np.random.default_rng(0).normal(scale=0.25, size=(GRID, GRID))
    return 8 * np.exp(-distance / (2 * width**2)) + noise


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def soft_and_hard(photo):
    """Draw the same attention used in both ways: a mean over all locations, and one location that was drawn."""
    alpha = softmax(hand_made_scores((0.42, 0.42), 0.13))  # (GRID, GRID)
    rng = np.random.default_rng(1)
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    soft = upscale_attention(alpha, photo.shape[:2])
    show_photo(panels[0], spotlight(photo, soft), "soft: a mean of all locations", fontsize=13)
    for k, panel in enumerate(panels[1:], start=1):
        one = np.zeros(GRID * GRID)
        one[rng.choice(GRID * GRID, p=alpha.ravel())] = 1
        drawn = upscale_attention(one.reshape(GRID, GRID), photo.shape[:2], smooth=False)
        show_photo(panel, spotlight(photo, drawn), f"hard: one location, draw {k}", fontsize=13)
    return figure


def doubly_stochastic():
    """Draw four steps of attention that each sum to 1, and what each location got over time, which need not."""
    places = [(0.3, 0.3), (0.4, 0.7), (0.75, 0.35), (0.6, 0.6)]
    alphas = np.stack([softmax(hand_made_scores(place, 0.2) / 2) for place in places])  # (4, GRID, GRID)
    figure = Figure(figsize=(12, 2.9), layout="constrained")
    *steps, total = figure.subplots(1, 5)
    for t, (panel, alpha) in enumerate(zip(steps, alphas, strict=True), start=1):
        show_photo(panel, alpha, f"word {t}", fontsize=13, cmap="Oranges")
        panel.set_xlabel("all locations: 1", fontsize=12)
    show_photo(total, alphas.sum(axis=0), "each location, over time", fontsize=13, cmap="Blues")
    total.set_xlabel("wanted: all the same", fontsize=12)
    return figure


def teacher_forcing():
    """Draw which word the decoder is shown: the true one in training, its own when it writes by itself."""
    figure = Figure(figsize=(11, 4.7), layout="constrained")
    axes = drawing(figure, 11, 4.7)
    truth, own = ["a", "tabby", "cat", "sits"], ["a", "small", "dog", "runs"]
    for bottom, title, shown, written in (
        (2.6, "teacher forcing", ["<start>", *truth[:3]], ["a", "small", "cat", "sits"]),
        (0.2, "writing alone", ["<start>", *own[:3]], own),
    ):
        axes.text(0.1, bottom + 1, title, fontsize=14, va="center")
        for t, (before, after) in enumerate(zip(shown, written, strict=True)):
            x = 3.2 + 2.1 * t
            forced = bottom > 1 or t == 0
            draw_box(axes, (x, bottom + 0.2), 1.2, 0.42, before, WORD if forced else ATTENTION)
            draw_box(axes, (x, bottom + 1), 1.2, 0.5, "LSTM", LSTM)
            draw_box(axes, (x, bottom + 1.8), 1.2, 0.42, after, ATTENTION)
            draw_arrow(axes, (x, bottom + 0.41), (x, bottom + 0.75))
            draw_arrow(axes, (x, bottom + 1.25), (x, bottom + 1.59))
            if t < 3:
                draw_arrow(axes, (x + 0.6, bottom + 1), (x + 1.5, bottom + 1), LSTM)
                if bottom < 1:  # what was written is what is shown next
                    draw_arrow(axes, (x + 0.6, bottom + 1.7), (x + 1.5, bottom + 0.3), ATTENTION)
    return figure


def search(beam_size):
    """
    Beam search in the language of `NEXT`.

    :return: for each step the hypotheses that were kept, as `drawings.beam_search_tree` takes them
    """
    steps, beam = [], [((), 0.0)]
    while beam:
        candidates = [
            ((*words, word), score + math.log(probability))
            for words, score in beam
            for word, probability in NEXT[words[-1] if words else "<start>"].items()
        ]
        kept = sorted(candidates, key=lambda found: -found[1])[:beam_size]
        steps.append(kept)
        beam = [found for found in kept if found[0][-1] != "<end>"]
        beam_size -= len(kept) - len(beam)  # a place in the beam goes with each caption that ends
    return steps


def built_in_dataset():
    """Draw six scenes of the built-in dataset with a caption of each."""
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    for i, panel in enumerate(figure.subplots(2, 3).flat):
        rng = np.random.default_rng([0, i])
        scene = make_scene(rng)
        photo, _ = draw_scene(scene, rng)
        words = make_captions(scene, rng)[0].split()
        half = (len(words) + 1) // 2
        show_photo(panel, np.array(photo), " ".join(words[:half]) + "\n" + " ".join(words[half:]), fontsize=12)
    return figure


def result(checkpoint, scene):
    """Caption a scene of the test split with a trained model and draw where it looked."""
    from captioning.inference.trained_model import load_captioner  # here only: the other pictures need no model

    captioner, content, path = load_captioner(checkpoint)
    rng = np.random.default_rng([0, 2, scene])  # seed 0, split 2: as in shapes.create_shapes
    photo = np.array(draw_scene(make_scene(rng), rng)[0])  # (256, 256, 3)
    if content["image_size"] != len(photo):
        raise UserError(f"checkpoint: {path} takes photos of {content['image_size']} pixels, {len(photo)} expected")
    image = torch.from_numpy(photo).permute(2, 0, 1).unsqueeze(0)  # (1, 3, 256, 256)
    [[best]] = captioner.search(image, keep_alphas=True)
    words = captioner.sentence(best)
    alphas = None if best.alphas is None else best.alphas[: len(words)].numpy()  # (T, P), without <end>
    return attention_figure(photo, words, alphas)


if __name__ == "__main__":
    run_script(main, Config)
