"""What README.md and docs/ say, taken out of them: commands, options, snippets, links and names of files."""

import ast
import contextlib
import importlib
import re
import shlex
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest

from captioning.command_line import parse_args

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "benchmarks/results.md",
    ROOT / "pretrained/README.md",
]
FILE_NAME = re.compile(r"[\w./-]+\.(?:py|md|ipynb|toml|cff|yaml)|requirements[\w-]*\.txt|Makefile|[\w./-]+/")


def blocks(page, language):
    """:return: list of the texts of a page's code blocks in this language"""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def prose(page):
    """:return: a page's text without its code blocks"""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def code_spans(page):
    """:return: list of what stands between backticks in a page's text"""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands():
    """:return: list of (page, command as a list of words), those of bash blocks and those within sentences"""
    found = []
    for page in PAGES:
        text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
        lines = [part for line in text.splitlines() for part in line.split("&&")]
        lines += [span for span in code_spans(page) if re.match(r"(python|torchrun|make|pip) [\w./-]", span)]
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # a setting before the command
                words.pop(0)
            if words:
                found.append((page, words))
    return found


def python_commands():
    """:return: those of `commands` that call one of this project's scripts"""
    return [(page, words) for page, words in commands() if words[0] in ("python", "torchrun") and words[1] != "-m"]


def measures_speed(words):
    """
    Tell whether a command's script imports captioning/speed/. That folder can be deleted, so what the pages say of it
    is checked by its own tests (tests/unit/speed), and by no others: these commands, and the names of its files.
    """
    script, _ = script_and_arguments(words)
    return script.exists() and "from captioning.speed" in script.read_text(encoding="utf-8")


def assert_understood(words):
    """Let a command's script parse its arguments."""
    script, arguments = script_and_arguments(words)
    if script.name == "blip.py":
        pytest.importorskip("transformers")
    config = config_of(script)
    if config is None:
        assert arguments == []
        return
    with contextlib.suppress(SystemExit):  # --help
        config = parse_args(config, arguments)
    if getattr(config, "train_options", None):
        parse_args(config_of(ROOT / "train.py"), shlex.split(config.train_options))


def script_and_arguments(words):
    """:return: path of the script that `python ...` or `torchrun ...` runs, and the script's own arguments"""
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return ROOT / words[place], words[place + 1 :]


def config_of(script):
    """:return: what a script gives to `run_script` to make its command line of; None if it has none"""
    sys.path.insert(0, str(script.parent))  # benchmarks import one another
    try:
        module = importlib.import_module(script.stem)
    finally:
        sys.path.remove(str(script.parent))
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_script" and isinstance(node.args[1], ast.Name):
            return getattr(module, node.args[1].id)
    return None


def option_names(config):
    """:return: set of '--name's that a config's command line has; `config` is a dataclass, or several joined by |"""
    classes = [config] if is_dataclass(config) else get_args(config)
    names = {field.name for each in classes for field in fields(each)}
    return {f"--{name}" for name in names} | {f"--no_{name}" for name in names}


def links(page):
    """:return: list of (path, heading's anchor or '') of the links within this repository"""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    targets = [target for target in targets if not re.match(r"https?:", target)]
    return [(page.parent / path if path else page, anchor) for path, _, anchor in (t.partition("#") for t in targets)]


def anchors(page):
    """:return: set of the anchors that GitHub gives to a page's headings"""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def file_names(page):
    """:return: list of the names of this project's files and folders that stand between backticks"""
    folders = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
    spans = [span for span in code_spans(page) if FILE_NAME.fullmatch(span)]
    return [
        span for span in spans if not span.endswith("/") or span.startswith(folders) or span.startswith("captioning")
    ]


def missing_files(page, of_speed):
    """:return: those of `file_names` that are not there, of captioning/speed/ or outside it (`measures_speed`)"""
    names = [name for name in file_names(page) if name.startswith("captioning/speed/") == of_speed]
    return [name for name in names if not (ROOT / name).exists() and not (page.parent / name).exists()]
