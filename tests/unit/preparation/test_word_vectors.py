"""Pretrained vectors reach the words they belong to, and a broken file is refused with the line that is wrong."""

import pytest
import torch

from captioning.preparation.word_vectors import load_word_vectors
from utils import UserError

WORD_MAP = {"<pad>": 0, "dog": 1, "Paris": 2, "german": 3, "frisbee": 4, "<unk>": 5, "<start>": 6, "<end>": 7, "at": 8}
DOG, PARIS = [1.0, -2.5, 3e-2], [4.0, 5.0, 6.0]


@pytest.fixture
def write(tmp_path):
    def write_file(*lines, end="\n"):
        path = tmp_path / "vectors.txt"
        path.write_bytes(("\n".join(lines) + end).encode())
        return path

    return write_file


@pytest.mark.parametrize("header", [[], ["3 3"]], ids=["glove", "word2vec"])
@pytest.mark.parametrize("end_of_line", ["", " ", "\r", " \r"], ids=repr)
def test_words_get_their_vectors(write, header, end_of_line):
    lines = [*header, "the 9 9 9", "dog 1 -2.5 3e-2", "Paris 4 5 6"]
    vectors, share = load_word_vectors(write(*[line + end_of_line for line in lines]), WORD_MAP)
    assert vectors.shape == (len(WORD_MAP), 3)
    assert vectors.dtype == torch.float32
    assert vectors[1].tolist() == pytest.approx(DOG)
    assert vectors[2].tolist() == pytest.approx(PARIS)
    assert share == 2 / 5


def test_the_last_line_may_lack_its_end(write):
    assert load_word_vectors(write("dog 1 -2.5 3e-2", "Paris 4 5 6", end=""), WORD_MAP)[0][2].tolist() == PARIS


def test_empty_lines_are_passed_over(write):
    assert load_word_vectors(write("dog 1 -2.5 3e-2", "", "Paris 4 5 6", "", ""), WORD_MAP)[1] == 2 / 5


def test_a_file_that_is_far_larger_than_what_is_needed_is_read_to_its_end(write):
    path = write(*[f"word{i} 1 2 3" for i in range(20_000)], "dog 1 -2.5 3e-2")
    assert load_word_vectors(path, WORD_MAP)[0][1].tolist() == pytest.approx(DOG)


def test_capitals_are_looked_past_only_if_the_word_itself_is_not_there(write):
    vectors, share = load_word_vectors(
        write("DOG 7 7 7", "dog 1 -2.5 3e-2", "Dog 8 8 8", "paris 4 5 6", "German 3 3 3", "GERMAN 2 2 2"), WORD_MAP
    )
    assert vectors[1].tolist() == pytest.approx(DOG)
    assert vectors[2].tolist() == PARIS
    assert vectors[3].tolist() == [3, 3, 3]  # the file's first, which is the more frequent
    assert share == 3 / 5


def test_two_words_that_differ_in_capitals_share_a_vector_that_the_file_has_once(write):
    vectors, share = load_word_vectors(write("apple 1 2 3"), {"<pad>": 0, "Apple": 1, "APPLE": 2})
    assert vectors[1:].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert share == 1


def test_of_a_word_that_comes_twice_the_first_counts(write):
    assert load_word_vectors(write("dog 1 -2.5 3e-2", "dog 0 0 0"), WORD_MAP)[0][1].tolist() == pytest.approx(DOG)


def test_words_with_blanks_are_passed_over_and_not_taken_for_their_first_part(write):
    path = write("dog 1 -2.5 3e-2", "at name@domain.com 7 7 7", ". . . 7 7 7", "at 4 5 6")
    vectors, share = load_word_vectors(path, WORD_MAP)
    assert vectors[8].tolist() == [4, 5, 6]
    assert share == 2 / 5
    path = write("dog 1 -2.5 3e-2", "at name@domain.com 7 7 7")
    assert load_word_vectors(path, WORD_MAP)[1] == 1 / 5


def test_words_in_other_letters_are_found(write):
    vectors, _ = load_word_vectors(
        write("Ölberg 4 5 6", "犬 1 2 3", "a\u00a0b 7 7 7"), {"<pad>": 0, "犬": 1, "ölberg": 2}
    )
    assert vectors[1:].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_special_words_and_missing_ones_start_at_random_as_large_as_the_others(write):
    words = {f"word{i}": i for i in range(1000)} | {"<unk>": 1000, "<pad>": 1001}
    vectors_in_file = 0.3 + 2 * torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    lines = [f"word{i} " + " ".join(map(str, row)) for i, row in enumerate(vectors_in_file.tolist())]
    path = write(*lines, "<unk> " + "100 " * 8)
    vectors, share = load_word_vectors(path, words)
    assert share == 0.5
    assert torch.allclose(vectors[:500], vectors_in_file)
    drawn = vectors[500:]
    assert drawn.mean().item() == pytest.approx(0.3, abs=0.1)
    assert drawn.std().item() == pytest.approx(2, rel=0.05)
    assert vectors[1000].max() < 50
    assert len(drawn.unique(dim=0)) == len(drawn)


