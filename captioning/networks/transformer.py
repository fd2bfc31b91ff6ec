"""
A transformer that writes captions (Vaswani et al. 2017): no recurrence, each word reads all words before it.

Every word of the caption is a vector, the sum of its embedding and its position. A layer adds three things to it: what
the word finds in the words before it (self-attention), what it finds in the photo (cross-attention), and what it makes
of both (a feed-forward network). After the last layer, a word's vector tells which word comes next.

A word never looks at those after it, so its vectors stay what they are when the caption continues. Two things follow:

- In training, where all words are known, all steps are taken at once (`take_steps`), each word kept from looking ahead.
- When the model writes, a step only computes the newest word. What later words will look at, the keys and values of the
  words so far, is kept in the state. (It is called the cache of keys and values.)

Two things differ from the paper, as in most of its successors. What a layer reads is normalised first, rather than its
sum afterwards, with which training needs no long warm-up ("pre-norm", Xiong et al. 2020). And what is read beside the
words is not a sentence that transformer layers have encoded, but the encoder's grid.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models import CaptionDecoder, resize_grid
from utils import UserError, autocast_dtype


class MultiHeadAttention(nn.Module):
    """Several attentions beside one another, called heads, each of which looks for something else (section 3.2.2)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)  # W^Q of all heads
        self.key = nn.Linear(dim, dim)  # W^K
        self.value = nn.Linear(dim, dim)  # W^V
        self.output = nn.Linear(dim, dim)  # W^O

    def forward(self, x, keys, values, causal=False, with_weights=False):
        """
        Find for each vector what it asks for.

        :param x: (N, T, dim), the vectors that ask
        :param keys, values: (N, S, dim) each, of the vectors that are looked at: what each is found by, what it tells
        :param causal: let the first vector see only the first of them, the second the first two, and so on
        :return: what was found (N, T, dim); weights (N, heads, T, S) that sum to 1 over S, or None if not asked for
        """
        query, keys, values = (self.split(part) for part in (self.query(x), keys, values))
        if with_weights:
            scores = query @ keys.transpose(2, 3) / math.sqrt(query.shape[3])  # (N, heads, T, S)
            weights = scores.softmax(dim=3)  # (N, heads, T, S)
            found = weights @ values  # (N, heads, T, dim / heads), equation 1
        else:  # the same in one operation, which is faster and keeps no weights
            weights, found = None, F.scaled_dot_product_attention(query, keys, values, is_causal=causal)
        return self.output(found.transpose(1, 2).flatten(2)), weights

    def split(self, x):
        """:return: (N, heads, T, dim / heads), of x (N, T, dim) what belongs to each head"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class TransformerLayer(nn.Module):
    """Read the words, read the photo, think: three sub-layers, each of which adds to the vectors (section 3.1)."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.norm_before_words = nn.LayerNorm(dim)
        self.read_words = MultiHeadAttention(dim, heads)  # self-attention
        self.norm_before_photo = nn.LayerNorm(dim)
        self.read_photo = MultiHeadAttention(dim, heads)  # cross-attention
        self.norm_before_thought = nn.LayerNorm(dim)
        self.think = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))  # equation 2
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, grid_keys, grid_values, word_keys, word_values, with_weights=False):
        """
        :param x: (N, T, dim), words after the earlier ones: one, or any number if there are no earlier ones
        :param grid_keys, grid_values: (N, P, dim) each, of the photo's locations
        :param word_keys, word_values: (N, t, dim) each, of the earlier words
        :return: x (N, T, dim); keys and values of all words (N, t + T, dim) each; weights (N, heads, T, P), with which
            the locations were read, or None if not asked for
        """
        normed = self.norm_before_words(x)  # (N, T, dim)
        word_keys = torch.cat([word_keys, self.read_words.key(normed)], dim=1)  # (N, t + T, dim)
        word_values = torch.cat([word_values, self.read_words.value(normed)], dim=1)  # (N, t + T, dim)
        found, _ = self.read_words(normed, word_keys, word_values, causal=x.shape[1] > 1)  # one word may read all
        x = x + self.dropout(found)  # (N, T, dim)

        normed = self.norm_before_photo(x)  # (N, T, dim)
        found, weights = self.read_photo(normed, grid_keys, grid_values, with_weights=with_weights)
        x = x + self.dropout(found)  # (N, T, dim)

        x = x + self.dropout(self.think(self.norm_before_thought(x)))
        return x, word_keys, word_values, weights


class TransformerState(NamedTuple):
    """What a new word may look at, in each layer."""

    grid_keys: torch.Tensor  # (N, layers, P, decoder_dim), of the photo's locations
    grid_values: torch.Tensor  # (N, layers, P, decoder_dim)
    word_keys: torch.Tensor  # (N, layers, t, decoder_dim), of the t words so far
    word_values: torch.Tensor  # (N, layers, t, decoder_dim)


