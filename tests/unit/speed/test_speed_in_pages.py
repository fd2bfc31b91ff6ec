"""What the pages say of captioning/speed/: its files are there, and the benchmarks of it take their commands."""

import pytest
from pages import PAGES, assert_understood, measures_speed, missing_files, python_commands

COMMANDS = [words for _, words in python_commands() if measures_speed(words)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_understood_by_the_benchmark_that_it_calls(words):
    assert_understood(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    assert missing_files(page, of_speed=True) == []
