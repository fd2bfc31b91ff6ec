"""A photo with what the annotations say about it, and the checks that its fields go through in every layout."""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from utils import UserError

SPLITS = ("TRAIN", "VAL", "TEST")
# What the files call the splits. Karpathy's "restval" are photos of COCO's val2014 that are trained on.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "restval"), "TRAIN"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "VAL"),
    **dict.fromkeys(("test", "testing"), "TEST"),
}


@dataclass
class AnnotatedPhoto:
    """A photo and its captions, as one annotation file has them."""

    image_id: int | str
    file_name: str  # below the image folder, with "/" between folders
    split: str | None = None  # TRAIN, VAL or TEST; None as long as nothing has decided it
    captions: list = field(default_factory=list)  # lists of words
    boxes: list | None = None  # where each object is, if the file tells: kept as it is
    other_names: tuple = ()  # below the image folder too: where the photo is looked for next
    path: Path | None = None  # of the photo on disk, once it has been found


def get_field(entry, key, kinds, where):
    """
    :param kinds: the type that the value must have, or a tuple of types
    :param where: file and entry, for the message
    :return: `entry[key]`
    :raises UserError: if `entry` is not an object, has no such key, or its value is of another type
    """
    expected = {str: "text", list: "a list"}.get(kinds, "a number or text")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: is {type(entry).__name__}, expected an object with '{key}'")
    if key not in entry:
        raise UserError(f"{where}: has no '{key}'; expected {expected}")
    if not isinstance(entry[key], kinds):
        raise UserError(f"{where}: '{key}' is {str(entry[key])[:40]!r}, expected {expected}")
    return entry[key]


def checked_id(image_id, where):
    """
    :return: `image_id`, if it is a whole number or text
    :raises UserError: if it is not
    """
    if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
        raise UserError(f"{where}: the photo's id is {str(image_id)[:40]!r}, expected a whole number or text")
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
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise UserError(
            f"{where}: the photo's file name {name[:80]!r} leads out of the image folder; "
            "expected one below it, so correct it in the file"
        )
    if not name.strip() or not windows.name or "\0" in name:
        raise UserError(f"{where}: the photo's file name is {name[:40]!r}, expected one below the image folder")
    return name
