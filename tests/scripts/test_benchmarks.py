"""The benchmarks run, on sizes that measure nothing, and end in lines of JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "script, options",
    [
        ("preprocess.py", ["--photos", "2", "2", "--repeats", "1"]),
        ("scaling.py", ["--photos", "20", "40"]),
        ("memory.py", ["--steps", "4", "--epochs", "2"]),
        ("train_step.py", ["--encoder", "resnet18", "--batch_size", "5", "--repeats", "1"]),
        ("evaluate.py", ["--encoder", "resnet18", "--photos", "2", "--plain_photos", "1", "--captions_per_image", "1"]),
        ("start.py", ["--repeats", "1"]),
        ("caption_folder.py", ["--encoder", "resnet18", "--photos", "1", "2", "--plain_photos", "1"]),
    ],
)
def test_a_benchmark_compares_with_the_plain_version_and_reports_json(script, options):
    command = [sys.executable, ROOT / "benchmarks" / script, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in result.stdout.split("\n") if line.startswith("{")]
    assert len(rows) >= 2
    for row in rows:
        assert set(row) == {"benchmark", "case", "unit", "plain", "ours", "ratio", "limit_fraction"}
        assert row["ratio"] == pytest.approx(row["ours"] / row["plain"], rel=0.01, abs=0.006)


def test_the_decoders_benchmark_has_a_row_and_a_line_of_json_for_each():
    command = [sys.executable, ROOT / "benchmarks/decoders.py", "--decoders", "show_tell", "transformer",
               "--photos", "1", "--repeats", "1", "--grid", "2"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.split("\n")
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| `show_tell`", "| `transformer`"]
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["case"] for row in rows] == ["show_tell", "transformer"]
    assert all(value > 0 for row in rows for value in list(row.values())[2:])
