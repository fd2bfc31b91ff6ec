"""Workers that may not open files enough are told of before they start."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import sys

from captioning.features import check_workers
from captioning.preparation.photos import photo_reader
from utils import UserError


class Nothing(list):
    read = False


resource.setrlimit(resource.RLIMIT_NOFILE, (20, int(sys.argv[1])))
for start in (photo_reader(2).__enter__, lambda: check_workers(Nothing(), 1, 2)):
    try:
        start()
    except UserError as error:
        print(error)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.fixture(scope="module")
def run_with_limit():
    """A function of the hardest limit: what the script prints under it."""

    def run(limit):
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(limit)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_too_low_a_limit_is_one_line(run_with_limit):
    reading, training, limit = run_with_limit(20)
    for line in (reading, training):
        assert line.startswith("workers: 2 need up to ") and "the limit is 20; raise it (ulimit -n), or take" in line
    assert limit == "20"


def test_the_limit_is_raised_where_the_system_allows_it(run_with_limit):
    [limit] = run_with_limit(400)
    assert 64 < int(limit) <= 400
