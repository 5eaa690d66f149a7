"""Evaluate an epoch: means over its steps, values for nnU-Net's log, the printed line, and the detection of collapse."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from nnunetv2_macl import monitoring
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write
from nnunetv2_macl.methods.registry import loss_labels, methods_of
from nnunetv2_macl.recipe import Recipe

SKIPPED = "skipped_steps"
# file in the folder of a run with the values of each epoch
CURVES_FILE = "epochs.csv"
# statistics of methods that compare embeddings
_OF_EMBEDDINGS = ("embedding_variance", "embedding_rank")


def _statistics(recipe: Recipe) -> list[str]:
    """Return the names of the statistics that a recipe's methods may measure."""
    methods = methods_of(recipe.method)
    names = [name for method in methods for name in method.statistics(recipe)]
    return names + [*_OF_EMBEDDINGS] * any(method.couples_samples for method in methods)


def log_keys(recipe: Recipe, probes: Iterable[str]) -> list[str]:
    """Return the keys that nnU-Net's logger must know, because it accepts no others.

    Args:
        recipe: Recipe of the run.
        probes: Keys of the probes.
    """
    keys = ["train_losses", "lrs", "epoch_start_timestamps", "epoch_end_timestamps", "patches_per_second", SKIPPED]
    keys += [f"train_losses/{name}" for name in recipe.losses]
    keys += probes
    keys += [f"references/{key}" for method in methods_of(recipe.method) for key in method.reference_labels]
    return keys + _statistics(recipe)


def write_curves(log: dict[str, list[float]], file: Path) -> None:
    """Write the values of each epoch as a table, with one row for each epoch.

    Args:
        log: Nonempty lists with one value for each epoch, by key. The epochs of the shortest list are written.
        file: The file to write.

    Raises:
        UserError: The file cannot be written.
    """
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["epoch", *log])
    rows.writerows([number, *values] for number, values in enumerate(zip(*log.values(), strict=False)))
    content = table.getvalue().encode()
    atomic_write(file, lambda stream: stream.write(content))


def read_curves(file: Path) -> dict[str, list[float]]:
    """Return what `write_curves` wrote, or nothing if there is no such file.

    Raises:
        UserError: The file was changed and is no longer such a table.
    """
    if not file.is_file():
        return {}
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return {key: [float(row[key]) for row in rows] for key in (rows[0] if rows else {}) if key != "epoch"}
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{file} is not a table of the values of each epoch: {error}. Remove it.") from None


@dataclass
class EpochSums:
    """Sums over the steps of an epoch so far. A run that is stopped within an epoch continues with them.

    Attributes:
        steps: Number of steps, including skipped ones.
        skipped: Number of steps without a finite loss or gradient.
        seconds: Time of all steps except the warm-up steps.
        sums: Sum of each measured value, without the skipped steps.
        counts: Number of steps in each sum. A method may measure a value in some steps of an epoch only.
        warm_up_steps: Number of steps after a start that are slower, because they compile the network.
        warm_up_seconds: Time of the warm-up steps.
    """

    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    warm_up_steps: int = 0
    warm_up_seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.counts:  # sums of an earlier version, in which each step measured all values
            self.counts = dict.fromkeys(self.sums, self.steps - self.skipped)

    def add(self, measured: dict[str, float], *, skipped: bool) -> None:
        self.steps += 1
        if skipped:
            self.skipped += 1
            return
        for key, value in measured.items():
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def add_time(self, seconds: float, *, is_warm: bool) -> None:
        """Add the time of a step in seconds. A step that is not warm includes compilation and other work of a start."""
        if is_warm:
            self.seconds += seconds
        else:
            self.warm_up_steps += 1
            self.warm_up_seconds += seconds

    @property
    def seconds_per_step(self) -> float:
        """Return the mean time of the steps after the warm-up, or of all steps if there are no others."""
        timed = self.steps - self.warm_up_steps
        return self.seconds / timed if timed > 0 else (self.seconds + self.warm_up_seconds) / self.steps

    def means(self) -> dict[str, float]:
        """Return the means over the steps that measured each value, or nothing if all steps were skipped."""
        return {key: value / self.counts[key] for key, value in self.sums.items()}


