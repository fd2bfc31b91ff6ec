"""
Finding the photos that the annotations name, below the image folder.

A name that differs from the file's only in ways that leave no doubt is taken: capitals, accents composed or not,
Windows' separators, folders more or fewer on the way. How many were, and what could not be found, is told.
"""

import difflib
import os
import unicodedata
from pathlib import Path, PurePosixPath

from utils import UserError

MAX_FILES = 2_000_000  # below the image folder; more are not looked through: it is a whole disk, given by mistake


def locate_photos(photos, image_folder, left_out):
    """
    Give each photo the `path` of its file, and the `file_name` that leads there. Prints what was not as named.

    :param photos: list of AnnotatedPhoto
    :param image_folder: Path of the folder that they are in
    :param left_out: LeftOut, which gets those that are not there
    :return: list of the photos that are there
    :raises UserError: if two entries lead to one file, and cannot be joined
    """
    missing = []
    for photo in photos:
        try:
            names = [photo.file_name, *photo.other_names]
            names = [name for name in names if (image_folder / name).exists()]
        except (OSError, ValueError) as error:  # a name that the file system cannot hold
            left_out.add(photo, f"missing ({getattr(error, 'strerror', None) or error})")
            continue
        if names:
            take(photo, names[0], image_folder)
        else:
            missing.append(photo)
    if missing:
        locate_in_index(missing, image_folder, left_out)
    found = join_names_of_one_file([photo for photo in photos if photo.path])
    tell_links_that_lead_out(found, image_folder)
    return found


def take(photo, name, image_folder):
    """Note where a photo is: `name` is the one that it has below the image folder."""
    photo.path = image_folder / name
    photo.file_name = name


def locate_in_index(missing, image_folder, left_out):
    """Look for photos among all files below the image folder, and tell how that went."""
    files = list_files(image_folder)
    index = {}
    for name in files:
        index.setdefault(simplify(name)[-1], []).append(name)
    num_found, example, explained = 0, None, False
    for photo in missing:
        named = simplify(photo.file_name)
        name = closest(named, index.get(named[-1], []))
        if name:
            example = example or (photo.file_name, name)
            num_found += 1
            take(photo, name, image_folder)
        else:
            left_out.add(photo, "missing" if explained else f"missing ({hint(photo, image_folder, files)})")
            explained = True  # of the first one; comparing names takes its time
    if num_found:
        print(f"{num_found} photos have other names on disk than in the annotations: {example[1]!r} was taken for "
              f"{example[0]!r}")  # fmt: skip


def list_files(folder):
    """:return: names of all files below a folder, with "/" between folders; links to folders are not followed"""
    names = []
    for path, _, files in os.walk(folder):
        below = PurePosixPath(Path(path).relative_to(folder).as_posix())
        names += [str(below / name) for name in files]
        if len(names) > MAX_FILES:
            break
    return sorted(names)


def simplify(name):
    """:return: parts of a file's name, without what may differ between systems"""
    name = unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()
    return PurePosixPath(name).parts


def closest(named, candidates):
    """
    :param named: simplified parts of the name that is looked for
    :param candidates: names of files whose last part is the same
    :return: the one that shares most parts from the end; None if there is none, or two that are equally close
    """
    if not candidates:
        return None
    shared = {}
    for name in candidates:
        pairs = zip(reversed(named), reversed(simplify(name)), strict=False)
        differing = [i for i, (one, other) in enumerate(pairs) if one != other]
        num_shared = differing[0] if differing else min(len(named), len(simplify(name)))
        shared.setdefault(num_shared, []).append(name)
    best = shared[max(shared)]
    return best[0] if len(best) == 1 else None


def hint(photo, image_folder, files):
    """:return: the path that a photo was looked for under, and the file that is most like it"""
    last = PurePosixPath(photo.file_name.replace("\\", "/")).name
    by_name = {PurePosixPath(name).name: name for name in files[:20_000]}
    similar = difflib.get_close_matches(last, by_name, n=1, cutoff=0)
    nearest = f"the nearest file is {by_name[similar[0]]!r}" if similar else "there are no files in that folder"
    return f"looked for as {image_folder / photo.file_name}; {nearest}"


def join_names_of_one_file(photos):
    """
    Where two entries lead to one file, as rows of a table do that write its name in two ways, the first one gets the
    captions of both. Prints how often.

    :param photos: list of AnnotatedPhoto with a `path`
    :return: list of them, each file once
    :raises UserError: if more than their captions differs: their splits, or ids that are not their names
    """
    entries, joined = {}, []
    for photo in photos:
        first = entries.setdefault(photo.path, photo)
        if first is photo:
            continue
        if first.split != photo.split:
            raise UserError(
                f"annotations: two entries name the photo {photo.file_name!r}, one for {first.split}, the other for "
                f"{photo.split}; keep one of them"
            )
        if not (is_known_by_name(first) and is_known_by_name(photo)):
            raise UserError(
                f"annotations: two entries name the photo {photo.file_name!r}, with the ids {first.image_id!r} and "
                f"{photo.image_id!r}; keep one of them"
            )
        first.captions += photo.captions
        joined.append(photo)
    if joined:
        print(f"Photos named in two ways: {len(joined)}, each with the captions of both; {joined[0].file_name!r} first")
    return list(entries.values())


def is_known_by_name(photo):
    """:return: whether a photo's entry has no id but its name, and so is nothing but captions"""
    return photo.boxes is None and simplify(str(photo.image_id))[-1:] == simplify(photo.file_name)[-1:]


def tell_links_that_lead_out(photos, image_folder):
    """Print how many photos are in fact outside the image folder, where a link leads to."""
    inside, folders = os.path.realpath(image_folder), {}
    outside = []
    for photo in photos:
        parent = photo.path.parent
        if parent not in folders:
            folders[parent] = os.path.realpath(parent)
        target = os.path.realpath(photo.path) if photo.path.is_symlink() else folders[parent]
        if not Path(target).is_relative_to(inside):
            outside.append((photo, target))
    if outside:
        photo, target = outside[0]
        print(f"{len(outside)} photos are outside of {image_folder}, where links lead: {photo.file_name} to {target}")
