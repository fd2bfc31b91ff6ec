"""
The field's other decoders, on the same seam as those of models.py (`init_state`, `step`, `scores`):

- `ShowAndTell` (Vinyals et al. 2015): no attention, the LSTM sees the photo once, before the first word.
- `SpatialAttention` (Lu et al. 2017): the LSTM moves first, and its new state says where to look.
- `AdaptiveAttention` (same paper): it may also look at a "visual sentinel", that is, at nothing of the photo.

Below them, all decoders by name, which settings each has, and `build_decoder`, which makes one from a config.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from captioning.networks.backbones import resize_grid
from captioning.speed.shared_products import Linear
from models import (
    Attention,
    CaptionDecoder,
    DecoderWithAttention,
    DecoderWithHardAttention,
    lstm_stack,
    mean_cell,
    run_lstm,
)
from utils import UserError, short


class ShowAndTell(CaptionDecoder):
    """
    The Neural Image Caption generator: the photo is the LSTM's first input, as if it were a word before <start>, and
    is never shown again (Vinyals et al. 2015, section 3.1). There is no alpha.

    The LSTM is the usual one; the paper's equation 8 leaves out the tanh of what the memory shows.
    """

    def __init__(self, vocab_size, encoder_dim, embed_dim=512, decoder_dim=512, encoded_image_size=14, dropout=0.5,
                 embedding_dropout=0.0, state_dropout=0.0, layers=1, embedding_max_norm=None,
                 tie_weights=False):  # fmt: skip
        """
        :param state_dropout: on the state in which the photo leaves the LSTM
        Other parameters: as for `models.DecoderWithAttention`.
        """
        super().__init__(
            vocab_size, embed_dim, decoder_dim, dropout, embedding_dropout, embedding_max_norm, tie_weights
        )
        self.encoded_image_size, self.layers, self.decoder_dim = encoded_image_size, layers, decoder_dim
        self.embed_image = Linear(encoder_dim, embed_dim)
        self.decode_step = lstm_stack(embed_dim, decoder_dim, layers)
        self.state_dropout = nn.Dropout(state_dropout)

    def init_state(self, features):
        """
        Show the photo (equation 10), its features averaged over the grid.

        :param features: (N, height, width, encoder_dim)
        :return: for each layer of the LSTM its hidden state and its cell (N, decoder_dim)
        """
        features = features.to(self.fc.weight.dtype)
        image = self.embed_image(mean_cell(features, self.encoded_image_size))  # (N, embed_dim)
        nothing = features.new_zeros(len(features), self.decoder_dim)  # (N, decoder_dim)
        memory = run_lstm(self.decode_step, image, [nothing] * 2 * self.layers)
        return tuple(self.state_dropout(part) for part in memory)

    def step(self, words, state):
        """
        Tell the next word (equations 11 and 12).

        :param words: (N,), ids of the previous words
        :param state: as `init_state` or the last `step` gave it
        :return: output (N, decoder_dim), None for alpha, the new state
        """
        embedded = self.embed(words)  # (N, embed_dim)
        memory = run_lstm(self.decode_step, embedded, state)
        return memory[-2], None, tuple(memory)


class SpatialAttention(CaptionDecoder):
    """
    Attention that is asked by the LSTM's new state rather than its last one (Lu et al. 2017, section 2.2).

    What it sees goes straight to the vocabulary, beside the state; the LSTM itself is shown the photo as a whole,
    at each step.
    """

    constant = 3  # keys, grid and image

    def __init__(self, vocab_size, encoder_dim, embed_dim=512, decoder_dim=512, attention_dim=512,
                 encoded_image_size=14, dropout=0.5, embedding_dropout=0.0, layers=1, nonlinearity="relu",
                 embedding_max_norm=None, tie_weights=False):  # fmt: skip
        """
        :param nonlinearity: of attention's score, 'relu' or 'tanh' (the paper's, equation 6)
        Other parameters: as for `models.DecoderWithAttention`.
        """
        super().__init__(
            vocab_size, embed_dim, decoder_dim, dropout, embedding_dropout, embedding_max_norm, tie_weights
        )
        self.encoded_image_size, self.layers, self.decoder_dim = encoded_image_size, layers, decoder_dim
        self.encode_cells = Linear(encoder_dim, decoder_dim)  # W_a of equation 15
        self.encode_image = Linear(encoder_dim, decoder_dim)  # W_b of equation 16
        self.attention = Attention(decoder_dim, decoder_dim, attention_dim, nonlinearity)
        self.decode_step = lstm_stack(embed_dim + decoder_dim, decoder_dim, layers)

    def init_state(self, features):
        """
        :param features: (N, height, width, encoder_dim)
        :return: keys (N, P, attention_dim), grid (N, P, decoder_dim), image (N, decoder_dim), and for each layer of
            the LSTM its hidden state and its cell (N, decoder_dim), which begin at zero

        The ReLU is not linear, so it has to come after resizing. W_a before it is, and is applied on the smaller grid
        of the two; what comes after it, the keys too, is computed for each of the P cells.
        """
        features = features.to(self.fc.weight.dtype)
        size = self.encoded_image_size
        image = torch.relu(self.encode_image(mean_cell(features, size)))  # (N, decoder_dim), v^g of equation 16
        if features.shape[1] * features.shape[2] > size * size:
            features = resize_grid(features, size)
        grid = torch.relu(resize_grid(self.encode_cells(features), size))  # (N, size, size, decoder_dim)
        grid = grid.flatten(1, 2)  # (N, P, decoder_dim), v_i of equation 15
        keys = self.attention.encoder_att(grid)  # (N, P, attention_dim)
        nothing = features.new_zeros(len(features), self.decoder_dim)  # (N, decoder_dim)
        return keys, grid, image, *[nothing] * 2 * self.layers

    def step(self, words, state):
        """
        Move, then look, then write: the LSTM, attention with its new state, and both together make the word.

        :param words: (N,), ids of the previous words
        :param state: as `init_state` or the last `step` gave it
        :return: output (N, decoder_dim), alpha (N, P), the new state
        """
        keys, grid, image, *memory = state
        embedded = self.embed(words)  # (N, embed_dim)
        memory = run_lstm(self.decode_step, torch.cat([embedded, image], dim=1), memory)
        hidden = memory[-2]  # (N, decoder_dim), the top layer's
        alpha = self.attention(keys, hidden)  # (N, P), equations 6 and 7
        context = (alpha.unsqueeze(1) @ grid).squeeze(1)  # (N, decoder_dim), equation 8
        return context + hidden, alpha, (keys, grid, image, *memory)


class AdaptiveAttention(SpatialAttention):
    """
    Spatial attention that knows when to look (Lu et al. 2017, section 2.3).

    One more "cell" stands beside the grid's: the visual sentinel, what the LSTM knows already. The alpha that `step`
    gives is that of the grid alone and sums to 1 - beta, so beta, the sentinel's share, is 1 - alpha.sum(dim=1):
    with it pages and figures show when the model looks.

    The doubly stochastic term of `losses.CaptionLoss` wants each cell looked at and so speaks against the sentinel;
    the paper trains without it (doubly_stochastic_weight 0).
    """

    def __init__(self, *args, **kwargs):
        """Parameters: as for `SpatialAttention`. With several LSTM layers the sentinel is the top one's."""
        super().__init__(*args, **kwargs)
        query = self.attention.decoder_att
        input_dim = self.decode_step[0].input_size
        self.sentinel_gate = Linear(input_dim + self.decoder_dim, self.decoder_dim)  # W_x and W_h of equation 9
        self.sentinel_att = Linear(self.decoder_dim, query.out_features)  # W_s of equation 12

    def step(self, words, state):
        """
        Move, remember, look, write.

        :param words: (N,), ids of the previous words
        :param state: as `init_state` or the last `step` gave it
        :return: output (N, decoder_dim), alpha (N, P) which sums to 1 - beta, the new state
        """
        keys, grid, image, *memory = state
        last = memory[-2]  # (N, decoder_dim), the top layer's hidden state before this step
        embedded = self.embed(words)  # (N, embed_dim)
        x = torch.cat([embedded, image], dim=1)  # (N, embed_dim + decoder_dim)
        memory = run_lstm(self.decode_step, x, memory)
        hidden, cell = memory[-2:]  # (N, decoder_dim) each

        gate = torch.sigmoid(self.sentinel_gate(torch.cat([x, last], dim=1)))  # equation 9
        sentinel = gate * torch.tanh(cell)  # (N, decoder_dim), equation 10
        weights = self.attention(keys, hidden, self.sentinel_att(sentinel))  # (N, P + 1), equation 12
        alpha, beta = weights[:, :-1], weights[:, -1:]  # (N, P), (N, 1)
        # Equation 11. Its factor 1 - beta of the grid's context is already in alpha.
        context = beta * sentinel + (alpha.unsqueeze(1) @ grid).squeeze(1)  # (N, decoder_dim)
        return context + hidden, alpha, (keys, grid, image, *memory)


