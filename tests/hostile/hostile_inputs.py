"""Broken and hostile files of those that a user brings: annotations, photos, word vectors."""

import io
import re
import shutil
import struct
import zlib

from hostile_case import ANY, Case, any_of, refused, with_json, with_text, write
from PIL import Image

# Annotations


def first(key, value):
    """Change a value of the first photo of an annotation file."""
    return with_json(lambda content: content["images"][0].update({key: value}))


NAMES = {
    "leads up": "../model.pth",
    "leads up from below": "a/../../model.pth",
    "is absolute": "/etc/passwd",
    "has a drive": "C:\\photos\\1.jpg",
    "leads up as in Windows": "..\\model.pth",
    "is on a server": "\\\\server\\share\\1.jpg",
    "has a NUL": "0.jpg\0.png",
    "is empty": "",
    "is blank": "  ",
    "is a number": 7,
    "is a list": ["0.jpg"],
}
ANNOTATIONS = [
    *any_of("create", "karpathy.json"),
    *any_of("csv", "captions.csv"),
    *any_of("coco", "coco.json", but=("is a device without an end", "is random bytes", "is all zeros")),
    *refused("create", "karpathy.json", {f"names a photo that {what}": first("filename", name)
                                         for what, name in NAMES.items()}),
    *refused("coco", "coco.json", {f"names a photo that {what}": first("file_name", name)
                                   for what, name in NAMES.items() if isinstance(name, str)}),
    *refused("csv", "captions.csv", {f"names a photo that {what}": with_text("0.jpg", name)
                                     for what, name in NAMES.items() if isinstance(name, str)}),
    *refused("create", "karpathy.json", {
        "names a folder that leads up": first("filepath", "../.."),
        "is a list": with_json(lambda content: content["images"]),
        "is a number": write("7"),
        "is null": write("null"),
        "has a number of thousands of digits": write('{"images": [' + "9" * 5000 + "]}"),
        "is nested a million deep": write("[" * 10**6),
        "is in UTF-16": write('{"images": []}'.encode("utf-16")),
        "has bytes that are no UTF-8": write(b'{"images": "\xff\xfe"}'),
        "has a comma too much": write('{"images": [],}'),
        "has no photos": with_json(lambda content: content["images"].clear()),
        "has photos that are no list": with_json(lambda content: content.update(images={"0": 1})),
        "has a photo that is a text": with_json(lambda content: content["images"].insert(0, "0.jpg")),
        "has a photo without a file name": with_json(lambda content: content["images"][0].pop("filename") and None),
        "has a photo without sentences": with_json(lambda content: content["images"][0].pop("sentences") and None),
        "has sentences that are a text": first("sentences", "a cat"),
        "has a sentence that is a number": first("sentences", [5]),
        "has tokens that are numbers": first("sentences", [{"tokens": [1, 2]}]),
        "has tokens that are half a letter": first("sentences", [{"tokens": ["\ud800"]}]),
        "has raw text that is a list": first("sentences", [{"raw": ["a cat"]}]),
        "has a split that nobody knows": first("split", "holdout"),
        "has a split that is a number": first("split", 1),
        "has a photo without a split": with_json(lambda content: content["images"][0].pop("split") and None),
        "has an id that is a list": first("imgid", [1]),
        "has an id that is half a number": first("imgid", 0.5),
        "has an id that is true": first("imgid", True),
    }),
    *refused("create", "karpathy.json", {
        "has a photo twice": with_json(lambda content: content["images"].append(content["images"][0])),
        "has an id twice": first("imgid", 1),
    }),
    Case("create", "karpathy.json", "has nothing to train on", with_json(
        lambda content: [photo.update(split="val") for photo in content["images"]] and None), says="to train on"),
    Case("create", "karpathy.json", "has no words", with_json(
        lambda content: [photo.update(sentences=[]) for photo in content["images"]] and None),
        says="has a caption with words"),
    Case("create", "karpathy.json", "names photos that no disk can hold", with_json(
        lambda content: [photo.update(filename=f"{i}" * 300) for i, photo in enumerate(content["images"])] and None),
        says="8 of 8 photos are missing"),
    Case("create", "karpathy.json", "names photos that are not there", with_text("0.jpg", "none.jpg"),
         says="1 of 8 photos are missing"),
    *refused("coco", "coco.json", {
        "has a photo without an id": with_json(lambda content: content["images"][0].pop("id") and None),
        "has an id that is null": first("id", None),
        "has an id twice": first("id", 1),
        "has annotations that are an object": with_json(lambda content: content.update(annotations={})),
        "has an annotation that is a list": with_json(lambda content: content["annotations"].append([1, "a cat"])),
        "has a caption of no photo": with_json(lambda content: content["annotations"][0].update(image_id=99)),
        "has a caption of photo true": with_json(lambda content: content["annotations"][0].update(image_id=True)),
        "has a caption that is null": with_json(lambda content: content["annotations"][0].update(caption=None)),
        "has an annotation without a caption": with_json(lambda content: content["annotations"][0].pop("caption")
                                                         and None),
    }),
    *refused("csv", "captions.csv", {
        "has a heading alone": write("image,caption\n"),
        "has other headings": with_text("image,", "picture,"),
        "has rows without captions": with_text("a red cat sat,train", "train"),
        "has a quotation mark that never ends": with_text("a red cat sat", '"a red cat sat'),
        "has a split that nobody knows": with_text("train", "holdout"),
        "has a photo in two splits": with_text("train", "val"),
        "has a row without a split": with_text("train", ""),
        "has a value of a megabyte": with_text("a red cat sat", "a" * 10**6),
        "is in UTF-16": write("image,caption\n0.jpg,a cat\n".encode("utf-16")),
        "is JSON": write('{"images": []}'),
    }),
    *refused("tsv", "captions.tsv", {
        "has rows without captions": with_text("0.jpg\t", ""),
        "has a photo that leads up": with_text("0.jpg", "../model.pth"),
    }),
]  # fmt: skip


