"""
The model of Show, Attend and Tell (Xu et al. 2015): an encoder that turns a photo into a grid of features, attention
that chooses where to look in this grid, and an LSTM that writes one word after another.

Every decoder offers the same three calls, and nothing else in the project touches an LSTM:

    state = decoder.init_state(features)  # all that does not change over time, once; (N, height, width, encoder_dim) in
    output, alpha, state = decoder.step(words, state)  # words (N,) -> (N, output_dim), (N, P) or None
    logits = decoder.scores(output)  # (M, output_dim) -> (M, vocab_size), of any number of timesteps

`state` is a NamedTuple of tensors whose first axis is the batch, N; P is the number of locations in the grid.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from utils import UserError, autocast_dtype


class Encoder(nn.Module):
    """A network that was trained to classify photos, without its pooling and its classifier (section 3.1.1)."""

    def __init__(self, name="resnet101", weights="none", encoded_image_size=14, encoder_dim=None):
        """
        :param name: a ResNet of torchvision's, or any other network that captioning/networks/backbones.py knows
        :param weights: 'imagenet' (downloaded once) or 'none' (random, to be trained)
        :param encoded_image_size: side of the grid of features, in locations
        :param encoder_dim: dimension of its features, through a 1 x 1 convolution; None keeps the network's
        """
        super().__init__()
        from captioning.networks.backbones import build_backbone  # a table of networks, each cut in its own way

        self.name, self.encoded_image_size, self.pretrained = name, encoded_image_size, weights != "none"
        backbone = build_backbone(name, weights)
        self.backbone, self.blocks, self.native_dim = backbone.network, backbone.blocks, backbone.dim
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1))
        self.encoder_dim = encoder_dim or self.native_dim
        self.project = nn.Linear(self.native_dim, encoder_dim) if encoder_dim else nn.Identity()  # 1 x 1 convolution
        self.fine_tune(False)

    def forward(self, images):
        """
        :param images: (N, 3, 256, 256), RGB, uint8 or float from 0 to 1
        :return: features (N, encoded_image_size, encoded_image_size, encoder_dim)
        """
        return resize_grid(self.features(images), self.encoded_image_size)

    def features(self, images):
        """
        The features on the network's own grid, 8 x 8 for a ResNet. A decoder resizes what it needs of them.

        :param images: as for `forward`; or what `grid` made of them, from the feature cache
        :return: (N, height, width, encoder_dim)
        """
        grid = images if images.dtype == torch.float16 else self.grid(images)  # the cache alone holds float16
        return self.project(grid.to(autocast_dtype(self.mean)))

    def grid(self, images):
        """
        The photos through the network. Where it is not trained the result is rounded to half precision, as the feature
        cache keeps it, so that a run with the cache and one without see the same numbers.

        :param images: (N, 3, 256, 256), RGB, uint8 or float from 0 to 1
        :return: (N, height, width, native_dim)
        """
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = ((images - self.mean) / self.std).to(memory_format=torch.channels_last)
        features = self.backbone(images).permute(0, 2, 3, 1)  # (N, height, width, native_dim)
        return features if features.requires_grad else features.clamp(-65504, 65504).half()  # the largest float16

    @property
    def frozen(self):
        """Whether nothing of the network is trained, so that a photo's features never change."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def fine_tune(self, fine_tune=True, first_block=2):
        """
        Choose what is trained: nothing; of a pretrained network the blocks from `first_block` (2 to 4 as in the
        tutorial), not its first, general filters; all of a network that starts from nothing.
        """
        for layer, block in self.blocks:
            layer.requires_grad_(fine_tune and (block >= first_block or not self.pretrained))
        self.train(self.training)

    def train(self, mode=True):
        """Frozen layers stay in eval mode: the statistics of their batch normalisation must not drift."""
        super().train(mode)
        for layer, _ in self.blocks:
            layer.train(mode and any(parameter.requires_grad for parameter in layer.parameters()))
        return self


