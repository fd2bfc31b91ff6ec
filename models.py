"""
The model of Show, Attend and Tell (Xu et al. 2015): an attention that looks at a part of the encoder's grid, and an
LSTM that writes one word after another. (The encoder itself, a torchvision network, is in encoders.py.)

Every decoder offers the same three calls, and nothing else in the project touches an LSTM:

    state = decoder.init_state(features)
    output, alpha, state = decoder.step(words, state)
    scores = decoder.scores(output)
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from captioning.networks.backbones import resize_grid
from captioning.speed.attention_scores import score_cells
from captioning.speed.shared_products import Embedding, Linear, linear, matmul_dtype, shared_products
from utils import UserError

__all__ = [
    "Attention",
    "CaptionDecoder",
    "Decoded",
    "DecoderWithAttention",
    "DecoderWithHardAttention",
]


class Decoded(NamedTuple):
    """What teacher forcing gives. Packed: the first word of every caption, then every second word, and so on."""

    scores: torch.Tensor  # (M, vocab_size), M words to predict in all captions together
    targets: torch.Tensor  # (M,), the ids of these words
    alphas: torch.Tensor | None  # (N, T, P), 0 after a caption's end; None without attention
    batch_sizes: list  # T numbers: how many captions still run at each timestep
    order: torch.Tensor  # (N,), which caption of the batch stands in each row: the longest first
    location_log_probs: torch.Tensor | None  # (M,), of the locations that hard attention drew; else None


class CaptionDecoder(nn.Module):
    """What all decoders have in common: word embeddings, the vocabulary's scores, and teacher forcing over `step`."""

    # This many tensors at the state's front stay as `init_state` made them, so a search need not move them.
    constant = 0

    def __init__(self, vocab_size, embed_dim, output_dim, dropout=0.5, embedding_dropout=0.0,
                 embedding_max_norm=None, tie_weights=False):  # fmt: skip
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = Embedding(vocab_size, embed_dim)
        self.embedding_max_norm = embedding_max_norm
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.dropout = nn.Dropout(dropout)
        self.fc = Linear(output_dim, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)
        if tie_weights:
            if output_dim != embed_dim:
                raise UserError(
                    f"tie_weights: the output has {output_dim} numbers and a word's embedding {embed_dim}; make "
                    "embed_dim and decoder_dim equal, or use deep_output"
                )
            self.fc.weight = self.embedding.weight

    def init_state(self, features):
        """
        Compute, once, all that does not change over time.

        :param features: (N, height, width, encoder_dim)
        :return: state, a tuple of tensors whose first axis is the batch
        """
        raise NotImplementedError

    def step(self, words, state):
        """
        :param words: (N,), ids of the previous words
        :param state: as `init_state` or the last `step` gave it
        :return: output (N, output_dim), alpha (N, P) or None, the new state
        """
        raise NotImplementedError

    def embed(self, words):
        """:return: embeddings (N, embed_dim) of the words (N,), scaled down to `embedding_max_norm` if longer"""
        embedded = self.embedding(words)  # (N, embed_dim)
        if self.embedding_max_norm is not None:
            lengths = embedded.norm(dim=1, keepdim=True)  # (N, 1)
            embedded = embedded * (self.embedding_max_norm / lengths.clamp_min(1e-12)).clamp(max=1)
        return self.embedding_dropout(embedded)

    def scores(self, output):
        """
        :param output: (M, output_dim), rows of any number of timesteps
        :return: unnormalised scores of every word (M, vocab_size)
        """
        return self.fc(self.dropout(output))

    def location_log_prob(self, state):
        """:return: (N,), log-probability of the location that the last step drew; None where nothing is drawn"""
        return None

    def forward(self, features, encoded_captions, caption_lengths, image_rows=None, teacher_forcing=1.0):
        """
        Predict each word of the captions from the true words before it.

        Captions are sorted by length, so that at each timestep those that still run are the batch's first rows.
        :param features: (B, height, width, encoder_dim)
        :param encoded_captions: (N, max_length), ids: <start> ... <end>, then <pad>
        :param caption_lengths: (N,), counting <start> and <end>, on the CPU
        :param image_rows: (N,), the row of `features` that each caption describes; None if N = B, in order
        :param teacher_forcing: probability that a step is shown the true word rather than the one drawn from the
            model's own prediction (scheduled sampling, Bengio et al. 2015)
        :return: a `Decoded`
        """
        caption_lengths, order = caption_lengths.cpu().sort(descending=True, stable=True)
        decode_lengths = caption_lengths - 1  # nothing is predicted after <end>
        batch_sizes = (decode_lengths > torch.arange(decode_lengths[0]).unsqueeze(1)).sum(dim=1).tolist()
        order = order.to(features.device)
        encoded_captions = encoded_captions[order]

        outputs, alphas, log_probs = [], [], []
        with shared_products():  # one gradient for each weight, not one at every timestep
            if image_rows is None:
                state = self.init_state(features[order])
            else:  # several captions share a photo: what depends on the photo alone is computed once for all of them
                image_rows = image_rows.to(features.device)[order]
                state = tuple(part[image_rows] for part in self.init_state(features))
            for t, n in enumerate(batch_sizes):
                words = encoded_captions[:n, t]  # (n,)
                if t > 0 and teacher_forcing < 1:
                    words = self.mix_words(words, outputs[-1][:n], teacher_forcing)
                if n < len(state[0]):
                    state = tuple(part[:n] for part in state)
                output, alpha, state = self.step(words, state)
                outputs.append(output)  # (n, output_dim)
                alphas.append(alpha)  # (n, P) or None
                log_probs.append(self.location_log_prob(state))  # (n,) or None
            scores = self.scores(torch.cat(outputs))  # one matrix product for all timesteps

        targets = pack_padded_sequence(encoded_captions[:, 1:], decode_lengths, batch_first=True)
        if alphas[0] is not None:
            alphas = PackedSequence(torch.cat(alphas), targets.batch_sizes)
            alphas = pad_packed_sequence(alphas, batch_first=True)[0]  # (N, T, P)
        return Decoded(
            scores=scores,
            targets=targets.data,
            alphas=None if isinstance(alphas, list) else alphas,
            batch_sizes=batch_sizes,
            order=order,
            location_log_probs=None if log_probs[0] is None else torch.cat(log_probs),
        )

    @torch.no_grad()
    def mix_words(self, words, last_output, teacher_forcing):
        """:return: (N,), the true word with probability `teacher_forcing`, else one drawn from the prediction"""
        with torch.autocast(last_output.device.type, enabled=False):  # older PyTorch: a cast without gradient is kept
            scores = self.scores(last_output.float())  # (N, vocab_size)
        drawn = scores.softmax(dim=1).multinomial(1).squeeze(1)  # (N,)
        keep = torch.rand(len(words), device=words.device) < teacher_forcing
        return torch.where(keep, words, drawn)

    def load_pretrained_embeddings(self, embeddings):
        """:param embeddings: (vocab_size, embed_dim), one row per word id"""
        if embeddings.shape != self.embedding.weight.shape:
            found, expected = tuple(embeddings.shape), tuple(self.embedding.weight.shape)
            raise UserError(f"embeddings: a table of {found} found, {expected} expected (words, embed_dim)")
        with torch.no_grad():
            self.embedding.weight.copy_(embeddings)

    def fine_tune_embeddings(self, fine_tune=True):
        """Choose whether the word embeddings are trained; only pretrained ones make sense frozen."""
        self.embedding.weight.requires_grad_(fine_tune)


