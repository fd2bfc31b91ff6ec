"""
Score a trained model: `python eval.py` prints a table of BLEU, METEOR, ROUGE-L and CIDEr for each beam size.

Without arguments it takes the newest best checkpoint of runs/ and the data it was trained with; `python eval.py
runs/soft` takes that run's. Several checkpoints are scored as one model, an ensemble. The files that it writes are
listed in `main`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from captioning.command_line import check_command_line, run_script
from captioning.config_fields import check_fields
from utils import (
    BeamSize,
    BeamSizes,
    CaptionLength,
    Count,
    LengthOrZero,
    NotNegative,
    Positive,
    Ranking,
    Split,
    UserError,
    Workers,
    choose_device,
)


@dataclass
class Config:
    model: tuple[str, ...] = ()  # checkpoints or run folders, several for an ensemble; default the newest, or ours
    word_map: str | None = None  # for the tutorial's checkpoints (.pth.tar): the WORDMAP_....json of their training
    split: tuple[Split, ...] = ()  # of TRAIN, VAL and TEST; default TEST, or VAL where the data has no TEST
    beam_sizes: BeamSizes = (1, 3, 5)  # a row of the table each; 1 is greedy choice
    normalisation: Ranking = "none"  # rank captions by log-probability, its mean over words, or with --reward
    reward: float = 0.0  # added to the log-probability for each word, with --normalisation reward
    beam_groups: Count = 1  # parts of the beam that avoid one another's words (diverse beam search); divides beam_sizes
    diversity: NotNegative = 0.5  # cost of a word that another group has just chosen, in nats of log-probability
    n_best: BeamSize = 1  # captions of each photo that are written and compared with one another; at most the beam size
    temperature: Positive = 1.0  # of the softmax: below 1 likely words become likelier, above 1 all become more alike
    min_length: LengthOrZero = 0  # shortest caption, in words
    max_length: CaptionLength | None = None  # longest caption, in words; default the longest of the training data
    no_repeat_ngram: LengthOrZero = 0  # no sequence of this many words twice in a caption; 0 for no rule
    no_unk: bool = False  # never write <unk>
    tokenizer: Literal["ours", "ptb"] = "ours"  # for the scores: words as they are, or split by coco-caption (Java)
    calibrate: bool = False  # find the softmax temperature that fits VAL best, and show how confidence fits accuracy
    pointing: bool = False  # built-in dataset: how often attention's strongest location lies in the named object's box
    data_folder: str | None = None  # folder of the data to score on; default that of the training
    data_name: str | None = None  # what its files' names share; default that of the training
    output_folder: str | None = None  # for all that is written; default the (first) checkpoint's folder
    batch_size: Count = 32  # photos that are searched at once
    workers: Workers = 0  # processes that read batches ahead; 0 reads in this process
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one
    cache_features: bool = True  # keep a frozen encoder's features in a file beside the data


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

from captioning.display.charts import reliability_diagram
from captioning.display.figure_files import save_figure
from captioning.evaluation.calibration import collect_outputs, fit_temperature, measure
from captioning.evaluation.pointing_game import check_boxes, pointing_game
from captioning.evaluation.split_scores import default_split, print_split, score_split, training_captions
from captioning.features import build_loader
from captioning.inference.model_files import check_photos, describe_model, locate_data
from captioning.inference.trained_model import load_captioner
from captioning.storage.files import save_json
from captioning.training.data_identity import describe_data
from datasets import CaptionDataset


def main(config):
    check_config(config)
    captioner, checkpoint, path = load_captioner(config.model, choose_device(config.device), config.word_map)
    data_folder, data_name = locate_data(config, checkpoint)
    output_folder = Path(config.output_folder or path.parent)
    if len(config.model) > 1:
        print(f"Model: ensemble of {', '.join(config.model)}")
    else:
        print(f"Model: {path} ({describe_model(checkpoint)})")
    splits = [name.upper() for name in config.split] or default_split(data_folder, data_name)

    def open_split(split):
        """:return: loader, and the split's features if they are on the GPU"""
        loader, resident = build_loader(
            data_folder, data_name, split, captioner.encoder, captioner.device, batch_size=config.batch_size,
            cached=config.cache_features and captioner.encoder.frozen, workers=config.workers,
        )  # fmt: skip
        check_photos(loader.dataset, checkpoint)
        loader.dataset.use_words(captioner.word_map)
        return loader, resident

    check_data(config, data_folder, data_name, splits)
    if config.data_folder is None and config.data_name is None:
        tell_changed_data(checkpoint, data_folder, data_name)
    options = {name: getattr(config, name) for name in ("normalisation", "reward", "temperature", "min_length")}
    options |= {"no_repeat_ngram": config.no_repeat_ngram, "never_unk": config.no_unk}
    options |= {"groups": config.beam_groups, "diversity": config.diversity}
    known = training_captions(data_folder / f"TRAIN_REFERENCES_{data_name}.json")
    statistics = {}
    for split in splits:
        loader, resident = open_split(split)
        max_length = config.max_length
        if max_length is None and "max_length" not in checkpoint:  # a file from before checkpoints said it
            max_length = int(loader.dataset.lengths.max()) - 2  # they count <start> and <end>
        scores, statistics[split] = score_split(
            captioner, split, loader, resident, known, config.beam_sizes, max_length, output_folder,
            tokenizer=config.tokenizer, n_best=config.n_best, **options,
        )  # fmt: skip
        print_split(split, len(loader.dataset), scores, statistics[split])
        if config.pointing:
            print(pointing_game(captioner, loader, resident, config.beam_sizes[-1], max_length, **options))
    common = {"settings": {**asdict(config), "model": config.model or [str(path)]}}  # that gave these scores
    written = "scores_*.json, statistics_*.json, captions_*_results.json, scores_*.csv"
    if config.calibrate:
        common["calibration"] = calibrate(captioner, open_split, splits, output_folder)
        written += ", calibration_*.png"
    for split in splits:  # {"perplexity", "captions": {beam size: ...}, "settings", "calibration"}
        save_json(statistics[split] | common, output_folder / f"statistics_{split}.json")
    print(f"Written to {output_folder}: {written}")


