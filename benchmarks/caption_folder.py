"""
Captioning a folder with one command against one command for each photo: ResNet-101, 512 / 512 / 512, 14 x 14, beam 5.

    python caption.py --img <folder> --output captions.csv        ours
    python caption.py --img photo.jpg --output photo.csv          plain, again and again

Both are timed from the command's start to its end, as a user waits for them. The photos are JPEGs of 640 x 480. Weights
are random, so captions would never end: both stop after 12 steps, as long as COCO's captions with <end>. Both must find
the same captions, which is checked.
"""

import csv
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import preprocess
import torch
from measure import report
from tutorial import settle

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a benchmark is run from anywhere

import train
from captioning.command_line import run_script
from captioning.networks.registry import build_decoder
from captioning.storage.tensors import save_checkpoint
from models import Encoder

VOCAB_SIZE, STEPS = 9490, 12


@dataclass
class Config:
    device: str = "cpu"  # 'cpu' or 'cuda'
    encoder: str = "resnet101"  # torchvision's name of the network
    photos: tuple[int, ...] = (50, 500)  # sizes of the folders
    plain_photos: int = 5  # photos that get a process of their own
    beam_size: int = 5  # captions that the search keeps


def main(config):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random_model(folder / "model.pth", config.encoder)
        (folder / "photos").mkdir()
        photos = preprocess.make_photos(folder / "photos", (640, 480), max(config.photos), preprocess.Config())

        def caption(img):
            """:return: seconds that the command takes, dict of photo's name -> its caption"""
            options = ["--beam_size", str(config.beam_size), "--max_length", str(STEPS), "--device", config.device]
            files = [
                "--img",
                str(img),
                "--model",
                str(folder / "model.pth"),
                "--output",
                str(folder / "captions.csv"),
                "--overwrite",
            ]
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "caption.py", *files, *options], check=True, capture_output=True)
            took = time.perf_counter() - start
            with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
                return took, {Path(row["image"]).name: row["caption"] for row in csv.DictReader(file)}

        alone = [caption(photo) for photo in photos[: config.plain_photos]]
        plain_rate = len(alone) / sum(took for took, _ in alone)
        rows = []
        for count in config.photos:
            some = folder / f"{count}_photos"
            some.mkdir()
            for photo in photos[:count]:
                shutil.copy(photo, some)
            took, captions = caption(some)
            same = sum(captions.get(photo) == words for _, one in alone for photo, words in one.items())
            assert count < len(alone) or same == len(alone), f"only {same} of {len(alone)} captions are the same"
            print(f"{count} photos: {took:.1f} s; {same} of {len(alone)} captions are the same", flush=True)
            rows.append((f"a folder of {count} photos", "photos/s", plain_rate, count / took, None))
    report("caption_folder", rows)


@torch.no_grad()
def save_random_model(path, name):
    """Write a checkpoint as train.py does, of a model with random weights and as many words as COCO has."""
    torch.manual_seed(0)
    config = dataclasses.asdict(train.Config(encoder=name, encoder_weights="none"))
    encoder = Encoder(name)
    settle(encoder, torch.randint(0, 256, (4, 3, 256, 256), dtype=torch.uint8))
    decoder = build_decoder(config, VOCAB_SIZE, encoder.encoder_dim)
    decoder.fc.weight.mul_(10)  # words differ clearly, so that rounding cannot swap two beams
    word_map = {f"word{i}": i for i in range(1, VOCAB_SIZE - 3)}
    word_map |= {"<pad>": 0, "<unk>": VOCAB_SIZE - 3, "<start>": VOCAB_SIZE - 2, "<end>": VOCAB_SIZE - 1}
    content = {"config": config, "word_map": word_map, "image_size": 256}
    save_checkpoint(content | {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, path)


if __name__ == "__main__":
    run_script(main, Config)
