"""A split's scores, for any captioner: taken, printed as a table, written to files. What eval.py and blip.py share."""

import csv

from captioning.evaluation import metrics
from captioning.storage.files import atomic_path, save_json
from datasets import load_reference_file

PHOTO_METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


def default_split(data_folder, data_name):
    """:return: the split that final scores are taken on: TEST, or VAL where there is none"""
    has_test = (data_folder / f"TEST_IMAGES_{data_name}.hdf5").exists()
    return ["TEST"] if has_test else ["VAL"]


def training_captions(path):
    """:return: list of all captions of the training photos, each a list of words; None if there is no such file"""
    if not path.exists() and not path.is_symlink():
        return None
    return [caption for photo in load_reference_file(path) for caption in photo["captions"]]


def score_split(captioner, split, loader, resident, known, beam_sizes, max_length, output_folder, **options):
    """
    Caption a split with each beam size, and write the captions, with each photo's own scores for the last beam size.

    :param captioner: `inference.Captioner`, or another with its `caption_split` and `perplexity`
    :param loader, resident: as `loaders.build_loader` gives them
    :param known: captions of the training set, or None
    :param options: for `caption_split`
    :return: dict of beam size -> dict of metric -> value; dict of the perplexity and what the captions are like
    """
    rows, captions = {}, {}
    for beam_size in beam_sizes:
        hypotheses, references = captioner.caption_split(loader, beam_size, max_length, resident, **options)
        rows[str(beam_size)], each = metrics.all_scores(references, hypotheses)
        captions[str(beam_size)] = metrics.caption_statistics(hypotheses, known or [])
        if known is None:
            del captions[str(beam_size)]["in_training_set"]
        photos = loader.dataset.references
        results = [
            {"image_id": photo["image_id"], "caption": " ".join(words)}
            for photo, words in zip(photos, hypotheses, strict=True)
        ]
        save_json(results, output_folder / f"captions_{split}_beam{beam_size}_results.json")
    save_photo_scores(photos, hypotheses, each, output_folder / f"scores_{split}_beam{beam_size}.csv")
    return rows, {"perplexity": captioner.perplexity(loader, resident), "captions": captions}


def save_photo_scores(photos, hypotheses, each, path):
    """Write a CSV: a row for each photo with its caption and its own scores."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption", *PHOTO_METRICS))
        for photo, words, own in zip(photos, hypotheses, each, strict=True):
            numbers = (f"{own[metric]:.4f}" for metric in PHOTO_METRICS)
            table.writerow((photo["file_name"], " ".join(words), *numbers))


def print_split(title, rows, statistics):
    """
    :param rows, statistics: of `score_split`
    """
    print(f"\n{title}\n{'beam':>5}" + "".join(f"{metric:>10}" for metric in metrics.ALL))
    for beam_size, row in rows.items():
        print(f"{beam_size:>5}" + "".join(f"{row[metric]:>10.4f}" for metric in metrics.ALL))
    print(f"perplexity of the references: {statistics['perplexity']:.2f}")
    for beam_size, values in statistics["captions"].items():
        print(f"beam {beam_size}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
