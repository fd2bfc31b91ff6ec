"""Files that are broken, or that do not belong together, are refused, each with a line that names the file."""

import json

import h5py
import numpy as np
import pytest
from conftest import WORD_MAP

from datasets import CaptionDataset
from utils import UserError


def refused(made, words):
    with pytest.raises(UserError, match=words) as raised:
        CaptionDataset(*made.arguments).load_references()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("part", ["images", "captions", "lengths", "word_map"])
def test_a_missing_file_is_named(make_files, part):
    made = make_files()
    path = getattr(made.paths, part)
    path.unlink()
    refused(made, rf"{path.name}: no such file")


def test_data_without_a_split_is_not_told_to_be_made_again(make_files):
    made = make_files("TRAIN")
    with pytest.raises(UserError, match=r"VAL_IMAGES_tiny\.hdf5: .*so tiny has no photos in VAL; .* --splits drawn"):
        CaptionDataset(made.folder, made.name, "VAL")


@pytest.mark.parametrize("part", ["captions", "lengths", "word_map", "references"])
@pytest.mark.parametrize("content", ["", "[1, 2", '{"a": 1}', "[]", "3", "null", '["a"]', "[[1, 2], [3]]", "[1.5]"])
def test_a_file_with_something_else_in_it_is_named(make_files, part, content):
    made = make_files("VAL")
    path = getattr(made.paths, part)
    path.write_text(content)
    refused(made, path.name)


@pytest.mark.parametrize("size", [0, 100, 2000, -1])
def test_a_truncated_hdf5_file_is_named(make_files, size):
    made = make_files(side=32)
    content = made.paths.images.read_bytes()
    made.paths.images.write_bytes(content[:size])
    refused(made, r"TRAIN_IMAGES_tiny\.hdf5: is not a complete HDF5 file")


def test_another_file_in_the_place_of_the_hdf5_file_is_named(make_files):
    made = make_files()
    made.paths.images.write_text("hello " * 1000)
    refused(made, r"TRAIN_IMAGES_tiny\.hdf5")


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (5, 8, 8)])
def test_an_hdf5_file_without_photos_is_named(make_files, shape):
    made = make_files()
    with h5py.File(made.paths.images, "w") as file:
        file["images"] = np.zeros(shape, np.uint8)
        file.attrs["captions_per_image"] = 2
    refused(made, r"TRAIN_IMAGES_tiny\.hdf5: has no photos under 'images'")


def test_an_hdf5_file_with_other_names_in_it_is_named(make_files):
    made = make_files()
    with h5py.File(made.paths.images, "w") as file:
        file["pictures"] = made.images
    refused(made, r"TRAIN_IMAGES_tiny\.hdf5: has no photos under 'images'")


def test_images_without_captions_per_image_are_refused(make_files):
    refused(make_files(attributes={}), r"TRAIN_IMAGES_tiny\.hdf5: has no attribute 'captions_per_image'")


@pytest.mark.parametrize("photos", [4, 6])
def test_captions_of_other_images_are_refused(make_files, photos):
    made, other = make_files(photos=5), make_files(photos=photos, name="other")
    made.paths.captions.write_text(json.dumps(other.captions))
    refused(made, rf"TRAIN_CAPTIONS_tiny\.json: {photos * 2} captions and 10 lengths.*10 expected")
    made.paths.lengths.write_text(json.dumps(other.lengths))
    refused(made, rf"TRAIN_CAPTIONS_tiny\.json: {photos * 2} captions and {photos * 2} lengths.*10 expected")


@pytest.mark.parametrize("length", [1, 10])
def test_impossible_lengths_are_refused(make_files, length):
    made = make_files()
    made.paths.lengths.write_text(json.dumps([*made.lengths[:-1], length]))
    refused(made, r"TRAIN_CAPLENS_tiny\.json: lengths of .* found, 2 to 9 expected")


def test_lengths_of_other_captions_are_refused(make_files):
    made, other = make_files(seed=0), make_files(seed=1, name="other")
    assert made.lengths != other.lengths
    made.paths.lengths.write_text(json.dumps(other.lengths))
    refused(made, r"TRAIN_CAPTIONS_tiny\.json: captions do not end where TRAIN_CAPLENS_tiny\.json says")


@pytest.mark.parametrize("word", ["<pad>", "<start>", "<end>"])
def test_captions_with_special_words_within_are_refused(make_files, word):
    made = make_files()
    made.captions[2][1] = WORD_MAP[word]
    made.paths.captions.write_text(json.dumps(made.captions))
    refused(made, r"TRAIN_CAPTIONS_tiny\.json: captions have <pad>, <start> or <end> within")


def test_a_word_map_with_a_word_twice_is_refused(make_files):
    made = make_files()
    text = made.paths.word_map.read_text()
    made.paths.word_map.write_text(text.replace("{", '{"cat": 7, ', 1))
    refused(made, r"WORDMAP_tiny\.json: is not valid JSON \(an object has 'cat' twice\)")


def test_a_word_map_that_is_too_small_is_refused(make_files):
    small = {"<pad>": 0, "a": 1, "<unk>": 2, "<start>": 3, "<end>": 4}
    refused(make_files(word_map=small), r"TRAIN_CAPTIONS_tiny\.json: word ids up to 9 found, .* 5 words")


def test_a_negative_word_id_is_refused(make_files):
    made = make_files()
    made.captions[2][1] = -1
    made.paths.captions.write_text(json.dumps(made.captions))
    refused(made, r"TRAIN_CAPTIONS_tiny\.json")


def test_a_word_map_with_another_end_is_refused(make_files):
    made = make_files()
    swapped = made.word_map | {"<end>": made.word_map["cat"], "cat": made.word_map["<end>"]}
    made.paths.word_map.write_text(json.dumps(swapped))
    refused(made, r"TRAIN_CAPTIONS_tiny\.json: captions do not end where")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": 2}, "each word an id of its own"),  # as red
        ({"a": 77}, "each word an id of its own"),
        ({"a": None}, "each word an id of its own"),
        ({"a": "1"}, "each word an id of its own"),
    ],
)
def test_a_word_map_whose_ids_are_not_0_to_n_is_refused(make_files, change, words):
    made = make_files()
    made.paths.word_map.write_text(json.dumps(made.word_map | change))
    refused(made, rf"WORDMAP_tiny\.json: .*{words}")


@pytest.mark.parametrize("word", ["<pad>", "<unk>", "<start>", "<end>"])
def test_a_word_map_without_its_special_words_is_refused(make_files, word):
    made = make_files()
    renamed = {("x" if key == word else key): index for key, index in made.word_map.items()}
    made.paths.word_map.write_text(json.dumps(renamed))
    refused(made, rf"WORDMAP_tiny\.json: has no '{word}'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda references: references[:-1], "4 photos found, 5 expected"),
        (lambda references: {"images": references}, "a list of photos expected"),
        (lambda references: [*references[:-1], {"image_id": 3}], "photo 4 does not have"),
        (lambda references: [*references[:-1], references[0] | {"captions": []}], "photo 4 does not have"),
        (lambda references: [*references[:-1], "a dog"], "photo 4 does not have"),
        (lambda references: [*references[:-1], references[0] | {"captions": [[]]}], "photo 4 does not have"),
        (lambda references: [*references[:-1], references[0] | {"captions": [["a"], [" "]]}], "photo 4 does not have"),
    ],
)
def test_references_of_other_images_are_refused(make_files, change, words):
    made = make_files("VAL")
    made.paths.references.write_text(json.dumps(change(made.references)))
    refused(made, rf"VAL_REFERENCES_tiny\.json: .*{words}")
