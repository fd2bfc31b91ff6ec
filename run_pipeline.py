"""
The four steps in a row: preprocess, train, evaluate, caption six photos. By default on the built-in dataset, whose
words a small decoder learns in a few minutes on two cores; `make demo` runs this. With your own photos:

    python run_pipeline.py --dataset holiday --annotations captions.csv --image_folder photos

Each step is a command that you could type yourself, and is printed as it runs. Run again, it continues where it ended,
with the data that it began with. With other photos or captions, choose another --dataset, or --overwrite.
"""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import skimage.data

from captioning.command_line import run_script, split_words
from captioning.config_fields import check_fields
from captioning.inference.model_files import PRETRAINED
from captioning.preparation.annotations import read_annotations
from captioning.storage.files import check_file, load_json
from utils import CountOrZero, UserError

# An encoder whose ImageNet weights come with pip. It is not trained here: its features are computed once, and an epoch
# of a small decoder then takes half a minute.
SHAPES_RECIPE = """--encoder efficientnet_lite2 --encoded_image_size 8 --encoder_dim 128 --embed_dim 128
    --decoder_dim 256 --attention_dim 128 --dropout 0.3 --doubly_stochastic_weight 0 --image_major --batch_size 8
    --optimizer adamw --decoder_lr 2e-3 --weight_decay 1e-3 --epochs 4 --schedule cosine --val_beam_size 1
    --val_share 0.3"""
# The same encoder for photos of your own: nothing is downloaded for them either.
PHOTOS_RECIPE = """--encoder efficientnet_lite2 --encoded_image_size 8 --image_major --batch_size 13 --decoder_lr 1e-3
    --schedule cosine --label_smoothing 0.1 --embedding_dropout 0.2 --epochs 12"""
# Few photos make few steps an epoch, and scores of a handful of captions that jump: small batches, many epochs, and no
# end before the last of them.
LITTLE_DATA_RECIPE = """--encoder efficientnet_lite2 --encoded_image_size 8 --image_major --batch_size 4
    --embed_dim 256 --decoder_dim 256 --attention_dim 256 --decoder_lr 1e-3 --schedule cosine --epochs 60
    --stop_patience 60"""
LITTLE_DATA = 1000  # photos
# Forty photos do not teach a language. Where their captions are in that of the model that comes with the collection, it
# learns their kind in a few epochs, at a low learning rate, and its captions are whole sentences from the first one on.
STARTED_RECIPE = f"""--start_from {shlex.quote(str(PRETRAINED))} --image_major --batch_size 4 --decoder_lr 1e-4
    --schedule cosine --epochs 20 --stop_patience 20"""
KNOWN_SHARE = 0.8  # of the words of the captions, which that model must know
# Python code that says what is wrong with its options, if train.py would refuse them.
READ_TRAIN_OPTIONS = "import captioning.command_line as line, train; line.check_command_line(train.Config)"


@dataclass
class Config:
    dataset: str = "shapes"  # name for the files; shapes is drawn on the spot
    annotations: tuple[str, ...] | str | None = None  # captions of your own data, as for create_input_files.py
    image_folder: str | None = None  # its photos; default images/ beside the annotations
    min_word_freq: CountOrZero | None = None  # words as rare as this become <unk>; default 5, or 0 for few photos
    run_folder: str | None = None  # where the model goes; default runs/<dataset>
    overwrite: bool = False  # make the data again, and train anew in place of the run that is in run_folder
    train_options: str | None = None  # added to the recipe, as --train_options="--epochs 5"
    img: str | None = None  # photo to caption in the end; default six that were not trained on


def main(config):
    check_fields(config)
    train_options = split_words("train_options", config.train_options or "")
    folder, run_folder = f"data/{config.dataset}", config.run_folder or f"runs/{config.dataset}"
    check_last_steps(config.img, train_options)
    annotations = config.annotations or ()
    if isinstance(annotations, str):
        annotations = (annotations,)

    create_options, recipe = choose_recipe(annotations, train_options)
    min_word_freq = create_options["min_word_freq"] if config.min_word_freq is None else config.min_word_freq
    create = ["--dataset", config.dataset, "--output_folder", folder, "--min_word_freq", str(min_word_freq)]
    image_folder = f"{folder}/images"
    if annotations:
        image_folder = config.image_folder or str(Path(annotations[0]).parent / "images")
        create += ["--annotations", *annotations, "--image_folder", image_folder]
        create += ["--val_share", str(create_options["val_share"])]
    if "words_of" in create_options:
        create += ["--words_of", create_options["words_of"]]

    data_name = f"{config.dataset}_5_cap_per_img_{min_word_freq}_min_word_freq"
    data = ["--data_folder", folder, "--data_name", data_name, "--run_folder", run_folder]
    data += ["--overwrite"] if config.overwrite else ["--resume", "auto"]
    best = f"{run_folder}/best.pth"
    if not annotations and PRETRAINED.is_file():  # something to see before the training
        run("caption.py", "--img", *sample_photos(), "--model", str(PRETRAINED), "--no_unk",
            "--output", "outputs/samples.html", "--overwrite")  # fmt: skip
    if not config.overwrite and may_keep_data(annotations, Path(folder, f"WORDMAP_{data_name}.json"), run_folder):
        print(f"\n{folder}: kept as it is, for the run in {run_folder} learns from it")
    else:
        run("create_input_files.py", *create)
    run("train.py", *data, *shlex.split(recipe), *train_options)
    run("eval.py", "--model", best)
    photos = [config.img] if config.img else unseen_photos(folder, data_name, image_folder)
    run("caption.py", "--img", *photos, "--model", best, "--output", f"{run_folder}/captions.html", "--overwrite")


