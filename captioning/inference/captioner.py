"""
A trained model with its words: what train.py's validation, eval.py and caption.py share.

It joins an encoder, a decoder and a word map, and turns photos into sentences.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from captioning.distributed import hide_bar
from captioning.inference.search import Rules, beam_search, sample_captions
from captioning.inference.small_checkpoint import complete
from captioning.networks.ensemble import Encoders, Ensemble
from captioning.networks.registry import build_decoder, build_encoder
from captioning.storage.tensors import check_weights, load_checkpoint
from datasets import check_word_map
from models import select_rows
from utils import UserError


class Captioner:
    """An encoder and a decoder, with the words that belong to the decoder's ids."""

    def __init__(self, encoder, decoder, word_map):
        self.encoder, self.decoder, self.word_map = encoder, decoder, word_map
        self.words = {index: word for word, index in word_map.items()}

    @property
    def device(self):
        return self.encoder.mean.device

    @torch.no_grad()
    def search(self, images, beam_size=5, max_length=50, **options):
        """
        :param images: (N, 3, 256, 256) photos or (N, height, width, native_dim) cached features
        :param max_length: longest caption, in words
        :param beam_size, options: see `search.beam_search`, and what `rules` takes
        :return: list of N lists of `Hypothesis`
        """
        rules, options = self.rules(max_length, options)
        return beam_search(self.decoder, self.encoder.features(images.to(self.device)), rules, beam_size, **options)

    @torch.no_grad()
    def sample(self, images, max_length=50, **options):
        """
        :param images, max_length: as for `search`
        :param options: see `search.sample_captions` (top_k, top_p, generator, keep_alphas), and what `rules` takes
        :return: list of N `Hypothesis`
        """
        return self.sample_features(self.encoder.features(images.to(self.device)), max_length, **options)

    def sample_features(self, features, max_length=50, **options):
        """As `sample`, from what `encoder.features` made of the images."""
        rules, options = self.rules(max_length, options)
        return sample_captions(self.decoder, features, rules, **options)

    def rules(self, max_length, options):
        """
        :param max_length: longest caption, in words
        :param options: dict; of it the rules take never_unk (whether `<unk>` may not be written), min_length,
            no_repeat_ngram and temperature (see `search.Rules`)
        :return: `Rules`, and a dict of the options that are left
        """
        names = ("never_unk", "min_length", "no_repeat_ngram", "temperature")
        chosen = {name: options[name] for name in names if name in options}
        forbidden = ["<pad>", "<start>"] + ["<unk>"] * chosen.pop("never_unk", False)
        rules = Rules(
            start=self.word_map["<start>"],
            end=self.word_map["<end>"],
            max_length=max_length,
            forbidden=tuple(self.word_map[word] for word in forbidden),
            **chosen,
        )
        return rules, {name: value for name, value in options.items() if name not in names}

    def sentence(self, hypothesis):
        """:return: list of words"""
        return [self.words[index] for index in hypothesis.words]

    def caption_split(self, loader, beam_size, max_length=50, resident=None, **options):
        """
        Caption each photo of a split, once.

        :param loader: DataLoader over an image-major `CaptionDataset` of the split
        :param resident: features of all its photos that are on the GPU already, or None
        :param options: as for `search`
        :return: hypotheses (list of captions, each a list of words), references (list of lists of captions)
        """
        hypotheses, references = [], []
        self.encoder.eval(), self.decoder.eval()
        for batch in tqdm(loader, desc=f"beam {beam_size}", leave=False, disable=hide_bar()):
            found = self.search(batch.to(self.device, resident).images, beam_size, max_length, **options)
            hypotheses += [self.sentence(best) for best, *_ in found]
            references += batch.references
        return hypotheses, references

    @torch.no_grad()
    def teacher_forced(self, loader, resident=None):
        """
        Walk through the captions of a split as training does: at each step the true words before it are known.

        A loop of its own over `step`, because an ensemble of decoders has no `forward`.

        :param loader, resident: as for `caption_split`
        :return: yields for each batch, of its M words with <end>, the decoder's outputs (M, output_dim), of which
            `decoder.scores` makes scores, and the words (M,)
        """
        self.encoder.eval(), self.decoder.eval()
        for batch in tqdm(loader, desc="teacher forcing", leave=False, disable=None):
            batch = batch.to(self.device, resident)
            state = self.decoder.init_state(self.encoder.features(batch.images))
            state = select_rows(state, batch.image_rows.to(self.device))
            lengths = batch.lengths.to(self.device)  # (N,)
            outputs, targets = [], []
            for t in range(batch.captions.shape[1] - 1):
                runs = lengths > t + 1  # (N,), the captions that have a word to predict
                output, _, state = self.decoder.step(batch.captions[:, t], state)
                outputs.append(output[runs])  # (n, output_dim)
                targets.append(batch.captions[runs, t + 1])  # (n,)
            yield torch.cat(outputs), torch.cat(targets)

    def perplexity(self, loader, resident=None):
        """
        :param loader, resident: as for `caption_split`
        :return: exp of the mean cross entropy of the words of all captions, <end> included, under teacher forcing
        """
        total, words = 0.0, 0
        for outputs, targets in self.teacher_forced(loader, resident):
            total += F.cross_entropy(self.decoder.scores(outputs).float(), targets, reduction="sum").item()
            words += len(targets)
        return math.exp(total / words)