def test_a_seed_repeats_the_random_vectors(write):
    path = write("dog 1 -2.5 3e-2")
    first, same, other = (load_word_vectors(path, WORD_MAP, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first[0], other[0])
    state = torch.get_rng_state()
    load_word_vectors(path, WORD_MAP)
    assert torch.equal(torch.get_rng_state(), state)  # the run's own random numbers go on as they were


def test_the_coverage_is_printed(write, capsys):
    path = write("dog 1 -2.5 3e-2", "paris 4 5 6")
    load_word_vectors(path, WORD_MAP)
    report = capsys.readouterr().out
    assert f"{path}: has vectors of 2 of 5 words (40.0%), 1 of them spelt with other capitals" in report


def test_vectors_of_another_size_are_refused_before_the_file_is_read(write):
    path = write("dog 1 -2.5 3e-2", "broken")
    with pytest.raises(UserError, match="embed_dim: 512 found, 3 expected"):
        load_word_vectors(path, WORD_MAP, embed_dim=512)
    assert load_word_vectors(write("dog 1 -2.5 3e-2"), WORD_MAP, embed_dim=3)[0].shape == (9, 3)


GOOD = "cat 1 2 3"


@pytest.mark.parametrize(
    ("lines", "line", "found"),
    [
        ([GOOD, "dog 1 2"], 2, "2 numbers found, 3 expected"),
        ([GOOD, "other 1 2"], 2, "2 numbers found, 3 expected"),
        ([GOOD, "other 1 2 "], 2, "2 numbers found, 3 expected"),
        ([GOOD, "dog 1 2 3 4"], 2, "4 numbers found, 3 expected"),
        ([GOOD, "dog 1  2"], 2, "2 numbers found, 3 expected"),
        ([GOOD, GOOD, "dog"], 3, "0 numbers found, 3 expected"),
        ([GOOD, "dog 1 two 3"], 2, "'two' found, a number expected"),
        ([GOOD, "dog 1 nan 3"], 2, "'nan' found, a number expected"),
        ([GOOD, "dog 1 1e39 3"], 2, "'1e39' found, a number expected"),
        ([GOOD, "dog 1 2_0 3"], 2, "'2_0' found, a number expected"),
        ([GOOD, "dog 1 2 inf"], 2, "'inf' found, a number expected"),
        (["2 3", GOOD, "dog 1 2"], 3, "2 numbers found, 3 expected"),
        (["dog"], 1, "'dog' found, a word and its numbers expected"),
        (["<html> not found </html>"], 1, "found, a word and its numbers expected"),
        (["", GOOD], 1, "nothing found"),
        ([""], 1, "nothing found"),
    ],
)
def test_a_broken_line_is_named(write, lines, line, found):
    with pytest.raises(UserError, match=f"^.*vectors.txt, line {line}: .*{found}") as error:
        load_word_vectors(write(*lines), WORD_MAP)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"3 3\ndog \x00\x00\x80\x3f\x00\x00", b"PK\x03\x04\x00\x00"])
def test_an_empty_or_binary_file_is_refused(tmp_path, content):
    path = tmp_path / "vectors.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match="vectors.bin.*(nothing found|is a binary file)"):
        load_word_vectors(path, WORD_MAP)


def test_a_file_that_was_cut_off_is_refused_if_its_header_tells(write):
    with pytest.raises(UserError, match="2 vectors found, 4 expected"):
        load_word_vectors(write("4 3", GOOD, "dog 1 2 3"), WORD_MAP)


def test_a_file_that_has_none_of_the_words_is_refused(write):
    with pytest.raises(UserError, match="none of the vocabulary's 5 words"):
        load_word_vectors(write("chien 1 2 3", "<unk> 1 2 3"), WORD_MAP)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt: no such file"):
        load_word_vectors(tmp_path / "nowhere.txt", WORD_MAP)
    with pytest.raises(UserError, match="cannot be read"):
        load_word_vectors(tmp_path, WORD_MAP)


@pytest.mark.parametrize("header", ["", "2 2\n"])
def test_a_byte_order_mark_does_not_cost_the_first_word(tmp_path, header):
    path = tmp_path / "vectors.txt"
    path.write_text(f"\ufeff{header}dog 1 2\ncat 3 4\n", encoding="utf-8")
    vectors, share = load_word_vectors(path, {"<pad>": 0, "dog": 1, "cat": 2})
    assert share == 1
    assert vectors[1].tolist() == [1, 2]
