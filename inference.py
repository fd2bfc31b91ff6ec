"""
A trained model with its words: what train.py's validation, eval.py and caption.py share.

It joins an encoder, a decoder and a word map, and turns photos into sentences.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from captioners import build_decoder
from decoding import Rules, beam_search
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
        :param beam_size, options: see `decoding.beam_search`
        :return: list of N lists of `decoding.Hypothesis`
        """
        features = self.encoder.features(images.to(self.device))
        rules = Rules(
            start=self.word_map["<start>"],
            end=self.word_map["<end>"],
            max_length=max_length + 1,  # with <end>
            forbidden=(self.word_map["<pad>"], self.word_map["<start>"]),
        )
        return beam_search(self.decoder, features, rules, beam_size, **options)

    def sentence(self, hypothesis):
        """:return: list of words"""
        return [self.words[index] for index in hypothesis.words]

    def caption_split(self, loader, beam_size, max_length=50, resident=None):
        """
        Caption each photo of a split, once.

        :param loader: DataLoader over an image-major `CaptionDataset` of the split
        :param resident: features of all its photos that are on the GPU already, or None
        :return: hypotheses (list of captions, each a list of words), references (list of lists of captions)
        """
        hypotheses, references = [], []
        self.encoder.eval(), self.decoder.eval()
        for batch in tqdm(loader, desc=f"beam {beam_size}", leave=False, disable=None):
            found = self.search(batch.to(self.device, resident).images, beam_size, max_length)
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