class Transformer(CaptionDecoder):
    """Layers that read the words so far and the grid (sections 3.1 to 3.5)."""

    def __init__(self, vocab_size, encoder_dim, embed_dim=512, decoder_dim=512, encoded_image_size=14, dropout=0.5,
                 embedding_dropout=0.0, residual_dropout=0.1, layers=3, heads=8, shown_head=None,
                 embedding_max_norm=None, tie_weights=False):  # fmt: skip
        """
        :param decoder_dim: of a word's vector, d_model
        :param residual_dropout: on what each sub-layer adds, and on the sum of embedding and position (section 5.4)
        :param shown_head: whose weights, in the last layer, are alpha, from 1 to `heads`; None for the mean of all
        Other parameters: as for `models.DecoderWithAttention`.
        :raises UserError: if there is no such head, or decoder_dim cannot be divided among the heads
        """
        super().__init__(
            vocab_size, embed_dim, decoder_dim, dropout, embedding_dropout, embedding_max_norm, tie_weights
        )
        if decoder_dim % heads:
            raise UserError(f"attention_heads: {heads} found, a divisor of decoder_dim ({decoder_dim}) expected")
        if shown_head is not None and shown_head > heads:
            raise UserError(f"shown_head: {shown_head} found, at most attention_heads ({heads}) expected")
        self.encoded_image_size, self.decoder_dim, self.shown_head = encoded_image_size, decoder_dim, shown_head
        self.encode_locations = nn.Linear(encoder_dim, decoder_dim)
        self.norm_of_grid = nn.LayerNorm(decoder_dim)
        self.encode_words = nn.Identity() if embed_dim == decoder_dim else nn.Linear(embed_dim, decoder_dim)
        self.layers = nn.ModuleList(TransformerLayer(decoder_dim, heads, residual_dropout) for _ in range(layers))
        self.norm_of_output = nn.LayerNorm(decoder_dim)
        self.residual_dropout = nn.Dropout(residual_dropout)

    def init_state(self, features):
        """
        :param features: (N, height, width, encoder_dim)
        :return: `TransformerState` before the first word
        """
        features = features.to(autocast_dtype(self.fc.weight))
        grid = resize_grid(self.encode_locations(features), self.encoded_image_size).flatten(1, 2)
        grid = self.norm_of_grid(grid)  # (N, P, decoder_dim)
        keys = torch.stack([layer.read_photo.key(grid) for layer in self.layers], dim=1)  # (N, layers, P, decoder_dim)
        values = torch.stack([layer.read_photo.value(grid) for layer in self.layers], dim=1)  # likewise
        no_words = keys.new_zeros(len(keys), len(self.layers), 0, self.decoder_dim)
        return TransformerState(keys, values, no_words, no_words)

    def step(self, words, state):
        """:return: output (N, decoder_dim), alpha (N, P), the new state; after the words (N,)"""
        output, alpha, state = self.read(words.unsqueeze(1), state)
        return output.squeeze(1), alpha.squeeze(1), state

    def take_steps(self, captions, batch_sizes, state, teacher_forcing):
        """As `CaptionDecoder.take_steps`, all at once, unless words of the model's own are mixed in one by one."""
        if teacher_forcing < 1:
            return super().take_steps(captions, batch_sizes, state, teacher_forcing)
        outputs, alphas, _ = self.read(captions[:, : len(batch_sizes)], state)  # (N, T, decoder_dim), (N, T, P)
        # Shorter captions are read to the end of the longest: what follows a word does not change it.
        outputs, alphas = (
            torch.cat([part[:n, t] for t, n in enumerate(batch_sizes)]) for part in (outputs, alphas)
        )  # (M, decoder_dim), (M, P)
        return outputs, alphas, None

    def read(self, words, state):
        """
        Let words that follow those of the state pass through all layers.

        :param words: (N, T): one, or any number at the beginning
        :return: outputs (N, T, decoder_dim), alphas (N, T, P), the new state
        """
        embedded = self.encode_words(self.embed(words.flatten())).unflatten(0, words.shape)  # (N, T, decoder_dim)
        positions = encode_positions(state.word_keys.shape[2], words.shape[1], self.decoder_dim, words.device)
        x = self.residual_dropout(embedded * math.sqrt(self.decoder_dim) + positions)  # (N, T, decoder_dim), 3.4

        word_keys, word_values, weights = [], [], None
        for layer, *seen in zip(self.layers, *(part.unbind(dim=1) for part in state), strict=True):
            x, keys, values, weights = layer(x, *seen, with_weights=layer is self.layers[-1])
            word_keys.append(keys)
            word_values.append(values)
        alphas = weights.mean(dim=1) if self.shown_head is None else weights[:, self.shown_head - 1]  # (N, T, P)
        state = state._replace(word_keys=torch.stack(word_keys, dim=1), word_values=torch.stack(word_values, dim=1))
        return self.norm_of_output(x), alphas, state


def encode_positions(first, count, dim, device):
    """
    Say where words stand by waves of many lengths, so that there is no last position (section 3.5).

    :param first: position of the first word, from 0
    :return: (count, dim), its sines and cosines in turn
    """
    positions = torch.arange(first, first + count, device=device).unsqueeze(1)  # (T, 1)
    angles = positions / 10_000 ** (torch.arange(0, dim, 2, device=device) / dim)  # (T, dim / 2, rounded up)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim]  # (T, dim)
