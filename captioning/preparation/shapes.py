"""
The built-in dataset: drawn scenes of coloured shapes, five captions each, and the box of every object. No download.

A scene has two to four objects. Either those on one side stand in a relation to those on the other ("two small red
stars above a blue ring on grey stripes"), or one object is between two. Which facts are told follows from the picture;
only their wording varies. So a caption can be right to the word, but only by a model that knows what stands where.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from captioning.command_line import run_script
from captioning.config_fields import check_fields
from captioning.storage.files import load_json, remove_leftovers, save_json
from utils import CountOrZero, Seed, UserError

IMAGE_SIZE = 256  # pixels
SUPERSAMPLE = 4  # shapes are drawn this much larger, then reduced: smooth edges
MARGIN, GAP = 8, 10  # least distance of an object to the picture's edge and to its neighbours, pixels
CAPTIONS_PER_IMAGE = 5

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLORS = {
    "red": (214, 40, 44),
    "orange": (248, 134, 20),
    "yellow": (250, 222, 50),
    "green": (38, 146, 66),
    "blue": (36, 84, 206),
    "purple": (136, 50, 166),
    "black": (32, 32, 38),
    "white": (252, 252, 252),
}
SIZES = {"small": (40, 46), "medium": (58, 66), "large": (82, 90)}  # longer side of the box: from, to, pixels
TINTS = {"grey": (172, 174, 178), "tan": (200, 178, 146), "pink": (222, 172, 184), "teal": (136, 182, 184)}
BACKGROUNDS = {
    "plain": "plain {tint}",
    "gradient": "a {tint} gradient",
    "stripes": "{tint} stripes",
    "checks": "{tint} checks",
    "speckles": "{tint} speckles",
}

SIZE_WORDS = {"small": ("small ", "little "), "medium": ("",), "large": ("large ", "big ")}
NUMBER_WORDS = {1: "a", 2: "two", 3: "three"}
# How the first (left or upper) side stands to the second, and the second to the first.
RELATIONS = {
    "horizontal": (("left of", "to the left of"), ("right of", "to the right of")),
    "vertical": (("above", "over"), ("below", "under")),
}
RELATION_SENTENCES = (
    "{first} {before} {second} on {background}",
    "{first} {first_is} {before} {second} on {background}",
    "{second} {after} {first} on {background}",
    "{second} {second_is} {after} {first} on {background}",
    "there {first_is} {first} {before} {second} on {background}",
    "on {background} {first_is} {first} {before} {second}",
)
BETWEEN_SENTENCES = (
    "{middle} between {first} and {last} on {background}",
    "{middle} is between {first} and {last} on {background}",
    "there is {middle} between {first} and {last} on {background}",
    "on {background} is {middle} between {first} and {last}",
    "{first} and {last} on both sides of {middle} on {background}",
)


@dataclass
class Config:
    folder: str = "data/shapes"  # the photos go to <folder>/images, the captions to <folder>/dataset_shapes.json
    num_train: CountOrZero = 3500  # scenes to train on
    num_val: CountOrZero = 500  # scenes to validate on
    num_test: CountOrZero = 500  # scenes to test on
    seed: Seed = 0  # the same seed draws the same scenes


@dataclass
class Group:
    """Objects that look alike: what one noun phrase tells ("two small red stars")."""

    count: int
    size: str
    color: str
    name: str


@dataclass
class Scene:
    """What a picture shows. `sides` run from left to right (axis horizontal) or from top to bottom (vertical)."""

    sides: list  # two lists of groups in a relation, or three for "between"
    axis: str
    background: str
    tint: str


def main(config):
    check_fields(config)
    path = create_shapes(config.folder, config.num_train, config.num_val, config.num_test, config.seed)
    print(f"{path}: {config.num_train} train, {config.num_val} val, {config.num_test} test scenes")


def create_shapes(folder, num_train=3500, num_val=500, num_test=500, seed=0):
    """
    Draw the dataset and write its annotations in Karpathy's layout, each image with a list of `boxes` besides.

    A dataset of the same settings that is already there is kept as it is. The annotations are written last, so that
    they never describe photos that are not there.

    :param folder: where to; photos go to `<folder>/images`
    :param num_train: number of scenes to train on; likewise `num_val`, `num_test`
    :param seed: a non-negative integer; a scene depends on the seed, its split and its place in it, nothing else
    :return: Path of `<folder>/dataset_shapes.json`
    :raises UserError: if a number makes no sense or the folder cannot be written
    """
    settings = {"num_train": num_train, "num_val": num_val, "num_test": num_test, "seed": seed}
    for field, value in settings.items():
        if value < 0:
            raise UserError(f"{field}: {value} given, expected 0 or more")
    path, image_folder = Path(folder) / "dataset_shapes.json", Path(folder) / "images"
    remove_leftovers(folder, r"dataset_shapes\.json")
    if is_complete(path, image_folder, settings):
        return path

    splits = ("train", "val", "test")
    scenes = [(split, i) for split in splits for i in range(settings[f"num_{split}"])]
    images = []
    try:
        path.unlink(missing_ok=True)
        image_folder.mkdir(parents=True, exist_ok=True)
        for imgid, (split, i) in enumerate(tqdm(scenes, desc="drawing scenes", unit="scene")):
            rng = np.random.default_rng([seed, splits.index(split), i])
            scene = make_scene(rng)
            image, boxes = draw_scene(scene, rng)
            image.save(image_folder / f"{split}_{i:05d}.jpg", quality=95, subsampling=0)
            images.append(annotate(imgid, f"{split}_{i:05d}.jpg", split, make_captions(scene, rng), boxes))
    except OSError as error:
        raise UserError(f"{folder}: the scenes could not be written there ({error.strerror or error})") from error
    save_json({"dataset": "shapes", "settings": settings, "images": images}, path)
    return path


def annotate(imgid, filename, split, captions, boxes):
    """:return: what Karpathy's layout says of one image, and its boxes"""
    sentids = list(range(imgid * CAPTIONS_PER_IMAGE, (imgid + 1) * CAPTIONS_PER_IMAGE))
    sentences = [
        {"tokens": caption.split(), "raw": caption.capitalize() + ".", "imgid": imgid, "sentid": sentid}
        for caption, sentid in zip(captions, sentids, strict=True)
    ]
    image = {"filename": filename, "split": split, "imgid": imgid, "sentids": sentids, "sentences": sentences}
    return image | {"boxes": boxes}


