"""README and docs say what is true: scripts understand their commands, imports work, files and links are there."""

import ast
import contextlib
import importlib
import re
import shlex

import pytest
from pages import (
    PAGES,
    ROOT,
    anchors,
    assert_understood,
    blocks,
    code_spans,
    commands,
    config_of,
    links,
    measures_speed,
    missing_files,
    option_names,
    python_commands,
)
from saved_model import save_model

from captioning.command_line import parse_args
from captioning.networks.registry import DECODERS
from utils import UserError

PYTHON_COMMANDS = python_commands()
OTHER_COMMANDS = [(page, words) for page, words in commands() if (page, words) not in PYTHON_COMMANDS]
SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if "run_script(main" in path.read_text(encoding="utf-8")]
OTHER_OPTIONS = {"--help", "--durations"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def name(value):
    return shlex.join(value)[:80] if isinstance(value, list) else value.name


@pytest.mark.parametrize("page, words", [run for run in PYTHON_COMMANDS if not measures_speed(run[1])], ids=name)
def test_a_command_is_understood_by_the_script_that_it_calls(page, words):
    assert_understood(words)


@pytest.mark.parametrize("page, words", OTHER_COMMANDS, ids=name)
def test_another_programs_command_names_what_is_there(page, words):
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(words[1:]) <= set(targets)
    elif words[:2] == ["pip", "install"]:
        files = [word for word in words[2:] if word.endswith(".txt")]
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        known = (ROOT / "pyproject.toml").read_text()
        assert all((ROOT / file).is_file() for file in files)
        assert all(re.search(rf"^{extra} = \[", known, flags=re.M) for each in extras for extra in each.split(","))
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    else:
        assert words[0] in ("cd", "git", "source", "tensorboard", "pre-commit"), f"unknown program {words[0]}"


@each_page
def test_an_option_within_a_sentence_belongs_to_a_script(page):
    scripts = [script for script in SCRIPTS if script.name != "blip.py" or importlib.util.find_spec("transformers")]
    configs = [config_of(script) for script in scripts]
    known = set().union(OTHER_OPTIONS, *map(option_names, configs))
    spans = [span for span in code_spans(page) if span.startswith("--")]
    assert {
        word.split("=")[0] for span in spans for word in span.split() if re.fullmatch("--[a-z_]+(=.*)?", word)
    } - known == set()
    for span in (span for span in spans if " " in span):  # with a value: some script takes it
        names = {word.split("=")[0] for word in span.split() if word.startswith("--")}
        able = [config for config in configs if names <= option_names(config)]
        assert any(takes(config, shlex.split(span)) for config in able), span


def takes(config, words):
    """:return: whether a command line of this config may hold these words"""
    with contextlib.suppress(UserError):
        parse_args(config, words)
        return True
    with contextlib.suppress(UserError):
        parse_args(config, ["--img", "photo.jpg", *words])
        return True
    return False


@each_page
def test_what_python_snippets_import_is_there(page):
    for snippet in blocks(page, "python"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


def test_the_snippet_for_your_own_code_captions_a_photo(tmp_path, monkeypatch, capsys):
    [snippet] = [text for text in blocks(ROOT / "README.md", "python") if "load_captioner" in text]
    from PIL import Image

    (tmp_path / "runs/coco").mkdir(parents=True)
    save_model(tmp_path / "runs/coco/best.pth", seed=0)
    Image.new("RGB", (80, 60), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.search(r"-\d+\.\d+", capsys.readouterr().out)  # a caption and its log-probability


@each_page
def test_every_link_leads_somewhere(page):
    for path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path.name}#{anchor}"


@each_page
def test_every_file_that_is_named_exists(page):
    assert missing_files(page, of_speed=False) == []


def test_the_readme_is_short_and_sends_newcomers_to_five_files():
    readme = ROOT / "README.md"
    assert len(readme.read_bytes()) <= 25_000
    section = readme.read_text(encoding="utf-8").split("## Read these five files")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d\. \[`[\w/.]+`\]", section, flags=re.M)) == 5


def test_every_decoder_is_named_where_one_chooses_among_them():
    tables = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/recipes.md")]
    rows = [" ".join(re.findall(r"^\| (`.*?) \|", table, flags=re.M)) for table in tables]  # the first column
    [help_text] = re.findall(r"^    decoder: .*# (.*)", (ROOT / "train.py").read_text(encoding="utf-8"), flags=re.M)
    for decoder in DECODERS:
        assert all(f"`{decoder}`" in row for row in rows), decoder
        assert re.search(rf"\b{decoder}\b", help_text), decoder


def test_every_picture_of_the_docs_is_shown_somewhere():
    shown = {path.resolve() for page in PAGES for path, _ in links(page)}
    assert [path.name for path in ROOT.glob("docs/*.png") if path.resolve() not in shown] == []
