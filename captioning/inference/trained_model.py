"""
A trained model with its words: what train.py's validation, eval.py and caption.py share.

It joins an encoder, a decoder and a word map, and turns photos into sentences.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from captioning.distributed import hide_bar
from captioning.inference.model_files import check_word_map_use, find_checkpoint, is_tutorials, newest_checkpoint
from captioning.inference.search import Rules, beam_search, sample_captions
from captioning.inference.small_checkpoint import complete
from captioning.networks.ensemble import Encoders, Ensemble
from captioning.networks.network_parts import WithoutRandomWeights
from captioning.networks.registry import build_decoder, build_encoder
from captioning.split_files import check_word_map
from captioning.storage.tensors import check_weights, load_checkpoint
from models import select_rows
from utils import UserError, short

NEVER_WRITTEN = ("<pad>", "<start>")
LONGEST = 50  # words of a caption, for checkpoints that do not say how long those of the training were


class SplitCaptions(NamedTuple):
    """What a model wrote for each photo of a split."""

    hypotheses: list  # a caption per photo, a list of words
    references: list  # per photo a list of captions by people, each a list of words
    cut_off: int  # hypotheses that the longest length cut off
    n_best: list | None = None  # per photo its captions, best first, where a search gives several


class Captioner:
    """An encoder and a decoder, with the words that belong to the decoder's ids."""

    def __init__(self, encoder, decoder, word_map, max_length=LONGEST):
        """
        :param word_map: dict of word -> id
        :param max_length: words of the longest caption that is written, unless a call says otherwise
        """
        self.encoder, self.decoder, self.word_map, self.max_length = encoder, decoder, word_map, max_length
        self.words = {index: word for word, index in word_map.items()}

    @property
    def device(self):
        return self.encoder.mean.device

    @torch.no_grad()
    def search(self, images, beam_size=5, max_length=None, **options):
        """
        :param images: (N, 3, 256, 256) photos or (N, height, width, native_dim) cached features
        :param max_length: longest caption, in words; default the captioner's own
        :param beam_size, options: see `search.beam_search`, and what `rules` takes
        :return: list of N lists of `Hypothesis`
        """
        rules, options = self.rules(max_length, options)
        return beam_search(self.decoder, self.encoder.features(images.to(self.device)), rules, beam_size, **options)

    @torch.no_grad()
    def sample(self, images, max_length=None, **options):
        """
        :param images, max_length: as for `search`
        :param options: see `search.sample_captions` (top_k, top_p, generator, keep_alphas), and what `rules` takes
        :return: list of N `Hypothesis`
        """
        return self.sample_features(self.encoder.features(images.to(self.device)), max_length, **options)

    def sample_features(self, features, max_length=None, **options):
        """As `sample`, from what `encoder.features` made of the images."""
        rules, options = self.rules(max_length, options)
        return sample_captions(self.decoder, features, rules, **options)

    def rules(self, max_length, options):
        """
        :param max_length: longest caption, in words; None for the captioner's own
        :param options: dict; of it the rules take never_unk (whether `<unk>` may not be written), min_length,
            no_repeat_ngram and temperature (see `search.Rules`)
        :return: `Rules`, and a dict of the options that are left
        """
        names = ("never_unk", "min_length", "no_repeat_ngram", "temperature")
        chosen = {name: options[name] for name in names if name in options}
        forbidden = [*NEVER_WRITTEN] + ["<unk>"] * chosen.pop("never_unk", False)
        rules = Rules(
            start=self.word_map["<start>"],
            end=self.word_map["<end>"],
            max_length=max_length or self.max_length,
            forbidden=tuple(self.word_map[word] for word in forbidden),
            **chosen,
        )
        return rules, {name: value for name, value in options.items() if name not in names}

    def sentence(self, hypothesis):
        """:return: list of words"""
        return [self.words[index] for index in hypothesis.words]

    def caption_split(self, loader, beam_size, max_length=None, resident=None, **options):
        """
        Caption each photo of a split, once.

        :param loader: DataLoader over an image-major `CaptionDataset` of the split
        :param resident: features of all its photos that are on the GPU already, or None
        :param options: as for `search`
        :return: `SplitCaptions`
        """
        n_best, references, cut_off = [], [], 0
        self.encoder.eval(), self.decoder.eval()
        for batch in tqdm(loader, desc=f"beam {beam_size}", leave=False, disable=hide_bar()):
            found = self.search(batch.to(self.device, resident).images, beam_size, max_length, **options)
            n_best += [[self.sentence(one) for one in captions] for captions in found]
            references += batch.references
            cut_off += sum(not best.ended for best, *_ in found)
        return SplitCaptions([best for best, *_ in n_best], references, cut_off, n_best)

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


def load_captioner(path=None, device="cpu", word_map_file=None):
    """
    :param path: a checkpoint of train.py or a run's folder, or a list of several that caption together (see
        ensemble.py); None or an empty list for the newest runs/*/best.pth
    :param word_map_file: of checkpoints of the tutorial (.pth.tar), whose words are in a file of their own
    :return: a `Captioner` in eval mode, the checkpoint, and its path; of several, the first's
    :raises UserError: if a file is not a checkpoint, or the word map is of no use; if several do not have the same
        words and photos of the same size
    """
    names = path if isinstance(path, list | tuple) else [path] if path else []
    paths = [find_checkpoint(name) for name in names] or [newest_checkpoint()]
    check_word_map_use(word_map_file, paths)
    captioners, checkpoints = zip(*(load_model(one, device, word_map_file) for one in paths), strict=True)
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
    longest = max(captioner.max_length for captioner in captioners)
    return Captioner(encoders.eval(), decoders.eval(), first.word_map, longest), checkpoint, paths[0]


def load_model(path, device, word_map_file=None):
    """:return: the `Captioner` of one checkpoint, in eval mode, and the checkpoint"""
    if is_tutorials(path) and word_map_file:
        from captioning.inference.tutorial_checkpoint import load_tutorial_checkpoint  # it imports this module

        checkpoint = load_tutorial_checkpoint(path, word_map_file)
        return build_captioner(checkpoint, path, device), checkpoint
    try:
        checkpoint = load_checkpoint(path)
    except UserError as error:
        if is_tutorials(path) and Path(path).is_file():
            raise UserError(
                f"{path}: this looks like a checkpoint of the tutorial, whose words are in a file of their own; add "
                "--word_map WORDMAP_....json"
            ) from error
        raise
    checkpoint = complete(checkpoint, path)
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
        with torch.device("meta"), WithoutRandomWeights():  # shapes only: a config may name sizes that no memory holds
            for module, name in zip(build(), ("encoder", "decoder"), strict=True):
                check_weights(module, checkpoint[name], name)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    with WithoutRandomWeights():
        encoder, decoder = build()
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    longest = longest_caption(checkpoint, source)
    return Captioner(encoder.to(device).eval(), decoder.to(device).eval(), checkpoint["word_map"], longest)


def longest_caption(checkpoint, source):
    """
    :param source: what the checkpoint is called in a message
    :return: how many words the checkpoint's model writes at most
    :raises UserError: if that is no length
    """
    longest = checkpoint.get("max_length", LONGEST)
    if type(longest) is not int or not 1 <= longest <= 1000:
        raise UserError(f"{source}: its max_length is {short(longest)}, 1 to 1000 words expected")
    return longest