def resize_grid(features, size):
    """
    :param features: (N, height, width, dim)
    :param size: side of the new grid, in locations, larger or smaller than the old one
    :return: (N, size, size, dim), each location the mean of the old ones that it overlaps
    """
    matrix = averaging_matrix(*features.shape[1:3], size, features.dtype, features.device)  # (P, Q)
    return (matrix @ features.flatten(1, 2)).unflatten(1, (size, size))


def weighted_mean(weights, features, size):
    """
    The mean on the grid that `resize_grid` would make, without making it: a mean of means is a weighted mean.

    :param weights: (N, P) or (P,), of the P = size * size new locations; features (N, height, width, dim)
    :return: (N, dim)
    """
    matrix = averaging_matrix(*features.shape[1:3], size, features.dtype, features.device)  # (P, Q)
    weights = (weights @ matrix).expand(len(features), -1)  # (N, Q), of the old locations
    return (weights.unsqueeze(1) @ features.flatten(1, 2)).squeeze(1)  # (N, dim)


def mean_features(features, size):
    """:return: (N, dim), the mean in which each location of the resized grid counts alike"""
    return weighted_mean(features.new_full((size * size,), 1 / size**2), features, size)


@functools.lru_cache(maxsize=16)  # it is asked for at each step
def averaging_matrix(height, width, size, dtype, device):
    """:return: (P, Q), how much each of the grid's Q = height * width locations counts in each of the P new ones"""
    each_location = torch.eye(height * width, device=device).unflatten(1, (height, width))  # (Q, height, width)
    return F.adaptive_avg_pool2d(each_location, size).flatten(1).T.to(dtype)  # (P, Q)


class Attention(nn.Module):
    """Additive attention: a small network scores every location of the grid (equations 4 and 5)."""

    def __init__(self, encoder_dim, decoder_dim, attention_dim, nonlinearity="relu"):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.nonlinearity = {"relu": torch.relu, "tanh": torch.tanh}[nonlinearity]

    def forward(self, keys, hidden):
        """
        :param keys: (N, P, attention_dim), `encoder_att` of each location's features: they do not change over time
        :param hidden: (N, decoder_dim), the LSTM's state after the previous word
        :return: alpha (N, P), how much to look at each location; sums to 1
        """
        return self.scores(keys, self.decoder_att(hidden)).softmax(dim=1)  # equation 5

    def scores(self, keys, query):
        """:return: (N, P), equation 4, of keys (N, P, attention_dim) and a query (N, attention_dim)"""
        return self.full_att(self.nonlinearity(keys + query.unsqueeze(1))).squeeze(2)  # (N, P)


class Decoded(NamedTuple):
    """What teacher forcing gives. Packed: the first word of each caption, then the second of each, and so on."""

    logits: torch.Tensor  # (M, vocab_size), M words to predict in all captions together
    targets: torch.Tensor  # (M,), the ids of these words
    alphas: torch.Tensor | None  # (N, T, P), 0 after a caption's end; None without attention
    batch_sizes: list  # T numbers: how many captions still run at each timestep
    order: torch.Tensor  # (N,), which caption of the batch stands in each row: the longest first
    location_log_probs: torch.Tensor | None  # (M,), of the locations that hard attention drew; else None


