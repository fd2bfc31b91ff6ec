"""Reading annotations: every layout in which the field keeps its captions in, one list of photos out.

Karpathy's JSON (coco, flickr8k, flickr30k), COCO's own captions JSON, and tables (CSV, TSV) with a row a caption.
"""

import csv
import io
import random
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from captioning.storage.files import load_json, read_text
from utils import UserError

SPECIAL_WORDS = ("<pad>", "<unk>", "<start>", "<end>")
SPLITS = ("TRAIN", "VAL", "TEST")
# What the files call the splits. Karpathy's "restval" are val photos of COCO that are trained on.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "restval"), "TRAIN"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "VAL"),
    **dict.fromkeys(("test", "testing"), "TEST"),
}
IMAGE_COLUMNS = ("image", "image_name", "file", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "comment")


@dataclass
class Photo:
    """A photo with what the annotations say of it."""

    image_id: int | str
    file_name: str  # below the image folder, with "/"
    split: str | None  # TRAIN, VAL or TEST; None where the file does not say
    captions: list = field(default_factory=list)  # lists of words
    boxes: list | None = None  # what is where, if the file tells: kept as it is
    other_name: str | None = None  # below the image folder too, where it is looked for next


def read_annotations(paths, val_share, test_share, seed):
    """
    Read one or several annotation files.

    A photo's split is what its entry says, else what its file's name says (`captions_val2017.json`), else drawn.

    :param paths: list of paths of .json, .csv, .tsv or .txt files
    :param val_share: share of the photos without a split that are drawn for VAL, 0 to 1; likewise `test_share`
    :param seed: of that draw
    :return: list of Photo in the files' order, each with a split and all its captions as words
    :raises UserError: if a file does not hold what it should, or a photo stands in it twice
    """
    photos = []
    for path in map(Path, paths):
        found = read_json(path) if path.suffix.lower() == ".json" else read_table(path)
        if not found:
            raise UserError(f"{path}: holds no photos; give a file with photos and their captions")
        without = [photo for photo in found if photo.split is None]
        if without and len(without) < len(found):
            raise UserError(
                f"{path}: {len(without)} photos have no split, {without[0].file_name!r} first, the others have one; "
                "give every photo a split, or none"
            )
        for photo in without:
            photo.split = split_of_file_name(path)
        photos += found
    refuse_duplicates(photos)
    draw_splits([photo for photo in photos if photo.split is None], val_share, test_share, seed)
    return photos


def refuse_duplicates(photos):
    """:raises UserError: if two photos have the same file name or the same id"""
    names, ids = set(), set()
    for photo in photos:
        if photo.file_name in names:
            raise UserError(f"annotations: photo {photo.file_name!r} stands there twice; keep one entry of it")
        if photo.image_id in ids:
            raise UserError(f"annotations: two photos have the id {photo.image_id!r}; give each its own")
        names.add(photo.file_name)
        ids.add(photo.image_id)


def draw_splits(photos, val_share, test_share, seed):
    """Draw each photo's split. The draw depends on the seed and the file names, not on their order."""
    drawn = sorted(photos, key=lambda photo: photo.file_name)
    random.Random(seed).shuffle(drawn)
    least = 1 if len(drawn) >= 3 else 0  # a handful of photos still gives one of each
    num_val = max(round(val_share * len(drawn)), least if val_share else 0)
    num_test = max(round(test_share * len(drawn)), least if test_share else 0)
    for i, photo in enumerate(drawn):
        photo.split = "VAL" if i < num_val else "TEST" if i < num_val + num_test else "TRAIN"


def split_of_file_name(path):
    """
    :return: TRAIN, VAL or TEST if the annotation file's name tells one of them, else None
    """
    words = re.findall("[a-z]+", path.stem.lower())
    splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return splits.pop() if len(splits) == 1 else None


# JSON


