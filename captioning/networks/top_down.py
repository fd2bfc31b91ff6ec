"""Top-Down attention (Anderson et al. 2018): one LSTM decides where to look, a second one writes."""

from typing import NamedTuple

import torch
from torch import nn

from models import Attention, CaptionDecoder, StackedLSTM, resize_grid
from utils import autocast_dtype


class TopDownState(NamedTuple):
    """Where a decoder with two LSTMs stands."""

    keys: torch.Tensor  # (N, P, attention_dim)
    grid: torch.Tensor  # (N, P, decoder_dim), the locations, v_i
    image: torch.Tensor  # (N, decoder_dim), the photo as a whole, the mean of the locations
    attention_h: torch.Tensor  # (N, decoder_dim), h^1, what the attention LSTM says
    attention_c: torch.Tensor  # (N, decoder_dim), what it remembers
    h: torch.Tensor  # (N, layers, decoder_dim), h^2, what the language LSTM is about to say
    c: torch.Tensor  # (N, layers, decoder_dim), what it remembers


class TopDownAttention(CaptionDecoder):
    """
    Two LSTMs (Anderson et al. 2018, section 3.2). The attention LSTM sees what the other has said, the photo as a whole
    and the previous word, and says where to look. The language LSTM sees what is found there, and says the next word.

    The paper's v_i are detected objects; here they are the grid's locations. As in ruotianluo's self-critical.pytorch,
    a linear layer and a ReLU bring them to decoder_dim first, once for all timesteps.
    """

    def __init__(self, vocab_size, encoder_dim, embed_dim=512, decoder_dim=512, attention_dim=512,
                 encoded_image_size=14, dropout=0.5, embedding_dropout=0.0, layers=1, nonlinearity="relu",
                 embedding_max_norm=None, tie_weights=False):  # fmt: skip
        """
        :param layers: of the language LSTM
        :param nonlinearity: of attention's score, 'relu' or 'tanh' (the paper's, equation 3)
        Other parameters: as for `models.DecoderWithAttention`.
        """
        super().__init__(
            vocab_size, embed_dim, decoder_dim, dropout, embedding_dropout, embedding_max_norm, tie_weights
        )
        self.encoded_image_size, self.layers, self.decoder_dim = encoded_image_size, layers, decoder_dim
        self.encode_locations = nn.Linear(encoder_dim, decoder_dim)
        self.attention = Attention(decoder_dim, decoder_dim, attention_dim, nonlinearity)
        self.attention_lstm = nn.LSTMCell(decoder_dim + decoder_dim + embed_dim, decoder_dim)
        self.language_lstm = StackedLSTM(decoder_dim + decoder_dim, decoder_dim, layers)

    def init_state(self, features):
        """
        :param features: (N, height, width, encoder_dim)
        :return: `TopDownState`; both LSTMs begin at zero
        """
        features = features.to(autocast_dtype(self.fc.weight))
        grid = resize_grid(self.encode_locations(features), self.encoded_image_size).flatten(1, 2)
        grid = torch.relu(grid)  # (N, P, decoder_dim)
        keys = self.attention.encoder_att(grid)  # (N, P, attention_dim)
        nothing = self.fc.weight.new_zeros(len(features), self.decoder_dim)
        nothings = self.fc.weight.new_zeros(len(features), self.layers, self.decoder_dim)
        return TopDownState(keys, grid, grid.mean(dim=1), nothing, nothing, nothings, nothings)

    def step(self, words, state):
        """
        Decide where to look, look, write.

        :return: output (N, decoder_dim), alpha (N, P), the new state; after the words (N,)
        """
        x = torch.cat([state.h[:, -1], state.image, self.embed(words)], dim=1)  # equation 2
        attention_h, attention_c = self.attention_lstm(x, (state.attention_h, state.attention_c))  # (N, decoder_dim)
        alpha = self.attention(state.keys, attention_h)  # (N, P), equations 3 and 4
        context = (alpha.unsqueeze(1) @ state.grid).squeeze(1)  # (N, decoder_dim), equation 5
        x = torch.cat([context, attention_h], dim=1)  # (N, 2 * decoder_dim), equation 6
        output, h, c = self.language_lstm(x, state.h, state.c)  # (N, decoder_dim), for equation 7
        return output, alpha, state._replace(attention_h=attention_h, attention_c=attention_c, h=h, c=c)
