"""Freed memory is kept, which is seen by how often the system has to hand out a page."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILL_AGAIN = """
import resource, sys
import torch
from captioning.speed.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(11):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).add_(1)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)  # the last time alone
"""


def pages(*arguments):
    command = [sys.executable, "-c", FILL_AGAIN, *arguments]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory is meant")
def test_a_block_that_was_freed_is_not_asked_of_the_system_again():
    assert pages("keep") < pages("give back") / 4


def test_without_glibc_nothing_changes(monkeypatch):
    from captioning.speed import memory

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())  # musl has no mallopt
    memory.keep_freed_memory()
    monkeypatch.setattr(memory.sys, "platform", "win32")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # would fail if it were called
    memory.keep_freed_memory()
