"""What training minimises."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from captioning.distributed import Share, average

# What is reported of a batch, and the column of log.csv that its mean over an epoch gets.
READINGS = {"cross_entropy": "train_loss", "top5_accuracy": "train_top5_accuracy", "reward": "train_reward"}


class CaptionLoss(nn.Module):
    """
    Cross entropy of every word, plus what keeps attention from staring at one place, plus what teaches hard attention.

    Which terms there are follows from what the decoder gives: no attention, no doubly stochastic term; nothing drawn,
    no REINFORCE. The moving average of REINFORCE's baseline is a buffer, so it goes into the checkpoint.
    """

    def __init__(
        self, doubly_stochastic_weight=1.0, label_smoothing=0.0, reinforce_weight=0.1, entropy_weight=0.002,
        baseline_momentum=0.9,
    ):  # fmt: skip
        """
        :param doubly_stochastic_weight: lambda of equation 14: look at each location about once in a caption
        :param label_smoothing: share of the target that is spread over all words (Szegedy et al. 2016)
        :param reinforce_weight: lambda_r of section 4.1, how much the drawn locations' reward counts
        :param entropy_weight: lambda_e of section 4.1, how much spread-out attention is wanted. (The paper's code
            has 0.1 and 0.002 too, but on another scale: its reward is a mean over words, and neither is divided by the
            batch.)
        :param baseline_momentum: share of the old baseline in the new one
        """
        super().__init__()
        self.doubly_stochastic_weight, self.label_smoothing = doubly_stochastic_weight, label_smoothing
        self.reinforce_weight, self.entropy_weight = reinforce_weight, entropy_weight
        self.baseline_momentum = baseline_momentum
        self.register_buffer("baseline", torch.zeros(()))

    def forward(self, decoded, share=Share(), advantages=None):  # noqa: B008  it cannot be changed
        """
        :param decoded: `models.Decoded`
        :param share: of several processes, how much of the batch this one has; the mean of what they return is then
            that of the whole batch
        :param advantages: (N,), for captions that the model drew itself, how much better than usual each is, which is
            then all that counts: no label smoothing, no doubly stochastic term; None for true captions
        :return: the loss to minimise, and the cross entropy alone (mean of the words, in nats; None for captions that
            the model drew), both 0-d
        """
        if advantages is None:
            scores = decoded.logits.float()  # (M, vocab_size)
            loss = share.words * F.cross_entropy(scores, decoded.targets, label_smoothing=self.label_smoothing)
            cross_entropy = loss.detach()
            if self.label_smoothing:  # what is printed can be compared with other runs
                cross_entropy = share.words * F.cross_entropy(scores.detach(), decoded.targets)
        else:
            loss, cross_entropy = share.captions * self.self_critical(decoded, advantages), None
        if decoded.alphas is not None and advantages is None:  # rewards alone are to teach
            looked = decoded.alphas.float().sum(dim=1)  # (N, P)
            loss = loss + share.captions * self.doubly_stochastic_weight * ((1 - looked) ** 2).mean()
        if decoded.location_log_probs is not None:
            loss = loss + share.words * self.reinforce(decoded, share)
        return loss, cross_entropy

    def self_critical(self, decoded, advantages):
        """
        Rennie et al. 2017, equation 7: a drawn caption's words become likelier, by how much better it is than usual.

        :return: 0-d; its gradient is the estimator, its value means nothing
        """
        word_log_probs = -F.cross_entropy(decoded.logits.float(), decoded.targets, reduction="none")  # (M,)
        advantages = advantages[decoded.order]  # (N,), the longest caption's first
        advantages = torch.cat([advantages[:n] for n in decoded.batch_sizes])  # (M,), of each word
        return -(advantages * word_log_probs).mean()

    def reinforce(self, decoded, share):
        """
        Section 4.1: d log p(s | a) weighted by how much likelier the caption was than usual, log p(y | s, a) - b.

        :return: 0-d; its gradient is the estimator, its value means nothing
        """
        word_log_probs = -F.cross_entropy(decoded.logits.detach().float(), decoded.targets, reduction="none")  # (M,)
        caption_log_probs = sum_per_caption(word_log_probs, decoded)  # (N,), log p(y | s, a)
        advantage = caption_log_probs - self.baseline  # (N,)
        if self.training:
            self.baseline.lerp_(average(caption_log_probs.mean() * share.captions), 1 - self.baseline_momentum)
        location_log_probs = sum_per_caption(decoded.location_log_probs, decoded)  # (N,), log p(s | a)
        alphas = decoded.alphas.float().clamp_min(1e-20)  # the gradient of entropy is infinite at 0
        entropy = torch.special.entr(alphas).sum(dim=(1, 2))  # (N,), 0 after a caption's end
        gain = self.reinforce_weight * advantage * location_log_probs + self.entropy_weight * entropy  # (N,)
        return -gain.sum() / len(word_log_probs)  # a mean over words, as the cross entropy is


def sum_per_caption(packed, decoded):
    """:return: (N,), sums over the timesteps of packed (M,)"""
    batch_sizes = torch.tensor(decoded.batch_sizes)
    return pad_packed_sequence(PackedSequence(packed, batch_sizes), batch_first=True)[0].sum(dim=1)


def readings_of_batch(decoded, share, cross_entropy, reward):
    """
    Measure what is reported of a batch; `READINGS` names each number's column.

    :param reward: of the captions that the model drew, 0-d; None if it learned from true ones
    :return: dict of readings, each 0-d; of several processes, their mean is that of the complete batch
    """
    if reward is not None:
        return {"reward": share.captions * reward}
    accuracy = share.words * top_k_accuracy(decoded.logits.detach(), decoded.targets, 5)
    return {"cross_entropy": cross_entropy, "top5_accuracy": accuracy}


@torch.no_grad()
def top_k_accuracy(scores, targets, k):
    """
    :param scores: (M, vocab_size)
    :param targets: (M,)
    :return: 0-d, share of the targets that are among the k highest scores
    """
    own = scores.gather(1, targets.unsqueeze(1))  # (M, 1)
    above = torch.gt(scores, own, out=torch.empty_like(scores))  # 1 or 0; bool takes several times as long on CPUs
    return (above.sum(dim=1) < k).float().mean()