def load_captioner(path=None, device="cpu"):
    """
    :param path: a checkpoint of train.py, or a list of several that caption together (see ensemble.py); None or an
        empty list for the newest runs/*/best.pth
    :return: a `Captioner` in eval mode, the checkpoint, and its path; of several, the first's
    :raises UserError: if a file is no checkpoint, or several do not have the same words and photos of the same size
    """
    paths = [Path(one) for one in (path if isinstance(path, list | tuple) else [path or newest_checkpoint()])]
    paths = paths or [newest_checkpoint()]
    captioners, checkpoints = zip(*(load_model(one, device) for one in paths), strict=True)
    first, checkpoint = captioners[0], checkpoints[0]
    if len(paths) == 1:
        return first, checkpoint, paths[0]
    for other, other_path in zip(checkpoints[1:], paths[1:], strict=True):
        if other["word_map"] != checkpoint["word_map"]:
            raise UserError(
                f"{other_path}: its word map differs from that of {paths[0]}; models can only caption together if they "
                "were trained on files of one run of create_input_files.py"
            )
        if other["image_size"] != checkpoint["image_size"]:
            raise UserError(
                f"{other_path}: photos of {other['image_size']} px found, {checkpoint['image_size']} px expected as in "
                f"{paths[0]}; models can only caption together if they see photos of the same size"
            )
    encoders = Encoders([captioner.encoder for captioner in captioners])
    decoders = Ensemble([captioner.decoder for captioner in captioners])
    return Captioner(encoders.eval(), decoders.eval(), first.word_map), checkpoint, paths[0]


def load_model(path, device):
    """:return: the `Captioner` of one checkpoint, in eval mode, and the checkpoint"""
    checkpoint = complete(load_checkpoint(path), path)
    return build_captioner(checkpoint, path, device), checkpoint


def build_captioner(checkpoint, source, device="cpu"):
    """
    :param checkpoint: as `files.load_checkpoint` gives it
    :param source: its path, for messages
    :return: its `Captioner`, in eval mode
    :raises UserError: if its config names no model, or its weights do not fit that model
    """
    config = checkpoint["config"]
    check_word_map(checkpoint["word_map"], source)

    def build():
        encoder = build_encoder(config)
        return encoder, build_decoder(config, len(checkpoint["word_map"]), encoder.encoder_dim)

    try:
        with torch.device("meta"):  # shapes only: a config may name sizes that no memory holds
            for module, name in zip(build(), ("encoder", "decoder"), strict=True):
                check_weights(module, checkpoint[name], name)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    encoder, decoder = build()
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    return Captioner(encoder.to(device).eval(), decoder.to(device).eval(), checkpoint["word_map"])


def locate_data(config, checkpoint):
    """
    :param config: a script's, with `data_folder` and `data_name`
    :return: folder and name of the data that it names, else of those that the model was trained with
    :raises UserError: if neither names any
    """
    found = []
    for name in ("data_folder", "data_name"):
        value = getattr(config, name) or checkpoint["config"].get(name)
        if not isinstance(value, str) or not value:
            raise UserError(f"{name}: the checkpoint does not say; give --{name}")
        found.append(value)
    return Path(found[0]), found[1]


def check_photos(dataset, checkpoint):
    """:raises UserError: if a dataset's photos are of another size than those that the model was trained with"""
    if dataset.image_size != checkpoint["image_size"]:
        raise UserError(
            f"{dataset.image_file}: photos of {dataset.image_size} px found, {checkpoint['image_size']} px expected by "
            f"the model; make the files with --image_size {checkpoint['image_size']}"
        )


def newest_checkpoint(folder="runs"):
    """:return: path of the newest best.pth below `folder`"""
    found = sorted(Path(folder).glob("**/best.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{folder}: no best.pth found; train a model first (python train.py), or name a checkpoint")
    return found[-1]
