"""Show and Tell (Vinyals et al. 2015): no attention, the LSTM sees the photo once, before the first word."""

from typing import NamedTuple

import torch
from torch import nn

from models import CaptionDecoder, StackedLSTM, mean_features
from utils import autocast_dtype


class LstmState(NamedTuple):
    """What the LSTM carries from word to word."""

    h: torch.Tensor  # (N, layers, decoder_dim), what it is about to say
    c: torch.Tensor  # (N, layers, decoder_dim), what it remembers


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
        self.embed_image = nn.Linear(encoder_dim, embed_dim)
        self.decode_step = StackedLSTM(embed_dim, decoder_dim, layers)
        self.state_dropout = nn.Dropout(state_dropout)

    def init_state(self, features):
        """
        Show the photo (equation 10), its features averaged over the grid.

        :param features: (N, height, width, encoder_dim)
        :return: `LstmState`
        """
        features = features.to(autocast_dtype(self.fc.weight))
        image = self.embed_image(mean_features(features, self.encoded_image_size))  # (N, embed_dim)
        nothing = self.fc.weight.new_zeros(len(features), self.layers, self.decoder_dim)
        _, h, c = self.decode_step(image, nothing, nothing)  # (N, layers, decoder_dim) each
        return LstmState(self.state_dropout(h), self.state_dropout(c))

    def step(self, words, state):
        """
        Tell the next word (equations 11 and 12).

        :return: output (N, decoder_dim), None for alpha, the new state; after the words (N,)
        """
        output, h, c = self.decode_step(self.embed(words), *state)
        return output, None, LstmState(h, c)