class Attention(nn.Module):
    """Additive attention: a small network scores every cell of the grid (paper, equations 4 and 5)."""

    def __init__(self, encoder_dim, decoder_dim, attention_dim, nonlinearity="relu"):
        super().__init__()
        self.encoder_att = Linear(encoder_dim, attention_dim)
        self.decoder_att = Linear(decoder_dim, attention_dim)
        self.full_att = Linear(attention_dim, 1)
        self.nonlinearity = {"relu": torch.relu_, "tanh": torch.tanh_}[nonlinearity]  # in place: half the memory

    def forward(self, keys, hidden, other_key=None):
        """
        :param keys: (N, P, attention_dim), `encoder_att` of each cell: it does not change over time
        :param hidden: (N, decoder_dim), what the decoder is about to say
        :param other_key: (N, attention_dim), of one thing more to look at, if there is one
        :return: alpha (N, P), how much to look at each cell; sums to 1. (N, P + 1) if there is another key
        """
        query = self.decoder_att(hidden)  # (N, attention_dim)
        scores = score_cells(keys, query, self.full_att, self.nonlinearity)  # (N, P)
        if other_key is not None:
            scores = torch.cat([scores, self.full_att(self.nonlinearity(other_key + query))], dim=1)  # (N, P + 1)
        return scores.softmax(dim=1)


