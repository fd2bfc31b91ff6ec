"""
Train one recipe with several seeds, score each run, and say the mean and the spread of every metric:

    python benchmarks/results_over_seeds.py --name soft --seeds 2 \
        --recipe "--data_folder data/flickr8k --data_name flickr8k_5_cap_per_img_5_min_word_freq --epochs 8"

The rows of the tables in docs/ are made like this. Runs lie in <folder>/<name>/seed_0 and so on; the table grows in
<folder>/results.csv. Started again, it continues where it stopped: a run that is scored is left as it is. A name stands
for one recipe, so that nothing is mixed up or replaced.
"""

import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a benchmark is run from anywhere

from captioning.command_line import run_script, split_words
from captioning.config_fields import check_fields
from captioning.evaluation.metrics import ALL as METRICS
from captioning.storage.files import load_json, save_json
from utils import BeamSizes, Count, Split, UserError

SETTINGS = ("recipe", "evaluation", "split", "beam_sizes")  # what a name stands for
COLUMNS = ("name", "seeds", "split", "beam", *(f"{metric} {kind}" for metric in METRICS for kind in ("mean", "std")))
OURS = ("seed", "run_folder", "resume", "overwrite")  # options that are not the recipe's to say


@dataclass
class Config:
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]  # of the recipe: its folder, and its rows in the table
    recipe: str = ""  # options of train.py, in quotes
    evaluation: str = ""  # more options of eval.py, such as '--no_unk'
    seeds: Count = 2  # runs, with the seeds 0, 1, ...
    split: Split = "VAL"  # that the runs are scored on
    beam_sizes: BeamSizes = (1, 3, 5)  # a row of the table each
    folder: str = "runs/results"  # of all recipes' runs, and of the table


def main(config):
    check_fields(config)
    recipe, evaluation = (split_options(name, getattr(config, name)) for name in ("recipe", "evaluation"))
    folder = Path(config.folder) / config.name
    begin(folder / "recipe.json", {name: as_json(getattr(config, name)) for name in SETTINGS})
    scores = []
    for seed in range(config.seeds):
        run_folder = folder / f"seed_{seed}"
        scores_file = run_folder / f"scores_{config.split}.json"
        if not scores_file.exists():
            run("train.py", *recipe, "--seed", seed, "--run_folder", run_folder, "--resume", "auto")
            run("eval.py", run_folder, "--split", config.split, "--beam_sizes", *config.beam_sizes, *evaluation)
        else:
            print(f"{run_folder}: done before")
        scores.append(load_json(scores_file))
    rows = [row_of(config, beam_size, [one[str(beam_size)] for one in scores]) for beam_size in config.beam_sizes]
    print_rows(rows)
    append_rows(rows, Path(config.folder) / "results.csv")


def split_options(name, text):
    """
    :return: list of command line words
    :raises UserError: if a quotation mark is not closed, or an option is ours to give
    """
    words = split_words(name, text)
    for option in OURS:
        if any(word.partition("=")[0] == f"--{option}" for word in words):
            raise UserError(f"{name}: --{option} found, but each seed's run gets its own; leave it out")
    return words


def as_json(value):
    """:return: the value as a JSON file gives it back"""
    return json.loads(json.dumps(value))


def begin(path, settings):
    """
    Note what a name stands for.

    :raises UserError: if it stands for something else already
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(settings, path)
    before = load_json(path)
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"{name}: {value!r} found, but {path} has {before.get(name)!r}; choose another --name, or remove "
                f"{path.parent}"
            )


def run(script, *arguments):
    """
    Run one of the scripts as a user would.

    :raises UserError: if it fails
    """
    words = [script, *map(str, arguments)]
    print("\n$ python", shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, str(ROOT / script), *words[1:]]).returncode
    if code:
        raise UserError(f"{script}: ended with exit code {code}; start it again to continue from there")


def row_of(config, beam_size, scores):
    """:return: dict with a value for each of `COLUMNS`, of a list of {metric: value}, one of each seed"""
    row = {"name": config.name, "seeds": len(scores), "split": config.split, "beam": beam_size}
    for metric in METRICS:
        values = [one[metric] for one in scores]
        row[f"{metric} mean"] = f"{statistics.mean(values):.4f}"
        row[f"{metric} std"] = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""  # of the sample: n - 1
    return row


def print_rows(rows):
    """Print a table in Markdown: mean ± standard deviation."""
    print("\n| recipe | seeds | beam | " + " | ".join(METRICS) + " |\n|---|" + "---:|" * (2 + len(METRICS)))
    for row in rows:
        cells = [" ± ".join(filter(None, (row[f"{metric} mean"], row[f"{metric} std"]))) for metric in METRICS]
        print(f"| {row['name']} | {row['seeds']} | {row['beam']} | " + " | ".join(cells) + " |")


def append_rows(rows, path):
    """
    Add rows to a CSV file; those that it has already are not added again.

    :raises UserError: if the file is another table
    """
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        before = list(csv.reader(file))
        if before and tuple(before[0]) != COLUMNS:
            raise UserError(f"{path}: has other columns than {', '.join(COLUMNS[:5])}, ...; move it away")
        file.seek(0, os.SEEK_END)
        table = csv.writer(file)
        if not before:
            table.writerow(COLUMNS)
        for row in rows:
            values = [str(row[column]) for column in COLUMNS]
            if values not in before:
                table.writerow(values)
    print(f"Added to {path}")


if __name__ == "__main__":
    run_script(main, Config)
