"""
Matrix products of a recurrence on CPUs, in two cheaper ways that compute the same. They apply within

    with shared_products():
        for t in ...:

(A layer without a bias is left alone, and so is a small weight that meets many rows, such as that of attention's score:
stacking the rows would cost more.)

One weight gradient for a whole recurrence: a layer that is used at every timestep gets, from plain autograd, a gradient
at every timestep: each is as large as its weights, comes from a handful of rows, and has to be added to the others. The
rows of all timesteps stacked give the same sum at once, three to four times as fast.

oneDNN on CPUs: PyTorch multiplies float32 matrices with MKL, which on some of AMD's processors reaches half of what
oneDNN does. oneDNN first puts a weight into an order of its own, which takes longer than to multiply a few rows by it;
a layer that is used again keeps it in that order, in bfloat16 too. Only large weights are worth it.
"""

from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from utils import autocast_dtype

LARGE = 200_000  # numbers in a weight whose products gain from oneDNN

_context = ContextVar("the shared_products that we are in", default=None)


class shared_products:  # noqa: N801  used like a function
    """Context in which the uses of a layer share copies of its weight and gather what its gradient needs."""

    def __init__(self, with_onednn=True):
        """:param with_onednn: let oneDNN multiply where a layer gains from it"""
        self.with_onednn = with_onednn
        self.layers = {}  # (ids of its weight and its bias) -> what the uses of a layer share

    def __enter__(self):
        self.before = _context.set(self)

    def __exit__(self, *_):
        _context.reset(self.before)
        for shared in self.layers.values():
            shared.token = None  # the graph holds both: in a circle they would wait for the garbage collector

    def linear(self, x, weight, bias):
        """:return: `F.linear` of x (..., input)"""
        shared = self.shared(weight, bias, autocast_dtype(x))
        return _Linear.apply(x.flatten(0, -2), shared, shared.token).unflatten(0, x.shape[:-1])

    def embedding(self, words, table):
        """:return: (N, embed_dim), rows of the table (vocab_size, embed_dim) for words (N,)"""
        shared = self.shared(table, None, table.dtype)
        return _Embedding.apply(words, shared, shared.token)

    def shared(self, weight, bias, dtype):
        layer = id(weight), id(bias)  # tied weights are one tensor with two uses
        if layer not in self.layers:
            self.layers[layer] = _Shared(weight, bias, dtype, self.with_onednn)
        return self.layers[layer]


def sharing():
    """:return: the `shared_products` that the caller is in; None if in none, or if no gradient is wanted"""
    return _context.get() if torch.is_grad_enabled() else None


def open_sharing(decoder, _, with_onednn=True):
    """A forward pre-hook: a pass through a decoder on the CPU begins to share its products."""
    close_sharing(decoder)  # PyTorch calls no hook after Ctrl-C: of a pass that ended so, sharing is still open
    if next(decoder.parameters()).device.type == "cpu":
        shared_products(with_onednn).__enter__()


def close_sharing(decoder, *_):
    """A forward hook: the pass has ended, or failed."""
    if context := _context.get():
        context.__exit__()


def linear(x, weight, bias):
    """:return: `F.linear` of x (..., input)"""
    context = sharing()
    if context is None or not is_worth_it(x, weight, bias):
        return F.linear(x, weight, bias)
    return context.linear(x, weight, bias)


