"""
Broken and hostile files of every kind end in one clear line and exit code 2, or are left out and named.

The table is in hostile_table.py; `python tests/hostile_table.py` prints it. Here each case is run in this process, and
a few as commands.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_checkpoints import EVIL
from hostile_files import NAME, RUNS, SCRIPTS, make_sound_files, run, try_case
from hostile_table import CASES, reports

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with sound files of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    make_sound_files(folder)
    return folder


@pytest.fixture(scope="module")
def whole(sound, tmp_path_factory):
    """What scripts write from sound files: dict of a run -> the bytes of its result."""
    results = {"caption": "out/captions.json", "view": "out/page.html"}
    found = {}
    for name, result in results.items():
        folder = tmp_path_factory.mktemp("whole") / "case"
        shutil.copytree(sound, folder)
        assert run(SCRIPTS[name], RUNS[name](folder), folder).code == 0
        found[name] = result, without_path(folder / result, folder)
    return found


def without_path(path, folder):
    return path.read_text(encoding="utf-8").replace(str(folder), "")


def test_the_table_is_long_and_names_each_case_once():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 120
    assert {case.run for case in CASES} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_sound_files_give_no_complaint(sound, tmp_path, name):
    shutil.copytree(sound, tmp_path / "case")
    result = run(SCRIPTS[name], RUNS[name](tmp_path / "case"), tmp_path / "case")
    assert result.code == 0 and not reports(result, tmp_path / "case")
    assert any(new.startswith("run/" if name == "again" else "out/") for new in result.new)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_file(sound, whole, tmp_path, case):
    folder = tmp_path / "case"
    result = try_case(case, sound, folder)
    print(f"{case.name}\n    exit {result.code}: {result.line or reports(result, folder)}")
    assert not (folder / "marker").exists()
    assert not [name for name in result.new if name.endswith(".tmp")]
    if case.ends == "refused" or (case.ends == "same" and result.code):
        assert result.code == 2
        check_line(result.line, case)
        # Nothing was made but what is whole and true without the broken file: features, the report of missing photos.
        assert all(re.search(r"_FEATURES_|UNREADABLE_", name) for name in result.new)
    elif case.ends == "same":
        name, expected = whole[case.run]
        assert without_path(folder / name, folder) == expected
    elif case.ends == "mended":
        assert result.code == 0 and any("computed again" in line for line in reports(result, folder))
    else:
        assert result.code == 0 and any("0.jpg" in line for line in reports(result, folder))


def check_line(line, case):
    """The line is one, can be printed, says which file or field, and is not what Python would say."""
    assert line.isprintable() and len(line) < 600
    assert (case.says or Path(case.file.format(NAME)).name) in line
    assert not re.search(r"Traceback|<class|object at 0x|\w+Error\(", line)


COMMANDS = {
    "caption.py": ["--img", "photos/0.jpg", "--model", "model.pth"],
    "eval.py": ["--model", "model.pth"],
    "view_captions.py": ["--model", "model.pth"],
    "train.py": ["--data_folder", "data", "--data_name", NAME, "--resume", "model.pth"],
    "train.py ": ["--data_folder", "data", "--data_name", NAME, "--encoder_weights", "model.pth"],
    "convert_checkpoint.py": ["--checkpoint", "model.pth", "--word_map", f"data/WORDMAP_{NAME}.json", "--output", "o"],
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_malicious_checkpoint_is_refused_by_every_command(sound, tmp_path, script):
    folder = tmp_path / "case"
    shutil.copytree(sound, folder)
    for what in ("calls os.system", "calls exec within its config, in the old format"):
        shutil.copy(sound / "model.pth", folder)
        EVIL[what](folder / "model.pth")
        command = [sys.executable, ROOT / script.strip(), *COMMANDS[script]]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 2 and result.stdout == ""
        assert re.fullmatch(r"error: model.pth: .*(refused|asks for).*nothing of it was run.*\n", result.stderr)
        assert not (folder / "marker").exists()
