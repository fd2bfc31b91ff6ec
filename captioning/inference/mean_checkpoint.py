"""
The mean of several checkpoints' weights, as one checkpoint: a model as quick as one, often better than each.

That holds for checkpoints whose runs went on from one trained model: branches of a run, such as the same rewards with
other seeds, or the epochs of one run (Izmailov et al. 2018; Wortsman et al. 2022). Models that began with other random
weights have each neuron in another place, so that their mean captions nothing: let those decide together, as an
ensemble.
"""

import torch
import torch.nn.functional as F

from captioning.inference.small_checkpoint import complete
from captioning.inference.trained_model import build_captioner
from captioning.networks.registry import SETTINGS
from captioning.storage.tensors import load_checkpoint
from utils import UserError, short

SAME = ("encoder", "encoder_dim", "decoder", *(name for name in SETTINGS if not name.endswith("dropout")))
ONE_START = 0.5  # cosine of two decoders' weights; branches of one run have above 0.9, other beginnings below 0.1


def mean_of_checkpoints(paths):
    """
    :param paths: two or more checkpoints of train.py, small ones too
    :return: dict for `storage.tensors.save_checkpoint`; the least cosine between the decoders' weights
    :raises UserError: if a file is not a checkpoint, or its model, words or photos are others than the first's
    """
    checkpoints = [complete(load_checkpoint(path), path) for path in paths]
    first = checkpoints[0]
    for checkpoint, path in zip(checkpoints, paths, strict=True):
        build_captioner(checkpoint, path)  # refuses weights that do not fit the model, or are not finite
        check_alike(first, checkpoint, paths[0], path)
    mean = {name: first[name] for name in ("config", "word_map", "image_size")}
    longest = [checkpoint["max_length"] for checkpoint in checkpoints if "max_length" in checkpoint]
    epochs = max(checkpoint["progress"].get("epoch", 0) for checkpoint in checkpoints)
    return {
        **mean,
        **({"max_length": max(longest)} if longest else {}),
        **{part: mean_of_tensors([checkpoint[part] for checkpoint in checkpoints]) for part in ("encoder", "decoder")},
        "progress": {"epoch": epochs},
        "mean_of": list(map(str, paths)),
    }, min(cosine(first["decoder"], checkpoint["decoder"]) for checkpoint in checkpoints)


def check_alike(first, other, first_path, path):
    """:raises UserError: if the mean of two checkpoints would be of no model"""
    if other["word_map"] != first["word_map"]:
        raise UserError(
            f"{path}: its word map differs from that of {first_path}; only models with the same words have a mean"
        )
    if other["image_size"] != first["image_size"]:
        raise UserError(
            f"{path}: photos of {other['image_size']} px found, {first['image_size']} px expected as in {first_path}"
        )
    for name in SAME:
        default = SETTINGS[name].default if name in SETTINGS else None
        found, expected = (checkpoint["config"].get(name, default) for checkpoint in (other, first))
        if found != expected:
            raise UserError(
                f"{path}: its {name} is {short(found)}, {short(expected)} expected as in {first_path}; only models "
                "that are built alike have a mean; others can decide together, as an ensemble (--model of eval.py)"
            )


def mean_of_tensors(state_dicts):
    """:return: state dict of the means; whole numbers, such as counts of batches, are the first's"""
    first, number = state_dicts[0], len(state_dicts)
    return {
        # In double precision, weights that are equal, such as a frozen encoder's, stay as they are to the bit.
        name: (sum(one[name].double() for one in state_dicts) / number).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


def cosine(one, other):
    """:return: float, the cosine of the angle between the weights of two state dicts, biases left out"""
    flat = [torch.cat([weights[name].flatten() for name in one if one[name].ndim > 1]) for weights in (one, other)]
    return F.cosine_similarity(*flat, dim=0).item()
