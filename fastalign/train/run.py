"""A run: its metrics, its progress on the screen, its checkpoints, its end."""

from __future__ import annotations

import json
import logging
import math
import random
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from fastalign.streams import stream
from fastalign.train import checkpoint, distributed, repeat, strict_json
from fastalign.train.device import autocast as autocast
from fastalign.train.device import choose_device as choose_device
from fastalign.train.device import forward_dtype as forward_dtype
from fastalign.train.folder import (
    RunError,
    claim_folder,
    clear_folder,
    is_unfinished,
    options_of,
    write_config,
)
from fastalign.train.meter import Meter
from fastalign.train.same_run import changed_options
from fastalign.train.stateful import Stateful as Stateful
from fastalign.train.whole import sync, whole_folder, write_text

log = logging.getLogger("fastalign")


class Stopped(RunError):
    """A run that cannot go on, for a reason found in the middle of it (a NaN, a full disk)."""


class Interrupted(Exception):
    """The user (Ctrl-C) or a batch system (SIGTERM) asked to stop; a checkpoint has been written.

    Args:
        message: for the user.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass
class RunConfig:
    """What every training command has."""

    output: str = "runs/new"
    """Folder of the run. It must not hold a run already, unless --overwrite or --resume says so."""
    overwrite: bool = False
    """Delete what a former run left in the output folder."""
    resume: str | None = None
    """Go on from the output folder's newest intact checkpoint (`--resume`), or from a given one."""
    seed: int = 0
    """Of weights, data order and sampling."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """Of the forward pass: float32, bfloat16 (autocast, weights stay fp32), auto (it on CUDA)."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one more is written at the end, on Ctrl-C and on SIGTERM."""
    keep_checkpoints: int = 2
    """How many checkpoints stay."""

    def __post_init__(self) -> None:
        at_least(self, 1, "checkpoint_every", "keep_checkpoints")
        if self.overwrite and self.resume is not None:
            raise RunError("--overwrite and --resume contradict each other")