# Photos


def png(width, height, colour=2, pixels=b""):
    """:return: a PNG that says that it is so large, whatever it holds"""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def image_bytes(kind, mode="RGB", size=(20, 20)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


PHOTOS = {
    **{what: change for what, change in ANY.items() if what != "is missing"},
    "is a text": write("no photo"),
    "is a drawing in SVG": write('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    "is a PostScript program": write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) show\n"),
    "is a bomb of 10 gigapixels": write(png(100_000, 100_000, pixels=zlib.compress(bytes(10**6)))),
    "is a bomb that says 4 billion squared": write(png(2**32 - 1, 2**32 - 1)),
    "is a GIF of 65,535 squared": write(image_bytes("GIF", "P")[:6] + b"\xff" * 4 + image_bytes("GIF", "P")[10:]),
    "is a BMP of a negative size": write(image_bytes("BMP")[:18] + b"\xff" * 8 + image_bytes("BMP")[26:]),
    "is a PNG of no width": write(png(0, 10)),
    "is a PNG with damaged pixels": write(png(10, 10, pixels=b"not compressed")),
    "is a PNG of colours that do not exist": write(png(10, 10, colour=5)),
    "is half a WebP": write(image_bytes("WEBP")[:20]),
    "is half a TIFF": write(image_bytes("TIFF")[:100]),
    "is a TIFF of real numbers": write(image_bytes("TIFF", "F")),
    "is a header alone": write(b"\xff\xd8\xff\xe0\x00\x10JFIF"),
}
PICTURES = [
    *[Case("photos", "photos/0.jpg", what, change, "reported") for what, change in PHOTOS.items()],
    Case("photos", "photos/0.jpg", "is missing", ANY["is missing"], "reported"),
    *refused("caption", "photos/0.jpg", {what: change for what, change in PHOTOS.items()
                                         if re.search("folder|pipe|text|Post|10 giga|half|missing", what)}),
    Case("create", "photos/0.jpg", "is empty, which is one too many", write(b""), says="1 of 8 photos are missing"),
    Case("folder", "photos/0.jpg", "is empty", write(b""), "reported"),
    Case("folder", "photos/0.jpg", "is a bomb", PHOTOS["is a bomb of 10 gigapixels"], "reported"),
    Case("folder", "photos", "has no photos", lambda path: shutil.rmtree(path) or path.mkdir()),
    Case("folder", "photos", "has photos of no size alone",
         lambda path: [photo.unlink() or photo.write_bytes(b"") for photo in path.iterdir()], says="img: none of 8"),
    Case("create", "photos", "is missing", shutil.rmtree),
]  # fmt: skip


# Word vectors


VECTORS = [
    *any_of("vectors", "vectors.txt"),
    *refused("vectors", "vectors.txt", {
        "has a line that is too short": with_text("cat 1 0.5 -1", "cat 1"),
        "has a line that is too long": with_text("cat 1", "cat 1 7"),
        "has a word for a number": with_text("cat 1", "cat one"),
        "has a number that is none": with_text("cat 1", "cat nan"),
        "has a number that is infinite": with_text("cat 1", "cat 1e999"),
        "says that it has more lines": lambda path: path.write_text("99 8\n" + path.read_text()),
        "says that its vectors are longer": lambda path: path.write_text("9 300\n" + path.read_text()),
        "says that its vectors are of a thousand million": lambda path: path.write_text(
            "9 999999999\n" + path.read_text()),
        "says so in thousands of digits": lambda path: path.write_text("9 " + "9" * 5000 + "\n" + path.read_text()),
        "says that it has none": write("0 0\n"),
        "is word2vec's binary format": write(b"2 8\ncat " + struct.pack("<8f", *range(8)) + b"\ndog " + bytes(32)),
        "is compressed": write(zlib.compress(b"cat 1 2 3")),
        "is in UTF-16": write("cat 1 2 3 4 5 6 7 8\n".encode("utf-16")),
        "has words of another language": write("hund 1 2 3 4 5 6 7 8\n"),
        "has a word alone": write("cat\n"),
        "begins with an empty line": lambda path: path.write_text("\n" + path.read_text()),
    }),
]  # fmt: skip