class DecoderWithAttention(CaptionDecoder):
    """An LSTM that looks at a weighted mean of the grid before each word: "soft" attention (paper, section 4.2)."""

    constant = 2  # features and keys

    def __init__(self, vocab_size, encoder_dim, embed_dim=512, decoder_dim=512, attention_dim=512,
                 encoded_image_size=14, dropout=0.5, embedding_dropout=0.0, state_dropout=0.0, layers=1, gate=True,
                 deep_output=False, nonlinearity="relu", embedding_max_norm=None, tie_weights=False):  # fmt: skip
        """
        :param vocab_size: number of words, with <pad>, <unk>, <start> and <end>
        :param encoder_dim, embed_dim, decoder_dim, attention_dim: size of a cell's features, of a word's embedding,
            of the LSTM's state and of the space in which attention compares the two
        :param encoded_image_size: side of the grid that attention sees; features of another grid are resized to it
        :param dropout, embedding_dropout, state_dropout: on the output, the word embeddings and the first state
        :param layers: LSTM cells on top of one another
        :param gate: scale the context by a gate beta (paper, section 4.2.1); the paper's is one number a step, this one
            has a number for each of the context's, as the tutorial's has
        :param deep_output: let the previous word and the context speak in the output too (paper, equation 7)
        :param nonlinearity: of attention's score, 'relu' or 'tanh' (the paper's)
        :param embedding_max_norm: longer embeddings are scaled down to this length; None for no limit
        :param tie_weights: one matrix for the embeddings and the vocabulary's scores
        """
        output_dim = embed_dim if deep_output else decoder_dim
        super().__init__(vocab_size, embed_dim, output_dim, dropout, embedding_dropout, embedding_max_norm, tie_weights)
        self.encoded_image_size, self.layers = encoded_image_size, layers
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim, nonlinearity)
        self.init_h = Linear(encoder_dim, layers * decoder_dim)
        self.init_c = Linear(encoder_dim, layers * decoder_dim)
        self.state_dropout = nn.Dropout(state_dropout)
        self.f_beta = Linear(decoder_dim, encoder_dim) if gate else None
        self.decode_step = lstm_stack(embed_dim + encoder_dim, decoder_dim, layers)
        if deep_output:
            self.output_h = Linear(decoder_dim, embed_dim)  # L_h of equation 7
            self.output_z = Linear(encoder_dim, embed_dim)  # L_z
        self.deep_output = deep_output

    def init_state(self, features):
        """
        :param features: (N, height, width, encoder_dim)
        :return: features (N, height, width, encoder_dim), keys (N, P, attention_dim), and for each layer of the LSTM
            its hidden state and its cell (N, decoder_dim)

        Resizing and `encoder_att` are both linear, so they may be done in either order: on the smaller grid of the
        two. That is why the features may keep their own Q cells while attention sees P of them.
        """
        features = features.to(matmul_dtype(self.fc.weight))  # now, not in every product again
        size = self.encoded_image_size
        if features.shape[1] * features.shape[2] > size * size:
            features = resize_grid(features, size)
        keys = resize_grid(self.attention.encoder_att(features), size).flatten(1, 2)  # (N, P, attention_dim)
        mean = mean_cell(features, size)  # (N, encoder_dim)
        hidden = self.state_dropout(self.init_h(mean)).chunk(self.layers, dim=1)  # (N, decoder_dim) each
        cell = self.state_dropout(self.init_c(mean)).chunk(self.layers, dim=1)
        memory = [part for layer in zip(hidden, cell, strict=True) for part in layer]
        return features, keys, *memory

    def step(self, words, state):
        """
        Look, then write: attention with the last hidden state, then the LSTM (paper, equations 1 to 3).

        :param words: (N,), ids of the previous words
        :param state: as `init_state` or the last `step` gave it
        :return: output (N, output_dim), alpha (N, P), the new state
        """
        features, keys, *memory = state[: 2 + 2 * self.layers]  # hard attention has one tensor more
        last = memory[-2]  # (N, decoder_dim), the top layer's hidden state
        alpha = self.attention(keys, last)  # (N, P)
        weights, log_prob = self.look(alpha)  # (N, P), (N,) or None
        weights = weights @ map_cells(features, self.encoded_image_size)  # (N, Q), of the features' own cells
        context = (weights.unsqueeze(1) @ features.flatten(1, 2)).squeeze(1)  # (N, encoder_dim)
        if self.f_beta is not None:
            context = torch.sigmoid(self.f_beta(last)) * context

        embedded = self.embed(words)  # (N, embed_dim)
        memory = run_lstm(self.decode_step, torch.cat([embedded, context], dim=1), memory)
        output = memory[-2]  # (N, decoder_dim)
        if self.deep_output:
            output = embedded + self.output_h(output) + self.output_z(context)  # (N, embed_dim)
        state = features, keys, *memory
        return output, alpha, state if log_prob is None else (*state, log_prob)

    def look(self, alpha):
        """:return: weights (N, P) of the cells in the context: alpha itself; None, as no location is drawn"""
        return alpha, None


