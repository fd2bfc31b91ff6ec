"""
Self-critical sequence training (Rennie et al. 2017): the decoder writes captions by itself and is taught by their
score, CIDEr-D, instead of by the true words. What scores above the model's usual becomes likelier, what scores below
less so.

The usual comes from several captions that are drawn for each photo: each is compared with the mean of the others (Luo
2020), so no caption has to be searched just to compare with.
"""

import math
from collections import Counter

import torch

from captioning.inference.trained_model import NEVER_WRITTEN, Captioner

LONGEST_NGRAM = 4
SIGMA = 6.0  # of the Gaussian by which CIDEr-D punishes a difference in length, in words


def temperature_of(config):
    """
    :return: of the softmax that captions are drawn by: as the config says, or 1, and 0.6 where labels are smoothed.
        Smoothing leaves every step a share of odd words; drawn at 1, captions are so poor that their rewards spoil the
        model (docs/recipes.md)
    """
    if config.self_critical_temperature is not None:
        return config.self_critical_temperature
    return 0.6 if config.label_smoothing > 0 else 1.0


class SelfCritic:
    """Draws a model's captions and judges them."""

    def __init__(self, dataset, samples, temperature=1.0):
        """
        :param dataset: image-major `CaptionDataset` of the training split; its references are the judges
        :param samples: captions that are drawn for each photo
        :param temperature: of the softmax that they are drawn by
        """
        # A reference's own <unk> (the tutorial's files have no other words) is some word, not the one that is drawn.
        self.references = [
            [[*("" if word == "<unk>" else word for word in words), "<end>"] for words in photo["captions"]]
            for photo in dataset.references
        ]
        self.cider = CiderD(self.references)
        self.samples, self.temperature = samples, temperature
        self.never_drawn = torch.tensor([dataset.word_map[word] for word in NEVER_WRITTEN])  # (2,)
        self.longest = dataset.captions.shape[1] - 2  # words, without <start> and <end>

    @torch.no_grad()
    def draw(self, run, batch):
        """
        Let the model write captions, without dropout, and score them.

        Encoder and decoder are left in eval mode: the gradient has to be that of the very policy that drew. With
        dropout, the captions would be less likely than they were when drawn, and pushing down those that score low
        would never make them rarer.

        :param run: `Run`
        :param batch: `datasets.Batch` of B photos, perhaps augmented, on the run's device
        :return: the batch with the model's N = B * samples captions in place of the true ones; their advantages (N,),
            by how much each scored more than the others of its photo; the mean score, 0-d
        """
        captioner = Captioner(run.encoder.eval(), run.decoder.eval(), run.word_map)
        with run.autocast:
            features = run.encoder.features(batch.images).repeat_interleave(self.samples, dim=0)
            drawn = captioner.sample_features(features, self.longest, temperature=self.temperature)

        words = [captioner.sentence(one) + ["<end>"] * one.ended for one in drawn]
        groups = [words[i : i + self.samples] for i in range(0, len(words), self.samples)]
        scores = [self.cider(group, self.references[i]) for i, group in zip(batch.photos.tolist(), groups, strict=True)]
        scores = torch.tensor(scores)  # (B, samples)
        others = (scores.sum(dim=1, keepdim=True) - scores) / (self.samples - 1)  # (B, samples), mean of the others
        start, end, pad = (run.word_map[word] for word in ("<start>", "<end>", "<pad>"))
        captions = [[start, *one.words, *[end] * one.ended] for one in drawn]
        lengths = torch.tensor([len(caption) for caption in captions])  # (N,)
        captions = torch.tensor([caption + [pad] * (int(lengths.max()) - len(caption)) for caption in captions])
        image_rows = torch.arange(len(batch.photos)).repeat_interleave(self.samples)  # (N,)
        captions, advantages, mean = (
            numbers.to(run.device, non_blocking=True)  # only sampling has to wait for a GPU
            for numbers in (captions, (scores - others).flatten(), scores.mean())
        )
        return batch._replace(captions=captions, lengths=lengths, image_rows=image_rows), advantages, mean

    def as_drawn(self, decoded):
        """
        Give captions the probabilities by which they were drawn, so that the policy that is taught is the one that
        wrote. <pad> and <start> are never drawn. Were they to keep a share of the softmax, what is taken from words
        that score low would partly go to them, and nothing would ever take it back, until hardly anything is left.

        :param decoded: `models.Decoded` of the captions of `draw`
        :return: the same, its logits divided by the temperature, those of <pad> and <start> at -inf
        """
        logits = decoded.logits.float() / self.temperature  # (M, vocab_size)
        never_drawn = self.never_drawn.to(logits.device, non_blocking=True)  # (2,)
        return decoded._replace(logits=logits.index_fill(1, never_drawn, -torch.inf))


class CiderD:
    """
    CIDEr-D of single captions (Vedantam et al. 2015, section 4), with the document frequencies of a whole dataset.

    The numbers are those of the official scorer, which can only score the dataset that the frequencies come from.
    """

    def __init__(self, references):
        """:param references: for each photo of the dataset a list of captions, each a list of words"""
        self.log_photos = math.log(len(references))
        self.photos_with = Counter()  # n-gram -> number of photos of which a caption has it
        for captions in references:
            self.photos_with.update({ngram for words in captions for ngram in count_ngrams(words)})

    def __call__(self, captions, references):
        """
        :param captions: list of captions of one photo, each a list of words
        :param references: list of the photo's true captions
        :return: list of their scores, 0 to 10
        """
        references = [(len(words), *self.weigh(words)) for words in references]
        return [self.score(len(words), *self.weigh(words), references) for words in captions]

    def score(self, length, weights, norms, references):
        """:return: mean over references and n of the n-grams' cosine similarity, less where the lengths differ"""
        total = 0.0
        for other_length, other_weights, other_norms in references:
            products = [0.0] * LONGEST_NGRAM
            for ngram, weight in weights.items():
                if other := other_weights.get(ngram):
                    products[len(ngram) - 1] += (
                        min(weight, other) * other
                    )  # saying it more often than they gains nothing
            similarity = sum(
                product / (a * b) for product, a, b in zip(products, norms, other_norms, strict=True) if product
            )
            total += similarity * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
        return 10 * total / LONGEST_NGRAM / len(references)

    def weigh(self, words):
        """:return: dict of n-gram -> its count times its inverse document frequency; the norms for n = 1 to 4"""
        weights, squares = {}, [0.0] * LONGEST_NGRAM
        for ngram, count in count_ngrams(words).items():
            weights[ngram] = count * (self.log_photos - math.log(max(1, self.photos_with[ngram])))
            squares[len(ngram) - 1] += weights[ngram] ** 2
        return weights, [math.sqrt(square) for square in squares]


def count_ngrams(words):
    """:return: Counter of the sequences of one to four words, as tuples"""
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST_NGRAM + 1) for i in range(len(words) - n + 1))
