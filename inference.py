"""
A trained model with its words: what train.py's validation, eval.py and caption.py share.

It joins an encoder, a decoder and a word map, and turns photos into sentences.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from captioners import build_decoder
from decoding import Rules, beam_search, sample
from encoders import Encoder
from utils import UserError, load_checkpoint


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
        :param beam_size, options: see `decoding.beam_search`, and what `rules` takes
        :return: list of N lists of `decoding.Hypothesis`
        """
        rules, options = self.rules(max_length, options)
        return beam_search(self.decoder, self.encoder.features(images.to(self.device)), rules, beam_size, **options)

    @torch.no_grad()
    def sample(self, images, max_length=50, **options):
        """
        :param images, max_length: as for `search`
        :param options: see `decoding.sample` (top_k, top_p, generator, keep_alphas), and what `rules` takes
        :return: list of N `decoding.Hypothesis`
        """
        rules, options = self.rules(max_length, options)
        return sample(self.decoder, self.encoder.features(images.to(self.device)), rules, **options)

    def rules(self, max_length, options):
        """
        :param max_length: longest caption, in words
        :param options: dict; of it the rules take never_unk (whether `<unk>` may not be written), min_length,
            no_repeat_ngram and temperature (see `decoding.Rules`)
        :return: `Rules`, and a dict of the options that are left
        """
        names = ("never_unk", "min_length", "no_repeat_ngram", "temperature")
        chosen = {name: options[name] for name in names if name in options}
        forbidden = ["<pad>", "<start>"] + ["<unk>"] * chosen.pop("never_unk", False)
        rules = Rules(
            start=self.word_map["<start>"],
            end=self.word_map["<end>"],
            max_length=max_length,  # one that has so many words without its <end> is cut off
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
        for batch in tqdm(loader, desc=f"beam {beam_size}", leave=False, disable=None):
            found = self.search(batch.to(self.device, resident).images, beam_size, max_length, **options)
            hypotheses += [self.sentence(best) for best, *_ in found]
            references += batch.references
        return hypotheses, references


def load_captioner(path, device="cpu"):
    """
    :param path: a checkpoint of train.py; None for the newest runs/*/best.pth
    :return: a `Captioner` in eval mode, the checkpoint, and its path
    """
    path = Path(path or newest_checkpoint())
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    encoder = Encoder(config["encoder"], "none", config["encoded_image_size"], config["encoder_dim"])
    decoder = build_decoder(config, len(checkpoint["word_map"]), encoder.encoder_dim)
    try:
        encoder.load_state_dict(checkpoint["encoder"])
        decoder.load_state_dict(checkpoint["decoder"])
    except RuntimeError as error:
        raise UserError(f"{path}: the weights do not fit the model that its config names ({error})") from error
    captioner = Captioner(encoder.to(device).eval(), decoder.to(device).eval(), checkpoint["word_map"])
    return captioner, checkpoint, path


def newest_checkpoint(folder="runs"):
    """:return: path of the newest best.pth below `folder`"""
    found = sorted(Path(folder).glob("**/best.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{folder}: no best.pth found; train a model first (python train.py), or name a checkpoint")
    return found[-1]