DECODERS = {
    "soft": DecoderWithAttention,
    "hard": DecoderWithHardAttention,
    "show_tell": ShowAndTell,
    "spatial": SpatialAttention,
    "adaptive": AdaptiveAttention,
}


class Setting(NamedTuple):
    """A field of train.py's config that a decoder is built from."""

    default: object  # what a config that does not have the field yet is taken to mean
    argument: str  # the decoder's name for it
    decoders: tuple  # those that have it
    expected: str  # which values make sense, in words
    allows: Callable  # whether a value is one of them


ALL = tuple(DECODERS)
# What a setting may be: in words, and as a check.
SIZE = "a whole number from 1 to 100,000", lambda value: type(value) is int and 1 <= value <= 100_000
SIDE = "a whole number from 1 to 256", lambda value: type(value) is int and 1 <= value <= 256
COUNT = "a whole number from 1 to 100", lambda value: type(value) is int and 1 <= value <= 100
SHARE = "a number from 0 to 1", lambda value: isinstance(value, int | float) and 0 <= value <= 1
SWITCH = "True or False", lambda value: isinstance(value, bool)
LIMIT = "a number above 0, or None", lambda value: value is None or (isinstance(value, int | float) and value > 0)
SCORE = "'relu' or 'tanh'", lambda value: value in ("relu", "tanh")
LOOK = "'argmax', 'sample' or 'expectation'", lambda value: value in ("argmax", "sample", "expectation")

