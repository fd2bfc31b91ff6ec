"""Broken and hostile files of those that preprocessing wrote: photos and captions for training, cached features."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
from hostile_case import ANY, Case, any_of, cut, flip, put_folder, put_loop, refused, with_json, write


def with_hdf5(edit):
    """Change what is in an HDF5 file."""

    def change(path):
        with h5py.File(path, "r+") as file:
            edit(file)

    return change


def with_images(images, **options):
    """Put other photos there; None leaves them out."""

    def edit(file):
        del file["images"]
        if images is not None or options:
            file.create_dataset("images", data=images, **options)

    return with_hdf5(edit)


def link_out(file):
    del file["images"]
    file["images"] = h5py.ExternalLink(str(Path(file.filename).with_name(NAME_OF_VAL)), "images")


def link_to_pipe(file):
    del file["images"]
    pipe = Path(file.filename).with_name("pipe")
    os.mkfifo(pipe)
    file["images"] = h5py.ExternalLink(str(pipe), "images")


def zeros(*shape, dtype="uint8"):
    return np.zeros(shape, dtype)


NAME_OF_VAL = "VAL_IMAGES_tiny_2_cap_per_img_0_min_word_freq.hdf5"
SOUND = (4, 3, 32, 32)
DATA = [
    *any_of("train", "data/TRAIN_IMAGES_{}.hdf5"),
    *any_of("train", "data/TRAIN_CAPTIONS_{}.json"),
    *any_of("train", "data/WORDMAP_{}.json", but=("is a device without an end", "is random bytes")),
    *refused("train", "data/TRAIN_CAPLENS_{}.json", {what: ANY[what] for what in ("is missing", "is empty")}),
    *refused("train", "data/TRAIN_IMAGES_{}.hdf5", {
        "has no photos": with_images(None),
        "has none of its photos": with_images(zeros(0, 3, 32, 32)),
        "has photos under a group": with_hdf5(lambda file: (file.pop("images"), file.create_group("images/images"))),
        "has photos of one channel": with_images(zeros(4, 1, 32, 32)),
        "has photos that are not square": with_images(zeros(4, 3, 32, 16)),
        "has photos of real numbers": with_images(zeros(*SOUND, dtype="float32")),
        "has photos in three dimensions": with_images(zeros(4, 3, 32)),
        "has photos that are texts": with_images(np.array([b"0.jpg"] * 4)),
        "has photos of a million pixels squared": with_images(None, shape=(4, 3, 10**6, 10**6), dtype="uint8",
                                                              chunks=(1, 3, 32, 32)),
        "has pixels in any other file": with_images(None, shape=SOUND, dtype="uint8",
                                                    external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]),
        "has photos that are a link to another file": with_hdf5(link_out),
        "has photos that are a link to a pipe": with_hdf5(link_to_pipe),
        "has photos that are a link to themselves": with_hdf5(
            lambda file: (file.pop("images"), file.__setitem__("images", h5py.SoftLink("/images")))),
        "does not say captions_per_image": with_hdf5(lambda file: file.attrs.clear()),
        "says captions_per_image is a text": with_hdf5(lambda file: file.attrs.update(captions_per_image="two")),
        "says captions_per_image is 0": with_hdf5(lambda file: file.attrs.update(captions_per_image=0)),
        "says captions_per_image is a list": with_hdf5(lambda file: file.attrs.update(captions_per_image=[2, 2])),
        "says captions_per_image is infinite": with_hdf5(lambda file: file.attrs.update(captions_per_image=np.inf)),
    }),
    *refused("train", "data/TRAIN_IMAGES_{}.hdf5", {
        "has a photo too few": with_images(zeros(3, 3, 32, 32)),
        "says it has a million million photos": with_images(None, shape=(10**12, 3, 32, 32), chunks=(1, 3, 32, 32),
                                                            dtype="uint8"),
        "says captions_per_image is a million million": with_hdf5(
            lambda file: file.attrs.update(captions_per_image=10**12)),
    }, says="TRAIN_CAPTIONS"),
    *refused("train", "data/TRAIN_CAPTIONS_{}.json", {
        "is an object": write("{}"),
        "has a caption too few": with_json(lambda rows: rows[1:]),
        "has captions of several lengths": with_json(lambda rows: rows[0].pop() and None),
        "has words for ids": with_json(lambda rows: rows[0].__setitem__(1, "cat")),
        "has real numbers for ids": with_json(lambda rows: rows[0].__setitem__(1, 1.5)),
        "has an id beyond the word map": with_json(lambda rows: rows[0].__setitem__(1, 10**6)),
        "has an id of thousands of digits": write("[[" + "9" * 5000 + "]]"),
        "has an id that no register holds": with_json(lambda rows: rows[0].__setitem__(1, 2**63)),
        "has a negative id": with_json(lambda rows: rows[0].__setitem__(1, -1)),
        "has a caption that does not begin": with_json(lambda rows: rows[0].__setitem__(0, 1)),
        "has a caption that does not end": with_json(lambda rows: rows[0].__setitem__(slice(2, None), [1] * 50)),
        "is nested a hundred deep": write("[" * 100 + "]" * 100),
    }),
    *refused("train", "data/TRAIN_CAPLENS_{}.json", {
        "is a list of lists": with_json(lambda lengths: [lengths]),
        "has a length of 1": with_json(lambda lengths: lengths.__setitem__(0, 1)),
        "has a length beyond the caption": with_json(lambda lengths: lengths.__setitem__(0, 99)),
        "has a length that is null": with_json(lambda lengths: lengths.__setitem__(0, None)),
        "has a length that another caption has": with_json(lambda lengths: lengths.__setitem__(0, lengths[0] - 1)),
    }),
    *refused("train", "data/WORDMAP_{}.json", {
        "is a list of words": with_json(list),
        "has no <start>": with_json(lambda words: words.update(start=words.pop("<start>"))),
        "has no <pad>": with_json(lambda words: words.update(pad=words.pop("<pad>"))),
        "has an id twice": with_json(lambda words: words.update(cat=1, dog=1)),
        "has a gap": with_json(lambda words: words.update({"<end>": 99})),
        "has ids that are texts": with_json(lambda words: {word: str(i) for word, i in words.items()}),
        "has ids that are true": with_json(lambda words: words.update(cat=True)),
        "is nested a million deep": write('{"a":' * 10**6),
    }),
    Case("train", "data/WORDMAP_{}.json", "is of other data",
         write(json.dumps({"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3})), says="word ids"),
    *any_of("view", "data/VAL_REFERENCES_{}.json", but=("is missing",)),
    *refused("view", "data/VAL_REFERENCES_{}.json", {
        "is an object": write("{}"),
        "has a photo too few": with_json(lambda photos: photos[1:]),
        "has a photo that is a text": with_json(lambda photos: photos.__setitem__(0, "0.jpg")),
        "has a photo without a name": with_json(lambda photos: photos[0].pop("file_name") and None),
        "has a photo without captions": with_json(lambda photos: photos[0].pop("captions") and None),
        "has captions that are texts": with_json(lambda photos: photos[0].update(captions=["a cat"])),
        "has words that are numbers": with_json(lambda photos: photos[0].update(captions=[[1, 2]])),
        "has no captions of a photo": with_json(lambda photos: photos[0].update(captions=[])),
    }),
    *refused("eval", "data/TRAIN_REFERENCES_{}.json", {
        "is cut off in the middle": cut(0.5),
        "has captions that are a number": with_json(lambda photos: photos[0].update(captions=3)),
    }),
    Case("eval", "data/VAL_REFERENCES_{}.json", "has a photo without an id",
         with_json(lambda photos: photos[0].pop("image_id") and None)),
    *refused("view", "data/VAL_IMAGES_{}.hdf5", {
        "has photos of another size than the model's": with_images(zeros(2, 3, 16, 16)),
        "is of a split that has more photos": with_images(zeros(*SOUND)),
    }, says="VAL_"),
    *refused("eval", "data/VAL_IMAGES_{}.hdf5", {"is cut off in the middle": cut(0.5), "is a text": write("photos")}),
    *[Case("view", "data/VAL_IMAGES_{}.hdf5", f"has a changed bit in byte {place}", flip(place, place % 8), "same")
      for place in (0, 5, 9, 13, 28, 44, 60, 90, 120, 150, 180, 210, 240, 270, 300, 400)],
]  # fmt: skip


# The feature cache


def on_cache(change):
    """Break the cached features of VAL, which the sound files hold."""

    def found(folder):
        [path] = folder.glob("VAL_FEATURES_*.hdf5")
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        change(path)

    return found


def other_features(shape, dtype):
    def edit(file):
        del file["features"]
        file.create_dataset("features", data=np.ones(shape, dtype))

    return with_hdf5(edit)


CACHES = [
    Case("eval", "data", f"has a feature cache that {what}", on_cache(change), "mended")
    for what, change in {
        "is empty": write(b""),
        "is cut off in the middle": cut(0.5),
        "is random bytes": ANY["is random bytes"],
        "is a link to itself": put_loop,
        "has other features": other_features((2, 1, 1, 7), "float16"),
        "has features of another precision": other_features((2, 1, 1, 1024), "float32"),
        "has a photo too few": other_features((1, 1, 1, 1024), "float16"),
        "has another key": with_hdf5(lambda file: file.attrs.update(key="0" * 12)),
        "has no features": with_hdf5(lambda file: file.pop("features")),
    }.items()
]  # fmt: skip
CACHES += [Case("eval", "data", "has a feature cache that is a folder", on_cache(put_folder), says="VAL_FEATURES")]
