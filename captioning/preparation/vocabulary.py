"""Captions of words in, captions of ids out: which words a model learns, and which of a photo's captions."""

import collections
import random

from utils import SPECIAL_WORDS, UserError

MANY_UNKNOWN = 0.1  # share of <unk> above which captions lose their meaning


def keep_captioned(photos, max_len, left_out):
    """
    Remove captions without words from all photos, and photos without a caption that can be learned. Prints how many
    captions had no words.

    :param max_len: longest caption that can be, in words; longer ones stay as references
    :param left_out: LeftOut, which gets the photos that are removed
    :return: list of the AnnotatedPhoto that have a caption of 1 to `max_len` words
    :raises UserError: if none is left
    """
    empty = [photo.file_name for photo in photos for words in photo.captions if not words]
    if empty:
        print(f"Captions without words: {len(empty)}, left out; the first is of {empty[0]!r}")
    kept = []
    for photo in photos:
        photo.captions = [words for words in photo.captions if words]
        if any(len(words) <= max_len for words in photo.captions):
            kept.append(photo)
        else:
            left_out.add(photo, f"has no caption of 1 to {max_len} words", unreadable=False)
    lengths = [len(words) for photo in photos for words in photo.captions]
    if photos and not lengths:
        raise UserError(f"annotations: none of the {len(photos)} photos has a caption with words; give some")
    if lengths and not kept:
        raise UserError(
            f"max_len: is {max_len}, but all {len(lengths)} captions are longer ({min(lengths)} to {max(lengths)} "
            f"words); give --max_len {max(lengths)}"
        )
    return kept


def count_words(photos):
    """:return: Counter of the words in all captions of a list of AnnotatedPhoto"""
    return collections.Counter(word for photo in photos for words in photo.captions for word in words)


def build_word_map(counts, min_word_freq, known=()):
    """
    Number the words that the training captions hold more than `min_word_freq` times, and those that a trained
    captioner knows already.

    The field's tutorial counts the captions of all splits. Only those of TRAIN are counted here: a word that was
    never trained cannot be predicted, and scores on unseen photos should not be helped by having seen their words.

    :param counts: Counter of the words of TRAIN
    :param min_word_freq: words that are as frequent as this, or rarer, become <unk>
    :param known: words to keep whether the captions hold them or not
    :return: dict from word to id: words from 1 in alphabetical order, <unk>, <start>, <end>, and <pad> 0
    :raises UserError: if no word is frequent enough
    """
    frequent = {word for word, count in counts.items() if count > min_word_freq}
    words = sorted(frequent | {*known} - {*SPECIAL_WORDS})
    if not words:
        most = max(counts.values())
        raise UserError(
            f"min_word_freq: is {min_word_freq}, but no training word occurs more than {most} times; give "
            f"--min_word_freq {advised_min_word_freq(counts)}"
        )
    word_map = {word: i for i, word in enumerate(words, start=1)}
    for special in ("<unk>", "<start>", "<end>"):
        word_map[special] = len(word_map) + 1
    word_map["<pad>"] = 0
    return word_map


def unknown_share(counts, min_word_freq):
    """:return: share of the counted words that become <unk>, 0 to 1"""
    return sum(count for count in counts.values() if count <= min_word_freq) / counts.total()


def advised_min_word_freq(counts):
    """:return: the largest min_word_freq with which at most a tenth of the counted words become <unk>"""
    advised = 0
    while unknown_share(counts, advised + 1) <= MANY_UNKNOWN:
        advised += 1
    return advised


def draw_captions(photos, captions_per_image, max_len, seed):
    """
    Choose each photo's `captions_per_image` captions: a draw of those that it has, some twice if they are too few.

    :param photos: list of AnnotatedPhoto
    :param max_len: longest caption that is chosen, in words
    :return: list of captions, those of a photo one after the other
    """
    rng = random.Random(seed)
    drawn = []
    for photo in photos:
        usable = [words for words in photo.captions if len(words) <= max_len]
        missing = captions_per_image - len(usable)
        if missing > 0:
            drawn += usable + [rng.choice(usable) for _ in range(missing)]
        else:
            drawn += rng.sample(usable, captions_per_image)
    return drawn


def encode(words, word_map, max_len):
    """
    :param words: list of at most `max_len` words
    :return: list of `max_len + 2` ids: <start>, the words, <end>, then <pad>
    """
    ids = [word_map.get(word, word_map["<unk>"]) for word in words]
    padding = [word_map["<pad>"]] * (max_len - len(words))
    return [word_map["<start>"], *ids, word_map["<end>"], *padding]
