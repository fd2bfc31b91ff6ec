"""
Caption photos: `python caption.py photo.jpg` prints the sentence and draws where the model looked for each word.
The figure opens in a window; without a display it is written to a file.

Name several photos, a folder, or a pattern in quotes ('holiday/**/*.jpg'), and each photo gets a line. `--output` keeps
the captions, and its ending says how: .csv (image, caption), .json (everything), .html (a page with attention). Photos
that cannot be read are named and skipped. `--sample` draws words by chance instead of searching for the likeliest
caption; several checkpoints after `--model` decide together, as an ensemble. A run's folder stands for its best
checkpoint: `python caption.py photo.jpg runs/soft`.
"""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from captioning.command_line import check_command_line, run_script
from captioning.config_fields import check_fields
from utils import (
    BeamSize,
    CaptionLength,
    Count,
    CountOrZero,
    LengthOrZero,
    NotNegative,
    Positive,
    PositiveShare,
    Ranking,
    Seed,
    UserError,
    Workers,
    choose_device,
)


@dataclass
class Config:
    img: tuple[str, ...]  # photos to caption: files, folders, or patterns such as 'holiday/*.jpg'
    model: tuple[str, ...] = ()  # checkpoints or run folders, several for an ensemble; default the newest, or ours
    output: str | None = None  # also write the captions here: .csv, .json or .html
    word_map: str | None = None  # for the tutorial's checkpoints (.pth.tar): the WORDMAP_....json of their training
    beam_size: BeamSize = 5  # captions that the search keeps; 1 is greedy choice
    normalisation: Ranking = "none"  # rank captions by log-probability, its mean over words, or with --reward
    reward: float = 0.0  # added to the log-probability for each word, with --normalisation reward
    beam_groups: Count = 1  # parts of the beam that avoid one another's words (diverse beam search); divides beam_size
    diversity: NotNegative = 0.5  # cost of a word that another group has just chosen, in nats of log-probability
    n_best: BeamSize = 1  # captions per photo, best first; at most beam_size
    sample: bool = False  # draw each word by its probability instead of searching
    top_k: CountOrZero = 0  # draw among this many likeliest words; 0 for all
    top_p: PositiveShare = 1.0  # draw among the likeliest words that hold this probability together
    seed: Seed | None = None  # repeats a draw (for the same photos and batch_size); default a new draw each time
    temperature: Positive = 1.0  # of the softmax: below 1 likely words become likelier, above 1 all become more alike
    min_length: LengthOrZero = 0  # shortest caption, in words
    max_length: CaptionLength | None = None  # longest caption, in words; default the longest of the training data
    no_repeat_ngram: LengthOrZero = 0  # no sequence of this many words twice in a caption; 0 for no rule
    no_unk: bool = False  # never write <unk>
    alphas: bool = False  # put where the model looked into the .json file
    dont_smooth: bool = False  # draw each location of the attention figure as a square
    figure: str | None = None  # write the attention figure here; default a window, or outputs/ without a display
    overwrite: bool = False  # replace the files of --output and --figure if they are there already
    batch_size: Count = 32  # photos that are captioned at once
    workers: Workers | None = None  # processes that read photos; 0: this one alone; default one per core
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

import numpy as np
import torch

from captioning.display.caption_tables import (
    PAGES,
    CaptionedPhoto,
    caption_row,
    check_output,
    print_captions,
    write_captions,
)
from captioning.inference.model_files import describe_model, find_checkpoint, is_model
from captioning.inference.trained_model import load_captioner
from captioning.preparation.photo_batches import find_photos, is_single_photo, read_batches
from captioning.storage.files import check_not_an_input, check_not_there


def main(config):
    check_fields(config)
    names = [name for name in config.img if not is_model(name)]
    models = [name for name in config.img if is_model(name)] + list(config.model)
    paths = find_photos(names)
    single = is_single_photo(names, paths)
    drawn = single and (config.figure is not None or config.output is None)
    suffix = Path(config.output or "").suffix.lower()
    check_config(config, suffix, drawn)
    for name, written in (("output", config.output), ("figure", config.figure)):
        check_not_an_input(name, written, [*paths, *models, config.word_map])
        check_not_there(name, written, config.overwrite)

    device = choose_device(config.device)
    captioner, checkpoint, model = load_captioner(models, device, config.word_map)
    models = models or [str(model)]
    described = f" ({describe_model(checkpoint)})" if len(models) == 1 else ""
    print(f"Model: {' + '.join(models)}{described}", file=sys.stderr)
    keep_alphas = drawn or config.alphas or suffix in PAGES
    photos = caption_photos(captioner, paths, checkpoint["image_size"], config, keep_alphas)
    # A photo is read, captioned and shown when the last line asks for it.
    photos = print_captions(photos, single, drawn, config.figure, not config.dont_smooth)
    name = " + ".join(find_checkpoint(path).parent.name for path in models)
    write_captions(photos, config.output, name, models, asdict(config), config.alphas)


