"""
Reading the field's JSON files: Karpathy's layout (coco, flickr8k, flickr30k), COCO's own captions, and lists of photos
with their captions (BLIP's files, Hugging Face's metadata.jsonl).
"""

import re

from captioning.preparation.annotated_photo import (
    AnnotatedPhoto,
    checked_id,
    checked_name,
    checked_split,
    get_field,
)
from captioning.preparation.tokenizer import tokenize, without_special
from captioning.storage.files import load_json, parse_json, read_text
from utils import UserError

NAME_KEYS = ("image", "file_name", "filename", "image_path")
CAPTION_KEYS = ("caption", "captions", "text")


def read_json(path):
    """
    :param path: of a .json file, or of a .jsonl file with an object in each line
    :return: list of AnnotatedPhoto
    :raises UserError: if it is in none of the layouts, or an entry is not as it should be
    """
    content = read_json_lines(path) if path.suffix.lower() == ".jsonl" else load_json(path)
    if isinstance(content, list):
        return read_list(path, content)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(
            f"{path}: has no list 'images'; expected Karpathy's layout, COCO's captions JSON or a list of objects with "
            "'image' and 'caption'"
        )
    if "annotations" in content:
        return read_coco(path, content)
    return [read_karpathy_entry(entry, f"{path}: images[{i}]") for i, entry in enumerate(content["images"])]


def read_json_lines(path):
    """
    :return: list of what each line holds
    :raises UserError: if a line is not JSON
    """
    content = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                content.append(parse_json(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not valid JSON ({error}); correct it") from None
    return content


def read_karpathy_entry(entry, where):
    """
    :param entry: one of the `images` of Karpathy's layout
    :param where: file and entry, for messages
    :return: AnnotatedPhoto
    """
    name = checked_name(get_field(entry, "filename", str, where), where)
    other_names = ()
    if entry.get("filepath"):  # the photos of coco are in folders, unless somebody has put them all into one
        other_names = (name,)
        name = checked_name(f"{get_field(entry, 'filepath', str, where)}/{name}", where)
    image_id = next((entry[key] for key in ("cocoid", "imgid") if key in entry), name)
    photo = AnnotatedPhoto(checked_id(image_id, where), name, boxes=entry.get("boxes"), other_names=other_names)
    if "split" in entry:
        photo.split = checked_split(get_field(entry, "split", str, where), where)
    for j, sentence in enumerate(get_field(entry, "sentences", list, where)):
        photo.captions.append(words_of_sentence(sentence, f"{where}.sentences[{j}]"))
    return photo


def words_of_sentence(sentence, where):
    """
    :param sentence: one of a photo's `sentences` in Karpathy's layout
    :return: its words: its `tokens`, or those of its `raw` text where it has none
    """
    if isinstance(sentence, dict) and "tokens" not in sentence and "raw" in sentence:
        return tokenize(get_field(sentence, "raw", str, where))
    tokens = get_field(sentence, "tokens", list, where)
    if not all(isinstance(token, str) and not re.search("[\ud800-\udfff]", token) for token in tokens):
        raise UserError(f"{where}: 'tokens' holds something other than words; expected a list of strings")
    return without_special(" ".join(tokens).split())


def read_coco(path, content):
    """
    :param content: COCO's captions JSON: `images` of {id, file_name}, `annotations` of {image_id, caption}
    :return: list of AnnotatedPhoto
    :raises UserError: if an entry is not as it should be, or a caption belongs to no photo
    """
    photos = {}
    for i, entry in enumerate(content["images"]):
        where = f"{path}: images[{i}]"
        name = checked_name(get_field(entry, "file_name", str, where), where)
        image_id = checked_id(get_field(entry, "id", (int, str), where), where)
        if image_id in photos:
            raise UserError(f"{where}: a second photo with the id {image_id!r}; keep one of them")
        other_names = coco_names(name, path.stem)
        photos[image_id] = AnnotatedPhoto(image_id, name, boxes=entry.get("boxes"), other_names=other_names)
    for i, entry in enumerate(get_field(content, "annotations", list, str(path))):
        where = f"{path}: annotations[{i}]"
        image_id = checked_id(get_field(entry, "image_id", (int, str), where), where)
        if image_id not in photos:
            raise UserError(f"{where}: no photo has the id {image_id!r}; add it to 'images', or remove the caption")
        photos[image_id].captions.append(tokenize(get_field(entry, "caption", str, where)))
    return list(photos.values())


def coco_names(name, stem):
    """
    COCO's zip files unpack into train2017/ and so on, which its file names do not mention.

    :param name: a photo's file name
    :param stem: name of the annotation file without its ending
    :return: tuple of names that the photo may have below the image folder
    """
    found = (re.search(r"(train|val|test)\d+", text) for text in (stem, name))
    return tuple(dict.fromkeys(f"{folder.group()}/{name}" for folder in found if folder))


def read_list(path, content):
    """
    :param content: list of objects such as BLIP's {"image": name, "caption": text or list of texts, "image_id": id};
        those of one name are one photo
    :return: list of AnnotatedPhoto
    :raises UserError: if an entry is not as it should be
    """
    photos = {}
    for i, entry in enumerate(content):
        where = f"{path}: entry {i}"
        name_key, caption_key = (first_key(entry, keys, where) for keys in (NAME_KEYS, CAPTION_KEYS))
        name = checked_name(get_field(entry, name_key, str, where), where)
        image_id = checked_id(entry.get("image_id", name), where)
        split = checked_split(get_field(entry, "split", str, where), where) if "split" in entry else None
        photo = photos.setdefault(name, AnnotatedPhoto(image_id, name, split))
        if photo.split != split:
            raise UserError(f"{where}: photo {name!r} is in two splits; give all its entries the same one")
        texts = entry[caption_key]
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: '{caption_key}' is {str(texts)[:40]!r}, expected a text or a list of texts")
        photo.captions += map(tokenize, texts)
    return list(photos.values())


def first_key(entry, keys, where):
    """
    :return: the first of `keys` that the entry has
    :raises UserError: if it has none
    """
    found = [key for key in keys if isinstance(entry, dict) and key in entry]
    if not found:
        raise UserError(f"{where}: has none of {', '.join(keys)}; expected an object with a photo's name and caption")
    return found[0]