class SharingLinear(nn.Linear):
    """`nn.Linear`; within `shared_products`, if it has a bias, its uses share what they have in common."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class SharingEmbedding(nn.Embedding):
    """`nn.Embedding`, without its options, that gathers the gradients of its uses within `shared_products`."""

    def forward(self, words):
        context = sharing()
        if context is None or words.ndim > 1 or not self.weight.requires_grad:
            return super().forward(words)
        return context.embedding(words, self.weight)


class SharingLSTMCell(nn.LSTMCell):
    """`nn.LSTMCell`, written out with the `linear` whose timesteps share their products."""

    def forward(self, x, state):
        h, c = state  # (N, hidden_size) each
        if x.device.type != "cpu":
            return super().forward(x, state)
        gates = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)
        i, f, g, o = gates.float().chunk(4, dim=1)  # input, forget, candidate, output: (N, hidden_size) each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # (N, hidden_size)
        return torch.sigmoid(o) * torch.tanh(c), c


def is_worth_it(x, weight, bias):
    """:return: whether a linear layer gains here: it has a bias, is trained, and its weight is large beside its rows"""
    return bias is not None and weight.requires_grad and weight.numel() > min(x.numel(), LARGE)


class _Shared:
    """What all uses of a layer share: its tensors without their history, and the rows for the weight's gradient."""

    def __init__(self, weight, bias, dtype, with_onednn):
        self.named_by = weight, bias  # kept alive, so that no other tensor gets their ids
        self.weight = weight.detach().to(dtype)  # (output, input)
        self.bias = None if bias is None else bias.detach().to(dtype)  # (output,)
        self.with_onednn, self.uses_onednn = with_onednn, with_onednn and gains_from_onednn(self.weight)
        self.uses, self.ordered = 0, None  # the weight in oneDNN's own order
        self.rows = []  # (backward pass, gradient (M, output), input (M, input)) of every use
        self.token = _Sum.apply(self, weight, *([] if bias is None else [bias]))

    def linear(self, x):
        """:return: `F.linear` of rows x (M, input). At the second use the weight is put into oneDNN's order."""
        self.uses += 1
        if self.uses == 2 and self.with_onednn and gains_from_onednn(self.weight, ordered=True):
            self.ordered = torch.ops.mkldnn._reorder_linear_weight(self.weight, len(x))
        if self.ordered is not None:
            return onednn_product(x, self.ordered, self.bias)
        return self.product(x, self.weight, self.bias)

    def product(self, x, weight, bias=None):
        """:return: `F.linear`, done by oneDNN if the layer gains from it"""
        return onednn_product(x, weight, bias) if self.uses_onednn else F.linear(x, weight, bias)


class _Linear(Function):
    """One use of a linear layer. Backward passes the gradient on to its input and notes its rows."""

    @staticmethod
    def forward(ctx, x, shared, token):
        ctx.dtype, ctx.shared = x.dtype, shared
        x = x.to(shared.weight.dtype)  # (M, input)
        ctx.save_for_backward(x)
        return shared.linear(x)

    @staticmethod
    def backward(ctx, gradient):
        shared = ctx.shared
        gradient = gradient.to(shared.weight.dtype)  # (M, output)
        note(shared, gradient, *ctx.saved_tensors)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        of_input = shared.product(gradient, shared.weight.T)  # (M, input)
        return of_input.to(ctx.dtype), None, None


class _Embedding(Function):
    """One use of an embedding: rows of its table."""

    @staticmethod
    def forward(ctx, words, shared, token):
        ctx.shared = shared
        ctx.save_for_backward(words)
        return F.embedding(words, shared.weight)

    @staticmethod
    def backward(ctx, gradient):
        note(ctx.shared, gradient, *ctx.saved_tensors)
        return None, None, None


class _Sum(Function):
    """
    The gradient of a layer's weight. Every use depends on its token, so backward comes here after all of them, though
    none gives the token a gradient.
    """

    @staticmethod
    def forward(ctx, shared, weight, bias=None):
        ctx.shared, ctx.dtype, ctx.has_bias = shared, weight.dtype, bias is not None
        return torch.zeros((), device=weight.device)

    @staticmethod
    def backward(ctx, _):
        shared = ctx.shared
        gradients, inputs = gathered(shared)
        if not ctx.has_bias:  # inputs (M,) are ids, gradients (M, embed_dim)
            return None, torch.zeros_like(shared.weight).index_add_(0, inputs, gradients)
        of_weight = shared.product(gradients.T, inputs.T)  # (output, input)
        return None, of_weight.to(ctx.dtype), gradients.sum(dim=0).to(ctx.dtype)


def note(shared, gradient, inputs):
    """Keep the rows of one use for the sum of this backward pass."""
    shared.rows.append((torch._C._current_graph_task_id(), gradient, inputs))


def gathered(shared):
    """:return: the gradients (M, output) and inputs of all uses in this backward pass; nothing of them is kept"""
    this_pass = torch._C._current_graph_task_id()  # an earlier one may have asked for other gradients only
    rows = [row[1:] for row in shared.rows if row[0] == this_pass]
    shared.rows.clear()
    return (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*rows, strict=True))


def onednn_product(x, weight, bias=None):
    """:return: `F.linear` of rows x (M, input), done by oneDNN (PyTorch calls it mkldnn)"""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def gains_from_onednn(weight, ordered=False):
    """
    :param ordered: whether it would find the weight in its own order
    :return: whether oneDNN multiplies by this weight faster than what PyTorch would take
    """
    if weight.device.type != "cpu" or weight.numel() < LARGE or not torch.backends.mkldnn.is_available():
        return False
    if ordered and weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
