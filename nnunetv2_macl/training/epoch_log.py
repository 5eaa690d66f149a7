"""What an epoch came to: means over its steps, nnU-Net's log, the line that is shown, the watch for collapse."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from nnunetv2_macl import monitoring
from nnunetv2_macl.methods.registry import loss_labels, methods_of
from nnunetv2_macl.probes import PROBE
from nnunetv2_macl.recipe import Recipe

SKIPPED = "skipped_steps"
# of the embeddings that a method compares
_OF_EMBEDDINGS = ("embedding_variance", "embedding_rank")


def _statistics(recipe: Recipe) -> list[str]:
    """Return the names of the statistics that a recipe's methods may measure."""
    methods = methods_of(recipe.method)
    names = [name for method in methods for name in method.statistics(recipe)]
    return names + [*_OF_EMBEDDINGS] * any(method.couples_samples for method in methods)


def log_keys(recipe: Recipe, probes: Iterable[str]) -> list[str]:
    """Return the keys to tell nnU-Net's logger of, which takes no other.

    Args:
        recipe: Of the run.
        probes: Values that are measured beside the losses.
    """
    keys = ["train_losses", "lrs", "epoch_start_timestamps", "epoch_end_timestamps", "patches_per_second", SKIPPED]
    keys += [f"train_losses/{name}" for name in recipe.losses]
    keys += probes
    keys += [f"references/{key}" for method in methods_of(recipe.method) for key in method.reference_labels]
    return keys + _statistics(recipe)


@dataclass
class EpochSums:
    """Sums over the steps of an epoch so far; a run that is stopped within an epoch goes on with them.

    Attributes:
        steps: Done, the skipped ones among them.
        skipped: Steps without a finite loss or gradient.
        seconds: Time of all steps but the warm-up ones.
        sums: Of each measured value, without the skipped steps.
        warm_up_steps: Steps after a start that say nothing about the speed, because they compile the network.
        warm_up_seconds: Their time.
    """

    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    warm_up_steps: int = 0
    warm_up_seconds: float = 0.0

    def add(self, measured: dict[str, float], *, skipped: bool) -> None:
        self.steps += 1
        if skipped:
            self.skipped += 1
            return
        self.sums = {key: self.sums.get(key, 0) + value for key, value in measured.items()}

    def add_time(self, seconds: float, *, is_warm: bool) -> None:
        """Add the time of a step; a step that is not warm compiles the network or does what comes with a start."""
        if is_warm:
            self.seconds += seconds
        else:
            self.warm_up_steps += 1
            self.warm_up_seconds += seconds

    @property
    def seconds_per_step(self) -> float:
        """Of the steps after the warm-up; of all where there are no others."""
        timed = self.steps - self.warm_up_steps
        return self.seconds / timed if timed > 0 else (self.seconds + self.warm_up_seconds) / self.steps

    def means(self) -> dict[str, float]:
        """Over the steps that were not skipped; empty where all were."""
        return {key: value / (self.steps - self.skipped) for key, value in self.sums.items()}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Epoch:
    """An epoch that is through.

    Args:
        number: from 0.
        epochs: of the run.
        batch_size: patches a step.
        sums: of its steps.
        recipe: of the run.
    """

    number: int
    epochs: int
    batch_size: int
    sums: EpochSums
    recipe: Recipe

    @property
    def references(self) -> dict[str, float]:
        """Return the values to read the curves against, by name."""
        return monitoring.reference_lines(self.recipe, self.batch_size, self.sums.means())

    @property
    def patches_per_second(self) -> float:
        return self.batch_size / self.sums.seconds_per_step

    def log_values(self, keys: Iterable[str], probed: dict[str, float]) -> dict[str, float]:
        """Values for those of `log_keys` that an epoch has; NaN for a loss of which every step was skipped.

        Args:
            keys: those that the log has.
            probed: what a probe measured; NaN in epochs without one.
        """
        means = self.sums.means()
        known = {f"train_losses/{name}": means.get(name, math.nan) for name in self.recipe.losses}
        known |= {f"references/{key}": value for key, value in self.references.items()}
        known |= {key: means.get(key, math.nan) for key in _statistics(self.recipe)}
        known |= {"train_losses": means.get("total", math.nan), "patches_per_second": self.patches_per_second}
        known |= {SKIPPED: self.sums.skipped}
        known |= {key: probed.get(key, math.nan) for key in keys if key.startswith(PROBE)}
        return {key: float(known[key]) for key in keys if key in known}

    def line(self, between_epochs: float = 0.0) -> str:
        """Return what is shown of the epoch.

        Args:
            between_epochs: Seconds between the last step of an epoch and the first of the next one, which the time left counts.
        """
        means, seconds = self.sums.means(), self.sums.seconds + self.sums.warm_up_seconds
        an_epoch = self.sums.seconds_per_step * self.sums.steps + between_epochs
        left = timedelta(seconds=round(an_epoch * (self.epochs - self.number - 1)))
        labels = loss_labels()
        shown = "  ".join(f"{labels[n].split(',')[0]} {means[n]:.4f}" for n in self.recipe.losses if n in means)
        # the first line of each method: where it would learn nothing
        for key, value in list(self.references.items())[:1]:
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
    """Tells that a run has collapsed, where it lasts, and that it no longer has.

    Args:
        reason: why it counts as collapsed, once it was told.
        epochs: in collapse so far, in a row.
    """

    reason: str | None = None
    epochs: int = 0

    def update(self, reason: str | None, recipe: Recipe) -> str | None:
        """Take note of an epoch; returns what to tell the user, if anything."""
        self.epochs = self.epochs + 1 if reason else 0
        before = self.reason
        # one epoch may be chance
        self.reason = reason if self.epochs >= 2 else None
        if self.reason and not before:
            return f"WARNING: the run has COLLAPSED: {self.reason}.\n{monitoring.collapse_advice(recipe)}"
        if before and not reason:
            return "The run is no longer collapsed."
        return None
