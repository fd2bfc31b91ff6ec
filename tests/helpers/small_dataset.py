"""A dataset of a few photos of one colour each, for create_input_files.py: its annotations, its options, its files."""

import json
import random

import h5py
from PIL import Image

from create_input_files import Config

WORDS = ["a", "red", "dog", "cat", "runs", "sleeps", "on", "grass", "rare"]


def make_dataset(folder, splits="TTTTTTTTVVXX", captions=5, **changes):
    """Karpathy's JSON with a photo of one colour for each letter of `splits`: T train, V val, X test."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for i, letter in enumerate(splits):
        Image.new("RGB", (40 + i, 30), color(i)).save(folder / "images" / f"{i}.png")
        sentences = [{"tokens": [rng.choice(WORDS[:8]) for _ in range(rng.randint(2, 6))]} for _ in range(captions)]
        split = {"T": "train", "V": "val", "X": "test", "R": "restval"}[letter]
        images.append({"filename": f"{i}.png", "imgid": 100 + i, "split": split, "sentences": sentences})
    for i, change in changes.items():
        images[int(i[1:])] |= change
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return images


def color(i):
    return (20 * i, 255 - 20 * i, 128)


def config(folder, **changes):
    fields = {
        "dataset": "own",
        "annotations": (str(folder / "dataset.json"),),
        "output_folder": str(folder / "out"),
        "min_word_freq": 2,
        "max_len": 8,
        "image_size": 16,
        "workers": 0,
    }
    return Config(**(fields | changes))


def load(folder, name, captions_per_image=5, min_word_freq=2):
    base = f"own_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"
    return json.loads((folder / "out" / f"{name}_{base}.json").read_text())


def load_images(folder, split):
    with h5py.File(folder / "out" / f"{split}_IMAGES_own_5_cap_per_img_2_min_word_freq.hdf5") as file:
        assert file["images"].chunks is None
        assert file["images"].compression is None
        return file["images"][:], file.attrs["captions_per_image"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