@dataclass(frozen=True)
class Epoch:
    """A finished epoch.

    Args:
        number: Number of the epoch, from 0.
        epochs: Number of epochs of the run.
        batch_size: Number of patches per step.
        sums: Sums over the steps of the epoch.
        recipe: Recipe of the run.
    """

    number: int
    epochs: int
    batch_size: int
    sums: EpochSums
    recipe: Recipe

    @property
    def references(self) -> dict[str, float]:
        """Return reference values for the curves, by name."""
        return monitoring.reference_lines(self.recipe, self.batch_size, self.sums.means())

    @property
    def patches_per_second(self) -> float:
        return self.batch_size / self.sums.seconds_per_step

    def log_values(self, keys: Iterable[str]) -> dict[str, float]:
        """Return the values of an epoch for the keys of the log. A loss is NaN if all steps were skipped.

        Args:
            keys: Keys of the log, see `log_keys`.
        """
        means = self.sums.means()
        known = {f"train_losses/{name}": means.get(name, math.nan) for name in self.recipe.losses}
        known |= {f"references/{key}": value for key, value in self.references.items()}
        known |= {key: means.get(key, math.nan) for key in _statistics(self.recipe)}
        known |= {"train_losses": means.get("total", math.nan), "patches_per_second": self.patches_per_second}
        known |= {SKIPPED: self.sums.skipped}
        return {key: float(known[key]) for key in keys if key in known}

    def line(self, between_epochs: float = 0.0) -> str:
        """Return the line that is printed for the epoch.

        Args:
            between_epochs: Time in seconds between the last step of an epoch and the first step of the next. The remaining time
                includes it.
        """
        means, seconds = self.sums.means(), self.sums.seconds + self.sums.warm_up_seconds
        an_epoch = self.sums.seconds_per_step * self.sums.steps + between_epochs
        left = timedelta(seconds=round(an_epoch * (self.epochs - self.number - 1)))
        labels = loss_labels()
        shown = "  ".join(f"{labels[n].split(',')[0]} {means[n]:.4f}" for n in self.recipe.losses if n in means)
        referenced = {loss for method in methods_of(self.recipe.method) for loss in method.referenced_losses}
        # the first reference is the value at which the method would learn nothing
        for key, value in list(self.references.items())[:1] if referenced & means.keys() else ():
            shown += f"  ({key} {value:.3f})"
        if "positives" in means:
            shown += f"  positives {means['positives']:.1f}"
        skipped = f"skipped {self.sums.skipped} steps without a finite gradient  " if self.sums.skipped else ""
        return (
            f"Epoch {self.number}  loss {means.get('total', math.nan):.4f}  {shown}  "
            f"{skipped}{seconds:.1f} s  {self.patches_per_second:.1f} patches/s  {left} left"
        )


@dataclass
class CollapseWatch:
    """Reports when a run has collapsed, and when it is no longer collapsed.

    Args:
        reason: Why the run counts as collapsed; None if it does not.
        epochs: Number of consecutive epochs with signs of collapse.
    """

    reason: str | None = None
    epochs: int = 0

    def update(self, reason: str | None, recipe: Recipe) -> str | None:
        """Record an epoch, and return a message for the user or None.

        Args:
            reason: Why the epoch shows signs of collapse, or None.
            recipe: Recipe of the run.
        """
        self.epochs = self.epochs + 1 if reason else 0
        before = self.reason
        # a single epoch may be chance
        self.reason = reason if self.epochs >= 2 else None
        if self.reason and not before:
            return f"WARNING: the run has COLLAPSED: {self.reason}.\n{monitoring.collapse_advice(recipe)}"
        if before and not reason:
            return "The run is no longer collapsed."
        return None
