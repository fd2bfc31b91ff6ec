"""
Score a trained model: `python eval.py` prints a table of BLEU, METEOR, ROUGE-L and CIDEr for each beam size.

Without arguments it takes the newest best checkpoint of runs/ and the data it was trained with. Beside the table it
writes scores.json and, for each beam size, the captions in the COCO challenge's results format.
"""

from dataclasses import dataclass
from pathlib import Path

import metrics
from inference import load_captioner
from loaders import build_loader
from utils import UserError, choose_device, run_script, save_json


@dataclass
class Config:
    checkpoint: str | None = None  # of train.py; default the newest runs/*/best.pth
    split: tuple[str, ...] = ()  # of TRAIN, VAL and TEST; default TEST, or VAL where the data has no TEST
    beam_sizes: tuple[int, ...] = (1, 3, 5)  # a row of the table each; 1 is greedy choice
    max_length: int = 50  # longest caption, in words
    data_folder: str | None = None  # of the data to score on; default the data of the training
    data_name: str | None = None  # what its files' names share; default that of the training
    output_folder: str | None = None  # for scores.json and the captions; default the checkpoint's folder
    batch_size: int = 32  # photos that are searched at once
    workers: int = 0  # processes that read batches ahead; 0 reads in this process
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one
    cache_features: bool = True  # keep a frozen encoder's features in a file beside the data


def main(config):
    if min(config.beam_sizes, default=0) < 1:
        raise UserError(f"beam_sizes: {config.beam_sizes} found, whole numbers from 1 expected")
    captioner, checkpoint, path = load_captioner(config.checkpoint, choose_device(config.device))
    data_folder = config.data_folder or checkpoint["config"]["data_folder"]
    data_name = config.data_name or checkpoint["config"]["data_name"]
    output_folder = Path(config.output_folder or path.parent)
    print(f"{path}: {checkpoint['config']['decoder']} decoder, {checkpoint['progress']['epoch']} epochs")

    scores = {}
    for split in config.split or default_split(data_folder, data_name):
        if split.upper() not in ("TRAIN", "VAL", "TEST"):
            raise UserError(f"split: '{split}' found, TRAIN, VAL or TEST expected")
        cached = config.cache_features and captioner.encoder.frozen
        loader, resident = build_loader(
            data_folder, data_name, split.upper(), captioner.encoder, captioner.device, batch_size=config.batch_size,
            cached=cached, workers=config.workers,
        )  # fmt: skip
        scores[split.upper()] = rows = {}
        for beam_size in config.beam_sizes:
            hypotheses, references = captioner.caption_split(loader, beam_size, config.max_length, resident)
            rows[str(beam_size)] = metrics.score(references, hypotheses)
            results = [
                {"image_id": photo["image_id"], "caption": " ".join(words)}
                for photo, words in zip(loader.dataset.references, hypotheses, strict=True)
            ]
            save_json(results, output_folder / f"captions_{split.upper()}_beam{beam_size}_results.json")
        print_table(f"{split.upper()} ({len(loader.dataset)} photos)", rows)
    save_json(scores, output_folder / "scores.json")
    print(f"Written to {output_folder}: scores.json, captions_*_results.json")


def default_split(data_folder, data_name):
    """:return: the split that final scores are taken on: TEST, or VAL where there is none"""
    has_test = (Path(data_folder) / f"TEST_IMAGES_{data_name}.hdf5").exists()
    return ("TEST",) if has_test else ("VAL",)


def print_table(title, rows):
    """:param rows: dict of beam size -> dict of metric -> value"""
    print(f"\n{title}\n{'beam':>5}" + "".join(f"{metric:>10}" for metric in metrics.ALL))
    for beam_size, row in rows.items():
        print(f"{beam_size:>5}" + "".join(f"{row[metric]:>10.4f}" for metric in metrics.ALL))


if __name__ == "__main__":
    run_script(main, Config)
