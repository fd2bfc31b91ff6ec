"""
Stop a fine-tuning of BLIP while it validates, go on with it, and compare with one that was left alone: is all the same?

    python tests/hostile/kill_blip.py --kills 10

SIGKILL, SIGTERM and Ctrl-C take turns, at random moments within a validation. It needs transformers.
"""

import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "helpers", TESTS / "hostile"))  # when it is run as a script

from kill_training import equal, exit_code, finish, start

import blip
import create_input_files
from captioning.command_line import run_script
from captioning.preparation.shapes import create_shapes
from captioning.storage.tensors import load_tensors
from utils import UserError

DATA = ["--data_folder", "data", "--data_name", "tiny_5_cap_per_img_0_min_word_freq"]
TINY = [
    "finetune", "--model", "small", *DATA, "--output_folder", "run", "--epochs", "2", "--batch_size", "8",
    "--accumulate", "1", "--lr", "4e-3", "--val_beam_size", "2", "--val_batch_size", "1", "--device", "cpu",
    "--save_minutes", "0", "--stop_patience", "9",
]  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Config:
    kills: int = 10
    seed: int = 0  # of the moments


def main(config):
    rng = random.Random(config.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        finish(start(make_model, folder, folder / "made.txt"))
        finish(start(fine_tune, prepare(folder, "clean"), folder / "clean.txt"))
        ways = itertools.islice(itertools.cycle(SIGNALS), config.kills)
        same = sum(one_kill(i, folder, number, rng) for i, number in enumerate(ways))
        print(f"{same} of {config.kills} ended as the one that was left alone", flush=True)
        if same < config.kills:
            raise UserError("finetune: a run that was stopped in validation did not end as the one that was left alone")


def make_model():
    create_shapes("drawn", 24, 12, 4)
    data = {"dataset": "tiny", "annotations": ("drawn/dataset_shapes.json",), "output_folder": "data"}
    create_input_files.main(create_input_files.Config(**data, min_word_freq=0, image_size=64, workers=0))
    sizes = ["--image_size", "64", "--patch_size", "16", "--dim", "32", "--layers", "2", "--heads", "2"]
    run_script(blip.main, blip.COMMANDS, ["new", *DATA, "--output_folder", "small", *sizes])


def prepare(folder, name):
    """:return: a new folder with the data and the model that the run starts from"""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir()
    for needed in ("data", "small"):
        (folder / name / needed).symlink_to(folder / needed)
    return folder / name


def fine_tune(*options):
    """Fine-tune as the command does, and note when a validation begins and ends."""
    validate = blip.validate

    def noted(*args):
        note("b")
        found = validate(*args)
        note("e")
        return found

    blip.validate = noted
    run_script(blip.main, blip.COMMANDS, [*TINY, *options])


def note(letter):
    with Path("validations").open("a") as file:
        file.write(letter)


def one_kill(i, folder, number, rng):
    """:return: whether a run that is stopped in a validation, and goes on, ends as the clean one"""
    killed, printed = folder / "killed", folder / "killed.txt"
    notes = ""
    while not notes.endswith("b"):  # until the signal came before the validation's end
        which, seconds = rng.randint(1, 2), rng.uniform(0, 0.3)
        prepare(folder, "killed")
        printed.unlink(missing_ok=True)
        code = stop_in_validation(start(fine_tune, killed, printed), killed / "validations", which, seconds, number)
        notes = (killed / "validations").read_text()
    saved = load_tensors(killed / "run" / "training.pth")["progress"]
    finish(start(lambda: fine_tune("--resume"), killed, printed))
    left = [path.name for path in (killed / "run").iterdir() if re.match(r"\.(.*tmp|saving_)", path.name)]
    same = not left and same_run(folder / "clean" / "run", killed / "run")
    print(
        f"kill {i + 1}: {signal.Signals(number).name} {seconds:.2f} s into validation {which}, ended with {code}; "
        f"saved was epoch {saved['epoch']}, batch {saved['batch']}: {'the same' if same else 'differs'}",
        flush=True,
    )
    return same


def stop_in_validation(process, notes, which, seconds, number):
    """:return: with what the process ended that gets the signal so many seconds after that validation's beginning"""
    while not notes.exists() or notes.read_text().count("b") < which:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(process, number)  # until it is waited for, it is there
    return exit_code(process)


def same_run(clean, killed):
    """:return: whether weights, optimizer, random states, best epoch and best model are the same to the last bit"""
    one, other = (load_tensors(run / "training.pth") for run in (clean, killed))
    best, other_best = (load_file(run / "model.safetensors") for run in (clean, killed))
    if not equal(one, other | {"config": one["config"]}):
        return False
    return all(torch.equal(best[name], other_best[name]) for name in best)


if __name__ == "__main__":
    run_script(main, Config)