def check_last_steps(img, train_options):
    """
    Tell at once what would only be noticed when the data are made, or the model is trained.

    :param img: photo to caption in the end, or None
    :param train_options: list of command line words for train.py
    :raises UserError: if there is no such photo, or train.py would refuse the words
    """
    if img:
        check_file(img)
    if train_options:  # read as train.py reads them, in a process of its own, as each step has
        command = [sys.executable, "-c", READ_TRAIN_OPTIONS, *train_options]
        result = subprocess.run(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)
        if result.returncode == 2:
            raise UserError(f"train_options: {result.stderr.removeprefix('error: ').strip()}")


def may_keep_data(annotations, word_map, run_folder):
    """
    :param word_map: path of the data's file that is written last
    :return: whether the data are there, and so is a run, whose photos and captions may not be replaced by others
    :raises UserError: if the annotations have changed since
    """
    checkpoints = (Path(run_folder, f"{name}.pth") for name in ("last", "previous", "best"))
    if not word_map.exists() or not any(map(Path.exists, checkpoints)):
        return False
    for path in annotations:
        if Path(path).stat().st_mtime > word_map.stat().st_mtime:
            raise UserError(
                f"annotations: {path} is newer than {word_map.parent}, which the run in {run_folder} learns from; give "
                "the new data another name (--dataset), replace both (--overwrite), or continue with train.py --resume"
            )
    return True


def sample_photos():
    """:return: paths of photos that come with scikit-image and may be shown to anybody"""
    folder = Path(skimage.data.__file__).parent
    names = ("astronaut.png", "camera.png", "motorcycle_left.png", "chelsea.png", "coffee.png", "rocket.jpg")
    return [str(folder / name) for name in names if (folder / name).is_file()]


def choose_recipe(annotations, train_options):
    """
    Choose settings that suit the data, and print which ones.

    :param annotations: paths of annotation files; empty for the built-in dataset
    :param train_options: list of command line words that are added to the recipe
    :return: dict of options of create_input_files.py, and a text of options of train.py
    """
    if not annotations:
        name, create_options, recipe = "the built-in dataset", {"min_word_freq": 5, "val_share": 0.1}, SHAPES_RECIPE
    else:
        photos = read_annotations(annotations, keep_splits=False)
        name = f"{len(photos)} photos"
        create_options, recipe = {"min_word_freq": 5, "val_share": 0.1}, PHOTOS_RECIPE
        if len(photos) < LITTLE_DATA:
            create_options = {"min_word_freq": 0, "val_share": 0.2}
            recipe = LITTLE_DATA_RECIPE
            if can_start_from_pretrained(photos, train_options):
                recipe = STARTED_RECIPE
                create_options["words_of"] = str(PRETRAINED)  # it forgets none of them
    print(f"Recipe for {name}: {' '.join(recipe.split())}")
    print('Change it with --train_options="--name value ...", which is added to it')
    return create_options, recipe


def can_start_from_pretrained(photos, train_options):
    """
    :param photos: list of `AnnotatedPhoto`
    :param train_options: list of command line words
    :return: whether the model that comes with the collection is there, knows most of the captions' words, and is of the
        kind that the options ask for
    """
    from captioning.storage.tensors import load_checkpoint  # here: both import torch, and --help should come at once
    from captioning.training.start import MODEL_SETTINGS

    asked = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in train_options}
    if not PRETRAINED.is_file() or asked & {*MODEL_SETTINGS, "encoder_weights", "start_from", "word_vectors"}:
        return False
    known = load_checkpoint(PRETRAINED)["word_map"]
    words = [word for photo in photos for caption in photo.captions for word in caption]
    return sum(word in known for word in words) >= KNOWN_SHARE * len(words) > 0


def run(script, *arguments):
    """Run one of the scripts as a user would; end with its exit code if it fails."""
    print("\n$ python", shlex.join([script, *arguments]), flush=True)
    code = subprocess.run([sys.executable, str(Path(__file__).parent / script), *arguments]).returncode
    if code:
        sys.exit(code)


def unseen_photos(folder, data_name, image_folder, count=6):
    """:return: paths of the first photos that were not trained on"""
    for split in ("TEST", "VAL", "TRAIN"):
        path = Path(folder) / f"{split}_REFERENCES_{data_name}.json"
        if path.exists():
            return [str(Path(image_folder) / photo["file_name"]) for photo in load_json(path)[:count]]
    raise UserError(f"{folder}: no references of {data_name} found, which create_input_files.py should have left there")


if __name__ == "__main__":
    run_script(main, Config)