def is_complete(path, image_folder, settings):
    """Tell whether the annotations at `path` were made with `settings` and all their photos are there."""
    if not path.exists():
        return False
    try:
        annotations = load_json(path)
        photos = {photo.name for photo in image_folder.glob("*.jpg")}
        named = {image["filename"] for image in annotations["images"]}
        return annotations["settings"] == settings and named <= photos
    except (UserError, KeyError, TypeError):  # not ours, or incomplete
        return False


def object_name(word):
    """
    :param word: a word of a caption
    :return: the `name` that its boxes carry ("stars" -> "star"), None if the word names no object
    """
    for name in SHAPES:
        if word in (name, plural(name)):
            return name
    return None


def plural(name):
    return name + ("es" if name.endswith("s") else "s")


# What a scene shows.


def make_scene(rng):
    """
    Draw the facts of a scene. No two groups share a shape or a colour, so that swapping two words makes it wrong.

    :param rng: numpy Generator
    :return: Scene
    """
    names = rng.permutation(SHAPES).tolist()
    colors = rng.permutation(list(COLORS)).tolist()

    def group(count=1, sizes=tuple(SIZES)):
        return Group(count, str(rng.choice(sizes)), colors.pop(), names.pop())

    kind = rng.choice(["pair", "counts", "trio", "between"], p=[0.35, 0.25, 0.2, 0.2])
    if kind == "pair":  # "a large red circle left of a blue star"
        sides = [[group()], [group()]]
    elif kind == "counts":  # "three small red stars above a blue ring"
        count, other = [(2, 1), (3, 1), (2, 2)][rng.integers(3)]
        sides = [[group(count, ("small", "medium"))], [group(other, ("small", "medium"))]]
    elif kind == "trio":  # "a red circle left of a blue star and a green heart"
        sides = [[group(sizes=["medium"])], [group(sizes=["medium"]), group(sizes=["medium"])]]
    else:  # "a red circle between a blue star and a green heart"
        sides = [[group(sizes=["medium"])] for _ in range(3)]
    if rng.random() < 0.5:
        sides.reverse()
    axis = str(rng.choice(list(RELATIONS)))
    return Scene(sides, axis, str(rng.choice(list(BACKGROUNDS))), str(rng.choice(list(TINTS))))


