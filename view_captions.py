"""
Look at captions in a browser: `python view_captions.py` writes one HTML page with photos, captions, references, scores
and where the model looked for each word. With several checkpoints the page shows them side by side; models of other
kinds, such as blip.py's, take part through the captions that they wrote (--results).

The page needs no network and no server: open it, keep it, send it.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from captioning.command_line import check_command_line, run_script
from captioning.config_fields import check_fields
from utils import BeamSize, CaptionLength, Count, ImageSize, Split, UserError, Workers, choose_device


@dataclass
class Config:
    model: tuple[str, ...] = ()  # checkpoints or run folders, several to compare; default the newest, or ours
    word_map: str | None = None  # for the tutorial's checkpoints (.pth.tar): the WORDMAP_....json of their training
    results: tuple[str, ...] = ()  # captions_*_results.json of other models, in COCO's format, to show beside them
    split: Split = "VAL"  # TRAIN, VAL or TEST
    num_photos: Count = 200  # spread evenly over the split; all of them if it has fewer
    beam_size: BeamSize = 5  # captions that the search keeps; 1 is greedy choice
    max_length: CaptionLength | None = None  # longest caption, in words; default the longest of the training data
    output: str | None = None  # HTML file to write; default outputs/captions_<split>.html, which is replaced
    overwrite: bool = False  # replace the file of --output if it is there already
    title: str | None = None  # the page's heading; default says how many photos of which split
    photo_size: ImageSize = 256  # longer side of the photos on the page, in pixels
    scores: bool = True  # score each photo's captions; METEOR needs about 1 GB of memory
    data_folder: str | None = None  # folder of the data to look at; default that of the first checkpoint's training
    data_name: str | None = None  # what its files' names share; default that of the first checkpoint's training
    batch_size: Count = 32  # photos that are searched at once
    workers: Workers = 0  # processes that read batches ahead; 0 reads in this process
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

import numpy as np
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from captioning.display.html_page import PageCaption, PagePhoto, check_page_path, write_page
from captioning.evaluation import metrics
from captioning.features import check_workers, read_images
from captioning.inference.model_files import (
    check_not_twice,
    check_photos,
    check_word_map_use,
    choose_dataset,
    describe_model,
    find_checkpoint,
    is_tutorials,
    locate_data,
    newest_checkpoint,
)
from captioning.inference.trained_model import load_captioner
from captioning.storage.files import check_not_an_input, check_not_there, load_json
from captioning.storage.hdf5 import open_hdf5
from datasets import CaptionDataset


def main(config):
    check_fields(config)
    split = config.split.upper()
    output = Path(config.output or f"outputs/captions_{split}.html")
    check_page_path(output)

    device = choose_device(config.device)
    captions, notes = {}, []
    checkpoints = [find_checkpoint(name) for name in config.model]
    if not checkpoints and not config.results:
        checkpoints = [newest_checkpoint()]
    check_not_an_input("output", output, [*checkpoints, *config.results])
    check_not_there("output", output, config.overwrite or config.output is None)
    check_word_map_use(config.word_map, checkpoints)
    names = model_names((*checkpoints, *config.results))
    dataset = None if checkpoints else open_split(config.data_folder, config.data_name, split)
    for name, checkpoint_path in zip(names, checkpoints, strict=False):
        word_map = config.word_map if is_tutorials(checkpoint_path) else None
        captioner, checkpoint, path = load_captioner(checkpoint_path, device, word_map)
        print(f"Model: {path} ({describe_model(checkpoint)})")
        if dataset is None:  # one set of photos for all models, that of the first
            dataset = open_split(*locate_data(config, checkpoint), split)
        check_photos(dataset, checkpoint)
        chosen = spread(len(dataset), config.num_photos)
        captions[name] = caption_photos(captioner, name, dataset, chosen, config)
        notes.append(f"{name}: {describe_model(checkpoint)} ({path})")
    chosen = spread(len(dataset), config.num_photos)
    for name, path in zip(names[len(checkpoints) :], config.results, strict=True):
        captions[name] = read_captions(path, name, [dataset.references[photo]["image_id"] for photo in chosen])
        notes.append(f"{name}: captions of {path}")

    references = [dataset.references[photo]["captions"] for photo in chosen]
    if config.scores:
        try:
            score_captions(captions, references)
            notes.append("Scores are each photo's own; CIDEr weighs words by how many of these photos mention them.")
        except UserError as error:  # the captions may have taken an hour
            notes.append(f"Without scores: {error}")
            print(f"warning: the page has no scores: {error}", file=sys.stderr)
    title = config.title or f"{len(chosen)} of {len(dataset)} photos of {split}, beam {config.beam_size}"
    write_page(output, page_photos(dataset, chosen, captions, references), title, notes, config.photo_size)
    print(f"{len(chosen)} photos, {output.stat().st_size / 1e6:.1f} MB: {output}")


def open_split(data_folder, data_name, split):
    """:return: `CaptionDataset` of the photos to show"""
    if not data_folder:
        raise UserError("data_folder: not given; results do not say which data they belong to; give its folder")
    dataset = CaptionDataset(data_folder, data_name or choose_dataset(data_folder), split, image_major=True)
    dataset.load_references()  # now: a broken file should end the run before it begins
    return dataset


def model_names(paths):
    """
    Name models after their runs: `runs/soft/best.pth` is 'soft', as long as no other is.

    :param paths: checkpoints, and files of results
    :return: list of names, all different: the folder, 'folder/file', or the whole path
    :raises UserError: if a file is named twice
    """
    check_not_twice("model, results", paths)
    paths = [Path(os.path.realpath(path)) for path in paths]
    choices = ([p.parent.name for p in paths], [f"{p.parent.name}/{p.stem}" for p in paths], [str(p) for p in paths])
    return next(names for names in choices if len(set(names)) == len(names))


def spread(total, count):
    """:return: list of `count` places from 0 to `total` - 1 at even distances, or all of them if they are no more"""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def caption_photos(captioner, name, dataset, chosen, config):
    """:return: list of `PageCaption`, with attention, one for each of the chosen photos"""
    check_workers(dataset, config.batch_size, config.workers)
    loader = DataLoader(
        Subset(dataset, chosen), config.batch_size, collate_fn=dataset.collate, num_workers=config.workers
    )
    captions = []
    for batch in tqdm(loader, desc=name, unit="batch", leave=False):
        found = captioner.search(batch.images, config.beam_size, config.max_length, keep_alphas=True)
        for best, *_ in found:
            captions.append(PageCaption(name, captioner.sentence(best), best.alphas, best.log_prob))
    return captions


def read_captions(path, name, image_ids):
    """
    :param path: captions that some model wrote: a list of {"image_id", "caption"}, as eval.py and COCO's tools have it
    :param image_ids: of the photos that are shown
    :return: list of `PageCaption`, without attention, one for each id
    :raises UserError: if the file is none of that kind, or a photo is not in it
    """
    content = load_json(path)
    try:
        captions = {row["image_id"]: row["caption"].split() for row in content}
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f'{path}: a list of {{"image_id", "caption"}} expected; give a captions_*_results.json'
        ) from None
    for image_id in image_ids:
        if image_id not in captions:
            raise UserError(f"{path}: has no caption for image_id {image_id!r}; give the results of the split shown")
    return [PageCaption(name, captions[image_id]) for image_id in image_ids]


def score_captions(captions, references):
    """
    Give every caption its scores.

    :param captions: dict of model -> list of `PageCaption`, whose `scores` are set
    :param references: per photo a list of captions, each a list of words
    """
    for column in captions.values():
        rows = metrics.per_photo_scores(references, [caption.words for caption in column])
        for caption, scores in zip(column, rows, strict=True):
            caption.scores = scores


def page_photos(dataset, chosen, captions, references):
    """Yield a `PagePhoto` at a time, its pixels read when it is its turn."""
    with open_hdf5(dataset.image_file, "images") as file:
        for i, photo in enumerate(chosen):
            image = read_images(file["images"], photo, photo + 1)[0].transpose(1, 2, 0)  # (H, W, 3)
            written = [column[i] for column in captions.values()]
            yield PagePhoto(str(dataset.references[photo]["file_name"]), image, written, references[i])


if __name__ == "__main__":
    run_script(main, Config)