class CaptionDecoder(nn.Module):
    """What all decoders have in common: word embeddings, the vocabulary's logits, and teacher forcing over `step`."""

    def __init__(self, vocab_size, embed_dim, output_dim, dropout=0.5, embedding_dropout=0.0,
                 embedding_max_norm=None, tie_weights=False):  # fmt: skip
        """
        :param embedding_max_norm: longer embeddings are scaled down to this length; None for no limit
        :param tie_weights: one matrix for the embeddings and the vocabulary's logits (Press and Wolf 2017)
        """
        super().__init__()
        self.vocab_size, self.embedding_max_norm = vocab_size, embedding_max_norm
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(output_dim, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)
        if tie_weights:
            if output_dim != embed_dim:
                raise UserError(f"tie_weights: decoder_dim {output_dim} found, embed_dim ({embed_dim}) expected")
            self.fc.weight = self.embedding.weight

    def embed(self, words):
        """:return: embeddings (N, embed_dim) of the words (N,), scaled down to `embedding_max_norm` if longer"""
        embedded = self.embedding(words)  # (N, embed_dim)
        if self.embedding_max_norm is not None:
            lengths = embedded.norm(dim=1, keepdim=True)  # (N, 1)
            embedded = embedded * (self.embedding_max_norm / lengths.clamp_min(1e-12)).clamp(max=1)
        return self.embedding_dropout(embedded)

    def scores(self, output):
        """:return: logits (M, vocab_size) of an output (M, output_dim) of any number of timesteps"""
        return self.fc(self.dropout(output))

    def forward(self, features, encoded_captions, caption_lengths, image_rows=None, teacher_forcing=1.0):
        """
        Predict each word of the captions from the true words before it.
        :param features: (B, height, width, encoder_dim)
        :param encoded_captions: (N, max_length), ids: <start> ... <end>, then <pad>
        :param caption_lengths: (N,), counting <start> and <end>, on the CPU
        :param image_rows: (N,), the row of `features` that each caption describes, on the CPU; None if N = B, in order
        :param teacher_forcing: share of true words, the others are drawn by the model (Bengio et al. 2015)
        :return: `Decoded`
        """
        captions, targets, image_rows, order = sort_by_length(encoded_captions, caption_lengths, image_rows)
        state = select_rows(self.init_state(features), image_rows)
        batch_sizes = targets.batch_sizes.tolist()
        outputs, alphas, log_probs = self.take_steps(captions, batch_sizes, state, teacher_forcing)
        if alphas is not None:
            alphas, _ = pad_packed_sequence(PackedSequence(alphas, targets.batch_sizes), batch_first=True)  # (N, T, P)
        return Decoded(self.scores(outputs), targets.data, alphas, batch_sizes, order, location_log_probs=log_probs)

    def take_steps(self, captions, batch_sizes, state, teacher_forcing):
        """:return: outputs (M, output_dim); alphas (M, P) or None; `Decoded`'s location_log_probs; all packed"""
        outputs, alphas, log_probs = [], [], []
        for t, n in enumerate(batch_sizes):
            if n < len(state[0]):  # the shortest captions have ended
                state = state._make(part[:n] for part in state)
            words = captions[:n, t]  # (n,)
            if t > 0 and teacher_forcing < 1:
                words = self.mix_words(words, outputs[-1][:n], teacher_forcing)  # (n,)
            output, alpha, state = self.step(words, state)
            outputs.append(output)  # (n, output_dim)
            alphas.append(alpha)  # (n, P) or None
            log_probs.append(getattr(state, "location_log_prob", None))  # (n,), only hard attention's
        return (None if parts[0] is None else torch.cat(parts) for parts in (outputs, alphas, log_probs))

    @torch.no_grad()
    def mix_words(self, words, last_output, teacher_forcing):
        """:return: (N,), the true word with probability `teacher_forcing`, else one drawn from the prediction"""
        with torch.autocast(last_output.device.type, enabled=False):  # older PyTorch: a cast without gradient is kept
            logits = self.scores(last_output.float())  # (N, vocab_size)
        drawn = logits.softmax(dim=1).multinomial(1).squeeze(1)  # (N,)
        keep = torch.rand(len(words), device=words.device) < teacher_forcing  # (N,)
        return torch.where(keep, words, drawn)

    def load_pretrained_embeddings(self, embeddings):
        """:param embeddings: (vocab_size, embed_dim), one row per word id"""
        self.embedding.load_state_dict({"weight": embeddings})

    def fine_tune_embeddings(self, fine_tune=True):
        """Choose whether the word embeddings are trained; only pretrained ones make sense frozen."""
        self.embedding.weight.requires_grad_(fine_tune)


