"""
A folder of sound files of every kind that the scripts read, and what runs a script on them when one is broken.

The cases are in hostile_table.py.
"""

import contextlib
import csv
import io
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from tutorial_models import make_models, save

import caption
import convert_checkpoint
import create_input_files
import eval as evaluate
import train
import view_captions
from captioning.command_line import one_line
from captioning.evaluation import metrics
from utils import UserError

NAME = "tiny_2_cap_per_img_0_min_word_freq"
CAPTIONS = [["a", "red", "cat", "sat"], ["the", "cat", "ran"], ["a", "dog", "ran", "far"], ["one", "red", "dog"]]
SPLITS = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
SECONDS, MEMORY = 300, 3 << 30  # what a case may take


class Hang(BaseException):
    """A script took too long. No handler of a script's may take it for a damaged file's error."""


class Outcome(NamedTuple):
    """What a script made of a file."""

    code: int  # 0 or 2, as the command would exit
    line: str  # what it would print on the error stream, if 2
    printed: str  # what it printed else, on both streams
    new: set  # names of the files that it wrote, below the folder


def make_sound_files(folder):
    """Write sound files of every kind."""
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    names = [f"{i}.jpg" for i in range(len(SPLITS))]
    for name in names:
        coarse = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 30)).save(folder / "photos" / name)
    sentences = [CAPTIONS[i % 4 : i % 4 + 2] or CAPTIONS[:1] for i in range(len(names))]
    rows = [(name, " ".join(words), split) for name, some, split in zip(names, sentences, SPLITS, strict=True)
            for words in some]  # fmt: skip
    karpathy = [
        {"filename": name, "imgid": i, "split": split, "sentences": [{"tokens": words} for words in some]}
        for i, (name, some, split) in enumerate(zip(names, sentences, SPLITS, strict=True))
    ]
    coco = {"images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": names.index(name), "caption": text} for name, text, _ in rows]}  # fmt: skip
    write_json(folder / "karpathy.json", {"images": karpathy})
    write_json(folder / "coco.json", coco)
    for name, delimiter in (("captions.csv", ","), ("captions.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("image", "caption", "split"), *rows])

    torch.manual_seed(0)
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), folder / "weights.pth")
    words = sorted({word for words in CAPTIONS for word in words})
    (folder / "vectors.txt").write_text("".join(f"{word} {i} 0.5 -1 2 3 4 5 6\n" for i, word in enumerate(words)))
    for options in (RUNS["create"](folder) | {"dataset": "tiny", "output_folder": str(folder / "data")},):
        assert run(create_input_files, options, folder).code == 0
    made = run(train, RUNS["train"](folder) | {"run_folder": str(folder / "run")}, folder)
    assert made.code == 0, made
    shutil.copy(folder / "run/last.pth", folder / "model.pth")
    word_map = json.loads((folder / f"data/WORDMAP_{NAME}.json").read_text())
    save(folder / "tutorial.pth.tar", *make_models(word_map), "legacy")


def write_json(path, content):
    path.write_text(json.dumps(content))


def created(annotations):
    """:return: function of a folder to the options of create_input_files.py"""
    return lambda folder: {
        "dataset": "new", "annotations": (str(folder / annotations),), "image_folder": str(folder / "photos"),
        "output_folder": str(folder / "out"), "captions_per_image": 2, "min_word_freq": 0, "image_size": 32,
        "workers": 0, "val_share": 0.2, "test_share": 0.2,
    }  # fmt: skip


def trained(**options):
    """:return: function of a folder to the options of train.py"""
    return lambda folder: {
        "data_folder": str(folder / "data"), "data_name": NAME, "run_folder": str(folder / "out"),
        "encoder": "shufflenet_v2_x0_5", "encoder_weights": str(folder / "weights.pth"), "encoded_image_size": 2,
        "embed_dim": 8, "decoder_dim": 8, "attention_dim": 8, "epochs": 1, "device": "cpu", "val_beam_size": 1,
    } | {name: str(folder / value) if isinstance(value, str) else value for name, value in options.items()}  # fmt: skip


# The scripts, with the options that make them read a kind of file.
SCRIPTS = {
    "create": create_input_files, "coco": create_input_files, "csv": create_input_files, "tsv": create_input_files,
    "photos": create_input_files, "train": train, "vectors": train, "resume": train, "again": train, "eval": evaluate,
    "caption": caption, "folder": caption, "view": view_captions, "convert": convert_checkpoint,
}  # fmt: skip
RUNS = {
    "create": created("karpathy.json"),
    "coco": created("coco.json"),
    "csv": created("captions.csv"),
    "tsv": created("captions.tsv"),
    "photos": lambda folder: created("karpathy.json")(folder) | {"max_unreadable": 1.0},
    "train": trained(),
    "vectors": trained(word_vectors="vectors.txt"),
    "resume": trained(resume="model.pth", epochs=2),
    "again": lambda folder: trained(epochs=2)(folder) | {"resume": "auto", "run_folder": str(folder / "run")},
    "eval": lambda folder: {
        "model": (str(folder / "model.pth"),), "output_folder": str(folder / "out"), "split": ("VAL",),
        "beam_sizes": (1,), "max_length": 5, "device": "cpu", "data_folder": str(folder / "data"),
    },
    "caption": lambda folder: {
        "img": (str(folder / "photos/0.jpg"),), "model": (str(folder / "model.pth"),), "max_length": 5,
        "output": str(folder / "out/captions.json"), "device": "cpu", "workers": 0,
    },
    "folder": lambda folder: RUNS["caption"](folder) | {"img": (str(folder / "photos"),)},
    "view": lambda folder: {
        "model": (str(folder / "model.pth"),), "output": str(folder / "out/page.html"), "scores": False,
        "max_length": 5, "device": "cpu", "data_folder": str(folder / "data"),
    },
    "convert": lambda folder: {
        "checkpoint": (str(folder / "tutorial.pth.tar"),), "word_map": str(folder / f"data/WORDMAP_{NAME}.json"),
        "output": str(folder / "out/best.pth"),
    },
}  # fmt: skip


def try_case(case, sound, folder):
    """
    Break a copy of the sound files as a case says, and run its script.

    :param sound: folder of `make_sound_files`
    :param folder: where the copy goes; it must not exist yet
    :return: `Outcome`
    """
    shutil.copytree(sound, folder, copy_function=os.link)  # nothing is copied but what is changed
    path = folder / case.file.format(NAME)
    if path.is_file():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    case.change(path)
    return run(SCRIPTS[case.run], RUNS[case.run](folder), folder)


def run(script, options, folder):
    """
    Run a script's `main` as its command would, within limits of time and memory.

    :return: `Outcome`; what is no UserError is raised, as the command would end with a traceback
    """
    before = files_below(folder)
    printed, code, line = io.StringIO(), 0, ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), limits():
        try:
            script.main(script.Config(**options))
        except UserError as error:
            code, line = 2, one_line(error)
    return Outcome(code, line, printed.getvalue(), files_below(folder) - before)


def files_below(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if not path.is_dir()}


@contextlib.contextmanager
def limits():
    """Stop what hangs, refuse what takes gigabytes, and leave METEOR's Java out."""

    def stop(*_):
        raise Hang(f"still not done after {SECONDS} s")

    def shared_words(truth, guess, meteor=None):
        return 0.5, [0.5] * len(guess)

    meteor, metrics.meteor_scores = metrics.meteor_scores, shared_words
    handler = signal.signal(signal.SIGALRM, stop)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    try:
        if pages:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
        signal.alarm(SECONDS)
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY if hard < 0 else hard, hard))
        metrics.meteor_scores = meteor
