"""
The four steps in a row: preprocess, train, evaluate, caption a photo. By default on the built-in dataset, with a small
network that learns it from nothing in a few minutes on two cores; `make demo` runs this.

Each step is a command that you could type yourself: they are printed as they run.
"""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from captioning.command_line import check_fields, run_script
from captioning.storage.files import load_json
from utils import CountOrZero, UserError

# What learns the built-in dataset quickly. There the encoder starts from nothing too, so no weights are downloaded.
DEMO = """--encoder mobilenet_v3_small --encoder_weights none --fine_tune_encoder --encoder_lr 2e-3 --decoder_lr 2e-3
    --encoded_image_size 8 --embed_dim 128 --decoder_dim 256 --attention_dim 128 --dropout 0.1
    --doubly_stochastic_weight 0 --image_major --batch_size 16 --epochs 8 --schedule cosine --val_beam_size 1"""


@dataclass
class Config:
    dataset: str = "shapes"  # name for the files; shapes is drawn on the spot
    annotations: str | None = None  # captions of your own data, as for create_input_files.py
    image_folder: str | None = None  # its photos; default images/ beside the annotations
    min_word_freq: CountOrZero = 5  # words that come this often or less in training captions become <unk>
    run_folder: str | None = None  # where the model goes; default runs/<dataset>
    train_options: str | None = None  # for train.py, as --train_options="--epochs 5"; default a quick recipe for shapes
    img: str | None = None  # photo to caption in the end; default the first of the split that was evaluated


def main(config):
    check_fields(config)
    folder, run_folder = f"data/{config.dataset}", config.run_folder or f"runs/{config.dataset}"
    data_name = f"{config.dataset}_5_cap_per_img_{config.min_word_freq}_min_word_freq"
    train_options = config.train_options
    if train_options is None:
        train_options = DEMO if config.annotations is None else ""
    annotations = config.annotations or f"{folder}/dataset_shapes.json"
    image_folder = config.image_folder or str(Path(annotations).parent / "images")

    create = ["--dataset", config.dataset, "--output_folder", folder, "--min_word_freq", str(config.min_word_freq)]
    if config.annotations:
        create += ["--annotations", config.annotations, "--image_folder", image_folder]
    run("create_input_files.py", *create)
    run("train.py", "--data_folder", folder, "--data_name", data_name, "--run_folder", run_folder,
        *shlex.split(train_options))  # fmt: skip
    run("eval.py", "--checkpoint", f"{run_folder}/best.pth")
    img = config.img or first_photo(folder, data_name, image_folder)
    run("caption.py", "--img", img, "--model", f"{run_folder}/best.pth", "--figure", f"{run_folder}/attention.png")


def run(script, *arguments):
    """Run one of the scripts as a user would; end with its exit code if it fails."""
    print("\n$ python", shlex.join([script, *arguments]), flush=True)
    code = subprocess.run([sys.executable, str(Path(__file__).parent / script), *arguments]).returncode
    if code:
        sys.exit(code)


def first_photo(folder, data_name, image_folder):
    """:return: path of a photo that was not trained on"""
    for split in ("TEST", "VAL", "TRAIN"):
        path = Path(folder) / f"{split}_REFERENCES_{data_name}.json"
        if path.exists():
            return str(Path(image_folder) / load_json(path)[0]["file_name"])
    raise UserError(f"{folder}: no references of {data_name} found, which create_input_files.py should have left there")


if __name__ == "__main__":
    run_script(main, Config)
