"""Photos with captions, made-up attention and made-up scores, for the tests of pages."""

import numpy as np
import skimage.data

from captioning.display.html_page import PageCaption, PagePhoto
from captioning.preparation import shapes

METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


def bump(row, column, side=14, share=1.0):
    """Attention on one place of the grid, `share` of it on the photo."""
    rows, columns = np.mgrid[:side, :side]
    weights = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 4)
    return share * (weights / weights.sum()).ravel()


def make_alphas(rng, words, side=14, shares=None):
    """A bump a word, and one for <end>, as the searches give them."""
    shares = np.ones(len(words) + 1) if shares is None else shares
    return np.stack([bump(*rng.integers(1, side - 1, 2), side, share) for share in shares])


def drawn_photos(number, models=("soft",), seed=0):
    """Photos of the built-in dataset, captioned with one of their references, with made-up attention and scores."""
    rng = np.random.default_rng(seed)
    photos = []
    for i in range(number):
        scene = shapes.make_scene(rng)
        image, _ = shapes.draw_scene(scene, rng)
        references = [caption.split() for caption in shapes.make_captions(scene, rng)]
        captions = []
        for model in models:
            words = references[rng.integers(5)]
            shares = rng.uniform(0.1, 1, len(words) + 1) if model == "adaptive" else None
            alphas = None if model == "show_and_tell" else make_alphas(rng, words, shares=shares)
            scores = {metric: float(rng.uniform(0, 1)) for metric in METRICS}
            captions.append(PageCaption(model, words, alphas, -float(rng.uniform(2, 12)), scores))
        photos.append(PagePhoto(f"scene_{i:02d}.jpg", np.array(image), captions, references))
    return photos


def scored_photos(rows, names="abcdefgh"):
    """Grey photos with a caption a model, whose BLEU-4 is given: one row a photo, one column a model."""
    image = np.full((16, 16, 3), 128, dtype=np.uint8)
    return [
        PagePhoto(
            name,
            image,
            [
                PageCaption(f"m{k}", ["word"], scores={} if score is None else {"BLEU-4": score})
                for k, score in enumerate(row)
            ],
        )
        for name, row in zip(names, rows, strict=False)
    ]


def white_photo(alphas, model="soft", words=("one", "two", "three")):
    """A white photo: what is lit on it is where the attention is."""
    return PagePhoto("white.jpg", np.full((64, 64, 3), 255, np.uint8), [PageCaption(model, list(words), alphas)])


def natural_photos(number, models):
    """Crops of real photos, all different: drawn scenes would make smaller JPEGs than a user's photos."""
    rng = np.random.default_rng(0)
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    for i in range(number):
        source = sources[i % 3]
        top, left = (rng.integers(0, length - 255) for length in source.shape[:2])
        words = [f"word{j}" for j in rng.integers(0, 500, 11)]
        captions = [
            PageCaption(model, words, make_alphas(rng, words), -5.0, {m: float(rng.uniform()) for m in METRICS})
            for model in models
        ]
        yield PagePhoto(f"{i:04d}.jpg", source[top : top + 256, left : left + 256], captions, [words] * 5)
