"""
A run's folder: its checkpoints, of which one is always complete; its curves; and how it came about.

last.pth is where the run stands, previous.pth where it stood a save before, best.pth the best so far. config.json has
the settings; starts.json says of each start which command, versions and commit it was. log.csv has a row for each
epoch, and TensorBoard's curves lie beside.
"""

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision

from captioning.distributed import is_first, is_joined
from captioning.storage.files import atomic_path, check_not_an_input, check_not_there, load_json, remove_leftovers
from captioning.storage.tensors import load_checkpoint, save_checkpoint
from captioning.training.run_log import TABLE, RunLog, start_wandb
from utils import Stopped, UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LOCK = ".lock"  # in the folder; it stays, as the lock goes with the process, not with the file
SETTINGS, STARTS = "config.json", "starts.json"
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
        self.resumed = None  # path of the checkpoint that the run continued from
        self.overwrite = False  # whether what an older run left is to go
        self.curves = {}  # of that checkpoint: TensorBoard's files, and how long they were
        self.saved_step, self.saved_time = 0, time.monotonic()
        self.held = None  # open file whose lock says that the folder is ours
        self.log = None  # `RunLog`, once the training begins

    def load(self, resume, overwrite=False, inputs=()):
        """
        :param resume: path of a checkpoint; 'auto' for this folder's newest if there is one; None for a new run
        :param overwrite: whether a new run may take the place of one that is in the folder
        :param inputs: paths of the files that the run begins with, or None among them; they are not replaced
        :return: its content, None for a new run
        :raises UserError: if another run uses the folder; if its checkpoints would be overwritten, or are to be both
            continued and overwritten; if the checkpoint is damaged (the line says whether its predecessor can be
            resumed)
        """
        self.hold()
        self.overwrite, path = overwrite, self.choose(resume)
        own = path is not None and path.parent.resolve() == self.path.resolve()
        if overwrite and (own or resume == "auto"):
            raise UserError(
                f"resume, overwrite: both found, but one continues the run in {self.path} and the other replaces it; "
                "leave one of them out"
            )
        there = [one for one in (self.last, self.previous, self.best) if one.exists() or one.is_symlink()]
        if there and not own and not overwrite:
            raise UserError(
                f"{self.path}: has the checkpoints of another run ({', '.join(one.name for one in there)}); "
                "continue it (--resume auto), choose another --run_folder, or let it be replaced (--overwrite)"
            )
        if not there and not overwrite and not (self.path / STARTS).exists():
            for name in (SETTINGS, TABLE):
                check_not_there("run_folder", self.path / name, overwrite)
        if path is None:
            for one in there:
                check_not_an_input("run_folder", one, inputs)
            return None
        if resume == "auto" and path != self.last:
            print(f"{self.last}: no such file; continuing from {path}")
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            predecessor = path.with_name(self.previous.name)
            if not path.exists() or path == predecessor or not is_sound(predecessor):
                raise
            raise UserError(f"{error}; or continue from the intact one before: --resume {predecessor}") from None
        self.resumed, self.saved_step = path, checkpoint["progress"].get("step", 0)
        if own:
            self.curves = checkpoint.get("curves", {})
            sizes = self.curves.values() if isinstance(self.curves, dict) else [None]
            if not all(type(size) is int and size >= 0 for size in sizes):
                raise UserError(f"{path}: its curves are not a dict of file sizes; get or make it again")
        return checkpoint

    def choose(self, resume):
        """:return: path of the checkpoint to continue from, or None"""
        if resume != "auto":
            return None if resume is None else Path(resume)
        found = [path for path in (self.last, self.previous, self.best) if path.exists() or path.is_symlink()]
        return found[0] if found else None

    def hold(self):
        """
        Keep the folder for this run alone, until the process ends, however it ends.

        :raises UserError: if another run has it
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_folder: {self.path} is not a folder; choose another")
        if fcntl is None or self.held is not None or not is_first() or not self.path.is_dir():
            return
        try:
            # A link there may lead anywhere, and a pipe would be waited for.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            held = os.fdopen(os.open(self.path / LOCK, flags, 0o666), "w")
        except OSError as error:
            raise UserError(f"run_folder: {self.path} is not writable ({error.strerror}); choose another") from None
        try:
            # Unlike flock's, this lock is not shared with the DataLoader's workers, which outlive a killed run.
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = held
        except OSError as error:
            held.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else it is a file system without locks
                raise UserError(
                    f"{self.path}: another training is writing there; wait for its end, or choose another --run_folder"
                ) from None

    def release(self):
        """Let others have the folder."""
        if self.held is not None:
            self.held.close()
            self.held = None

    def begin(self, run):
        """
        Write config.json, add to starts.json, and continue the curves as they were when the checkpoint was saved:
        what a killed run drew after it will be drawn again. An older run that is to be replaced is removed.

        :param run: `Run`
        :return: `RunLog`
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_folder: {self.path} cannot be made ({error.strerror}); choose another") from None
        self.hold()
        remove_leftovers(self.path, r"\w+\.(pth|json|csv)")
        if self.overwrite:
            self.remove_older_run()
        starts = self.path / STARTS
        before = load_json(starts) if starts.exists() or starts.is_symlink() else []
        if not isinstance(before, list):
            raise UserError(f"{starts}: a list of the run's starts expected; move the file away")
        record = [*before, describe_start(run.config, run.step)]
        for path, content in ((starts, record), (self.path / SETTINGS, dataclasses.asdict(run.config))):
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        self.rewind_curves()
        first_time = record[0].get("time") if isinstance(record[0], dict) else None
        wandb_run = start_wandb(run.config.wandb, self.path, dataclasses.asdict(run.config), first_time)
        self.log = RunLog(self.path, run.step + 1, wandb_run)
        if run.history:
            self.log.table(run.history)
        return self.log

    def remove_older_run(self):
        """Remove the checkpoints, curves and tables of a run that is to be replaced."""
        for path in (self.last, self.previous, self.best, self.path / TABLE, self.path / STARTS):
            path.unlink(missing_ok=True)

    def rewind_curves(self):
        """
        Take out of TensorBoard's files what was drawn after the checkpoint, if they are still those that it knows.
        """
        known = {self.path / name: size for name, size in self.curves.items() if fnmatch(name, CURVES)}
        if not known or not all(path.is_file() and path.stat().st_size >= size for path, size in known.items()):
            return
        newest = max(path.stat().st_mtime for path in known)
        for path in self.path.glob(CURVES):
            if path in known:
                with path.open("rb+") as file:
                    file.truncate(known[path])
            elif path.stat().st_mtime >= newest:
                path.unlink()

    @contextlib.contextmanager
    def kept(self, run):
        """
        Within this block, whatever ends the training, no step that is done gets lost.

        :raises Stopped: after a signal
        :raises UserError: when a worker of the DataLoader was killed, or none answers
        """
        try:
            yield
        except KeyboardInterrupt as reason:  # no step is half done
            if run.step > self.saved_step:
                self.save(run)
            where = f" at step {run.step}; continue with --resume {self.last}" if self.last.exists() else ""
            number = getattr(reason, "number", signal.SIGINT)
            raise Stopped(number, f"stopped by {signal.Signals(number).name}{where}") from None
        except (RuntimeError, ConnectionResetError, EOFError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader "):
                raise
            if run.step > self.saved_step and not is_joined():  # the others wait elsewhere, and could not save with us
                self.save(run)
            where = f" All steps up to {self.saved_step} are saved: --resume {self.last}." if self.saved_step else ""
            reason = str(error).split("\n")[0].rstrip(". ")
            raise UserError(
                f"workers: one of them has ended, or hangs ({reason}).{where} If memory is short, also a container's "
                "/dev/shm, take fewer --workers; 0 needs none"
            ) from error
        finally:
            if self.log:
                with contextlib.suppress(OSError):  # a full disk, of which an error already tells
                    self.log.close()
            self.release()

    @contextlib.contextmanager
    def saved_if_it_fails(self, run):
        """Within this block, which changes nothing of the run, a failure loses no step."""
        try:
            yield
        except Exception:
            if run.step > self.saved_step and not is_joined():  # several processes have saved before it
                self.save(run)
            raise

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
        run.log.flush()
        content["curves"] = {path.name: path.stat().st_size for path in self.path.glob(CURVES)}
        if best:
            with run.average.in_place() as own:  # the tensors of `content` are the model's, not copies
                save_checkpoint({**content, "own_weights": own}, self.best)
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
