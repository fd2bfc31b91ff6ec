"""The benchmarks that measure captioning/speed/ run, and end in lines of JSON; the others: tests/scripts."""

import pytest
from benchmark_checks import assert_compares_with_the_plain_version

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "script, options",
    [
        ("train_step.py", ["--encoder", "resnet18", "--batch_size", "5", "--repeats", "1"]),
        ("encoder.py", ["--encoder", "resnet18", "--batch_size", "1", "--repeats", "1"]),
    ],
)
def test_a_benchmark_compares_with_the_plain_version_and_reports_json(script, options):
    assert_compares_with_the_plain_version(script, options)
