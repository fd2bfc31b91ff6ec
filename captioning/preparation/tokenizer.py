"""Turning a caption's text into words, in any script."""

import re
import unicodedata

from utils import SPECIAL_WORDS

# Letters of the scripts that write no spaces between words: Chinese, Japanese, Thai, Lao, Burmese, Khmer.
UNSPACED = (
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"
    "\u1000-\u102a\u103f\u1050-\u1055\u1780-\u17b3"
)
# Their marks for vowels and tones, which belong to the letter before them.
MARKS = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u102b-\u103e\u1056-\u1059\u17b4-\u17d3\u17dd\u3099\u309a"
)
STACKERS = "\u1039\u17d2"  # put the next Burmese or Khmer letter below the one before: both are one character
JOINERS = "\u200c\u200d"  # zero-width non-joiner (Persian) and joiner (Hindi), which shape letters within a word
SPACE = "\u200b"  # the zero-width space between words

CHARACTER = re.compile(f"[{UNSPACED}][{MARKS}]*(?:(?<=[{STACKERS}])[{UNSPACED}][{MARKS}]*)*")
CHARACTER_OR_WORD = re.compile(rf"{CHARACTER.pattern}|[^\s{UNSPACED}]+")


def tokenize(text):
    """
    Split a text into words: lower case, letters and digits of any script, no punctuation.

    In scripts that write no spaces between words, every character is a word.

    :param text: string
    :return: list of words
    """
    text = "".join(map(replace_other, unicodedata.normalize("NFC", text.lower())))
    words = [word.strip(JOINERS) for word in CHARACTER_OR_WORD.findall(text)]
    return [word for word in words if any(unicodedata.category(c)[0] in "LN" for c in word)]


def replace_other(c):
    """:return: a letter, mark or digit as it is, nothing for an invisible character, a space for any other"""
    category = unicodedata.category(c)
    if c in JOINERS or category[0] in "LMN":
        return c
    return "" if category == "Cf" and c != SPACE else " "  # Cf: soft hyphens, marks of direction


def without_special(words):
    """:return: the words without those that the word map keeps for itself"""
    return [word for word in words if word not in SPECIAL_WORDS]


def is_split_into_characters(words):
    """
    :param words: the words of many captions
    :return: whether some are of a script without spaces, and each of these is a single character
    """
    unspaced = [word for word in words if re.match(f"[{UNSPACED}]", word)]
    return bool(unspaced) and all(CHARACTER.fullmatch(word) for word in unspaced)
