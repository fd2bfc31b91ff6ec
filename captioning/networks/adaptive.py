"""
Attention that follows from the LSTM's new state rather than its last one (Lu et al. 2017), and a model that knows when
not to look.

- `SpatialAttention`: the LSTM moves first, and its new state says where to look.
- `AdaptiveAttention`: it may also look at a "visual sentinel", that is, at nothing of the photo.
"""

from typing import NamedTuple

import torch
from torch import nn

from models import Attention, CaptionDecoder, StackedLSTM, mean_features, resize_grid
from utils import autocast_dtype


class SpatialState(NamedTuple):
    """Where a decoder with spatial attention stands."""

    keys: torch.Tensor  # (N, P, attention_dim)
    grid: torch.Tensor  # (N, P, decoder_dim), the locations, v_i of equation 15
    image: torch.Tensor  # (N, decoder_dim), the photo as a whole, v^g of equation 16
    h: torch.Tensor  # (N, layers, decoder_dim), what the LSTM is about to say
    c: torch.Tensor  # (N, layers, decoder_dim), what it remembers


class SpatialAttention(CaptionDecoder):
    """
    Attention that follows from the LSTM's new state rather than its last one (Lu et al. 2017, section 2.2).

    What it sees goes straight to the vocabulary, beside the state; the LSTM itself is shown the photo as a whole,
    at each step.
    """

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
        self.encode_cells = nn.Linear(encoder_dim, decoder_dim)  # W_a of equation 15
        self.encode_image = nn.Linear(encoder_dim, decoder_dim)  # W_b of equation 16
        self.attention = Attention(decoder_dim, decoder_dim, attention_dim, nonlinearity)
        self.decode_step = StackedLSTM(embed_dim + decoder_dim, decoder_dim, layers)

    def init_state(self, features):
        """
        :param features: (N, height, width, encoder_dim)
        :return: `SpatialState`; the LSTM begins at zero

        The ReLU is not linear, so it has to come after resizing; W_a before it is.
        """
        features = features.to(autocast_dtype(self.fc.weight))
        size = self.encoded_image_size
        image = torch.relu(self.encode_image(mean_features(features, size)))  # (N, decoder_dim)
        grid = torch.relu(resize_grid(self.encode_cells(features), size)).flatten(1, 2)  # (N, P, decoder_dim)
        keys = self.attention.encoder_att(grid)  # (N, P, attention_dim)
        nothing = self.fc.weight.new_zeros(len(features), self.layers, self.decoder_dim)
        return SpatialState(keys, grid, image, nothing, nothing)

    def step(self, words, state):
        """
        Move, then look, then write: the LSTM, attention with its new state, and both together make the word.

        :return: output (N, decoder_dim), alpha (N, P), the new state; after the words (N,)
        """
        x = torch.cat([self.embed(words), state.image], dim=1)  # (N, embed_dim + decoder_dim)
        hidden, h, c = self.decode_step(x, state.h, state.c)  # (N, decoder_dim), (N, layers, decoder_dim) each
        alpha = self.attention(state.keys, hidden)  # (N, P), equations 6 and 7
        context = (alpha.unsqueeze(1) @ state.grid).squeeze(1)  # (N, decoder_dim), equation 8
        return context + hidden, alpha, state._replace(h=h, c=c)


class AdaptiveAttention(SpatialAttention):
    """
    Spatial attention that knows when to look (Lu et al. 2017, section 2.3).

    One more "location" stands beside the grid's: the visual sentinel, what the LSTM knows already. The alpha of `step`
    is that of the grid alone and sums to 1 - beta, so beta, the sentinel's share, is 1 - alpha.sum(dim=1): with it
    pages and figures show when the model looks.

    The doubly stochastic term of `losses.CaptionLoss` asks for a look at each location, so it works against the
    sentinel; the paper trains without it (doubly_stochastic_weight 0).
    """

    def __init__(self, *args, **kwargs):
        """Parameters: as for `SpatialAttention`. With several LSTM layers the sentinel is the top one's."""
        super().__init__(*args, **kwargs)
        input_dim, attention_dim = self.decode_step[0].input_size, self.attention.decoder_att.out_features
        self.sentinel_gate = nn.Linear(input_dim + self.decoder_dim, self.decoder_dim)  # W_x and W_h of equation 9
        self.sentinel_att = nn.Linear(self.decoder_dim, attention_dim)  # W_s of equation 12

    def step(self, words, state):
        """
        Move, remember, look, write.

        :return: output (N, decoder_dim), alpha (N, P) which sums to 1 - beta, the new state; after the words (N,)
        """
        x = torch.cat([self.embed(words), state.image], dim=1)  # (N, embed_dim + decoder_dim)
        hidden, h, c = self.decode_step(x, state.h, state.c)  # (N, decoder_dim), (N, layers, decoder_dim) each

        gate = torch.sigmoid(self.sentinel_gate(torch.cat([x, state.h[:, -1]], dim=1)))  # equation 9
        sentinel = gate * torch.tanh(c[:, -1])  # (N, decoder_dim), equation 10
        query = self.attention.decoder_att(hidden)  # (N, attention_dim)
        of_grid = self.attention.scores(state.keys, query)  # (N, P)
        of_sentinel = self.attention.scores(self.sentinel_att(sentinel).unsqueeze(1), query)  # (N, 1)
        weights = torch.cat([of_grid, of_sentinel], dim=1).softmax(dim=1)  # (N, P + 1), equation 12
        alpha, beta = weights[:, :-1], weights[:, -1:]  # (N, P), (N, 1)
        # Equation 11. Its factor 1 - beta of the grid's context is already in alpha.
        context = beta * sentinel + (alpha.unsqueeze(1) @ state.grid).squeeze(1)  # (N, decoder_dim)
        return context + hidden, alpha, state._replace(h=h, c=c)
