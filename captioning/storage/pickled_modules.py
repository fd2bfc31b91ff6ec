"""
The tensors of pickled modules, such as the field's tutorial saves, without importing a class or running any code.
"""

import os
from pathlib import Path

import torch

from captioning.storage.files import check_file
from captioning.storage.unpickling import Inert, UnlistedName, open_pickle
from utils import UserError

# The classes of such a model, of its optimizers and of what old PyTorch kept beside them.
INERT = {
    "models": "Encoder DecoderWithAttention Attention",
    "torch.nn.modules.activation": "ReLU Sigmoid Softmax",
    "torch.nn.modules.batchnorm": "BatchNorm2d",
    "torch.nn.modules.container": "Sequential",
    "torch.nn.modules.conv": "Conv2d",
    "torch.nn.modules.dropout": "Dropout",
    "torch.nn.modules.linear": "Identity Linear",
    "torch.nn.modules.pooling": "AdaptiveAvgPool2d MaxPool2d",
    "torch.nn.modules.rnn": "LSTMCell",
    "torch.nn.modules.sparse": "Embedding",
    "torch.nn.parallel.data_parallel": "DataParallel",
    "torch.nn.backends.thnn": "_get_thnn_function_backend",
    "torch.optim.adam": "Adam",
    "torch.optim.adamw": "AdamW",
    "torch.optim.rmsprop": "RMSprop",
    "torch.optim.sgd": "SGD",
    "torchvision.models.resnet": "BasicBlock Bottleneck",
}
MOST_LEVELS = 32  # of modules within modules
MOST_SHARING = 4  # so many tensors may, on average, share the bytes of a file: tied weights do


def load_pickled_modules(path, names):
    """
    Read what `torch.save({"encoder": encoder, ...}, path)` wrote, with any PyTorch since 0.4.

    :param path: of the file
    :param names: of those modules in the pickled dict whose tensors are wanted
    :return: the dict, in which modules are `Inert`; and a dict of name -> state dict
    :raises UserError: if the file is missing, damaged or another, or asks for code
    """
    check_file(path)
    inert = {f"{module}.{name}" for module, some in INERT.items() for name in some.split()}
    try:
        with Path(path).open("rb") as file:
            content, read_storage = open_pickle(file, inert)
            most_bytes = MOST_SHARING * os.fstat(file.fileno()).st_size
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, not a dict")
            for name in names:
                if not isinstance(content.get(name), Inert):
                    raise UserError(f"has no pickled module '{name}'; give a checkpoint of the tutorial")
                children = content[name].state["_modules"]
                if list(children) == ["module"]:  # DataParallel is around it
                    content[name] = children["module"]
            return content, {name: read_tensors(content[name], read_storage, most_bytes) for name in names}
    except UnlistedName as name:
        raise UserError(
            f"{path}: asks for '{name}', which no pickled captioning model needs; the file is refused, and nothing of "
            "it was run"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file fails in a dozen ways: zipfile, pickle, struct, key and type errors
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"{path}: cannot be read as a pickled checkpoint ({reason}); get it again") from error


def read_tensors(module, read_storage, most_bytes):
    """
    :param module: `Inert`
    :param read_storage: function of a `StoredNumbers` to its bytes
    :param most_bytes: that the tensors may have together
    :return: dict of dotted name -> tensor, the parameters and buffers of the module and those within it
    :raises ValueError: if modules or tensors are more than a file of that size can mean
    """
    tensors, storages, seen, waiting = {}, {}, set(), [("", module)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:  # a module that holds itself would never end
            continue
        seen.add(id(module))
        if prefix.count(".") > MOST_LEVELS:
            raise ValueError(f"its modules are nested more than {MOST_LEVELS} deep")
        for name, stored in [*module.state["_parameters"].items(), *module.state["_buffers"].items()]:
            if stored is None:  # a layer without bias
                continue
            key = stored.storage.key
            if key not in storages:
                storages[key] = read_numbers(stored.storage, read_storage)
            tensor = storages[key].as_strided(stored.size, stored.stride, stored.offset).clone()
            most_bytes -= tensor.nbytes
            if most_bytes < 0:
                raise ValueError("its tensors have more numbers than the file")
            tensors[prefix + name] = tensor
        waiting += [(f"{prefix}{name}.", child) for name, child in module.state["_modules"].items() if child]
    return tensors


def read_numbers(storage, read_storage):
    """:return: (count,) tensor of a `StoredNumbers`"""
    numbers = torch.frombuffer(bytearray(read_storage(storage)), dtype=storage.dtype)
    if len(numbers) != storage.count:
        raise ValueError(f"{len(numbers)} numbers found in a storage, {storage.count} expected; it was cut off")
    return numbers