def sort_by_length(captions, lengths, image_rows=None):
    """
    Put the longest captions first, so that those that still run are always the first rows.
    :return: captions (N, max_length); the words to predict, packed; image_rows (N,); order (N,)
    """
    lengths, order = lengths.cpu().sort(descending=True, stable=True)
    image_rows = order if image_rows is None else image_rows.cpu()[order]  # (N,)
    image_rows, order = (rows.to(captions.device, non_blocking=True) for rows in (image_rows, order))
    captions = captions[order]  # (N, max_length)
    targets = pack_padded_sequence(captions[:, 1:], lengths - 1, batch_first=True)  # nothing is predicted after <end>
    return captions, targets, image_rows, order


def select_rows(state, rows):
    """:return: the state of some of the batch's rows, by their indices (n,)"""
    return state._make(part.index_select(0, rows) for part in state)  # sums gradients in one order; part[rows] does not


class StackedLSTM(nn.ModuleList):
    """LSTM cells stacked on one another; the papers have one."""

    def __init__(self, input_dim, decoder_dim, layers):
        inputs = [input_dim] + [decoder_dim] * (layers - 1)
        super().__init__(nn.LSTMCell(size, decoder_dim) for size in inputs)

    def forward(self, x, h, c):
        """:return: the top h (N, decoder_dim), after the lowest has read x; all h and c (N, layers, decoder_dim)"""
        hidden, memory = [], []
        for lstm, own_h, own_c in zip(self, h.unbind(dim=1), c.unbind(dim=1), strict=True):
            x, own_c = lstm(x, (own_h, own_c))  # (N, decoder_dim) each
            hidden.append(x)
            memory.append(own_c)
        return x, torch.stack(hidden, dim=1), torch.stack(memory, dim=1)


class AttentionState(NamedTuple):
    """Where a decoder with attention stands."""

    features: torch.Tensor  # (N, height, width, encoder_dim)
    keys: torch.Tensor  # (N, P, attention_dim)
    h: torch.Tensor  # (N, layers, decoder_dim), what the LSTM says after the previous word
    c: torch.Tensor  # (N, layers, decoder_dim), what it remembers


class DecoderWithAttention(CaptionDecoder):
    """An LSTM that looks at a weighted mean of the grid before each word: "soft" attention (section 4.2)."""

    def __init__(self, vocab_size, encoder_dim, embed_dim=512, decoder_dim=512, attention_dim=512,
                 encoded_image_size=14, dropout=0.5, embedding_dropout=0.0, state_dropout=0.0, layers=1, gate=True,
                 deep_output=False, nonlinearity="relu", embedding_max_norm=None, tie_weights=False):  # fmt: skip
        """
        :param encoder_dim, embed_dim, decoder_dim, attention_dim: dimensions of a location's features, a word's
            embedding, the LSTM's state, and of the space in which attention compares the two
        :param encoded_image_size: side of the grid that attention sees; features of another grid are resized to it
        :param dropout, embedding_dropout, state_dropout: on the output, the word embeddings and the first state
        :param gate: scale each dimension of the context by a gate beta (the paper's, section 4.2.1, is one number)
        :param deep_output: let the previous word and the context enter the output too (equation 7)
        :param nonlinearity: of attention's score, 'relu' or 'tanh' (the paper's)
        """
        output_dim = embed_dim if deep_output else decoder_dim
        super().__init__(vocab_size, embed_dim, output_dim, dropout, embedding_dropout, embedding_max_norm, tie_weights)
        self.encoded_image_size, self.layers, self.deep_output = encoded_image_size, layers, deep_output
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim, nonlinearity)
        self.init_h = nn.Linear(encoder_dim, layers * decoder_dim)
        self.init_c = nn.Linear(encoder_dim, layers * decoder_dim)
        self.state_dropout = nn.Dropout(state_dropout)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim) if gate else None
        self.decode_step = StackedLSTM(embed_dim + encoder_dim, decoder_dim, layers)
        if deep_output:
            self.output_h = nn.Linear(decoder_dim, embed_dim)  # L_h of equation 7
            self.output_z = nn.Linear(encoder_dim, embed_dim)  # L_z

    def init_state(self, features):
        """:return: `AttentionState` of features (N, height, width, encoder_dim); their mean starts the LSTM (3.1.2)"""
        features = features.to(autocast_dtype(self.fc.weight))
        # Resizing and `encoder_att` are both linear: the keys of the resized grid are the resized keys.
        keys = resize_grid(self.attention.encoder_att(features), self.encoded_image_size)
        mean = mean_features(features, self.encoded_image_size)  # (N, encoder_dim)
        h = self.state_dropout(self.init_h(mean)).float().unflatten(1, (self.layers, -1))  # (N, layers, decoder_dim)
        c = self.state_dropout(self.init_c(mean)).float().unflatten(1, (self.layers, -1))  # (N, layers, decoder_dim)
        return AttentionState(features, keys.flatten(1, 2), h, c)

    def step(self, words, state):
        """
        Look, then write: attention asked by the last hidden state, then the LSTM (equations 1 to 6).

        :return: output (N, output_dim), alpha (N, P), the new state; after the words (N,)
        """
        last = state.h[:, -1]  # (N, decoder_dim)
        alpha = self.attention(state.keys, last)  # (N, P)
        weights, state = self.look(alpha, state)  # (N, P)
        context = weighted_mean(weights, state.features, self.encoded_image_size)  # (N, encoder_dim), equation 6
        if self.f_beta is not None:
            context = torch.sigmoid(self.f_beta(last)) * context  # (N, encoder_dim)

        embedded = self.embed(words)  # (N, embed_dim)
        output, h, c = self.decode_step(torch.cat([embedded, context], dim=1), state.h, state.c)
        if self.deep_output:
            output = embedded + self.output_h(output) + self.output_z(context)  # (N, embed_dim)
        return output, alpha, state._replace(h=h, c=c)

    def look(self, alpha, state):
        """:return: how much each location counts in the context (N, P); the state"""
        return alpha, state


