"""Att2in (Rennie et al. 2017): an LSTM whose gates do not see the photo; only the candidate for its memory does."""

from typing import NamedTuple

import torch
from torch import nn

from models import Attention, CaptionDecoder, resize_grid
from utils import autocast_dtype


class Att2inState(NamedTuple):
    """Where an att2in decoder stands."""

    keys: torch.Tensor  # (N, P, attention_dim)
    grid: torch.Tensor  # (N, P, decoder_dim), the locations, I_i
    h: torch.Tensor  # (N, decoder_dim), what the LSTM says after the previous word
    c: torch.Tensor  # (N, decoder_dim), what it remembers


class Att2in(CaptionDecoder):
    """
    Attention that enters the LSTM's candidate alone (Rennie et al. 2017, the attention model "Att2in").

    An LSTM has three gates, each between 0 and 1, and a candidate for its memory. Soft attention shows what it sees to
    all four; here the gates follow from the words alone. The candidate is a maxout: of two units, the larger one.

    As in ruotianluo's self-critical.pytorch, a linear layer and a ReLU bring the locations to decoder_dim first, once
    for all timesteps.
    """

    def __init__(self, vocab_size, encoder_dim, embed_dim=512, decoder_dim=512, attention_dim=512,
                 encoded_image_size=14, dropout=0.5, embedding_dropout=0.0, nonlinearity="relu",
                 embedding_max_norm=None, tie_weights=False):  # fmt: skip
        """
        :param nonlinearity: of attention's score, 'relu' or 'tanh' (the paper's)
        Other parameters: as for `models.DecoderWithAttention`.
        """
        super().__init__(
            vocab_size, embed_dim, decoder_dim, dropout, embedding_dropout, embedding_max_norm, tie_weights
        )
        self.encoded_image_size, self.decoder_dim = encoded_image_size, decoder_dim
        self.encode_locations = nn.Linear(encoder_dim, decoder_dim)
        self.attention = Attention(decoder_dim, decoder_dim, attention_dim, nonlinearity)
        # Three gates, and the candidate's two units: what word, state and context say to them.
        self.from_word = nn.Linear(embed_dim, 5 * decoder_dim)  # W_ix, W_fx, W_ox, W_zx
        self.from_state = nn.Linear(decoder_dim, 5 * decoder_dim)  # W_ih, W_fh, W_oh, W_zh
        self.from_context = nn.Linear(decoder_dim, 2 * decoder_dim)  # W_zI

    def init_state(self, features):
        """
        :param features: (N, height, width, encoder_dim)
        :return: `Att2inState`; the LSTM begins at zero, as in the paper
        """
        features = features.to(autocast_dtype(self.fc.weight))
        grid = resize_grid(self.encode_locations(features), self.encoded_image_size).flatten(1, 2)
        grid = torch.relu(grid)  # (N, P, decoder_dim)
        keys = self.attention.encoder_att(grid)  # (N, P, attention_dim)
        nothing = self.fc.weight.new_zeros(len(features), self.decoder_dim)
        return Att2inState(keys, grid, nothing, nothing)

    def step(self, words, state):
        """
        Look where the last state says, then write.

        :return: output (N, decoder_dim), alpha (N, P), the new state; after the words (N,)
        """
        alpha = self.attention(state.keys, state.h)  # (N, P)
        context = (alpha.unsqueeze(1) @ state.grid).squeeze(1)  # (N, decoder_dim)

        said = (self.from_word(self.embed(words)) + self.from_state(state.h)).float()  # (N, 5 * decoder_dim)
        gates, candidates = said.tensor_split([3 * self.decoder_dim], dim=1)
        write, keep, show = torch.sigmoid(gates).chunk(3, dim=1)  # i, f, o: (N, decoder_dim) each
        candidates = candidates + self.from_context(context)  # (N, 2 * decoder_dim)
        candidate = torch.maximum(*candidates.chunk(2, dim=1))  # (N, decoder_dim)
        c = write * candidate + keep * state.c  # (N, decoder_dim)
        h = show * torch.tanh(c)  # (N, decoder_dim)
        return h, alpha, state._replace(h=h, c=c)