SETTINGS = {
    "embed_dim": Setting(512, "embed_dim", ALL, *SIZE),
    "decoder_dim": Setting(512, "decoder_dim", ALL, *SIZE),
    "attention_dim": Setting(512, "attention_dim", ("soft", "hard", "spatial", "adaptive"), *SIZE),
    "encoded_image_size": Setting(14, "encoded_image_size", ALL, *SIDE),
    "dropout": Setting(0.5, "dropout", ALL, *SHARE),
    "embedding_dropout": Setting(0.0, "embedding_dropout", ALL, *SHARE),
    "state_dropout": Setting(0.0, "state_dropout", ("soft", "hard", "show_tell"), *SHARE),
    "decoder_layers": Setting(1, "layers", ALL, *COUNT),
    "gate": Setting(True, "gate", ("soft", "hard"), *SWITCH),
    "deep_output": Setting(False, "deep_output", ("soft", "hard"), *SWITCH),
    "attention_nonlinearity": Setting("relu", "nonlinearity", ("soft", "hard", "spatial", "adaptive"), *SCORE),
    "embedding_max_norm": Setting(None, "embedding_max_norm", ALL, *LIMIT),
    "tie_weights": Setting(False, "tie_weights", ALL, *SWITCH),
    "hard_expected_share": Setting(0.5, "expected_share", ("hard",), *SHARE),
    "hard_inference": Setting("argmax", "inference", ("hard",), *LOOK),
}


def build_decoder(config, vocab_size, encoder_dim):
    """
    Build the decoder that a config names.

    :param config: dict of train.py's hyperparameters, as the checkpoint keeps them; a field that it lacks, because it
        is older than the field, has the default of `SETTINGS`
    :param vocab_size: number of words
    :param encoder_dim: numbers in a cell of the encoder's grid
    :return: the decoder, with random weights
    :raises UserError: if the decoder is unknown, a setting's value makes no sense, or a setting was changed that this
        decoder does not have
    """
    name = config.get("decoder", "soft")
    if not isinstance(name, str) or name not in DECODERS:
        raise UserError(f"decoder: {short(name)} found, one of {', '.join(DECODERS)} expected")
    arguments = {}
    for field, setting in SETTINGS.items():
        value = config.get(field, setting.default)
        if name in setting.decoders:
            if not setting.allows(value):
                raise UserError(f"{field}: {short(value)} found, {setting.expected} expected")
            arguments[setting.argument] = value
        elif value != setting.default:
            raise UserError(
                f"{field}: {short(value)} found, {setting.default!r} (the default) expected: the decoder '{name}' has "
                f"no such setting; leave it out, or choose --decoder {' or '.join(setting.decoders)}"
            )
    return DECODERS[name](vocab_size, encoder_dim, **arguments)
