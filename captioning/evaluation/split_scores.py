"""A split's scores, for any captioner: taken, printed as a table, written to files. What eval.py and blip.py share."""

import csv

from captioning.evaluation import metrics
from captioning.split_files import load_reference_file
from captioning.storage.files import atomic_path, save_json

FEW_PHOTOS = 100  # fewer of them give scores that depend on chance
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


def score_split(
    captioner, split, loader, resident, known, beam_sizes, max_length, output_folder, tokenizer="ours", n_best=1,
    **options,
):  # fmt: skip
    """
    Caption a split with each beam size; write captions, scores, and each photo's own scores for the last beam size.

    The split is in all files' names. Captions are written before they are scored, so that they are there if METEOR's
    Java fails.
    :param captioner: `Captioner`, or another with its `caption_split` and `perplexity`
    :param loader, resident: as `features.build_loader` gives them
    :param known: captions of the training set, or None
    :param max_length: longest caption, in words; None for the captioner's own
    :param tokenizer: 'ours' to score the words as they are, 'ptb' to tokenize everything again as coco-caption does
    :param n_best: captions of each photo that are written and described beside the best; at most the beam size
    :param options: for `caption_split`
    :return: dict of beam size -> dict of metric -> value; dict of the perplexity and what the captions are like
    """
    scores, captions = {}, {}
    with metrics.MeteorProcess() as meteor:  # one start of Java for all beam sizes
        for beam_size in beam_sizes:
            if n_best > 1:
                options["n_best"] = min(n_best, beam_size)
            hypotheses, references, cut_off, several = captioner.caption_split(
                loader, beam_size, max_length, resident, **options
            )
            photos = loader.dataset.references
            results = [
                {"image_id": photo["image_id"], "caption": " ".join(words)}
                for photo, words in zip(photos, hypotheses, strict=True)
            ]
            save_json(results, output_folder / f"captions_{split}_beam{beam_size}_results.json")
            captions[str(beam_size)] = metrics.caption_statistics(hypotheses, known or []) | {"cut_off": cut_off}
            if min(n_best, beam_size) > 1:
                captions[str(beam_size)] |= metrics.n_best_statistics(several)
                save_n_best(photos, several, output_folder / f"captions_{split}_beam{beam_size}_n_best.json")
            if known is None:
                del captions[str(beam_size)]["in_training_set"]
            scored = (
                metrics.tokenize_for_coco(references, hypotheses) if tokenizer == "ptb" else (references, hypotheses)
            )
            scores[str(beam_size)], each = metrics.all_scores(*scored, meteor)
    save_json(scores, output_folder / f"scores_{split}.json")
    save_photo_scores(photos, hypotheses, each, output_folder / f"scores_{split}_beam{beam_size}.csv")
    return scores, {"perplexity": captioner.perplexity(loader, resident), "captions": captions}


def save_n_best(photos, n_best, path):
    """Write a JSON file: each photo with several captions of it, best first."""
    lists = [
        {"image_id": photo["image_id"], "captions": [" ".join(words) for words in captions]}
        for photo, captions in zip(photos, n_best, strict=True)
    ]
    save_json(lists, path)


def save_photo_scores(photos, hypotheses, each, path):
    """Write a CSV: a row for each photo with its caption and its own scores."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption", *PHOTO_METRICS))
        for photo, words, own in zip(photos, hypotheses, each, strict=True):
            numbers = (f"{own[metric]:.4f}" for metric in PHOTO_METRICS)
            table.writerow((photo["file_name"], " ".join(words), *numbers))


def print_split(split, num_photos, scores, statistics):
    """
    :param scores, statistics: of `score_split`
    """
    print(f"\n{split} ({num_photos} photos)\n{'beam':>5}" + "".join(f"{metric:>10}" for metric in metrics.ALL))
    for beam_size, row in scores.items():
        print(f"{beam_size:>5}" + "".join(f"{row[metric]:>10.4f}" for metric in metrics.ALL))
    if num_photos < FEW_PHOTOS:
        print(f"Only {num_photos} photos: scores are coarse; BLEU-4 is 0 if no four words in a row are right")
    print(f"Perplexity of the references: {statistics['perplexity']:.2f} per word")
    for beam_size, values in statistics["captions"].items():
        print(f"beam {beam_size}: {describe_statistics(values)}")


def describe_statistics(values):
    """:return: the numbers of `metrics.caption_statistics` in words"""
    parts = [
        f"{values['mean_length']:.1f} words per caption",
        f"{values['vocabulary']} different words",
        f"{values['distinct_1']:.1%} of the words and {values['distinct_2']:.1%} of the word pairs are distinct",
    ]
    if "in_training_set" in values:
        parts.append(f"{values['in_training_set']:.1%} of the captions are in the training set, word for word")
    if "n_best" in values:
        parts.append(
            f"{values['n_best']:.1f} captions per photo, of whose words {values['n_best_distinct_1']:.1%} and of whose "
            f"word pairs {values['n_best_distinct_2']:.1%} are distinct"
        )
    if values.get("cut_off"):
        parts.append(f"{values['cut_off']} cut off at the longest length (--max_length)")
    return ", ".join(parts)
