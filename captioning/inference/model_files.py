"""Which model and which data a user means: checkpoints by file, run folder or not at all; datasets by folder."""

import os
from pathlib import Path

from utils import UserError

MODEL_ENDINGS = (".pth", ".pt", ".tar")
PRETRAINED = Path(__file__).parents[2] / "pretrained/flickr8k.pth"  # the model that comes with the collection


def find_checkpoint(name):
    """
    :param name: a checkpoint, or the folder of a run
    :return: its path; of a run's folder, that of its best.pth; of another, that of the only .pth in it
    """
    path = Path(name)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.pth"))
    return found[0] if len(found) == 1 else path / "best.pth"


def newest_checkpoint(folder="runs"):
    """
    :return: path of the newest best.pth below `folder`; if there is none, of the model that comes with the collection
    :raises UserError: if that is missing too
    """
    found = [path for path in Path(folder).glob("**/best.pth") if path.is_file()]
    if not found and PRETRAINED.is_file():
        return PRETRAINED
    if not found:
        raise UserError(f"{folder}: no best.pth found; train a model first (python train.py), or name a checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime)


def is_model(name):
    """:return: whether a word of the command line names a model, not a photo: a checkpoint, or a run's folder"""
    return (Path(name) / "best.pth").exists() or Path(name).suffix.lower() in MODEL_ENDINGS


def check_not_twice(name, paths):
    """
    :param name: of the option that names the files
    :param paths: list of paths
    :raises UserError: if two of them are the same file
    """
    found = [os.path.realpath(path) for path in paths]  # unlike resolve(), it bears a link to itself
    for path in found:
        if found.count(path) > 1:
            raise UserError(f"{name}: {path} is named twice; name each once")


def locate_data(config, checkpoint):
    """
    Give the data that a script's config names, else that of the model's training.

    :param config: with `data_folder` and `data_name`; a folder with one dataset needs no name
    :return: folder and name
    :raises UserError: if neither names any, or the folder has several
    """
    trained = {name: checkpoint["config"].get(name) for name in ("data_folder", "data_name")}
    folder, name = config.data_folder or trained["data_folder"], config.data_name
    if not isinstance(folder, str) or not folder:
        raise UserError("data_folder: the checkpoint does not say; give --data_folder")
    if name is None and config.data_folder:
        name = choose_dataset(folder, trained["data_name"])
    name = name or trained["data_name"]
    if not isinstance(name, str) or not name:
        raise UserError("data_name: the checkpoint does not say; give --data_name")
    return Path(folder), name


def choose_dataset(folder, preferred=None):
    """
    :param folder: of files of create_input_files.py
    :param preferred: name of the dataset to take if the folder has several
    :return: name of the dataset in the folder
    :raises UserError: if it has none, or several
    """
    found = sorted(path.stem.removeprefix("WORDMAP_") for path in Path(folder).glob("WORDMAP_*.json"))
    if preferred in found:
        return preferred
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{folder}: no WORDMAP_*.json found; give a folder that create_input_files.py filled")
    raise UserError(f"data_name: {folder} has several datasets; give --data_name and one of {', '.join(found)}")


def check_photos(dataset, checkpoint):
    """:raises UserError: if a dataset's photos are of another size than those that the model was trained with"""
    if dataset.image_size != checkpoint["image_size"]:
        raise UserError(
            f"{dataset.image_file}: photos of {dataset.image_size} px found, {checkpoint['image_size']} px expected by "
            f"the model; make the files with --image_size {checkpoint['image_size']}"
        )


def describe_model(checkpoint):
    """:return: in a few words, what a checkpoint holds"""
    settings, epochs = checkpoint["config"], checkpoint["progress"].get("epoch", 0)
    return f"{settings['decoder']} decoder on {settings['encoder']}, {epochs} epoch{'' if epochs == 1 else 's'}"


def is_tutorials(path):
    """:return: whether a checkpoint has the ending of those of the tutorial, whose words are in a file of their own"""
    return Path(path).suffix == ".tar"


def check_word_map_use(word_map_file, paths):
    """
    :param word_map_file: that the user gave, or None
    :param paths: of the checkpoints
    :raises UserError: if none of them needs it
    """
    if word_map_file is not None and not any(map(is_tutorials, paths)):
        raise UserError(
            f"word_map: '{word_map_file}' found, but it is for checkpoints of the tutorial (.pth.tar), and there is "
            "none: ours have their words in them, so leave it out"
        )
