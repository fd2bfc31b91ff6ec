"""
How long one waits for a script: its help, and the caption of one photo, from typing the command.

Each command is a process of its own, as in a shell. The yardstick, "plain", is a process that imports torch and nothing
else; no script that uses a network can be faster. Rounds are interleaved, so that what else runs on the machine meets
all of them alike.
"""

import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from measure import report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a benchmark is run from anywhere

from captioning.command_line import run_script
from utils import Count

SCRIPTS = ("create_input_files.py", "train.py", "eval.py", "caption.py", "view_captions.py", "run_pipeline.py",
           "convert_checkpoint.py", "blip.py", "app.py")  # fmt: skip


@dataclass
class Config:
    repeats: Count = 3  # times that each command is run, after one that does not count
    photo: str | None = None  # photo to caption; default a cup of coffee of scikit-image's


def main(config):
    package = importlib.util.find_spec("skimage").submodule_search_locations[0]
    photo = config.photo or str(Path(package, "data", "coffee.png"))
    with tempfile.TemporaryDirectory() as folder:
        figure = ["--figure", str(Path(folder, "figure.png")), "--overwrite"]
        commands = {
            "import torch": ["-c", "import torch"],
            "caption.py, its imports alone": ["-c", "import caption"],
            "caption.py, one photo": ["caption.py", photo, *figure],
            **{f"{script} --help": [script, "--help"] for script in SCRIPTS},
        }
        rounds = [{case: run(command) for case, command in commands.items()} for _ in range(1 + config.repeats)][1:]
    ends = {case: statistics.median(one[case][1] for one in rounds) for case in commands}
    sentence = statistics.median(one["caption.py, one photo"][0] for one in rounds)
    plain = ends.pop("import torch")
    seconds = {"caption.py, one photo, to the sentence": sentence, **ends}
    report("start", [(case, "s", plain, ours, None) for case, ours in seconds.items()])


def run(arguments):
    """:return: seconds until a Python command has printed its first line, if it prints any, and until it has ended"""
    start = time.perf_counter()
    command = [sys.executable, "-u", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        first_line = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: ended with {process.returncode}")
    return first_line, time.perf_counter() - start


if __name__ == "__main__":
    run_script(main, Config)
