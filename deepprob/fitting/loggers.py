"""Callbacks that write the curves of a fit where other programs read them: a CSV file, TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from deepprob.errors import whole
from deepprob.fitting.callbacks import Callback, Fit


class CSVLogger(Callback):
    """Write the history of epochs to a CSV file, one row for each: its number, then the columns of ``history.epochs``
    by name.

    A row is in the file when its epoch is over, so that a fit that is killed leaves all rows but the last. A fit that
    starts over writes a new file; a resumed fit continues it, without rows that the checkpoint does not know.

    Args:
        path: The file; missing folders are created.
        every: Epochs between two rows.

    Raises:
        ValueError: If ``every`` is not a whole number of at least 1.
        OSError: If the file cannot be written; raised before the first step.
    """

    def __init__(self, path: str | Path, every: int = 1) -> None:
        self.path, self.every = Path(path), whole("CSVLogger's every", every)

    def start(self, fit: Fit) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")
        except OSError as error:
            reason = str(error.strerror).lower()
            raise type(error)(
                f"the CSV file must be one that can be written; got {str(self.path)!r} ({reason}). Name a file."
            ) from error
        self._append(fit, range(1, fit.epoch + 1))

    def epoch_end(self, fit: Fit) -> None:
        self._append(fit, range(fit.epoch, fit.epoch + 1))

    def _append(self, fit: Fit, epochs: range) -> None:
        """Append the rows of some epochs, below a header if the file is empty."""
        columns = dict(sorted(fit.history.epochs.items()))  # a checkpoint does not keep their order
        rows = [
            [str(n), *(_plain(values[n - 1]) for values in columns.values())] for n in epochs if n % self.every == 0
        ]
        with self.path.open("a", newline="", encoding="utf-8") as file:
            header = [["epoch", *columns]] if rows and not file.tell() else []
            csv.writer(file).writerows(header + rows)


class TensorBoard(Callback):
    """Write the history of epochs as scalars for TensorBoard: ``tensorboard --logdir FOLDER``.

    Args:
        folder: The folder of this fit; TensorBoard compares the folders below its ``logdir``.
        every: Epochs between two values.

    Raises:
        ValueError: If ``every`` is not a whole number of at least 1.
        ImportError: If the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: str | Path, every: int = 1) -> None:
        self.folder, self.every = Path(folder), whole("TensorBoard's every", every)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard needs the package tensorboard, which is not installed. Install the extra "
                "deepprob[tensorboard], or only the package: pip install tensorboard"
            ) from error
        self._make = SummaryWriter
        self._writer: Any = None

    def start(self, fit: Fit) -> None:
        # Values of later epochs come from a fit that ran before, or that went on after its last checkpoint.
        self._writer = self._make(str(self.folder), purge_step=fit.epoch + 1)

    def epoch_end(self, fit: Fit) -> None:
        if fit.epoch % self.every == 0:
            for name, values in fit.history.epochs.items():
                self._writer.add_scalar(name, values[-1], fit.epoch)
            self._writer.flush()
        if fit.stop or fit.step >= fit.total_steps:
            self._writer.close()


def _plain(value: float) -> str:
    """A number with all of its digits; a whole one without a point.

    Examples:
        >>> [_plain(value) for value in (2, 2.0, 0.1, float("nan"))]
        ['2', '2', '0.1', 'nan']
    """
    return repr(float(value)).removesuffix(".0")