class DecoderWithHardAttention(DecoderWithAttention):
    """
    "Hard" attention: the context is one cell, drawn from alpha (paper, section 4.1).

    Drawing has no gradient, so the decoder also gives the log-probability of the cells that it drew, by which
    `losses.CaptionLoss` teaches attention from how well the caption went. The state's last tensor holds it.
    """

    def __init__(self, *args, expected_share=0.5, inference="argmax", **kwargs):
        """
        :param expected_share: probability that a training step takes alpha itself, the expected value, instead of a
            drawn cell: less noise for the gradient (0.5 in the paper)
        :param inference: in eval mode look at the likeliest cell ('argmax'), a drawn one ('sample') or at the
            expected value ('expectation')
        Other arguments: as for `DecoderWithAttention`.
        """
        super().__init__(*args, **kwargs)
        self.expected_share, self.inference = expected_share, inference

    def init_state(self, features):
        return *super().init_state(features), features.new_zeros(len(features), dtype=torch.float32)

    def look(self, alpha):
        """:return: weights (N, P), one-hot rows or alpha itself; log-probability of the drawn locations (N,), else 0"""
        nothing_drawn = torch.zeros_like(alpha[:, 0])  # (N,)
        if not self.training and self.inference == "expectation":
            return alpha, nothing_drawn
        if not self.training and self.inference == "argmax":
            return one_hot(alpha.argmax(dim=1), alpha), nothing_drawn
        location = alpha.detach().float().multinomial(1).squeeze(1)  # (N,)
        log_prob = alpha.gather(1, location.unsqueeze(1)).squeeze(1).clamp_min(1e-20).log()  # (N,)
        if not self.training:
            return one_hot(location, alpha), log_prob
        expected = torch.rand_like(nothing_drawn) < self.expected_share  # (N,)
        weights = torch.where(expected.unsqueeze(1), alpha, one_hot(location, alpha))  # (N, P)
        return weights, torch.where(expected, nothing_drawn, log_prob)

    def location_log_prob(self, state):
        return state[-1]


def one_hot(location, alpha):
    """:return: (N, P), like alpha but 1 at `location` (N,) and 0 elsewhere"""
    return torch.zeros_like(alpha).scatter_(1, location.unsqueeze(1), 1.0)


def map_cells(features, size):
    """
    Write `resize_grid` as a matrix, so that a weight on each new cell can be carried back to the old ones.

    :param features: (N, height, width, encoder_dim), only for its grid, device and type
    :return: (P, Q): row p says which of the Q = height * width cells make cell p of the P = size * size, and sums to 1
    """
    return resizing_matrix(*features.shape[1:3], size, features.dtype, features.device)


@functools.lru_cache(maxsize=16)  # it is asked for at each step
@torch.no_grad()
def resizing_matrix(height, width, size, dtype, device):
    """:return: (P, Q), what `map_cells` says"""
    each_cell = torch.eye(height * width, dtype=dtype, device=device)  # (Q, Q)
    return resize_grid(each_cell.view(1, height, width, -1), size).flatten(1, 2).squeeze(0)


def mean_cell(features, size):
    """
    :param features: (N, height, width, encoder_dim)
    :return: (N, encoder_dim), the mean over the grid that `resize_grid` would make, without making it
    """
    return map_cells(features, size).mean(dim=0) @ features.flatten(1, 2)


def lstm_stack(input_dim, decoder_dim, layers):
    """:return: LSTM cells, each reading the one below it"""
    return nn.ModuleList(nn.LSTMCell(input_dim if i == 0 else decoder_dim, decoder_dim) for i in range(layers))


def run_lstm(cells, x, memory):
    """
    One timestep through a stack of LSTM cells.

    :param x: (N, input_dim)
    :param memory: for each layer its hidden state and its cell, (N, decoder_dim) each
    :return: list, the new memory; its last two are the top layer's
    """
    new_memory = []
    for lstm, h, c in zip(cells, memory[::2], memory[1::2], strict=True):
        # What lstm(x, (h, c)) computes, written out with the `linear` whose timesteps share their products.
        gates = linear(x, lstm.weight_ih, lstm.bias_ih) + linear(h, lstm.weight_hh, lstm.bias_hh)
        i, f, g, o = gates.float().chunk(4, dim=1)  # input, forget, candidate, output: (N, decoder_dim) each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        x = torch.sigmoid(o) * torch.tanh(c)
        new_memory += [x, c]
    return new_memory