def at_least(config: Any, least: float, *names: str) -> None:
    """Checks fields of a configuration; None counts as not given.

    Raises:
        RunError: one is smaller than `least` or NaN.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise RunError(f"expected {name} >= {least}, got {value}")


class Run:
    """Context manager around a training loop. --overwrite deletes when it begins.

    Args:
        config: the command's configuration.
        command: its name, shown beside the progress bar.
        total: steps of the whole run.
    """

    def __init__(self, config: RunConfig, command: str, total: int) -> None:
        self.config, self.command, self.total = config, command, total
        self.folder = Path(config.output)
        self.started = time.monotonic()
        device = choose_device(config.device)
        self.meter = Meter(device, forward_dtype(device, config.dtype))
        self.step = 0
        self._signal: int | None = None
        self.is_main = distributed.world().is_main
        self._owns_folder = False
        self._not_finite: set[str] = set()

    # --- the loop's side -------------------------------------------------------------------------

    def restore(self, stateful: Stateful) -> int:
        """Loads what --resume asks for; the step to go on from (0 in a new run).

        Raises:
            RunError: the checkpoint is not of this run, see `same_run`.
            CheckpointError: there is no intact one.
        """
        self.stateful = stateful
        if self.config.resume is None:
            return 0
        if self.config.resume == "auto":
            if is_unfinished(self.folder):
                log.warning("no checkpoint was written yet: beginning at the beginning")
                self._drop_metrics_after(-1)
                self._take_over()
                return 0
            saved, damaged = checkpoint.newest_intact(self.folder / "checkpoints")
            for line in damaged:
                log.warning("%s; taking the one before it", line)
        else:
            saved = checkpoint.load(Path(self.config.resume))
        for name, was, now in changed_options(
            self.command, options_of(self.config), saved.state["run"]
        ):
            log.warning("resumed with %s %s; the checkpoint's run had %s", name, now, was)
        stateful.restore(saved)
        if saved.step > self.total:
            raise RunError(
                f"the checkpoint is of step {saved.step}, this run has only {self.total} steps"
            )
        self.step = saved.step
        self._drop_metrics_after(saved.step)
        self._take_over()
        self.meter.skip()
        self.meter.load_state_dict(saved.state["meter"])
        log.info("resumed at step %d of %d", saved.step, self.total)
        return saved.step

    def _take_over(self) -> None:
        """The folder is this run's from here on: until now it may be another's, whose checkpoint
        was refused."""
        self._owns_folder = True
        if self.is_main:
            write_config(self.folder, self.config)

    def _drop_metrics_after(self, step: int) -> None:
        """Removes what was logged past the checkpoint: it will be logged again."""
        path = self.folder / "metrics.jsonl"
        if not self.is_main or not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the half line of a killed run
            if record["step"] <= step:
                kept.append(line + "\n")
        write_text(path, "".join(kept))

    def log(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl (null for what is not finite) and refreshes the
        screen.

        Raises:
            Stopped: it cannot be written.
        """
        if not self.is_main:
            return
        for key, value in metrics.items():
            if not math.isfinite(value) and key not in self._not_finite:
                self._not_finite.add(key)
                log.warning("step %d: %s is %s; metrics.jsonl has null for it", step, key, value)
        record = {"step": step, "phase": phase, "time": time.time(), **metrics}
        with (
            self._writing(f"step {step}: metrics.jsonl"),
            (self.folder / "metrics.jsonl").open("a") as file,
        ):
            file.write(strict_json.dumps(record) + "\n")
        if phase == "train":
            self._screen.show(step, metrics)

    def end_step(self, step: int, *, last: bool = False) -> None:
        """After every step: the checkpoint that is due, and the stop that was asked for.

        `last`: whether the run ends here, before its total of steps.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came; the checkpoint is written.
            Stopped: the checkpoint cannot be written. Those before it stay.
        """
        self.step = step
        due = last or step % self.config.checkpoint_every == 0 or step == self.total
        self._checkpoint(step, f"step {step}", f"at step {step}", due)

    def end_update(self, step: int, updates: int, every: int) -> None:
        """After an update in the middle of `step`: as `end_step`, for a checkpoint every `every`
        updates (0: none). It bears the number of the steps that are done, and replaces theirs."""
        due = every > 0 and updates % every == 0
        self._checkpoint(step - 1, f"step {step}", f"after update {updates} of step {step}", due)

    def _checkpoint(self, step: int, place: str, stopped: str, due: bool) -> None:
        """A checkpoint of so many steps, where it is due or a stop was asked for."""
        stop = distributed.largest(self._signal or 0) or None
        if stop is None and not due:
            return
        with self.meter.phase("checkpoint"):
            saved = self.stateful.capture(step)
            saved.state["meter"] = self.meter.state_dict()
            saved.state["run"] = {"command": self.command, "options": options_of(self.config)}
            path = self._save(saved, place)
        if stop is not None:
            raise Interrupted(f"stopped {stopped}; go on with --resume (checkpoint {path})", stop)

    def _save(self, saved: checkpoint.Checkpoint, place: str) -> Path:
        with self._writing(f"{place}: a checkpoint"):
            # No step that a checkpoint covers may be missing, even where the power fails.
            if self.is_main and (self.folder / "metrics.jsonl").exists():
                sync(self.folder / "metrics.jsonl")
                sync(self.folder)
            return checkpoint.save(self.folder / "checkpoints", saved, self.config.keep_checkpoints)

    @contextmanager
    def saving_model(self) -> Iterator[Path]:
        """Gives the folder to save what came out into; it becomes OUTPUT/model when it is whole.
        Only the main process may write into it.

        Raises:
            Stopped: it cannot be written.
        """
        if not self.is_main:
            yield self.folder / "model"
            return
        with (
            self.meter.phase("checkpoint"),
            self._writing("the model"),
            whole_folder(self.folder / "model") as folder,
        ):
            yield folder

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Stopped(
                f"{what} cannot be written: {error.strerror or error}; {self.last_checkpoint()}"
            ) from error

    def last_checkpoint(self) -> str:
        paths = checkpoint.found(self.folder / "checkpoints")
        return (
            f"the last good checkpoint is {paths[-1]}" if paths else "no checkpoint was written yet"
        )

    # --- its beginning and end -------------------------------------------------------------------

    def __enter__(self) -> Run:
        if self.is_main:
            if self.config.overwrite:
                clear_folder(self.folder)
        else:
            # The same weights came of the same seed; what is drawn from here on is its own.
            rank = distributed.world().rank
            torch.manual_seed(stream(self.config.seed, "process", rank).initial_seed())
        if self.config.resume is None:
            self._take_over()
        distributed.barrier()
        from fastalign.train.screen import Screen

        self._screen = Screen(self.command, self.total, self.started, not self.is_main)
        self._screen.start()
        self.meter.start()
        self._handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        if _in_main_thread():
            for number in self._handlers:
                signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._screen.stop()
        self.meter.stop()
        self._write_accounting()
        if _in_main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _write_accounting(self) -> None:
        if not (self.is_main and self._owns_folder):
            return
        found = {
            "method": self.command,
            "step": self.step,
            **self.meter.summary(),
            **repeat.facts(self.meter.device),
        }
        try:
            write_text(self.folder / "accounting.json", strict_json.dumps(found, indent=2) + "\n")
        except OSError as error:
            log.warning("accounting.json cannot be written: %s", error.strerror)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self._signal is None:
            self._signal = number
            log.warning("%s: finishing this step and writing a checkpoint", name)
            if number == signal.SIGINT:
                log.warning("(Ctrl-C again: stop at once)")
        elif number == signal.SIGINT:
            # Not at a second SIGTERM: batch systems send one to a job and to each of its processes.
            raise KeyboardInterrupt


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def begin(config: RunConfig) -> torch.device:
    """Claims the output folder, seeds everything and chooses the device, before any work is done;
    processes that torchrun started meet here.

    Raises:
        RunError: the output folder cannot be used, or the device is not there.
        CheckpointError: there is nothing to resume.
    """
    device = distributed.start(choose_device(config.device))
    autocast(device, config.dtype)
    distributed.on_main(lambda: _claim(config))
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    return device


def _claim(config: RunConfig) -> None:
    own = config.resume == "auto" or (
        config.resume is not None
        and Path(config.resume).resolve().parent.parent == Path(config.output).resolve()
    )
    folder = Path(config.output)
    unfinished = config.resume == "auto" and folder.is_dir() and is_unfinished(folder)
    if config.resume is not None and not unfinished:
        checkpoint.check_there(config.resume, folder / "checkpoints")
    claim_folder(folder, overwrite=config.overwrite, reuse=own)


def check_context(max_length: int, context: int, model: str) -> None:
    """RunError where sequences of `max_length` tokens do not fit into a model's context."""
    if max_length > context:
        raise RunError(
            f"max_length {max_length} is more than the {context} tokens that {model} can read"
        )


def first_non_finite(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity."""
    for name, tensor in named:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            return f"{name} (first {kind} among {tensor.numel():,} values)"
    return None
