"""
Reading tables of captions: CSV, TSV and the like, with a row for each caption, or one for each photo with all of its
captions in columns.
"""

import csv
import io
import re
from dataclasses import dataclass

from captioning.preparation.annotated_photo import AnnotatedPhoto, checked_name, checked_split
from captioning.preparation.tokenizer import tokenize
from captioning.storage.files import read_text
from utils import UserError

DELIMITERS = ",|\t;"
NAME_COLUMNS = ("image", "image_name", "file", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "comment", "text")
NUMBERED_CAPTION = re.compile(r"(caption|comment|text)[_ ]?\d+")  # such as caption_0 ... caption_4
# The number of a caption, which Flickr8k writes behind its photo's name: 1000268201_693b08cb0e.jpg#0
CAPTION_NUMBER = re.compile(r"(?<=\.)(\w{2,5})#\d+$")
ROW_START = re.compile(r'\s*"?[^",|;\t]+\.\w{2,5}(#\d+)?"?\s*[,|;\t]')  # a photo's name and the end of its column


@dataclass
class Columns:
    """How a table is laid out."""

    delimiter: str  # between two columns
    count: int
    name: int  # which column holds the photo's file name
    captions: list  # which ones hold captions
    split: int | None = None  # which one holds the split, if any does
    has_header: bool = True


def read_table(path):
    """
    Read a table such as Flickr8k's captions.txt or Flickr8k.token.txt, Flickr30k's results.csv, Hugging Face's
    metadata.csv.

    :param path: of a text file in UTF-8, with comma, tab, | or ; between its columns
    :return: list of AnnotatedPhoto
    :raises UserError: if it cannot be read, has no column for photos and captions, or a row is not as it should be
    """
    text = read_text(path)
    columns = read_columns(path, text)
    # With | and tab nobody needs to quote: Flickr30k's captions hold quotation marks of their own.
    quoting = csv.QUOTE_NONE if columns.delimiter in "|\t" else csv.QUOTE_MINIMAL
    photos = {}
    rows = csv.reader(io.StringIO(text), delimiter=columns.delimiter, quoting=quoting, strict=True)
    line = 1  # where the row begins
    try:
        if columns.has_header:
            next(rows)
            line = rows.line_num + 1
        for row in rows:
            where = f"{path}: line {line}"
            refuse_swallowed_rows(row, where)
            add_row(photos, [value.strip() for value in row], columns, where)
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {line}: {error}; correct the quotation marks there") from None
    return list(photos.values())


def read_columns(path, text):
    """
    :return: Columns, from the first line
    :raises UserError: if no character between columns gives one for photos and one for captions
    """
    first = text.split("\n", 1)[0]
    if re.match(r"[^\t]+\.\w{2,5}#\d+\t", first):  # Flickr8k.token.txt has no header
        return Columns("\t", 2, name=0, captions=[1], has_header=False)
    for delimiter in DELIMITERS:
        header = [name.strip().strip('"').lower() for name in first.split(delimiter)]
        names = [header.index(name) for name in NAME_COLUMNS if name in header]
        captions = [header.index(name) for name in CAPTION_COLUMNS if name in header][:1]
        captions = captions or [i for i, name in enumerate(header) if NUMBERED_CAPTION.fullmatch(name)]
        if names and captions:
            split = header.index("split") if "split" in header else None
            return Columns(delimiter, len(header), names[0], captions, split)
    raise UserError(
        f"{path}: its first line is {first[:60]!r}; expected the names of the columns, one of "
        f"{', '.join(NAME_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}, with comma, tab, | or ; between them"
    )


def refuse_swallowed_rows(row, where):
    """:raises UserError: if a value in quotation marks goes on over lines that look like rows of their own"""
    for value in row:
        for below in value.split("\n")[1:]:
            if ROW_START.match(below):
                raise UserError(
                    f"{where}: its quotation mark is not closed there, so that the row takes in others, as "
                    f"{below.strip()[:40]!r}; close it, or remove it"
                )


def add_row(photos, row, columns, where):
    """
    Add a row's captions to its photo.

    :param photos: dict from file name to AnnotatedPhoto; gets the photo if it is new
    :param row: list of values
    :raises UserError: if the row is not as it should be
    """
    row = with_all_columns(row, columns)
    if not any(row):
        return
    if len(row) != columns.count:
        raise UserError(f"{where}: {len(row)} columns, expected {columns.count} as in the first line; correct it")
    name = checked_name(CAPTION_NUMBER.sub(r"\1", row[columns.name]), where)
    split = checked_split(row[columns.split], where) if columns.split is not None and row[columns.split] else None
    photo = photos.setdefault(name, AnnotatedPhoto(name, name, split))
    if photo.split != split:
        raise UserError(f"{where}: photo {name!r} is in two splits; give all its rows the same one")
    photo.captions += [tokenize(row[i]) for i in columns.captions]


def with_all_columns(row, columns):
    """
    Give a row as many values as there are columns, where one of the two faults that are common in the field's files
    has changed their number. Both can be undone only if the caption is the last column.

    :param row: list of values
    :return: list of values, the same if the row is sound or beyond help
    """
    if columns.captions != [columns.count - 1]:
        return row
    if len(row) > columns.count:  # a caption with commas and no quotation marks
        return row[: columns.count - 1] + [f"{columns.delimiter} ".join(row[columns.count - 1 :])]
    glued = re.fullmatch(r"(\d+)\s+(.+)", row[-1]) if row else None
    if glued and len(row) == columns.count - 1:  # Flickr30k's "2199200615.jpg| 4   A dog runs across the grass ."
        return row[:-1] + [glued[1], glued[2]]
    return row