# How it is told.


def make_captions(scene, rng):
    """
    Tell the scene's facts five times in different words.

    :param scene: Scene
    :param rng: numpy Generator
    :return: list of CAPTIONS_PER_IMAGE different sentences, lower case, without punctuation
    """
    sentences = BETWEEN_SENTENCES if len(scene.sides) == 3 else RELATION_SENTENCES
    return [tell(scene, sentences[i], rng) for i in rng.permutation(len(sentences))[:CAPTIONS_PER_IMAGE]]


def tell(scene, sentence, rng):
    """Fill the gaps of one of the sentences, drawing among synonyms."""
    words = {"background": BACKGROUNDS[scene.background].format(tint=scene.tint)}
    sides = [" and ".join(noun_phrase(group, rng) for group in side) for side in scene.sides]
    if len(sides) == 3:
        words["first"], words["middle"], words["last"] = sides
    else:
        before, after = RELATIONS[scene.axis]
        words["first"], words["second"] = sides
        words["before"], words["after"] = str(rng.choice(before)), str(rng.choice(after))
        words["first_is"], words["second_is"] = (
            "is" if sum(group.count for group in side) == 1 else "are" for side in scene.sides
        )
    return sentence.format(**words)


def noun_phrase(group, rng):
    """Name a group: number, size (medium is not worth a word), colour, shape."""
    size = str(rng.choice(SIZE_WORDS[group.size]))
    name = group.name if group.count == 1 else plural(group.name)
    article = "an" if group.count == 1 and not size and group.color[0] in "aeiou" else NUMBER_WORDS[group.count]
    return f"{article} {size}{group.color} {name}"


# How it is drawn.


def draw_scene(scene, rng):
    """
    Draw a scene.

    :param scene: Scene
    :param rng: numpy Generator: exact sizes, places, slants and shades
    :return: PIL image (RGB, IMAGE_SIZE square); list of boxes, one for each object:
        {"name", "color", "size", "box": [x0, y0, x1, y1]}, tight, in pixels, x1 and y1 exclusive
    """
    image = draw_background(scene.background, TINTS[scene.tint], rng)
    # One column of objects for each side: a group of three is there three times.
    columns = [[group for group in side for _ in range(group.count)] for side in scene.sides]
    masks = [[draw_mask(group.name, group.size, rng) for group in column] for column in columns]
    places = place([[mask.size for mask in column] for column in masks], scene.axis, rng)
    boxes = []
    for group, mask, (x, y) in zip(sum(columns, []), sum(masks, []), sum(places, []), strict=True):
        image.paste(shade(COLORS[group.color], rng), (x, y), mask)
        box = [x, y, x + mask.width, y + mask.height]
        boxes.append({"name": group.name, "color": group.color, "size": group.size, "box": box})
    return image, boxes


def place(sizes, axis, rng):
    """
    Find a place for every object: sides one after the other along the axis, each side's objects stacked across it.

    :param sizes: for each side a list of (width, height), pixels
    :param axis: "horizontal" or "vertical"
    :param rng: numpy Generator
    :return: for each side a list of (x0, y0), pixels
    """
    if axis == "vertical":  # turn the picture, place from left to right, turn it back
        turned = place([[size[::-1] for size in side] for side in sizes], "horizontal", rng)
        return [[corner[::-1] for corner in side] for side in turned]
    widths = [max(width for width, _ in side) + (12 if len(side) > 1 else 0) for side in sizes]
    slack = IMAGE_SIZE - 2 * MARGIN - sum(widths) - GAP * (len(sizes) - 1)
    starts = MARGIN + np.sort(rng.integers(0, slack, len(sizes), endpoint=True))
    starts = starts + [sum(widths[:k]) + GAP * k for k in range(len(sizes))]
    nearest = min(np.diff(starts + np.array(widths) / 2))

    gaps = [GAP + rng.integers(0, 12) for _ in sizes]
    heights = [sum(height for _, height in side) + gap * (len(side) - 1) for side, gap in zip(sizes, gaps, strict=True)]
    reach = (IMAGE_SIZE - 2 * MARGIN - max(heights)) / 2
    line = IMAGE_SIZE / 2 + rng.uniform(-reach, reach)  # the sides' middles stay near it: "left of" is clearly left
    corners = []
    for side, start, width, height, gap in zip(sizes, starts, widths, heights, gaps, strict=True):
        y = line + rng.uniform(-0.25, 0.25) * nearest - height / 2
        y = int(np.clip(y, MARGIN, IMAGE_SIZE - MARGIN - height))
        corners.append([])
        for w, h in side:
            corners[-1].append((int(start + rng.integers(0, width - w, endpoint=True)), y))
            y += h + int(gap)
    return corners


