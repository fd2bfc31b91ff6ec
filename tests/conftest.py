"""What several test files share: the files of one small run of create_input_files.py, and a tiny decoder."""

import json
import resource
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from models import DecoderWithAttention

WORD_MAP = {"<pad>": 0, "a": 1, "red": 2, "cat": 3, "dog": 4, "sat": 5, "ran": 6, "<unk>": 7, "<start>": 8, "<end>": 9}


@pytest.fixture
def make_files(tmp_path):
    """
    A function that writes one split's files as create_input_files.py does, and gives all that it wrote.

    Keywords replace a part: `captions`, `lengths`, `references`, `word_map` (None leaves the file out), `attributes`.
    """

    def write(split="TRAIN", photos=5, per_image=2, side=8, seed=0, folder=tmp_path, name="tiny", **replaced):
        random = np.random.default_rng(seed)
        images = random.integers(0, 256, (photos, 3, side, side), dtype=np.uint8)
        lengths = random.integers(3, 8, photos * per_image).tolist()  # with <start> and <end>
        captions = []
        for length in lengths:
            words = random.integers(1, 7, length - 2).tolist()
            captions.append([8, *words, 9] + [0] * (9 - length))
        made = {
            "captions": captions,
            "lengths": lengths,
            "word_map": WORD_MAP,
            "references": [
                {"image_id": 100 + i, "file_name": f"{i}.jpg", "captions": [["a", "cat", str(i)], ["one", "more"]]}
                for i in range(photos)
            ],
            "attributes": {"captions_per_image": per_image},
        } | replaced
        paths = SimpleNamespace(
            images=folder / f"{split}_IMAGES_{name}.hdf5",
            captions=folder / f"{split}_CAPTIONS_{name}.json",
            lengths=folder / f"{split}_CAPLENS_{name}.json",
            word_map=folder / f"WORDMAP_{name}.json",
            references=folder / f"{split}_REFERENCES_{name}.json",
        )
        with h5py.File(paths.images, "w") as file:
            file.attrs.update(made["attributes"])
            file["images"] = images
        for part in ("captions", "lengths", "word_map", "references"):
            if made[part] is not None:
                getattr(paths, part).write_text(json.dumps(made[part]))
        return SimpleNamespace(images=images, folder=folder, name=name, split=split, paths=paths, **made)

    def write_and_name(*args, **kwargs):
        made = write(*args, **kwargs)
        made.arguments = (made.folder, made.name, made.split)
        return made

    return write_and_name


@pytest.fixture
def training(make_files, tmp_path):
    """
    A function that trains on a few photos, as the command would: 2 epochs of 6 steps. It gives the run's folder.

    Where the folder is there already and the options do not say what to do with it, the new run replaces the old one.
    """
    from tiny_training import TINY, command  # train.py takes seconds to import

    make_files("TRAIN", photos=6, side=64)
    make_files("VAL", photos=2, side=64, seed=1)

    def run(name, *options):
        known = {"--resume", "--overwrite", "--no_overwrite"} & set(map(str, options))
        overwrite = [] if known else ["--overwrite"]
        data = ["--data_folder", tmp_path, "--data_name", "tiny", "--run_folder", tmp_path / name]
        command(*data, *TINY, *overwrite, *options)
        return tmp_path / name

    return run


@pytest.fixture
def small_files():
    """A function that lets no file grow beyond so many bytes, as a full disk would not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def tiny_decoder():
    """A function that builds a small decoder without dropout, its random numbers far enough from zero to matter."""

    def build(cls=DecoderWithAttention, vocab_size=11, encoder_dim=6, embed_dim=7, decoder_dim=7, seed=0, spread=0.5,
              **options):  # fmt: skip
        torch.manual_seed(seed)
        options = {"attention_dim": 5, "encoded_image_size": 3, "dropout": 0.0} | options
        decoder = cls(vocab_size, encoder_dim, embed_dim=embed_dim, decoder_dim=decoder_dim, **options)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.normal_(0, spread)
        return decoder

    return build