def check_config(config, suffix, drawn):
    """:raises UserError: if a setting, or several together, make no sense"""
    given = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    of_search = ", ".join(
        sorted(given & {"beam_size", "beam_groups", "diversity", "normalisation", "reward", "n_best"})
    )
    of_sampling = ", ".join(sorted(given & {"top_k", "top_p", "seed"}))
    check_output(config.output)
    for wrong, message in (  # what search.py checks is left to it
        (config.sample and of_search, f"{of_search}: found with --sample, but for beam search; leave one of them out"),
        (not config.sample and of_sampling, f"{of_sampling}: found without --sample; add it"),
        ((config.normalisation == "reward") != ("reward" in given),
         "reward: goes with --normalisation reward, and that with it; give both or none"),
        (config.n_best > config.beam_size,
         f"n_best: {config.n_best} found, at most beam_size ({config.beam_size}) expected"),
        (config.beam_size % config.beam_groups,
         f"beam_groups: {config.beam_groups} found, a number that divides beam_size ({config.beam_size}) expected"),
        ("diversity" in given and config.beam_groups == 1,
         f"diversity: {config.diversity} found, but it is between groups; add --beam_groups"),
        (config.max_length is not None and config.min_length > config.max_length,
         f"min_length: {config.min_length} found, at most max_length ({config.max_length}) expected"),
        (config.n_best > 1 and suffix in (".csv", *PAGES),
         f"n_best: {config.n_best} found, but a {suffix} file has one caption per photo; write a .json file"),
        (config.alphas and suffix != ".json", "alphas: are for a .json file; add --output captions.json"),
        (given & {"figure", "dont_smooth"} and not drawn,
         "figure, dont_smooth: are for one photo, called by its name; for more add --output captions.html"),
    ):  # fmt: skip
        if wrong:
            raise UserError(message)


def caption_photos(captioner, paths, size, config, keep_alphas):
    """
    Yield a `CaptionedPhoto` for each photo that can be read, in order. The others are named on the error stream.

    :param size: width and height that the encoder wants, in pixels
    :raises UserError: if no photo can be read
    """
    generator = None if config.seed is None else torch.Generator(captioner.device).manual_seed(config.seed)
    captioned, cut_off = 0, 0
    for batch in read_batches(paths, size, config.batch_size, config.workers):
        images = torch.from_numpy(np.stack([image for _, image in batch]))  # (N, 3, S, S)
        found = decode(captioner, images, config, generator, keep_alphas)
        for (path, image), hypotheses in zip(batch, found, strict=True):
            captions = [caption_row(captioner.sentence(h), h.log_prob, h.score, h.ended) for h in hypotheses]
            captioned += 1
            cut_off += not hypotheses[0].ended
            yield CaptionedPhoto(path, image, captions, hypotheses[0].alphas_of_words())
    if cut_off:
        longest = config.max_length or captioner.max_length
        print(f"{cut_off} of {captioned} captions cut off after {longest} words (--max_length)", file=sys.stderr)


def decode(captioner, images, config, generator, keep_alphas):
    """:return: for each of images (N, 3, S, S) its hypotheses, best first"""
    rules = {name: getattr(config, name) for name in ("min_length", "no_repeat_ngram", "temperature")}
    options = rules | {"never_unk": config.no_unk, "keep_alphas": keep_alphas}
    if config.sample:
        options |= {"top_k": config.top_k, "top_p": config.top_p, "generator": generator}
        return [[drawn] for drawn in captioner.sample(images, config.max_length, **options)]
    options |= {"normalisation": config.normalisation, "reward": config.reward, "n_best": config.n_best}
    options |= {"groups": config.beam_groups, "diversity": config.diversity}
    return captioner.search(images, config.beam_size, config.max_length, **options)


if __name__ == "__main__":
    run_script(main, Config)
