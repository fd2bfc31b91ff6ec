"""Runs a benchmark on sizes that measure nothing, and looks at what it reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_benchmark(script, *options):
    """:return: what the benchmark printed, and the list of its lines of JSON as dicts"""
    command = [sys.executable, ROOT / "benchmarks" / script, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, [json.loads(line) for line in result.stdout.split("\n") if line.startswith("{")]


def assert_compares_with_the_plain_version(script, options):
    _, rows = run_benchmark(script, *options)
    assert len(rows) >= 2
    for row in rows:
        assert set(row) == {"benchmark", "case", "unit", "plain", "ours", "ratio", "limit_fraction"}
        assert row["ratio"] == pytest.approx(row["ours"] / row["plain"], rel=0.01, abs=0.006)
