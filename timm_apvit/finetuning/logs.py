"""The metrics of a training in files: JSON lines, CSV and TensorBoard."""

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

from timm_apvit.files import write_atomically

JSON_LOG, CSV_LOG, TENSORBOARD_LOG = 'metrics.jsonl', 'metrics.csv', 'tensorboard'


def check_tensorboard() -> None:
    """Raise ModuleNotFoundError if TensorBoard is missing."""
    if importlib.util.find_spec('tensorboard') is None:
        raise ModuleNotFoundError("--tensorboard needs tensorboard: pip install 'timm-apvit[tensorboard]'")


class MetricsLog:
    """The metrics of a training's epochs: ``metrics.jsonl``, ``metrics.csv`` and, if wanted, TensorBoard's files.

    Args:
        directory: exists.
        tensorboard: whether to write TensorBoard's files, into ``directory/tensorboard``.
    """

    def __init__(self, directory: Path, tensorboard: bool = False) -> None:
        self.directory = directory
        self.tensorboard = tensorboard
        self._writer: Any = None
        self._shown = 0

    def write(self, rows: list[dict[str, float]]) -> None:
        """Write the rows of all epochs so far, in place of what there is."""
        write_atomically(self.directory / JSON_LOG, ''.join(json.dumps(row) + '\n' for row in rows))
        table = io.StringIO(newline='')
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(table, names, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.directory / CSV_LOG, table.getvalue())
        if self.tensorboard:
            self._show(rows)

    def close(self) -> None:
        """Finish TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()

    def _show(self, rows: list[dict[str, float]]) -> None:
        """Add the rows that TensorBoard does not have yet."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run begins again with all its epochs; what an earlier process wrote of them is not shown twice.
            self._writer = SummaryWriter(str(self.directory / TENSORBOARD_LOG), purge_step=0)
        for row in rows[self._shown :]:
            for name, value in row.items():
                if name != 'epoch':
                    self._writer.add_scalar(name, value, int(row['epoch']))
        self._writer.flush()
        self._shown = len(rows)
