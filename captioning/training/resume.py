"""
A run taken up again: a checkpoint's content is checked in full, then put into a run that was built from the config.

Nothing in a checkpoint is trusted. The optimizer's fused steps trust all sizes and would write beyond the end of a
tensor that is too small, so of its state only the numbers are taken, into tensors of our own.
"""

import dataclasses
import math

import torch

from captioning.distributed import get_rank
from captioning.storage.tensors import OTHER_KIND, check_weights, load_checkpoint
from captioning.training.losses import READINGS
from captioning.training.report import PRINTED
from captioning.training.start import MODEL_SETTINGS
from utils import UserError, short

SAME = (*MODEL_SETTINGS, "fine_tune_encoder", "optimizer")  # settings that the resumed run must share
ORDER = ("batch_size", "accumulate", "image_major", "bucket", "seed")  # and within an epoch: what the next batch is
JUDGEMENT = ("stop_metric", "val_beam_size", "val_share")  # settings without which scores cannot be compared
OWN = ("resume", "run_folder", "overwrite", "start_from", "device", "workers", "save_minutes", "wandb")  # of each start
LARGEST = 10**12  # of a count of steps or epochs; TensorBoard ends at 2 ** 63
MOMENTS = {  # of the optimizers, what they keep of each parameter besides the step
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}


def restore(run, checkpoint):
    """
    Go on where a checkpoint stopped.

    :param run: `Run`, built from the config, at step 0
    :param checkpoint: dict, as `load_checkpoint` gives it
    :raises UserError: if it is not of this run, or damaged
    """
    check_data(run, checkpoint)
    within_epoch = checkpoint["progress"].get("batch", 0) > 0
    for name in (*SAME, *ORDER * within_epoch):
        found, expected = getattr(run.config, name), checkpoint["config"].get(name)
        if found != expected:
            raise UserError(f"{name}: {found!r} found, but the resumed run has {short(expected)}; repeat its options")
    try:
        checkpoint = with_own_weights(checkpoint)
        if checkpoint["progress"].get("self_critical_since", 0) and run.config.self_critical_from_epoch is not None:
            run.schedule = run.schedule_of_rewards()
        moments = check_parts(run, checkpoint)
        for name in ("encoder", "decoder", "loss_function", "schedule", "scaler"):
            getattr(run, name).load_state_dict(checkpoint[name])
        run.average.load_state_dict(checkpoint.get("average", {}))
        # Learning rates and weight decay are the config's: a run that diverged may continue with others.
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": moments})
        run.schedule.apply()
        for name in run.PROGRESS:
            setattr(run, name, checkpoint["progress"].get(name, getattr(run, name)))
        for name, values in checkpoint.get("readings", {}).items():
            run.readings[name] = list(torch.tensor(values, dtype=torch.float32, device=run.device))
        run.sums = checkpoint.get("sums", {})
        run.history = checkpoint.get("history", [])
        run.best = checkpoint.get("best", {}) or best_of_old_checkpoint(run, checkpoint)
        for state in checkpoint["random_states"][get_rank() :][:1]:  # none, if there are more processes now
            torch.set_rng_state(state["cpu"])
            if state["gpu"] is not None and run.device.type == "cuda":
                torch.cuda.set_rng_state(state["gpu"], run.device)
    except (*OTHER_KIND, UserError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"resume: the checkpoint is of another run ({reason}); repeat its options") from error
    judge_again_if_needed(run, checkpoint)


def with_own_weights(checkpoint):
    """:return: the checkpoint with the weights that training goes on with, where best.pth has their mean over time"""
    parts = {name: dict(checkpoint[name]) for name in ("encoder", "decoder")}
    for name, tensor in checkpoint.get("own_weights", {}).items():
        part, _, name_in_part = name.partition(".")
        parts[part][name_in_part] = tensor
    return {**checkpoint, **parts}


