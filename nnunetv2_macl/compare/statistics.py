"""Means and their uncertainty over patients and seeds: a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Resampling:
    """How often each seed and each case stands in each of B resamples.

    Seeds and patients are drawn with replacement, independently of each other; all cases of a patient are drawn together. The
    same resamples for every arm make a comparison paired. With few seeds or patients the intervals are too narrow, as any
    bootstrap's.

    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007.
    """

    seeds: np.ndarray  # (B, S)
    cases: np.ndarray  # (B, N)

    @classmethod
    def draw(cls, patients: Sequence[str], seeds: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Resampling:
        """Draw resamples of seeds and of the patients of each case, (N,)."""
        rng = np.random.default_rng(seed)
        names, of_case = np.unique(np.asarray(patients), return_inverse=True)
        drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
        drawn_patients = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        return cls(drawn_seeds, drawn_patients[:, of_case])

    @classmethod
    def whole(cls, seeds: int, cases: int) -> Resampling:
        """The data as they are, each once: B = 1."""
        return cls(np.ones((1, seeds), dtype=int), np.ones((1, cases), dtype=int))

    @classmethod
    def each_seed(cls, seeds: int, cases: int) -> Resampling:
        """One seed at a time, on all cases: B = S."""
        return cls(np.eye(seeds, dtype=int), np.ones((seeds, cases), dtype=int))

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of each class over seeds and cases, then over classes, as nnU-Net means; NaN values are left out.

        Args:
            values: (S, N, C).

        Returns:
            (B,); NaN where a resample has no value.
        """
        defined = ~np.isnan(values)

        def sums(array: np.ndarray) -> np.ndarray:
            return np.einsum("bs,bsc->bc", self.seeds, np.einsum("bn,snc->bsc", self.cases, array, optimize=True))

        counts = sums(defined.astype(float))
        totals = sums(np.where(defined, values, 0.0))
        per_class = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
        present = ~np.isnan(per_class)
        classes = present.sum(1)
        return np.divide(
            np.where(present, per_class, 0.0).sum(1), classes, out=np.full(len(classes), np.nan), where=classes > 0
        )


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    # value, low, high: over patients and seeds
    value: float
    low: float
    high: float
    by_seed: tuple[float, ...] = ()  # the value of each seed alone, (S,); empty where it is not asked for

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    @property
    def significant_across_seeds(self) -> bool:
        """Whether the seeds are enough to say that it is not 0: Student's 95 % interval of `by_seed` does not hold it.

        The bootstrap does not know how few they are: of three that lie on one side by chance, every resample does.
        """
        low, high = student_interval(self.by_seed)
        return low > 0 or high < 0


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of independent values; not a number for fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    reach = student.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def estimate(values: np.ndarray, resampling: Resampling, reference: np.ndarray | None = None) -> Estimate:
    """Mean of an arm, or by how much it is above that of another on the same cases and seeds.

    Args:
        values: (S, N, C), NaN where not defined.
        resampling: of S and N.
        reference: as ``values``, of the other arm.
    """
    whole, each = Resampling.whole(*values.shape[:2]), Resampling.each_seed(*values.shape[:2])
    value, by_seed, samples = (sampling.mean(values) for sampling in (whole, each, resampling))
    if reference is not None:
        value = value - whole.mean(reference)
        by_seed, samples = by_seed - each.mean(reference), samples - resampling.mean(reference)
    return Estimate(float(value[0]), *_interval(samples), tuple(by_seed.tolist()))


def first_reached(curve: np.ndarray, goal: np.ndarray, epochs: Sequence[int]) -> np.ndarray:
    """Return the first of the epochs (P,) at which a curve (P, B) is at its goal (B,), infinite where it never is."""
    reached = curve >= goal
    return np.where(reached.any(0), np.asarray(epochs, dtype=float)[reached.argmax(0)], np.inf)


def estimate_first_reached(
    curve: np.ndarray, goal: np.ndarray, epochs: Sequence[int], resampling: Resampling
) -> Estimate:
    """When a curve reaches the mean ``goal``, see `first_reached`.

    Args:
        curve: (P, S, N, C).
        goal: (S, N, C).
        epochs: (P,).
        resampling: of S and N.
    """

    def reached(sampling: Resampling) -> np.ndarray:
        return first_reached(np.stack([sampling.mean(point) for point in curve]), sampling.mean(goal), epochs)

    return Estimate(float(reached(Resampling.whole(*goal.shape[:2]))[0]), *_interval(reached(resampling)))


def _interval(samples: np.ndarray) -> tuple[float, float]:
    samples = samples[~np.isnan(samples)]
    if not samples.size:
        return float("nan"), float("nan")
    # no interpolation: samples may be infinite
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)