def check_config(config):
    """:raises UserError: if a setting makes no sense"""
    check_fields(config)
    if config.max_length is not None and config.min_length > config.max_length:
        raise UserError(f"min_length: {config.min_length} found, at most max_length ({config.max_length}) expected")
    if config.reward and config.normalisation != "reward":
        raise UserError(f"reward: {config.reward} found with --normalisation {config.normalisation}; it needs 'reward'")
    check_groups(config)


def check_groups(config):
    """:raises UserError: if the beams cannot be divided into groups, or a single group has a cost between groups"""
    if any(beam_size % config.beam_groups for beam_size in config.beam_sizes):
        raise UserError(
            f"beam_groups: {config.beam_groups} found, a number that divides each of beam_sizes "
            f"({', '.join(map(str, config.beam_sizes))}) expected"
        )
    if config.diversity != Config.diversity and config.beam_groups == 1:
        raise UserError(f"diversity: {config.diversity} found, but it is between groups; add --beam_groups")


def check_data(config, data_folder, data_name, splits):
    """:raises UserError: if what is asked for beside the scores cannot be had from this data: told before the work"""
    if config.calibrate and not (data_folder / f"VAL_IMAGES_{data_name}.hdf5").exists():
        raise UserError(f"calibrate: {data_folder} has no VAL of {data_name}, on which the temperature is found")
    if config.pointing:
        for split in splits:
            check_boxes(CaptionDataset(data_folder, data_name, split, image_major=True))


def tell_changed_data(checkpoint, data_folder, data_name):
    """Say so if the training photos are no longer those of the run: others may have been drawn for the other splits."""
    known = checkpoint.get("data")
    if not isinstance(known, dict) or not (data_folder / f"TRAIN_IMAGES_{data_name}.hdf5").exists():
        return
    if describe_data(CaptionDataset(data_folder, data_name, "TRAIN")) != known.get("TRAIN"):
        print(
            f"{data_folder}: the files of {data_name} were made again with other photos or captions since the model "
            "was trained; it may be scored on photos that it learned from"
        )


def calibrate(captioner, open_split, splits, output_folder):
    """
    Find the temperature on VAL; measure there and on the other splits what it corrects, and draw it.

    :param open_split: function of a split's name to a loader and its resident features
    :return: dict of the temperature, and for each split of the loss and the expected calibration error
    """
    found, logits_of = {}, captioner.decoder.scores
    for split in dict.fromkeys(["VAL", *splits]):
        words = collect_outputs(captioner, *open_split(split))
        if split == "VAL":
            found["temperature"] = fit_temperature(logits_of, *words)
            print(f"\ncalibration: temperature {found['temperature']:.3f} minimises the loss of VAL")
        found[split] = {}
        for when, temperature in (("before", 1.0), ("after", found["temperature"])):
            r = measure(logits_of, *words, temperature)
            error = r.expected_calibration_error
            found[split][when] = {"loss": r.loss, "expected_calibration_error": error}
            print(f"{split} {when}: loss {r.loss:.4f}, expected calibration error {error:.4f}")
            title = f"next words of {split}, temperature {temperature:.2f}"
            figure = reliability_diagram(r.confidences, r.accuracies, r.counts, title)
            save_figure(figure, output_folder / f"calibration_{split}_{when}.png")
    return found


if __name__ == "__main__":
    run_script(main, Config)