def best_of_old_checkpoint(run, checkpoint):
    """:return: the best epoch's entry, from a checkpoint that has but its score"""
    score, epoch = checkpoint["progress"].get("best_score", -1.0), run.epoch - run.epochs_since_best
    return {"epoch": epoch, run.config.stop_metric: score} if score >= 0 else {}


def check_data(run, checkpoint):
    """:raises UserError: if the run's training data are not those of the checkpoint"""
    if checkpoint["word_map"] != run.word_map:
        raise UserError(
            "resume: the checkpoint has other words than the data; give the data of its run, or begin a new run: "
            "with another --run_folder, or with --overwrite and no --resume"
        )
    if checkpoint["image_size"] != run.image_size:
        raise UserError(
            f"resume: the data have photos of {run.image_size} px, but the resumed run has {checkpoint['image_size']} "
            "px; give the data of its run"
        )
    if digest_of(checkpoint, "TRAIN", run) != run.data["TRAIN"]:
        raise UserError(
            "resume: the checkpoint's run had other training photos or captions; give its data, or begin a new run: "
            "with another --run_folder, or with --overwrite and no --resume"
        )


def digest_of(checkpoint, split, run):
    """:return: what a checkpoint says of its data; an older one, which says nothing, is believed"""
    data = checkpoint.get("data")
    return data.get(split) if isinstance(data, dict) else run.data[split]


def judge_again_if_needed(run, checkpoint):
    """Forget the best score where the scores to come cannot be compared with it."""
    changed = changed_judgement(run.config, checkpoint["config"])
    if digest_of(checkpoint, "VAL", run) != run.data["VAL"]:
        changed.append("the validation data")
    forget_best_if_changed(run, changed)


def changed_judgement(config, settings):
    """
    :param settings: config of the run that is resumed, a dict
    :return: list of the settings that differ, without which scores cannot be compared
    """
    return [name for name in JUDGEMENT if settings.get(name) != getattr(config, name)]


def forget_best_if_changed(run, changed):
    """
    :param run: with `best` and `epochs_since_best`
    :param changed: list of what differs from the run that is resumed, in words
    """
    if changed and run.best:
        print(
            f"Changed since the checkpoint: {', '.join(changed)}. Scores cannot be compared with those before, so the "
            "next epoch counts as the best so far and replaces the best model"
        )
        run.best, run.epochs_since_best = {}, 0


def check_parts(run, checkpoint):
    """
    See that a checkpoint's parts fit the run's before any is taken.

    :return: the optimizer's moments, as `copy_moments` gives them
    :raises UserError: if one does not fit; other errors if something is missing or is of another kind
    """
    for name in ("encoder", "decoder", "loss_function"):
        check_weights(getattr(run, name), checkpoint[name], name)
    for name, kind in (("history", list), ("random_states", list), ("data", dict)):
        if not isinstance(checkpoint.get(name, kind()), kind):
            raise UserError(f"{name}: is {short(checkpoint[name])}, a {kind.__name__} expected")
    for name in ("schedule", "scaler", "progress"):
        for key, value in checkpoint[name].items():
            check_number(value, f"{name}: '{key}'")
            largest = run.steps_per_epoch * run.config.accumulate if key == "batch" else LARGEST
            counts = name != "scaler" and key != "best_score"
            if counts and (type(value) is not int or not 0 <= value <= largest):
                raise UserError(f"{name}: '{key}' is {short(value)}, a whole number from 0 to {largest:,} expected")
    for name, values in checkpoint.get("readings", {}).items():
        check_numbers(values, f"readings: '{name}'")
        if name not in READINGS:
            raise UserError(f"readings: '{short(name)}' is none that training has")
    for name, values in checkpoint.get("sums", {}).items():
        check_numbers(values, f"sums: '{name}'", count=2)
        if values[1] < 1 or name not in READINGS:
            raise UserError(f"sums: '{short(name)}' is none that training has")
    for entry in checkpoint.get("history", []):
        check_entry(entry, "history")
        if missing := sorted(PRINTED - set(entry)):
            raise UserError(f"history: an epoch has no {', '.join(missing)}")
    check_best(checkpoint)
    return copy_moments(run.optimizer, checkpoint["optimizer"])


