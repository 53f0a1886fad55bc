"""The demo's output: an introduction, a progress bar, a table and a summary.

The text is plain ASCII, so that it survives any terminal, pipe or log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastema
from fastema.cli.demo import summary
from fastema.cli.demo.speed import Machine
from fastema.cli.demo.train import MOMENTUM, Evaluation, History, Setup, Times


class Reporter:
    """Prints the report of one run to standard output; if `quiet`, only the summary."""

    def __init__(self, setup: Setup, machine: Machine, *, quiet: bool) -> None:
        self._setup, self._machine, self._quiet = setup, machine, quiet
        self._console = Console(highlight=False)

    def introduce(self) -> None:
        """Print the settings of the run."""
        if self._quiet:
            return
        setup, recipe = self._setup, self._setup.recipe
        self._console.print(
            f"[bold]fastema {fastema.__version__}[/bold]: the {recipe.model}, "
            f"{setup.num_parameters / 1e6:.2f} M parameters in {setup.num_tensors} tensors, "
            f"learns to read {len(setup.digits.labels)} handwritten digits and is tested on "
            f"{len(setup.digits.test_labels)} others.\n"
            f"SGD: constant learning rate {recipe.lr:g}, momentum {MOMENTUM:g}, batch size "
            f"{recipe.batch_size}, epochs {recipe.epochs}, seed {recipe.seed}. "
            f"EMA: decay {recipe.decay:g}, warmed up.\n"
            f"The average and its first update took {self._machine.start_s:.2f} s "
            "(the kernel is compiled once and cached on disk).\n"
        )

    @contextlib.contextmanager
    def watching(self) -> Iterator[Callable[[Evaluation], None]]:
        """Show a progress bar on a terminal; yield the function that updates it."""
        progress = Progress(
            TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("right: raw {task.fields[raw]:5.1f} %, EMA {task.fields[ema]:5.1f} %"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            expand=True,
            disable=self._quiet or not self._console.is_terminal,
        )
        task = progress.add_task("", total=self._setup.recipe.epochs, raw=0.0, ema=0.0)

        def show(seen: Evaluation) -> None:
            progress.update(
                task, completed=seen.epoch, raw=seen.raw.accuracy, ema=seen.ema.accuracy
            )

        with progress:
            yield show

    def conclude(self, history: History, picture: Path) -> None:
        """Print the table and the summary."""
        if not self._quiet:
            self._console.print(self._table(history))
        self._console.print(self._format_summary(history))
        # No wrapping and no markup: people copy the path.
        self._console.print(f"Picture: {picture}", soft_wrap=True, markup=False)

    def _table(self, history: History) -> Table:
        gbps = self._machine.gbps
        columns: list[tuple[str, str, Callable[[Evaluation, Times], str]]] = [
            ("raw\nloss", "yellow", lambda seen, _: f"{seen.raw.loss:.3f}"),
            ("EMA\nloss", "bold cyan", lambda seen, _: f"{seen.ema.loss:.3f}"),
            ("raw\nright %", "yellow", lambda seen, _: f"{seen.raw.accuracy:.1f}"),
            ("EMA\nright %", "bold cyan", lambda seen, _: f"{seen.ema.accuracy:.1f}"),
            ("step\nms", "", lambda _, times: f"{1e3 * times.step_s:.2f}"),
            ("update\nms", "", lambda _, times: f"{1e3 * times.update_s:.3f}"),
            ("share\nof step", "", lambda _, times: f"{times.update_s / times.step_s:.1%}"),
            ("moves\nGB/s", "", lambda _, times: f"{gbps(times.update_s):.1f}"),
            ("of plain\ncopying", "", lambda _, times: f"{times.limit_s / times.update_s:.0%}"),
        ]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("\nepoch", justify="right")
        for name, style, _ in columns:
            table.add_column(name, justify="right", style=style, no_wrap=True)
        epochs = zip(history.epoch_ends, history.times, strict=True)
        for number, (seen, times) in enumerate(epochs, start=1):
            table.add_row(str(number), *(cell(seen, times) for _, _, cell in columns))
        return table

    def _format_summary(self, history: History) -> str:
        seen = summary.tail(history)
        last = history.evaluations[-1]
        best_raw, best_ema = summary.best(history.evaluations)
        cost, machine = summary.cost(history), self._machine
        epochs = "epoch" if seen.epochs == 1 else f"{seen.epochs} epochs"
        return (
            f"[bold]{summary.describe_outcome(seen)}.[/bold]\n"
            f"Test accuracy, mean and standard deviation over the last {epochs}:\n"
            f"  raw weights  {seen.raw_accuracy.mean:5.1f} +/- {seen.raw_accuracy.std:.1f} %, "
            f"loss {seen.raw_loss.mean:.3f}; at the end {last.raw.accuracy:.1f} %, "
            f"best {best_raw:.1f} %\n"
            f"  EMA weights  {seen.ema_accuracy.mean:5.1f} +/- {seen.ema_accuracy.std:.1f} %, "
            f"loss {seen.ema_loss.mean:.3f}; at the end {last.ema.accuracy:.1f} %, "
            f"best {best_ema:.1f} %\n"
            f"The EMA update takes {cost.update_s / cost.step_s:.1%} of a step: "
            f"{1e3 * cost.update_s:.3f} of {1e3 * cost.step_s:.2f} ms (medians); "
            f"in total {sum(cost.updates_s):.2f} of {sum(cost.steps_s):.1f} s.\n"
            f"It moves {machine.update_bytes / 1e6:.1f} MB. During training it reaches "
            f"{machine.gbps(cost.update_s):.0f} GB/s; a kernel that only moves bytes reaches "
            f"{machine.gbps(cost.limit_s):.0f} (plain copying). Undisturbed, it reaches "
            f"{machine.gbps(machine.update_s):.0f} GB/s, and plain copying "
            f"{machine.gbps(machine.limit_s):.0f}."
        )