class HardAttentionState(NamedTuple):
    features: torch.Tensor  # this and the next three as in `AttentionState`
    keys: torch.Tensor
    h: torch.Tensor
    c: torch.Tensor
    location_log_prob: torch.Tensor  # (N,), log-probability of the location that the last step drew; 0 if it drew none


class DecoderWithHardAttention(DecoderWithAttention):
    """
    "Hard" attention: in training the context is one location, drawn from alpha (section 4.1).

    Drawing has no gradient, so the state also tells how likely the drawn location was, by which the loss (see
    captioning/training/losses.py) teaches attention from how well the caption went.
    """

    def __init__(self, *args, expected_share=0.5, inference="argmax", **kwargs):
        """
        :param expected_share: probability, for each caption at each word, of taking alpha itself, the expected value,
            instead of a drawn location: less noise for the gradient (0.5 in the paper)
        :param inference: in eval mode take the likeliest location ('argmax'), a drawn one ('sample') or 'expectation'
        """
        super().__init__(*args, **kwargs)
        self.expected_share, self.inference = expected_share, inference

    def init_state(self, features):
        state = super().init_state(features)
        return HardAttentionState(*state, location_log_prob=state.h.new_zeros(len(features)))

    def look(self, alpha, state):
        """:return: how much each location counts in the context (N, P), one-hot rows or alpha itself; the state"""
        if not self.training and self.inference == "expectation":
            return alpha, state
        if not self.training and self.inference == "argmax":
            return F.one_hot(alpha.argmax(dim=1), alpha.shape[1]).to(alpha.dtype), state
        location = alpha.detach().float().multinomial(1).squeeze(1)  # (N,)
        log_prob = alpha.gather(1, location.unsqueeze(1)).squeeze(1).clamp_min(1e-20).log()  # (N,), for the reward
        takes_alpha = torch.rand_like(log_prob) < (self.expected_share if self.training else 0)  # (N,)
        drawn = F.one_hot(location, alpha.shape[1]).to(alpha.dtype)  # (N, P)
        weights = torch.where(takes_alpha.unsqueeze(1), alpha, drawn)  # (N, P)
        return weights, state._replace(location_log_prob=log_prob.masked_fill(takes_alpha, 0.0))