def check_entry(entry, where):
    """:raises UserError: if what was noted of an epoch is no dict of names and numbers"""
    check_numbers(list(entry.values()), where)
    if not all(isinstance(name, str) for name in entry):
        raise UserError(f"{where}: names expected")


def check_best(checkpoint):
    """:raises UserError: if a checkpoint's best epoch is none"""
    best = checkpoint.get("best", {})
    check_entry(best, "best")
    if best and not {"epoch", checkpoint["config"].get("stop_metric")} <= set(best):
        raise UserError("best: has no epoch, or no score")


def copy_moments(optimizer, state_dict):
    """
    Take an optimizer's moments from a checkpoint, and nothing else: its settings are the config's.

    :param optimizer: a new one, with the parameters that it will change
    :param state_dict: of another one, from a file
    :return: dict of a parameter's number -> dict of name -> tensor: copies in memory of our own, laid out as the
        parameter is, whatever the strides in the file
    :raises UserError: if they do not fit the parameters
    """
    own, found = optimizer.state_dict()["param_groups"], state_dict["param_groups"]
    if [group["params"] for group in found] != [group["params"] for group in own]:
        raise UserError("optimizer: its groups have other parameters")
    for i, group in enumerate(found):
        check_number(group["lr"], f"optimizer: 'lr' of group {i}")
    names = MOMENTS[type(optimizer)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    copies = {}
    for index, moments in state_dict["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise UserError(f"optimizer: has a parameter {short(index)}, {len(parameters)} expected")
        parameter, copies[index] = parameters[index], {}
        stepped = ("step",) if "exp_avg" in names else ()
        if set(moments) - {"step"} != set(names) or not set(stepped) <= set(moments):
            raise UserError(f"optimizer: has other moments for parameter {index} than {', '.join(names)}")
        for name in (*stepped, *names):
            value = moments[name]
            if name == "momentum_buffer" and value is None:  # of a parameter that no step has changed yet
                copies[index][name] = None
                continue
            copies[index][name] = copy_numbers(value, parameter, name, index)
    return copies


def copy_numbers(value, parameter, name, index):
    """:return: a tensor with the numbers of one moment, in memory of our own"""
    shape = torch.Size() if name == "step" else parameter.shape
    plain = type(value) is torch.Tensor and value.layout == torch.strided and not value.is_meta
    if not plain or value.shape != shape or value.dtype != torch.float32 or not value.isfinite().all():
        raise UserError(f"optimizer: '{name}' of parameter {index} does not fit it, or is not finite")
    if name == "step":
        return torch.tensor(value.item())
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def check_number(value, where):
    """:raises UserError: if it is no number below infinity; what is below all, a best score may be at first"""
    if type(value) not in (int, float, bool) or not value < math.inf:
        raise UserError(f"{where} is {short(value)}, a number expected")


def check_numbers(values, where, count=None):
    """:raises UserError: if it is not a list of numbers (`count` of them)"""
    if not isinstance(values, list) or (count is not None and len(values) != count):
        raise UserError(f"{where} is {short(values)}, a list of numbers expected")
    for value in values:
        check_number(value, where)


def settings_of_resumed_run(config):
    """
    :param config: train.py's, as the file and the command line say it
    :return: a config with the settings of the run that `--resume FILE` names, so that none has to be repeated; None
        where no file is named, or it cannot be read
    """
    if config.resume in (None, "auto"):
        return None
    try:
        settings = load_checkpoint(config.resume)["config"]
    except UserError:  # told when the run begins, with what can be done
        return None
    known = {field.name for field in dataclasses.fields(config)} - set(OWN)
    return dataclasses.replace(config, **{name: value for name, value in settings.items() if name in known})