def read_json(path):
    """
    :param path: of Karpathy's or COCO's JSON
    :return: list of Photo
    :raises UserError: if it is neither, or an entry is not as it should be
    """
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{path}: has no list 'images'; expected Karpathy's layout or COCO's captions JSON")
    if "annotations" in content:
        return read_coco(path, content)
    photos = []
    for i, entry in enumerate(content["images"]):
        where = f"{path}: images[{i}]"
        name = other_name = checked_name(get(entry, "filename", str, where), where)
        if entry.get("filepath"):  # the photos of coco are in folders, unless somebody put them into one
            name = f"{checked_name(get(entry, 'filepath', str, where), where)}/{name}"
        split = checked_split(get(entry, "split", str, where), where) if "split" in entry else None
        image_id = next((entry[key] for key in ("cocoid", "imgid") if key in entry), name)
        photo = Photo(checked_id(image_id, where), name, split, boxes=entry.get("boxes"), other_name=other_name)
        for j, sentence in enumerate(get(entry, "sentences", list, where)):
            photo.captions.append(sentence_words(sentence, f"{where}.sentences[{j}]"))
        photos.append(photo)
    return photos


def sentence_words(sentence, where):
    """
    :param sentence: one of a photo's `sentences` in Karpathy's layout
    :return: its words: its `tokens`, or those of its `raw` text where it has none
    """
    if isinstance(sentence, dict) and "tokens" not in sentence and "raw" in sentence:
        return tokenize(get(sentence, "raw", str, where))
    tokens = get(sentence, "tokens", list, where)
    if not all(isinstance(token, str) and not re.search("[\ud800-\udfff]", token) for token in tokens):
        raise UserError(f"{where}: 'tokens' holds something else than words; expected a list of strings")
    return without_special(" ".join(tokens).split())


def read_coco(path, content):
    """
    :param content: COCO's captions JSON: `images` of {id, file_name}, `annotations` of {image_id, caption}
    :return: list of Photo
    :raises UserError: if an entry is not as it should be, or a caption belongs to no photo
    """
    # COCO's zip files unpack into train2017/ and so on, which its file names do not say.
    folder = re.search(r"(train|val|test)\d+", path.stem)
    photos = {}
    for i, entry in enumerate(content["images"]):
        where = f"{path}: images[{i}]"
        name = checked_name(get(entry, "file_name", str, where), where)
        image_id = checked_id(get(entry, "id", (int, str), where), where)
        if image_id in photos:
            raise UserError(f"{where}: id {image_id!r} stands there twice; keep one entry of it")
        other_name = f"{folder.group()}/{name}" if folder else None
        photos[image_id] = Photo(image_id, name, None, boxes=entry.get("boxes"), other_name=other_name)
    for i, entry in enumerate(get(content, "annotations", list, str(path))):
        where = f"{path}: annotations[{i}]"
        image_id = checked_id(get(entry, "image_id", (int, str), where), where)
        if image_id not in photos:
            raise UserError(f"{where}: no photo has the id {image_id!r}; add it to 'images', or leave the caption out")
        photos[image_id].captions.append(tokenize(get(entry, "caption", str, where)))
    return list(photos.values())


def get(entry, key, kinds, where):
    """
    :return: `entry[key]`
    :raises UserError: if `entry` is no object, has no such key, or its value is of another kind than `kinds`
    """
    expected = {str: "a text", list: "a list"}.get(kinds, "a number or a text")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: is {type(entry).__name__}, expected an object with '{key}'")
    if key not in entry:
        raise UserError(f"{where}: has no '{key}'; expected {expected}")
    if not isinstance(entry[key], kinds):
        raise UserError(f"{where}: '{key}' is {str(entry[key])[:40]!r}, expected {expected}")
    return entry[key]


# Tables


