"""RunLoggerBase: metrics.csv in the run's own folder."""

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.utilities.rank_zero import rank_zero_only

from diffaug.plots.picture import write_csv

_CSVLogger: Any = object  # that of either package stands here


class RunLoggerBase(_CSVLogger):
    """metrics.csv in the run's own folder; a resumed run goes on writing where its checkpoint was.

    The rows of steps that are taken again are dropped, so that each step is there once. (Lightning's CSVLogger deletes
    all earlier rows.)

    Arguments:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="")
        self._begun = False

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if not self._begun and step is not None:
            self._begun = True
            self._drop_from(step)
        super().log_metrics(metrics, step)

    def _drop_from(self, step: int) -> None:
        """Drop the rows of an earlier process that are of this step or a later one."""
        path = Path(self.log_dir) / "metrics.csv"
        if not path.exists():
            return
        with path.open(newline="") as file:
            head, *rows = csv.reader(file)
        place = head.index("step")
        write_csv(path, head, [row for row in rows if int(row[place]) < step])

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            path = Path(self.log_dir) / "metrics.csv"
            earlier = path.read_text() if path.exists() else None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory")
                writer = super().experiment
            if earlier:
                path.write_text(earlier)
                writer.metrics_keys = next(csv.reader(earlier.splitlines()))
        return self._experiment
