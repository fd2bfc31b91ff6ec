"""
A BLIP transformer (Li et al. 2022) with its words: loaded, built small, saved; photos in, sentences out.

The network is the `transformers` library's own: a vision transformer sees the photo in patches, a text transformer
writes, and looks at the patches in each of its layers. Here is what joins it to our files: pixels as it wants them,
captions as its word pieces, and its answers as the words that metrics.py scores.
"""

import math
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from string import ascii_lowercase, digits
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import constants, hf_hub_url
from tqdm import tqdm
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from captioning.config_fields import check_value
from captioning.inference.trained_model import SplitCaptions
from captioning.preparation.tokenizer import tokenize
from captioning.storage.files import atomic_path, check_file
from utils import CountOrZero, Dimension, Layers, UserError

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")  # BERT's, and BLIP's start of a caption
SAVING = ".saving_"  # what the names of folders begin with that hold a model that is just being written
IGNORED = -100  # target of what is not to be predicted


class Sentence(NamedTuple):
    """A caption that BLIP wrote."""

    words: list
    log_prob: float  # natural logarithm of its probability, the end included if it was reached
    score: float  # what it was ranked by: log_prob, or its mean over the pieces
    ended: bool  # False if the longest length cut it off


class Blip:
    """A BLIP model and its processor: what `inference.Captioner` is to our own models."""

    def __init__(self, model, processor):
        """
        :param model: `BlipForConditionalGeneration`
        :param processor: `BlipProcessor`
        """
        self.model, self.processor = model, processor
        size = model.config.vision_config.image_size
        self.image_size = size if isinstance(size, int) else size[0]  # of the photos that the model wants, in pixels

    @property
    def device(self):
        return self.model.device

    @property
    def max_positions(self):
        """:return: of how many pieces a caption may be, its beginning and end included"""
        return self.model.config.text_config.max_position_embeddings

    @property
    def max_pieces(self):
        """:return: of how many pieces a caption may be, without [DEC] and [SEP], which take two positions"""
        return self.max_positions - 2

    def check_pieces(self, max_pieces):
        """:raises UserError: if the model has too few positions for captions of so many pieces"""
        most = self.max_pieces
        if max_pieces > most:
            raise UserError(f"max_pieces: {max_pieces} found, at most {most} expected, for which this model has places")

    def pixels(self, images):
        """
        Give photos as the vision transformer wants them; the same as the library's processor gives, but on any device.

        :param images: (N, 3, S, S) uint8, squares of any size
        :return: (N, 3, image_size, image_size) float32
        """
        look = self.processor.image_processor
        mean, std = torch.tensor([look.image_mean, look.image_std], device=self.device).view(2, 3, 1, 1)
        images = images.to(self.device)
        if images.shape[-1] != self.image_size:
            # As floats, for PyTorch resizes bytes on the CPU alone; rounded after each direction, as it does there.
            images = images.float()
            for size in ((images.shape[-2], self.image_size), (self.image_size, self.image_size)):
                images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
                images = images.round().clamp(0, 255)  # (N, 3, S, image_size), then (N, 3, image_size, image_size)
        return (images / 255 - mean) / std

    def see(self, images):
        """
        :param images: (N, 3, S, S) uint8
        :return: (N, P + 1, vision's dim), what the vision transformer says about the photo and each of its P patches
        """
        return self.model.vision_model(pixel_values=self.pixels(images)).last_hidden_state

    def text_of(self, words):
        """:return: the words as the tokenizer reads them"""
        return " ".join(words).replace("<unk>", self.processor.tokenizer.unk_token)

    def fits(self, caption):
        """:return: whether the model has room for a caption's pieces; caption: list of words"""
        pieces = self.processor.tokenizer.tokenize(self.text_of(caption))
        return len(pieces) <= self.max_pieces

    def spell(self, captions, max_pieces=None):
        """
        Give captions as ids of word pieces. A caption starts with [DEC], as it does when the model writes, and ends
        with [SEP]. (The tokenizer by itself would put [CLS] first, as BERT had it.)

        :param captions: N lists of words
        :param max_pieces: longer captions are cut; None for as many as the model has positions for
        :return: ids (N, T), padded; mask (N, T), 1 where there is a piece
        """
        tokenizer = self.processor.tokenizer
        if max_pieces is None:
            max_pieces = self.max_pieces
        texts = [self.text_of(words) for words in captions]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_pieces + 2, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)  # (N, T) each
        ids[:, 0] = self.model.config.text_config.bos_token_id
        return ids, mask

    def predict(self, seen, ids, mask):
        """
        Predict each next piece from the true ones before it.

        :param seen: (N, P + 1, dim), of the photo of each caption, from `see`
        :param ids, mask: (N, T), from `spell`
        :return: scores (N, T - 1, pieces) and targets (N, T - 1), which are `IGNORED` behind a caption's end
        """
        out = self.model.text_decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, use_cache=False)
        return out.logits[:, :-1].float(), ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)

    def log_probs(self, seen, ids, mask):
        """:return: (N,), natural logarithms of the captions' probabilities; arguments as for `predict`"""
        scores, targets = self.predict(seen, ids, mask)
        losses = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")  # (N, T - 1)
        return -losses.sum(dim=1)

    @torch.no_grad()
    def search(self, images, beam_size=5, max_length=50, normalisation="none"):
        """
        Caption photos with the library's own beam search.

        :param images: (N, 3, S, S) uint8
        :param beam_size: captions that the search keeps; 1 is greedy choice
        :param max_length: longest caption, in word pieces
        :param normalisation: how captions are ranked: 'none' by log-probability, 'length' by its mean over pieces
        :return: list of N `Sentence`
        :raises UserError: if the model cannot write captions of that length
        """
        text = self.model.config.text_config
        if max_length >= self.max_positions:
            most = self.max_positions - 1
            raise UserError(f"max_length: {max_length} found, at most {most} expected, which this model can write")
        seen = self.see(images)  # (N, P + 1, dim)
        ids = self.model.text_decoder.generate(
            torch.full((len(seen), 1), text.bos_token_id, device=self.device), encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
            eos_token_id=text.sep_token_id, pad_token_id=text.pad_token_id, max_new_tokens=max_length,
            num_beams=beam_size, do_sample=False,
            **({"length_penalty": float(normalisation == "length")} if beam_size > 1 else {}),
        )  # (N, T): [DEC], the pieces, [SEP], padding  # fmt: skip
        ends = (ids == text.sep_token_id).long()  # (N, T)
        mask = (ends.cumsum(dim=1) - ends == 0).long()  # (N, T), 1 up to the first [SEP]
        log_probs = self.log_probs(seen, ids, mask)  # (N,)
        lengths, ended = mask.sum(dim=1).tolist(), ends.any(dim=1).tolist()
        sentences = []
        for row, length, log_prob, end in zip(ids, lengths, log_probs.tolist(), ended, strict=True):
            words = tokenize(self.processor.tokenizer.decode(row[1:length], skip_special_tokens=True))
            score = log_prob / (length - 1) if normalisation == "length" else log_prob
            sentences.append(Sentence(words, log_prob, score, end))
        return sentences

    def caption_split(self, loader, beam_size, max_length=50, resident=None, **options):
        """
        Caption each photo of a split, once.

        :param loader: DataLoader over the photos of an image-major `CaptionDataset`
        :param resident: not used; it is here because `inference.Captioner` has it
        :param options: as for `search`
        :return: `SplitCaptions`
        """
        hypotheses, references, cut_off = [], [], 0
        self.model.eval()
        for batch in tqdm(loader, desc=f"beam {beam_size}", leave=False, disable=None):
            found = self.search(batch.images, beam_size, max_length, **options)
            hypotheses += [sentence.words for sentence in found]
            references += batch.references
            cut_off += sum(not sentence.ended for sentence in found)
        return SplitCaptions(hypotheses, references, cut_off)

    @torch.no_grad()
    def perplexity(self, loader, resident=None):
        """
        :param loader, resident: as for `caption_split`
        :return: exp of the mean cross entropy of the words of all references, their end included, under teacher
            forcing; per word, not per piece, so that models with other pieces can be compared. Captions that are longer
            than the model can read count neither with their loss nor with their words.
        :raises UserError: if all are longer
        """
        total, words = 0.0, 0
        self.model.eval()
        for batch in tqdm(loader, desc="teacher forcing", leave=False, disable=None):
            known = [
                (i, caption) for i, photo in enumerate(batch.references) for caption in photo if self.fits(caption)
            ]
            if not known:
                continue
            rows = torch.tensor([i for i, _ in known])  # (N,), caption's photo
            captions = [caption for _, caption in known]
            total -= self.log_probs(self.see(batch.images)[rows.to(self.device)], *self.spell(captions)).sum().item()
            words += sum(len(caption) + 1 for caption in captions)
        if not words:
            raise UserError(f"references: none has at most {self.max_pieces} pieces, which this model has places for")
        return math.exp(total / words)

    def save(self, folder):
        """
        Write model and processor in the library's own format, so that `from_pretrained(folder)` loads them.

        Each file is written beside its place, flushed to disk and renamed; the weights come last.
        :raises UserError: if a file cannot be written; the weights that were there before are then untouched
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=folder) as beside:
            try:
                self.model.save_pretrained(beside)
                self.processor.save_pretrained(beside)
            except Exception as error:  # safetensors has an exception of its own for a full disk
                if not isinstance(error, OSError) and "SafetensorError" not in type(error).__name__:
                    raise
                raise UserError(f"{folder}: the model could not be written ({error}); is the disk full?") from error
            for path in sorted(Path(beside).iterdir(), key=lambda path: path.suffix == ".safetensors"):
                with atomic_path(folder / path.name) as temporary:
                    path.replace(temporary)


def load_blip(name, device="cpu"):
    """
    :param name: a folder that `Blip.save` or the library wrote, or a model's name on the Hugging Face hub
    :return: `Blip` in eval mode
    :raises UserError: if there is no such model, it cannot be downloaded, or it is not a captioning BLIP
    """
    try:  # a folder, or what was downloaded before
        blip = read_blip(name, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # a missing or damaged file fails in a dozen ways, with as many exceptions
        if Path(name).is_dir():
            raise cannot_load(name, error) from error
        check_reachable(name)
        try:
            blip = read_blip(name)
        except UserError:
            raise
        except Exception as error:
            raise cannot_load(name, error) from error
    blip.model.to(device).eval()
    return blip


def read_blip(name, **options):
    """
    :return: `Blip`
    :raises UserError: if its files or its config make no sense, or lack weights
    """
    for path in Path(name).iterdir() if Path(name).is_dir() else ():
        if not path.is_dir():
            check_file(path)  # a pipe would be waited for
    config = BlipConfig.from_pretrained(name, **options)
    check_model_config(config)
    processor = BlipProcessor.from_pretrained(name, **options)
    model, found = BlipForConditionalGeneration.from_pretrained(
        name, config=config, output_loading_info=True, **options
    )
    if absent := sorted(map(str, found["missing_keys"])):  # they stand for whatever was in the memory
        raise UserError(
            f"model: '{name}' is not a BLIP model that writes captions (it has no {absent[0]}); give one that does"
        )
    for key, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(f"model: '{key}' of '{name}' has values that are not finite numbers; get or make it again")
    return Blip(model, processor)


def check_model_config(config):
    """
    See that a config names a model that can be built and asked: the library builds a million layers if it is told to.

    :param config: BlipConfig
    :raises UserError: if a number in it is out of its range
    """
    for part, of in (("text_config", config.text_config), ("vision_config", config.vision_config)):
        check_value(f"model: {part}: num_hidden_layers", Layers, of.num_hidden_layers)
        check_value(f"model: {part}: num_attention_heads", Layers, of.num_attention_heads)
        check_value(f"model: {part}: hidden_size", Dimension, of.hidden_size)
        check_value(f"model: {part}: intermediate_size", Dimension, of.intermediate_size)
    text = config.text_config
    for name in ("bos_token_id", "sep_token_id", "pad_token_id"):
        value = getattr(text, name)
        check_value(f"model: text_config: {name}", CountOrZero, value)
        if value >= text.vocab_size:
            raise UserError(f"model: text_config: {name}: {value} found, below vocab_size ({text.vocab_size}) expected")


def cannot_load(name, error):
    """:return: UserError of what the library says"""
    needed = "config.json, model.safetensors, and the files of the tokenizer and the image processor"
    return UserError(f"model: '{name}' cannot be loaded ({' '.join(str(error).split())[:200]}); a BLIP has {needed}")


def check_reachable(name):
    """
    Ask the hub for the model once; the library by itself would try for minutes.

    :raises UserError: with what to download and where to put it, if the hub does not answer
    """
    advice = (
        f"where there is a network, run `hf download {name} --local-dir {Path(name).name}`, copy that folder here, and "
        f"give it: --model {Path(name).name}"
    )
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"model: '{name}' is neither a folder nor downloaded, and HF_HUB_OFFLINE is set; {advice}")
    try:
        request = urllib.request.Request(hf_hub_url(name, "config.json"), method="HEAD")
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers; why it says no, the library knows better (a wrong name, a model that needs a login)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"model: '{name}' is neither a folder nor downloaded, and the Hugging Face hub cannot be reached "
            f"({reason}); {advice}"
        ) from None


def new_blip(words, image_size, patch_size, dim, layers, heads):
    """
    Build a BLIP of random weights, as small as you like.

    :param words: that its tokenizer knows whole; others are spelled
    :param image_size, patch_size: sides of the photo and of a patch, in pixels
    :param dim: numbers that stand for a patch or a piece, in both transformers
    :param layers: of each transformer
    :param heads: of each attention
    :return: `Blip`
    """
    letters = sorted({*ascii_lowercase, *digits, *"".join(words)})
    pieces = list(dict.fromkeys([*SPECIAL_PIECES, *words, *letters, *(f"##{letter}" for letter in letters)]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
        tokenizer = BertTokenizerFast.from_pretrained(folder, bos_token="[DEC]", strip_accents=False)
    looks = BlipImageProcessor(size={"height": image_size, "width": image_size})
    common = {
        "hidden_size": dim, "intermediate_size": 4 * dim, "num_hidden_layers": layers, "num_attention_heads": heads,
        "projection_dim": dim, "initializer_range": 0.02,
    }  # fmt: skip
    roles = {"bos": "[DEC]", "eos": "[SEP]", "sep": "[SEP]", "pad": "[PAD]"}
    ids = {f"{role}_token_id": pieces.index(piece) for role, piece in roles.items()}
    config = BlipConfig(
        text_config=common | ids | {"vocab_size": len(pieces), "max_position_embeddings": 64},
        vision_config=common | {"image_size": image_size, "patch_size": patch_size},
        projection_dim=dim, image_text_hidden_size=dim,
    )  # fmt: skip
    return Blip(BlipForConditionalGeneration(config).eval(), BlipProcessor(looks, tokenizer))