def draw_mask(name, size, rng):
    """
    Draw one shape, a little slanted.

    :param name: one of SHAPES
    :param size: one of SIZES
    :param rng: numpy Generator: its exact size and slant
    :return: PIL image (L), cropped to the shape: 255 inside, 0 outside
    """
    angle = np.radians(rng.uniform(-10, 10))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = outline(name) @ turn  # (K, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    side = int(rng.integers(*SIZES[size], endpoint=True)) * SUPERSAMPLE
    points = (points - (low + high) / 2) / max(high - low) * side + side / 2
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=255)
    if name == "ring":
        ImageDraw.Draw(mask).ellipse([0.26 * side, 0.26 * side, 0.74 * side, 0.74 * side], fill=0)
    mask = mask.reduce(SUPERSAMPLE)
    return mask.crop(mask.point(lambda value: 255 * (value > 127)).getbbox())


def outline(name):
    """:return: the corners of a shape, (K, 2): x to the right, y down, any scale"""
    if name == "square":
        return arc(45, 315, 4)
    if name == "triangle":
        return arc(0, 240, 3)
    if name == "star":
        return arc(0, 324, 10) * np.tile([1, 0.45], 5)[:, None]
    if name == "cross":
        arm = np.array([[-0.36, -1], [0.36, -1], [0.36, -0.36]])
        quarters = [[[1, 0], [0, 1]], [[0, 1], [-1, 0]], [[-1, 0], [0, -1]], [[0, -1], [1, 0]]]
        return np.concatenate([arm @ np.array(quarter) for quarter in quarters])
    if name == "heart":
        t = np.linspace(0, 2 * np.pi, 100)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y], axis=1)
    if name == "moon":  # a disc's rim from its lower to its upper tip, and back along a disc that covers its right
        return np.concatenate([arc(141.3, 398.7, 80), arc(372.6, 167.4, 80) * 0.8 + [0.45, 0]])
    return arc(0, 357, 120)  # circle, ring


def arc(start, end, corners):
    """:return: points on the unit circle, (corners, 2), angles in degrees clockwise from the top"""
    angle = np.radians(np.linspace(start, end, corners))
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def draw_background(background, tint, rng):
    """:return: PIL image (RGB, IMAGE_SIZE square) in two tones of the tint"""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    angle = rng.choice([0, 45, 90, 135]) * np.pi / 180
    across = x * np.cos(angle) + y * np.sin(angle)
    along = y * np.cos(angle) - x * np.sin(angle)
    width, phase = rng.integers(14, 26), rng.uniform(0, np.pi)  # of stripes and checks, in pixels and radians

    def wave(distance):
        """Alternate between -1 and 1, with smooth edges about a pixel wide."""
        return np.clip(np.sin(distance * np.pi / width + phase) * width / np.pi, -1, 1)

    if background == "gradient":
        tone = across - across.min()
        tone = 1.8 * (tone / tone.max() * 2 - 1)
    elif background == "stripes":
        tone = wave(across)
    elif background == "checks":
        tone = wave(across) * wave(along)
    elif background == "speckles":
        noise = Image.fromarray(rng.integers(0, 256, (52, 52), dtype=np.uint8))
        noise = noise.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        tone = np.clip((np.asarray(noise) - 150.0) / 20, -1, 1)
    else:
        tone = np.zeros_like(across)
    pixels = np.array(shade(tint, rng)) + 12 * tone[..., None]  # (256, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shade(color, rng):
    """:return: the colour a little lighter or darker, (r, g, b)"""
    return tuple(np.clip(np.array(color) + rng.integers(-9, 10), 0, 255).tolist())


if __name__ == "__main__":
    run_script(main, Config)
