"""What is printed can neither command a terminal nor cost the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioning.screen import printable, safe_screen

ROOT = Path(__file__).parents[2]
JOB = """
import sys
from dataclasses import dataclass
from pathlib import Path
from captioning.command_line import run_script

@dataclass
class Config:
    lines: int = 3

def main(config):
    for i in range(config.lines):
        print(f"caption {i}: ein M\\u00fcller \\u4e2d \\ud800")
        print("a note", file=sys.stderr)
    Path("done").write_text("all of it")

run_script(main, Config)
"""


def run(folder, command, **environment):
    """Run the job above in a shell, as `JOB`; :return: exit code, output, errors"""
    (folder / "job.py").write_text(JOB)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = command.replace("JOB", f"{sys.executable} job.py")
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True)
    return ended.returncode, ended.stdout.decode("latin-1"), ended.stderr.decode("latin-1")


def test_a_console_of_few_characters_gets_substitutes(tmp_path):
    code, output, errors = run(tmp_path, "JOB", PYTHONIOENCODING="ascii")
    assert code == 0 and "caption 2: ein M?ller ? ?" in output and "Traceback" not in errors
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("command", ["JOB --lines 30000 | head -n 1", "JOB --lines 30000 2>&1 | head -n 1"])
def test_a_reader_that_leaves_ends_nothing(tmp_path, command):
    code, output, errors = run(tmp_path, command)
    assert code == 0 and output.count("\n") == 1
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("command", ["JOB 2>&-", "JOB >&-", "JOB >&- 2>&-"])
def test_closed_streams_end_nothing_and_no_file_takes_their_place(tmp_path, command):
    code, output, errors = run(tmp_path, command)
    assert code == 0 and "Traceback" not in errors
    assert (tmp_path / "done").read_text() == "all of it"
    assert ("caption 0" in output) == (">&- " not in command + " " or command == "JOB 2>&-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is needed")
def test_output_that_cannot_be_written_is_said_when_the_work_is_done(tmp_path):
    code, _, errors = run(tmp_path, "JOB > /dev/full")
    assert code == 2 and errors.splitlines()[-1].startswith("error: what the script printed could not be written")
    assert (tmp_path / "done").exists()


def test_a_terminal_gets_no_commands_and_a_progress_bar_its_own(capsys):
    with safe_screen():
        print("dog\x1b]0;title\x07 \x9b2J\u202e.jpg")
        print("\r50%|#####     |", end="")
    assert capsys.readouterr().out == "dog?]0;title? ?2J?.jpg\n\r50%|#####     |"


def test_a_name_is_part_of_one_line_whatever_is_in_it():
    assert printable("a\nerror: b\r\t\x1b[0m.jpg") == "a?error: b???[0m.jpg"
    assert printable(Path(os.fsdecode(b"caf\xe9.jpg"))) == "caf\ufffd.jpg"
    assert printable("\u0915\u094d\u200d\u0937 \u4e2d\u6587 e\u0301") == "\u0915\u094d\u200d\u0937 \u4e2d\u6587 e\u0301"
