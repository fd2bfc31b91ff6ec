"""
Where a run's numbers go: TensorBoard's curves, a table for spreadsheets (log.csv), and Weights & Biases where it is
asked for.
"""

import csv

from torch.utils.tensorboard import SummaryWriter

from captioning.storage.files import atomic_path
from utils import UserError

TABLE = "log.csv"
FIGURE_DPI = 60  # of figures in TensorBoard's files, which would grow by a quarter of a megabyte for each at 100


class RunLog:
    """Notes what a run tells. Of several processes only the first has a log that keeps it."""

    def __init__(self, folder=None, next_step=1, wandb_run=None):
        """
        :param folder: path of the run's folder; None for a log that keeps nothing
        :param next_step: later curves of an older run in this folder are hidden
        :param wandb_run: of `start_wandb`, or None
        """
        self.folder, self.wandb_run = folder, wandb_run
        self.writer = SummaryWriter(folder, purge_step=next_step) if folder else None

    def numbers(self, values, step):
        """
        :param values: dict of name -> number, such as "train/cross_entropy"
        :param step: where on the curves they stand: of the optimizer, or for validation's, the epoch
        """
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb_run:
            axis = "epoch" if all(name.startswith("val/") for name in values) else "step"
            self.wandb_run.log({**values, axis: step})

    def figure(self, name, figure, epoch):
        """Draw a figure in epochs 1, 2, 4, 8 ... only: each takes as much room as thousands of numbers."""
        if self.writer and epoch & (epoch - 1) == 0:
            figure.set_dpi(FIGURE_DPI)
            self.writer.add_figure(name, figure, epoch)

    def table(self, history):
        """Write log.csv: a row for each epoch."""
        if not self.folder:
            return
        columns = list(dict.fromkeys(name for entry in history for name in entry))
        with atomic_path(self.folder / TABLE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(history)

    def flush(self):
        """Write all curves out, so that their files' sizes are those of what was told."""
        if self.writer:
            self.writer.flush()

    def close(self):
        """End the files."""
        if self.writer:
            self.writer.close()
        if self.wandb_run:
            self.wandb_run.finish()


def start_wandb(project, folder, config, started):
    """
    :param project: its name at Weights & Biases, or None
    :param config: dict
    :param started: when the run first began: a resumed run continues the same curves there
    :return: what wandb.init gives, or None
    :raises UserError: if wandb is not installed, or cannot begin
    """
    if project is None:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("wandb: the package is not installed: pip install wandb, or leave --wandb out") from None
    identity = f"{folder.name}-{started}"
    identity = "".join(c if c.isalnum() else "-" for c in identity)[-64:]
    try:
        return wandb.init(
            project=project, name=folder.name, dir=str(folder), config=config, id=identity, resume="allow"
        )
    except Exception as error:  # its own many kinds: no account, no network
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"wandb: could not begin ({reason}); run `wandb login`, or set WANDB_MODE=offline, or leave --wandb out"
        ) from None
