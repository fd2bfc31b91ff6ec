"""
The table of broken and hostile files: which file is broken how, which script reads it, and how that must end.

`python tests/hostile_table.py` runs all cases and prints them with their exit codes and lines.
"""

import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "helpers"))  # when it is run as a script

from hostile_checkpoints import CHECKPOINTS, TUTORIAL
from hostile_data import CACHES, DATA
from hostile_files import make_sound_files, try_case
from hostile_inputs import ANNOTATIONS, PICTURES, VECTORS

CASES = [*ANNOTATIONS, *PICTURES, *DATA, *CACHES, *CHECKPOINTS, *VECTORS, *TUTORIAL]


def main():
    """Run every case and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "sound"
        sound.mkdir()
        make_sound_files(sound)
        for i, case in enumerate(CASES):
            result = try_case(case, sound, Path(folder) / str(i))
            said = result.line or next(iter(reports(result, Path(folder) / str(i))), "as if nothing had happened")
            print(f"{i + 1:3} {case.name}\n    exit {result.code}: {said.replace(folder + '/', '')}")
            shutil.rmtree(Path(folder) / str(i))


def reports(result, folder):
    """:return: lines in which a script that went on says what it left out or made again"""
    lines = [line for line in result.printed.splitlines() if "skipped" in line or "computed again" in line]
    for name in result.new:
        if "UNREADABLE" in name:
            lines += (folder / name).read_text().splitlines()[1:]
    return lines


if __name__ == "__main__":
    main()
