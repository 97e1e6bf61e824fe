"""What a run shows on the screen: a progress bar, or a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

COLUMNS = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "reward/proxy": "reward {:+.3f}",
    "kl/k1": "KL {:.2f}",
    "tokens_per_s": "{:,.0f} tok/s",
}
SECONDS_PER_LINE = 5


class Screen:
    """Progress of a command on stderr, from ``start`` to ``stop``.

    Args:
        command: its name, shown beside the bar.
        total: steps of the whole run.
        started: when the run began, by ``time.monotonic``.
        quiet: show nothing; for all processes of a run but one.
    """

    def __init__(self, command: str, total: int, started: float, quiet: bool = False) -> None:
        self.command, self.total, self.started = command, total, started
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            disable=quiet or not sys.stderr.isatty(),
            console=Console(stderr=True),
        )

    def start(self) -> None:
        self._bar.start()
        self._task = self._bar.add_task(self.command, total=self.total, shown="")

    def stop(self) -> None:
        self._bar.stop()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        shown = "  ".join(
            form.format(metrics[key]) for key, form in COLUMNS.items() if key in metrics
        )
        self._bar.update(self._task, completed=step, shown=shown)
        late = time.monotonic() - self._last_line > SECONDS_PER_LINE
        if self._bar.disable and (late or step == self.total):
            self._last_line = time.monotonic()
            elapsed = self._last_line - self.started
            print(
                f"{self.command} {step}/{self.total}  {elapsed:.0f}s  {shown}",
                file=sys.stderr,
                flush=True,
            )
