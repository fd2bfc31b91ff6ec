"""
The decoder's matrix products in training, made cheaper without changing what they compute. Within

    with shared_products():
        for t in ...:

every `nn.Linear` with a bias and every `nn.Embedding` is treated in two ways; the code inside needs no change. (Small
weights that meet many rows, as attention's score does, are left alone: to stack the rows would cost more.)

One weight gradient for a whole recurrence: a layer that is used at every timestep gets, from plain autograd, a gradient
at every timestep: each is as large as its weights, comes from a handful of rows, and has to be added to the others. The
rows of all timesteps stacked give the same sum at once, three to four times as fast.

oneDNN for float32 on CPUs: PyTorch multiplies float32 matrices with MKL, which on some of AMD's processors reaches half
of what oneDNN does. oneDNN prepares itself for each number of rows that it meets, and batches have many, so rows are
padded to a few round numbers. Only large weights are worth it.

Attention's scores meet here too, to be made as attention_scores.py says.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from attention_scores import SharedKeys, gains_from_sharing, score_cells

LARGE = 200_000  # numbers in a weight whose products gain from oneDNN
FEW = 64  # rows for which it does not pay that oneDNN re-orders a whole weight


class shared_products(TorchFunctionMode):  # noqa: N801  used like a function
    """Context in which a layer's uses share the copies of its weight and gather what its gradient needs."""

    def __init__(self):
        super().__init__()
        self.layers = {}  # of a function and its weight: a `_Shared`

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if function is F.linear and len(args) == 3 and is_worth_it(*args):
                x, weight, bias = args
                shared = self.shared(function, weight, bias, matmul_dtype(x))
                return _Linear.apply(x.flatten(0, -2), shared, shared.token).unflatten(0, x.shape[:-1])
            if function is score_cells and gains_from_sharing(*args):
                keys, query, layer, _ = args
                return self.shared_keys(keys, layer).scores(query, layer)
            if function is F.embedding and kwargs.get("max_norm", (*args, None, None)[3]) is None:
                words, weight = args[:2]
                if words.ndim == 1 and weight.requires_grad:
                    shared = self.shared(function, weight, None, weight.dtype)
                    return _Embedding.apply(words, shared, shared.token)
        return function(*args, **kwargs)

    def shared(self, function, weight, bias, dtype):
        layer = function, id(weight), id(bias)  # tied weights are one tensor with two uses
        if layer not in self.layers:
            self.layers[layer] = _Shared(weight, bias, dtype)
        return self.layers[layer]

    def shared_keys(self, keys, layer):
        """:return: the `SharedKeys` of a tensor that begins where these do: they are its first rows"""
        use = score_cells, keys.data_ptr(), keys.shape[1:], id(layer.weight)
        if use not in self.layers or len(keys) > len(self.layers[use].keys):
            self.layers[use] = SharedKeys(keys, layer)
        return self.layers[use]


def is_worth_it(x, weight, bias):
    """:return: whether a linear layer gains here: it has a bias, is trained, and its weight is large beside its rows"""
    return bias is not None and weight.requires_grad and weight.numel() > min(x.numel(), LARGE)


def matmul_dtype(x):
    """:return: the type in which autocast would multiply x"""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Shared:
    """What all uses of a layer share: its tensors without their history, and the rows for the weight's gradient."""

    def __init__(self, weight, bias, dtype):
        self.named_by = weight, bias  # kept alive, so that no other tensor gets their ids
        self.weight = weight.detach().to(dtype)  # (output, input)
        self.bias = None if bias is None else bias.detach().to(dtype)  # (output,)
        self.rows = []  # (backward pass, gradient (M, output), input (M, input)) of every use
        self.token = _Sum.apply(self, weight, *([] if bias is None else [bias]))


class _Linear(Function):
    """One use of a linear layer. Backward passes the gradient on to its input and notes its rows."""

    @staticmethod
    def forward(ctx, x, shared, token):
        ctx.dtype, ctx.shared = x.dtype, shared
        x = x.to(shared.weight.dtype)  # (M, input)
        ctx.save_for_backward(x)
        if uses_onednn(x, shared.weight):
            return onednn_product(padded(x), shared.weight, shared.bias)[: len(x)]
        return F.linear(x, shared.weight, shared.bias)

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.shared.weight
        gradient = gradient.to(weight.dtype)  # (M, output)
        note(ctx.shared, gradient, *ctx.saved_tensors)
        if not ctx.needs_input_grad[0]:
            of_input = None
        elif uses_onednn(gradient, weight):
            of_input = onednn_product(padded(gradient), weight.T)[: len(gradient)]  # (M, input)
        else:
            of_input = (gradient @ weight).to(ctx.dtype)  # (M, input)
        return of_input, None, None


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
        if uses_onednn(gradients, shared.weight):  # gradients (M, output), inputs (M, input)
            of_weight = onednn_product(padded(gradients).T.contiguous(), padded(inputs).T)  # (output, input)
            return None, of_weight, gradients.sum(dim=0)
        return None, (gradients.T @ inputs).to(ctx.dtype), gradients.sum(dim=0).to(ctx.dtype)


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
    """
    :return: `F.linear` of rows x (M, input), done by oneDNN

    It first puts the second matrix into an order of its own. So a few rows are better multiplied the other way round:
    they are put in order, not the weight.
    """
    linear = torch.ops.mkldnn._linear_pointwise
    if len(x) > FEW or not weight.is_contiguous():
        return linear(x, weight, bias, "none", [], "")
    product = linear(weight, x, None, "none", [], "").T  # (M, output)
    return torch.add(product, 0 if bias is None else bias, out=x.new_empty(product.shape))


def padded(x):
    """:return: x (M, size) with rows of zeros up to a round number: few more, and a multiple of 8"""
    step = max(8, 1 << max(0, len(x).bit_length() - 3))
    return F.pad(x, (0, 0, 0, -len(x) % step))


def uses_onednn(x, weight):
    """:return: whether products of x and the weight are better done by oneDNN (PyTorch calls it mkldnn)"""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return on_cpu and weight.numel() >= LARGE
