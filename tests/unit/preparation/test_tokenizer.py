"""A text becomes its words, whatever script it is in."""

import pytest

from captioning.preparation.tokenizer import is_split_into_characters, tokenize


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's T-shirt... (red)!", ["a", "man", "s", "t", "shirt", "red"]),
        ("  ", []),
        ("Cafe\u0301 ÜBER naïve", ["café", "über", "naïve"]),
        ("Собака бежит.", ["собака", "бежит"]),
        ("कुत्ता दौड़ रहा है।", ["कुत्ता", "दौड़", "रहा", "है"]),
        ("一只狗, dog", ["一", "只", "狗", "dog"]),
        ("snake_case 🐶 10,000", ["snake", "case", "10", "000"]),
    ],
)
def test_words_are_letters_and_digits_of_any_script(text, words):
    assert tokenize(text) == words


def test_a_word_with_a_zero_width_joiner_stays_whole():
    assert tokenize("می\u200cشود") == ["می\u200cشود"]  # Persian
    assert tokenize("क्\u200dष है") == ["क्\u200dष", "है"]  # Hindi
    assert tokenize("a \u200d dog 👩\u200d🚀") == ["a", "dog"]


def test_invisible_characters_do_not_split_a_word_but_a_zero_width_space_does():
    assert tokenize("co\u00adop \u2066left\u2069") == ["coop", "left"]
    assert tokenize("two\u200bwords ❤\ufe0f") == ["two", "words"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("หมาวิ่ง", ["ห", "ม", "า", "วิ่", "ง"]),  # Thai; a vowel and a tone mark stay with their letter
        ("ဗုဒ္ဓ", ["ဗု", "ဒ္ဓ"]),  # Burmese, with a letter below another
        ("ខ្មែរ", ["ខ្មែ", "រ"]),  # Khmer
        ("カタカナ2つ", ["カ", "タ", "カ", "ナ", "2", "つ"]),
        ("dogหมาcat", ["dog", "ห", "ม", "า", "cat"]),
    ],
)
def test_scripts_without_spaces_are_split_into_characters(text, words):
    assert tokenize(text) == words


def test_whether_captions_were_split_into_characters_is_known():
    assert is_split_into_characters(["a", "ห", "วิ่"])
    assert not is_split_into_characters(["a", "dog"])
    assert not is_split_into_characters(["小狗", "狗"])  # somebody split this into words
