"""What is killed in a container, or in BLIP's validation, leaves nothing that is half done."""

import subprocess
import sys
from pathlib import Path

import pytest
from kill_containers import may_unshare

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def output_of(script, *options):
    """:return: what it printed; it has to end well"""
    command = [sys.executable, HERE / script, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(not may_unshare(), reason="this machine lets us make no containers")
def test_a_container_killed_while_two_compute_one_cache_leaves_a_whole_one():
    printed = output_of("kill_containers.py", "--rounds", "2")
    assert "process 1 and 1" in printed and "2 of 2 rounds left a whole cache" in printed


def test_a_fine_tuning_stopped_in_validation_ends_as_one_that_was_left_alone():
    pytest.importorskip("transformers")
    assert "3 of 3 ended as the one that was left alone" in output_of("kill_blip.py", "--kills", "3")
