"""
The decoder as the field's tutorial describes it, for the benchmarks to compare with: features on the full 14 x 14 grid,
attention's projection of them at every timestep, the vocabulary's scores timestep by timestep, one photo at a time.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from models import resize_grid


class PlainDecoder(nn.Module):
    """Soft attention; `take` copies the weights of ours, so that both give the same numbers."""

    def __init__(self, vocab_size, encoder_dim, embed_dim=512, decoder_dim=512, attention_dim=512, dropout=0.5):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def take(self, ours):
        """Copy the weights of a `models.DecoderWithAttention`."""
        names = {name.replace("attention.", "").replace("decode_step.0.", "decode_step."): tensor
                 for name, tensor in ours.state_dict().items()}  # fmt: skip
        self.load_state_dict(names)
        return self

    def attend(self, features, h):
        """:return: context (N, encoder_dim), alpha (N, P)"""
        att = torch.relu(self.encoder_att(features) + self.decoder_att(h).unsqueeze(1))  # (N, P, attention_dim)
        alpha = self.full_att(att).squeeze(2).softmax(dim=1)
        return (features * alpha.unsqueeze(2)).sum(dim=1), alpha

    def step(self, embedded, features, h, c):
        """:return: alpha (N, P), h and c (N, decoder_dim)"""
        context, alpha = self.attend(features, h)
        context = torch.sigmoid(self.f_beta(h)) * context
        h, c = self.decode_step(torch.cat([embedded, context], dim=1), (h, c))
        return alpha, h, c

    def forward(self, features, captions, lengths):
        """
        :param features: (N, 14, 14, encoder_dim)
        :return: scores (N, T, vocab_size), alphas (N, T, P), both zero after a caption's end; the captions, sorted;
            their numbers of words to predict
        """
        lengths, order = lengths.sort(descending=True, stable=True)
        features, captions = features[order].flatten(1, 2), captions[order]  # (N, P, encoder_dim)
        mean = features.mean(dim=1)
        h, c = self.init_h(mean), self.init_c(mean)
        embedded = self.embedding(captions)  # (N, max_length, embed_dim)
        decode_lengths = (lengths - 1).tolist()
        scores = features.new_zeros(len(captions), max(decode_lengths), self.fc.out_features)
        alphas = features.new_zeros(len(captions), max(decode_lengths), features.shape[1])
        for t in range(max(decode_lengths)):
            n = sum(length > t for length in decode_lengths)
            alpha, h, c = self.step(embedded[:n, t], features[:n], h[:n], c[:n])
            scores[:n, t] = self.fc(self.dropout(h))
            alphas[:n, t] = alpha
        return scores, alphas, captions, decode_lengths

    @torch.no_grad()
    def beam_search(self, features, start, end, beam_size, steps):
        """
        :param features: (1, 14, 14, encoder_dim), of one photo
        :return: list of word ids, without <start> and <end>
        """
        k = beam_size
        features = features.flatten(1, 2).expand(k, -1, -1)  # (k, P, encoder_dim)
        mean = features.mean(dim=1)
        h, c = self.init_h(mean), self.init_c(mean)
        written = torch.full((k, 1), start, device=features.device)
        totals = torch.zeros(k, 1, device=features.device)
        complete = []
        for step in range(1, steps + 1):
            alpha, h, c = self.step(self.embedding(written[:, -1]), features[: len(written)], h, c)
            candidates = totals + self.fc(h).log_softmax(dim=1)  # (k, vocab_size)
            best, index = (candidates[0] if step == 1 else candidates.flatten()).topk(k)
            rows, words = index // candidates.shape[1], index % candidates.shape[1]
            written = torch.cat([written[rows], words.unsqueeze(1)], dim=1)
            going = [i for i, word in enumerate(words.tolist()) if word != end]
            complete += [(best[i].item(), written[i].tolist()[1:-1]) for i in range(k) if i not in going]
            k = len(going)
            if k == 0:
                break
            written, totals, h, c = written[going], best[going].unsqueeze(1), h[rows][going], c[rows][going]
        if not complete:
            return written[totals.argmax()].tolist()[1:]
        return max(complete, key=lambda found: found[0])[1]


def plain_encode(encoder, images):
    """:return: features (N, 14, 14, encoder_dim) of uint8 images, the memory in PyTorch's usual order"""
    images = ((images.float() / 255 - encoder.mean) / encoder.std).contiguous()
    return resize_grid(encoder.backbone(images).permute(0, 2, 3, 1), 14)


@torch.no_grad()
def settle(encoder, images):
    """Give a random network's batch normalisation the statistics of these photos, so that features stay moderate."""
    layers = [layer for layer in encoder.backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0  # nothing of the old ones stays
    encoder.backbone.train()((images.float() / 255 - encoder.mean) / encoder.std)
    for layer in layers:
        layer.momentum = 0.1
    encoder.eval()
