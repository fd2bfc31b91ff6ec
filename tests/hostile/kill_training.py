"""
Kill what is running at random moments, start it again, and compare with what was left alone: is all the same?

    python tests/hostile/kill_training.py                         # 20 kills of each work, some ten minutes
    python tests/hostile/kill_training.py --kills 3 --work train  # fewer
    python tests/hostile/kill_training.py --work train --drawn    # each kill with a recipe drawn at random

Training must end with the same weights, optimizer, scores, curves and printed lines, to the last bit; preprocessing,
drawing and the feature cache with the same files. Every second kill waits for a file that is just being written.
"""

import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "helpers"))  # when it is run as a script

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import create_input_files
import train
from captioning.command_line import parse_args, run_script
from captioning.features import cache_features
from captioning.preparation.shapes import create_shapes
from captioning.training.settings import check_config
from models import Encoder
from utils import UserError

DATA = ["--data_folder", "data", "--data_name", "tiny_5_cap_per_img_0_min_word_freq", "--run_folder", "run"]
TINY = [
    "--encoder", "shufflenet_v2_x0_5", "--encoder_weights", "none", "--encoded_image_size", "2", "--embed_dim", "8",
    "--decoder_dim", "8", "--device", "cpu", "--epochs", "3", "--batch_size", "10",
    "--val_beam_size", "1", "--print_every", "3", "--save_minutes", "0.00001", "--resume", "auto",
]  # fmt: skip
CHOICES = (  # of which a drawn recipe has one each
    (
        ["--decoder", "soft"],
        ["--decoder", "hard"],
        ["--decoder", "show_tell"],
        ["--decoder", "spatial"],
        ["--decoder", "adaptive"],
    ),
    ([], ["--hard_inference", "sample"], ["--gate", "False"], ["--deep_output"]),
    ([], ["--tie_weights"], ["--decoder_layers", "2"], ["--attention_nonlinearity", "tanh"]),
    ([], ["--optimizer", "adamw", "--weight_decay", "0.01"], ["--optimizer", "sgd"]),
    (
        [],
        ["--schedule", "cosine", "--schedule_cycles", "2"],
        ["--schedule", "one_cycle"],
        ["--schedule_patience", "1"],
        ["--schedule", "exponential", "--schedule_step_size", "5"],
        ["--schedule", "steps", "--schedule_step_size", "3"],
    ),
    ([], ["--warmup_steps", "1"]),
    ([], ["--clip", "norm"], ["--clip", "none"]),
    ([], ["--fine_tune_encoder"], ["--fine_tune_encoder", "--fine_tune_from_step", "9"], ["--no_cache_features"]),
    ([], ["--flip", "0.5", "--noise", "0.1"], ["--warp", "0.2", "--colour", "0.2"], ["--crop_min_scale", "0.5"]),
    (
        [],
        ["--bucket"],
        ["--image_major"],
        ["--image_major", "--self_critical_from_epoch", "2"],
        ["--image_major", "--self_critical_from_epoch", "1", "--self_critical_samples", "2"],
    ),
    ([], ["--accumulate", "2"], ["--accumulate", "3"]),
    ([], ["--teacher_forcing", "linear"], ["--teacher_forcing", "inverse_sigmoid"]),
    ([], ["--label_smoothing", "0.1", "--embedding_dropout", "0.2"], ["--state_dropout", "0.3"]),
    ([], ["--precision", "bf16"], ["--no_fast_cpu"]),
    ([], ["--workers", "1"]),
    ([], ["--stop_metric", "CIDEr"], ["--val_share", "0.5"], ["--seed", "7"]),
)
RECIPES = (  # between them, all that a run has to remember
    ["--fine_tune_encoder", "--fine_tune_from_step", "9", "--accumulate", "2", "--schedule", "cosine",
     "--average_last", "2"],
    ["--decoder", "hard", "--hard_inference", "sample", "--bucket", "--flip", "0.5", "--noise", "0.1", "--workers", "1",
     "--teacher_forcing", "linear", "--optimizer", "sgd", "--precision", "bf16", "--schedule_patience", "1"],
    ["--image_major", "--self_critical_from_epoch", "2", "--ema_decay", "0.9"],
)  # fmt: skip


@dataclass
class Config:
    kills: int = 20  # of each work
    work: tuple[str, ...] = ("train", "draw", "preprocess", "cache")  # what is killed
    seed: int = 0  # of the moments
    folder: str | None = None  # where to work; default a temporary folder
    drawn: bool = False  # kill each training with a recipe of its own, drawn at random


def main(config):
    rng = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        finish(start(make_data, folder, folder / "made.txt"))
        for work in config.work:
            drawn = config.drawn and work == "train"
            same = sum(one_kill(work, i, folder, rng, drawn) for i in range(config.kills))
            print(f"{work}: {same} of {config.kills} ended as the one that was left alone", flush=True)
            if same < config.kills:
                raise UserError(f"{work}: a killed run did not end as the one that was left alone")


def draw_recipe(rng):
    """:return: list of options for train.py, drawn until they go together"""
    while True:
        recipe = [word for choices in CHOICES for word in rng.choice(choices)]
        try:
            check_config(parse_args(train.Config, [*DATA, *TINY, *recipe]))
        except UserError:
            continue
        return recipe


