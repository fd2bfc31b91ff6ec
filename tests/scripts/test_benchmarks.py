"""The benchmarks run, and end in lines of JSON; those that measure captioning/speed/: tests/unit/speed."""

import csv
import json
import shlex
import subprocess
import sys

import pytest
import torch
from benchmark_checks import ROOT, assert_compares_with_the_plain_version, run_benchmark

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "script, options",
    [
        ("preprocess.py", ["--photos", "2", "2", "--repeats", "1"]),
        ("scaling.py", ["--photos", "20", "40"]),
        ("memory.py", ["--steps", "4", "--epochs", "2"]),
        ("evaluate.py", ["--encoder", "resnet18", "--photos", "2", "--plain_photos", "1", "--captions_per_image", "1"]),
        ("start.py", ["--repeats", "1"]),
        ("caption_folder.py", ["--encoder", "resnet18", "--photos", "1", "2", "--plain_photos", "1"]),
    ],
)
def test_a_benchmark_compares_with_the_plain_version_and_reports_json(script, options):
    assert_compares_with_the_plain_version(script, options)


def test_the_decoders_benchmark_has_a_row_and_a_line_of_json_for_each():
    printed, rows = run_benchmark(
        "decoders.py", "--decoders", "show_tell", "transformer", "--photos", "1", "--repeats", "1", "--grid", "2"
    )
    assert [line.split(" | ")[0] for line in printed.split("\n")[2:4]] == ["| `show_tell`", "| `transformer`"]
    assert [row["case"] for row in rows] == ["show_tell", "transformer"]
    assert all(value > 0 for row in rows for value in list(row.values())[2:])


@pytest.fixture
def over_seeds(training, tmp_path):
    """A function that trains and scores a tiny recipe with several seeds; it gives what was printed and the rows."""
    from tiny_training import TINY

    training("other", "--epochs", 1)  # it makes the data

    def run(*options, recipe="", expect=0):
        data = ["--data_folder", str(tmp_path), "--data_name", "tiny"]
        recipe = shlex.join([*data, *TINY, "--epochs", "1", *shlex.split(recipe)])
        command = [sys.executable, ROOT / "benchmarks/results_over_seeds.py", "--name", "tiny", "--recipe", recipe,
                   "--folder", tmp_path / "results", "--beam_sizes", "1", "2", *options]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == expect, result.stdout + result.stderr
        path = tmp_path / "results/results.csv"
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        return result.stdout + result.stderr, rows

    return run


def test_results_over_seeds_are_mean_and_spread_and_what_is_done_is_not_done_again(over_seeds, tmp_path):
    printed, rows = over_seeds()
    scores = [json.loads((tmp_path / f"results/tiny/seed_{i}/scores_VAL.json").read_text()) for i in range(2)]
    assert [row["beam"] for row in rows] == ["1", "2"]
    for row in rows:
        values = [one[row["beam"]]["ROUGE-L"] for one in scores]
        assert float(row["ROUGE-L mean"]) == pytest.approx(sum(values) / 2, abs=1e-4)
        assert float(row["ROUGE-L std"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-4)
        assert f"{row['ROUGE-L mean']} ± {row['ROUGE-L std']}" in printed
    weights = [torch.load(tmp_path / f"results/tiny/seed_{i}/last.pth")["decoder"]["fc.bias"] for i in range(2)]
    assert not torch.equal(*weights)

    printed, again = over_seeds()
    assert printed.count("done before") == 2 and "train.py" not in printed and again == rows
    printed, more = over_seeds("--seeds", "3")
    assert printed.count("$ python train.py") == 1 and [row["seeds"] for row in more] == ["2", "2", "3", "3"]


def test_a_name_stands_for_one_recipe(over_seeds, tmp_path):
    over_seeds("--seeds", "1")
    before = (tmp_path / "results/tiny/seed_0/last.pth").read_bytes()
    printed, _ = over_seeds("--seeds", "1", recipe="--decoder_lr 0.5", expect=2)
    assert "error: recipe: " in printed and "choose another --name" in printed
    assert (tmp_path / "results/tiny/seed_0/last.pth").read_bytes() == before
    printed, _ = over_seeds(recipe="--seed 3", expect=2)
    assert "recipe: --seed found, but each seed's run gets its own" in printed