def read_table(path):
    """
    Read a table with a header and a row a caption, such as Flickr8k's captions.txt or Flickr30k's results.csv.

    :param path: of a text file in UTF-8, its columns parted by comma, tab, | or ;
    :return: list of Photo
    :raises UserError: if it cannot be read, has no column for images and captions, or a row is not as it should be
    """
    text = read_text(path)
    delimiter, header = read_header(path, text)
    image, caption = (column(header, names) for names in (IMAGE_COLUMNS, CAPTION_COLUMNS))
    split = column(header, ("split",))
    # With | and tab nobody needs to quote: Flickr30k's captions hold quotation marks of their own.
    quoting = csv.QUOTE_NONE if delimiter in "|\t" else csv.QUOTE_MINIMAL
    photos = {}
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        next(rows)
        for row in rows:
            where = f"{path}: line {rows.line_num}"
            row = mend_row([value.strip() for value in row], header, caption, delimiter)
            if not row:  # an empty line
                continue
            if len(row) != len(header):
                raise UserError(f"{where}: {len(row)} columns, expected {len(header)} as in the first line; mend it")
            name = checked_name(row[image], where)
            row_split = checked_split(row[split], where) if split is not None and row[split] else None
            photo = photos.setdefault(name, Photo(name, name, row_split))
            if photo.split != row_split:
                raise UserError(f"{where}: photo {name!r} is in two splits; give all its rows the same one")
            photo.captions.append(tokenize(row[caption]))
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: {error}; mend the quotation marks there") from None
    return list(photos.values())


def read_header(path, text):
    """
    :return: the character that parts the columns, and the columns' names in lower case
    :raises UserError: if no such character gives a column for images and one for captions
    """
    first = text.split("\n", 1)[0]
    for delimiter in ",|\t;":
        header = [name.strip().strip('"').lower() for name in first.split(delimiter)]
        if column(header, IMAGE_COLUMNS) is not None and column(header, CAPTION_COLUMNS) is not None:
            return delimiter, header
    raise UserError(
        f"{path}: its first line is {first[:60]!r}; expected the names of the columns, one of "
        f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}, parted by comma, tab, | or ;"
    )


def column(header, names):
    """
    :return: the place of the first of `names` in `header`, None if none is there
    """
    return next((header.index(name) for name in names if name in header), None)


def mend_row(row, header, caption, delimiter):
    """
    Mend the two faults that are common in the field's files; both need the caption to be the last column.

    :param row: list of values, stripped
    :return: list of values, with a value a column unless the row is beyond help; empty for an empty line
    """
    if not any(row):
        return []
    if caption == len(header) - 1:
        if len(row) > len(header):  # a caption with commas and no quotation marks
            return row[:caption] + [f"{delimiter} ".join(row[caption:])]
        glued = re.fullmatch(r"(\d+)\s+(.+)", row[-1])
        if len(row) == len(header) - 1 and glued:  # Flickr30k's "2199200615.jpg| 4   A dog runs across the grass ."
            return row[:-1] + [glued[1], glued[2]]
    return row


# What all layouts share


def tokenize(text):
    """
    Part a text into words: lower case, letters and digits of any script, no punctuation.

    Chinese and Japanese part their words by nothing: there, every character is a word.

    :param text: string
    :return: list of words
    """
    text = unicodedata.normalize("NFC", text.lower())
    text = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)  # letters, marks, numbers
    return re.sub(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff])", r" \1 ", text).split()


def without_special(words):
    """
    :return: the words without those that the word map keeps for itself
    """
    return [word for word in words if word not in SPECIAL_WORDS]


def checked_id(image_id, where):
    """
    :return: `image_id`, if it is a whole number or a text
    :raises UserError: if it is not
    """
    if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
        raise UserError(f"{where}: the photo's id is {str(image_id)[:40]!r}, expected a whole number or a text")
    return image_id


def checked_split(name, where):
    """
    :return: TRAIN, VAL or TEST
    :raises UserError: if the name means none of them
    """
    if name.strip().lower() not in SPLIT_NAMES:
        raise UserError(f"{where}: split is {name[:40]!r}, expected one of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[name.strip().lower()]


def checked_name(name, where):
    """
    :return: a file's name with "/" between folders
    :raises UserError: if it is empty, or could lie outside the image folder
    """
    windows = PureWindowsPath(name)
    if not name.strip() or "\0" in name:
        raise UserError(f"{where}: the photo's file name is {name[:40]!r}, expected one below the image folder")
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise UserError(
            f"{where}: the photo's file name {name[:80]!r} leads out of the image folder; "
            "expected one below it, mend the file"
        )
    return name