def one_kill(work, i, folder, rng, drawn):
    """:return: whether a run that is killed, and started again, leaves what one leaves that was not"""
    variant = 0
    if work == "train":
        variant = i if drawn else i % len(RECIPES)
    clean, killed = folder / f"{work}_{variant}", folder / f"{work}_killed"
    recipe = RECIPES[i % len(RECIPES)]
    job = {"train": lambda: run_training(recipe), "draw": draw, "preprocess": preprocess, "cache": cache}[work]
    seconds = folder / f"{work}_{variant}.seconds"
    while not clean.exists():
        recipe = draw_recipe(rng) if drawn else recipe
        begun = time.monotonic()
        code = exit_code(start(job, prepare(work, clean), clean.with_suffix(".txt")))
        seconds.write_text(str(time.monotonic() - begun))
        if drawn and code == 2:  # too few steps for the schedule, a decoder without such a setting: another is drawn
            shutil.rmtree(clean)
        elif code:
            raise failed(code)
    if drawn:
        print(" ".join(recipe))
    while True:  # until it is killed before it is done
        prepare(work, killed)
        printed = killed.with_suffix(".txt")
        printed.unlink(missing_ok=True)
        moment, writing = rng.uniform(0, float(seconds.read_text())), i // 2 % 2 == 1
        process = start(job, killed, printed)
        if kill_at(process, moment, killed, writing):
            break
    state = sorted(path.name for path in killed.rglob("*") if path.suffix == ".tmp")
    finish(start(job, killed, printed))
    differences = compare(work, clean, killed)
    print(f"{work} {i + 1}: killed after {moment:.2f} s, {', '.join(state) or 'nothing'} half written: "
          f"{'differs in ' + ', '.join(differences) if differences else 'the same'}", flush=True)  # fmt: skip
    return not differences


def prepare(work, folder):
    """:return: the folder, with what the work starts from: the data; of preprocessing, an older version of them"""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if work != "draw":
        shutil.copytree(folder.parent / "data", folder / "data", copy_function=os.link)
    return folder


def start(job, folder, output):
    """:return: process id of a child that does the job in the folder; all is imported already, so it starts at once"""
    process = os.fork()
    if process:
        return process
    try:
        os.chdir(folder)
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        job()
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(process):
    code = exit_code(process)
    if code:
        raise failed(code)


def exit_code(process):
    """:return: with what a child ended; waits for it"""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def failed(code):
    return UserError(f"the run that was not killed ended with {code}; --folder keeps what it printed")


def kill_at(process, moment, folder, writing):
    """:return: whether the process could be killed at the moment (with `writing`: when it next writes a file)"""
    end = time.monotonic() + moment
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if time.monotonic() >= end and (not writing or any(folder.rglob(".*.tmp"))):
            os.kill(process, signal.SIGKILL)
            return exit_code(process) == -signal.SIGKILL
        if not writing:
            time.sleep(0.001)
    return False


def make_data():
    create_shapes("drawn", 16, 4, 4)
    create_shapes("drawn_more", 40, 4, 4)
    preprocess("drawn")


def draw():
    create_shapes("drawn", 20, 4, 4)


def run_training(recipe):
    run_script(train.main, train.Config, [*DATA, *TINY, *recipe])


def preprocess(folder="../drawn_more"):
    data = {"dataset": "tiny", "annotations": (f"{folder}/dataset_shapes.json",), "output_folder": "data"}
    small = {"min_word_freq": 0, "image_size": 64, "workers": 0}
    create_input_files.main(create_input_files.Config(**data, **small))


def cache():
    torch.manual_seed(0)
    for image_file in sorted(Path("data").glob("*_IMAGES_*")):
        cache_features(Encoder("squeezenet1_1").eval(), image_file, torch.device("cpu"), batch_size=1)


def compare(work, clean, killed):
    """:return: list of what differs"""
    if work != "train":
        one, other = ({path.relative_to(run): path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
                      for run in (clean, killed))  # fmt: skip
        return [str(name) for name in one | other if one.get(name) != other.get(name)]
    differences = [path.name for path in killed.rglob("*.tmp")]
    for name in ("last.pth", "best.pth"):
        one, other = (torch.load(run / "run" / name, weights_only=True) for run in (clean, killed))
        differences += [f"{name} {part}" for part in one if part != "curves" and not same_part(part, one, other)]
    if scalars(clean / "run") != scalars(killed / "run"):
        differences.append("curves")
    if epochs_printed(clean) != epochs_printed(killed):
        differences.append("printed lines")
    return differences


def same_part(part, one, other):
    """:return: whether a part of two checkpoints is the same; of the epochs, all but how many seconds they took"""
    parts = one[part], other[part]
    if part in ("history", "best"):
        parts = [without_seconds(entries if part == "history" else [entries]) for entries in parts]
    return equal(*parts)


def without_seconds(history):
    """:return: list of the entries of a run's epochs without the times that they took"""
    return [{name: value for name, value in entry.items() if "seconds" not in name} for entry in history]


def equal(one, other):
    """:return: whether two checkpoints' parts are the same to the last bit"""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and np.array_equal(bits(one), bits(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.ndim else tensor.numpy()


def scalars(run_folder):
    """:return: dict of curve -> list of (step, value), each point as often as it is there"""
    events = EventAccumulator(str(run_folder)).Reload()
    return {tag: sorted((point.step, point.value) for point in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def epochs_printed(folder):
    """:return: list of what was printed of each epoch, without the seconds; an epoch that was done twice counts once"""
    printed = folder.with_suffix(".txt").read_text()
    lines = re.findall(r"^(epoch \d+: .*), \d+ s and \d+ s for validation(.*)$", printed, flags=re.MULTILINE)
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    run_script(main, Config)
