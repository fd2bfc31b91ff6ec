"""
A run's folder: its checkpoints, of which one is always whole; its curves; and how it came about.

last.pth is where the run stands, previous.pth where it stood a save before, best.pth the best so far. config.json has
the settings; starts.json says of each start which command, versions and commit it was. TensorBoard's curves lie beside.
"""

import dataclasses
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from captioning.distributed import is_first
from captioning.storage.files import atomic_path, load_json, remove_leftovers
from captioning.storage.tensors import load_checkpoint, save_checkpoint
from utils import UserError

CURVES = "events.out.tfevents.*"  # TensorBoard's files


class RunFolder:
    """Where a run is saved, how often, and taken up again."""

    def __init__(self, path, save_minutes):
        """
        :param path: of the folder, which need not exist yet
        :param save_minutes: time between two checkpoints within an epoch; 0 for none
        """
        self.path, self.save_minutes = Path(path), save_minutes
        self.last, self.previous, self.best = (self.path / f"{name}.pth" for name in ("last", "previous", "best"))
        self.curves = {}  # of the checkpoint that was resumed: TensorBoard's files, and how long they were
        self.saved_step, self.saved_time = 0, time.monotonic()

    def load(self, resume):
        """
        :param resume: path of a checkpoint; 'auto' for this folder's last.pth if there is one; None for a new run
        :return: its content, None for a new run
        :raises UserError: if it is damaged; the line says whether its predecessor can be resumed
        """
        if resume is None or (resume == "auto" and not self.last.exists()):
            return None
        path = self.last if resume == "auto" else Path(resume)
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            predecessor = path.with_name(self.previous.name)
            if not path.exists() or path == predecessor or not is_sound(predecessor):
                raise
            raise UserError(f"{error}; or go on from its predecessor, which is sound: --resume {predecessor}") from None
        self.saved_step = checkpoint["progress"].get("step", 0)
        if path.parent.resolve() == self.path.resolve():
            self.curves = checkpoint.get("curves", {})
            sizes = self.curves.values() if isinstance(self.curves, dict) else [None]
            if not all(type(size) is int and size >= 0 for size in sizes):
                raise UserError(f"{path}: its curves are no dict of file sizes; get or make it again")
        return checkpoint

    def begin(self, config, step):
        """
        Write config.json, add to starts.json, and go on with the curves as they were when the checkpoint was saved:
        what a killed run drew after it will be drawn again.

        :param config: train.py's
        :param step: of the optimizer, done so far
        :return: SummaryWriter
        """
        remove_leftovers(self.path, r"\w+\.(pth|json)")
        starts = self.path / "starts.json"
        before = load_json(starts) if starts.exists() or starts.is_symlink() else []
        if not isinstance(before, list):
            raise UserError(f"{starts}: a list of the run's starts expected; move the file away, or mend it")
        record = [*before, describe_start(config, step)]
        for path, content in ((self.path / "config.json", dataclasses.asdict(config)), (starts, record)):
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in self.path.glob(CURVES) if self.curves else ():
            if path.name not in self.curves:
                path.unlink()
            elif path.stat().st_size > self.curves[path.name]:
                with path.open("rb+") as file:
                    file.truncate(self.curves[path.name])
        return SummaryWriter(self.path, purge_step=step + 1)  # also hides the curves of an older run in this folder

    def is_due(self):
        """:return: whether it is time for a checkpoint within the epoch"""
        return self.save_minutes > 0 and time.monotonic() - self.saved_time >= 60 * self.save_minutes

    def save(self, run, best=False):
        """
        Write last.pth, and keep the one before as previous.pth. All processes call it, the first writes.

        :param run: `Run`, between two steps
        :param best: write best.pth too, and first: a run that is killed in between will do both again
        :raises UserError: if the disk is full, or if weights are not finite; the files are then as they were
        """
        content = run.state_dict()
        if is_first():
            self.write(run, content, best)
        self.saved_step, self.saved_time = run.step, time.monotonic()

    def write(self, run, content, best):
        """Write the files of `save`."""
        run.check_weights()
        run.writer.flush()
        content["curves"] = {path.name: path.stat().st_size for path in self.path.glob(CURVES)}
        if best:
            save_checkpoint(content, self.best)
        save_checkpoint(content, self.last, self.previous)


def is_sound(path):
    """:return: whether a checkpoint can be read"""
    try:
        return bool(load_checkpoint(path))
    except UserError:
        return False


def describe_start(config, step):
    """:return: dict of what one needs to know to do the same again"""
    gpu = torch.cuda.is_available()
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "step": step,
        "config": dataclasses.asdict(config),
        "git": git_state(Path(__file__).parent),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "h5py": h5py.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if gpu else None,
            "gpu": torch.cuda.get_device_name() if gpu else None,
            "platform": platform.platform(),
        },
    }


def git_state(folder):
    """:return: dict of the commit, and whether files differ from it; None where there is no git"""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", folder, *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}
