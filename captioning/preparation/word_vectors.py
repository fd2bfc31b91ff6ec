"""
Pretrained word vectors in the text formats of GloVe and word2vec (fastText's .vec is the same), for the embeddings.

A line is a word and its numbers, with spaces between; word2vec writes the number of words and their size above.
"""

import codecs
import re

import torch

from captioning.storage.files import check_file
from utils import SPECIAL_WORDS, UserError

LARGEST = torch.finfo(torch.float32).max


def load_word_vectors(path, word_map, embed_dim=None, seed=0):
    """
    Look up the vocabulary's words; those that are not there, and the special words, start at random.

    A word is taken as it is written; else the file's first that differs only in capitals. The random vectors have the
    mean and the spread of those found. Prints how many words were found.
    Only one line is in memory at a time, and only the vocabulary's words have their numbers read: GloVe's files of 5 GB
    are no trouble.

    :param path: of the text file
    :param word_map: word -> id
    :param embed_dim: refuse vectors of any other size; None takes the size that the file has
    :param seed: of the random vectors
    :return: vectors (vocab_size, embed_dim) float32, in the order of the ids, and the share of the words found
    :raises UserError: if the file is missing, empty, binary, or broken (with the line's number), if the vectors have
        another size, or if the file has none of the words
    """
    size, count = read_header(path)
    if embed_dim not in (None, size):
        raise UserError(f"embed_dim: {embed_dim} found, {size} expected: that is the size of the vectors in {path}")
    words = {word: index for word, index in word_map.items() if word not in SPECIAL_WORDS}
    same_letters = {}
    for word, index in words.items():
        same_letters.setdefault(word.lower(), []).append(index)

    exact, similar = {}, {}  # id -> vector
    for word, numbers, where in read_lines(path, size, count):
        if word in words:
            vectors, indices = exact, [words[word]]
        else:
            vectors, indices = similar, same_letters.get(word.lower(), ())
        indices = [index for index in indices if index not in vectors]  # of a word that comes twice, the first counts
        if indices:
            vector = parse_numbers(numbers, size, where)
            if vector is not None:
                vectors.update(dict.fromkeys(indices, vector))

    found = similar | exact
    if not found:
        raise UserError(f"{path}: has none of the vocabulary's {len(words)} words; give vectors of the same language")
    share = len(found) / len(words)
    print(f"{path}: has vectors of {len(found)} of {len(words)} words ({share:.1%}), {len(found) - len(exact)} of them "
          "spelt with other capitals; the other words start at random")  # fmt: skip

    known = torch.stack(list(found.values()))  # (words found, size)
    vectors = torch.randn(len(word_map), size, generator=torch.Generator().manual_seed(seed))  # (vocab_size, size)
    vectors = known.mean() + known.std(correction=0) * vectors
    vectors[list(found)] = known
    return vectors, share


def read_header(path):
    """
    :return: size of the vectors; and their number if the file tells it (word2vec), else None
    :raises UserError: if the file is missing, empty, or not such a text
    """
    check_file(path)
    try:
        with open(path, "rb") as file:  # noqa: PTH123  path may be a string
            head = file.read(1 << 16).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if b"\0" in head:
        raise UserError(f"{path}: is a binary file; unpack it, or convert it to word2vec's text format")
    fields = head.split(b"\n")[0].split()
    if not fields:
        raise UserError(f"{path}, line 1: nothing found, a word and its numbers expected; download the file again")
    if len(fields) == 2 and all(re.fullmatch(rb"\d{1,9}", field) for field in fields) and int(fields[1]) > 0:
        return int(fields[1]), int(fields[0])
    if len(fields) < 3 or not is_number(fields[-1]):
        raise UserError(f"{path}, line 1: {text(fields)!r} found, a word and its numbers expected")
    return len(fields) - 1, None


def read_lines(path, size, count):
    """
    Give each line's word, its numbers still as bytes, and the line's name for messages.

    :raises UserError: if a line is too short, or the file
    """
    found = 0
    with open(path, "rb") as file:  # noqa: PTH123
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            line = line.strip(b" \r\n")
            if not line or (number == 1 and count is not None):
                continue
            found += 1
            # Counting spaces is all that is done to most lines: splitting them would take ten times as long.
            if line.count(b" ") < size:
                raise UserError(
                    f"{path}, line {number}: {line.count(b' ')} numbers found, {size} expected after the word "
                    f"{text(line.split()[:1])!r}; the file is damaged or was cut off, download it again"
                )
            word, _, numbers = line.partition(b" ")
            yield word.decode("utf-8", "replace"), numbers, f"{path}, line {number}"
    if count is not None and found != count:
        raise UserError(f"{path}: {found} vectors found, {count} expected from line 1; download the file again")


def parse_numbers(numbers, size, where):
    """
    :param numbers: bytes, what follows a line's first word
    :return: (size,) float32; None if a part of the word comes first, as in ". . ." of glove.840B
    :raises UserError: if there are fewer or more numbers, or what is not a finite number
    """
    fields = numbers.split()
    if len(fields) > size and not is_number(fields[0]):
        return None
    if len(fields) != size:
        raise UserError(f"{where}: {len(fields)} numbers found, {size} expected; download the file again")
    for field in fields:
        if not is_number(field):
            raise UserError(f"{where}: {text([field])!r} found, a number expected; download the file again")
    return torch.tensor([float(field) for field in fields])


def is_number(field):
    """:return: whether these bytes are a number that float32 holds; 1_0 is a word to all but Python"""
    try:
        return b"_" not in field and abs(float(field)) <= LARGEST
    except ValueError:
        return False


def text(fields):
    """:return: the fields as a text of a length that fits a message"""
    return b" ".join(fields).decode("utf-8", "replace")[:50]
