"""Compute means and their uncertainty over patients and seeds, with a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Resampling:
    """The number of times that each of B resamples contains each of S seeds and each of N cases.

    Seeds and patients are drawn with replacement, independently of each other. All cases of a patient are drawn together.
    Using the same resamples for all arms makes comparisons paired. With few seeds or patients the intervals are too narrow,
    as in any bootstrap.

    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007.
    """

    seeds: np.ndarray  # (B, S)
    cases: np.ndarray  # (B, N)
    patients: np.ndarray | None = None  # number of the patient of each case, (N,), if patients were drawn

    @classmethod
    def draw(cls, patients: Sequence[str], seeds: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Resampling:
        """Draw resamples of the seeds and of the patients. ``patients`` (N,) holds the patient of each case."""
        rng = np.random.default_rng(seed)
        names, of_case = np.unique(np.asarray(patients), return_inverse=True)
        drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
        drawn_patients = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        return cls(drawn_seeds, drawn_patients[:, of_case], of_case)

    @classmethod
    def whole(cls, seeds: int, cases: int) -> Resampling:
        """Return one resample (B = 1) that contains every seed and every case once."""
        return cls(np.ones((1, seeds), dtype=int), np.ones((1, cases), dtype=int))

    @classmethod
    def each_seed(cls, seeds: int, cases: int) -> Resampling:
        """Return one resample for each seed (B = S), with this seed and all cases."""
        return cls(np.eye(seeds, dtype=int), np.ones((seeds, cases), dtype=int))

    @classmethod
    def each_patient(cls, seeds: int, patients: np.ndarray) -> Resampling:
        """Return one resample for each patient (B = P), with all seeds and the cases of this patient."""
        cases = np.arange(patients.max() + 1)[:, None] == patients
        return cls(np.ones((len(cases), seeds), dtype=int), cases.astype(int))

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Return the mean of each class over seeds and cases, then over classes, as nnU-Net averages. NaN is left out.

        Args:
            values: (S, N, C), for C classes.

        Returns:
            (B,); NaN for a resample without values.
        """
        return mean_of_classes(self.by_class(values))

    def by_class(self, values: np.ndarray) -> np.ndarray:
        """Return the mean of each class over seeds and cases, (B, C), as `mean` does; NaN for a class without values."""
        defined = ~np.isnan(values)

        def sums(array: np.ndarray) -> np.ndarray:
            return np.einsum("bs,bsc->bc", self.seeds, np.einsum("bn,snc->bsc", self.cases, array, optimize=True))

        counts = sums(defined.astype(float))
        totals = sums(np.where(defined, values, 0.0))
        return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)


def mean_of_classes(values: np.ndarray) -> np.ndarray:
    """Return the mean over classes of values (B, C), without NaN: (B,); NaN where all are NaN."""
    present = ~np.isnan(values)
    classes = present.sum(1)
    sums = np.where(present, values, 0.0).sum(1)
    return np.divide(sums, classes, out=np.full(len(classes), np.nan), where=classes > 0)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, over patients and seeds or over splits."""

    value: float
    low: float
    high: float
    repeats: tuple[float, ...] = ()  # value of each seed or of each split, (S,); may be empty
    by_patient: tuple[float, ...] = ()  # value of each patient, the mean over seeds; may be empty

    @property
    def sign(self) -> int:
        """Return 1 or -1 if the whole interval is above or below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    @property
    def is_sure(self) -> bool:
        """Return whether Student's 95 % intervals of `repeats` and of `by_patient` exclude 0.

        This guards against few seeds and few patients, for which a bootstrap interval is too narrow: if three seeds have the
        same sign by chance, so has every resample. All seeds share their test patients, so both intervals are needed.
        """
        by_patient = [self.by_patient] if self.by_patient else []
        intervals = [student_interval(values) for values in (self.repeats, *by_patient)]
        return all(low > 0 or high < 0 for low, high in intervals)


def student_interval(values: Sequence[float], overlap: float = 0.0) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of some values; NaN for fewer than two.

    Args:
        values: The values, for example one for each seed.
        overlap: 0 for independent values. For random splits of the same patients, the number of test patients divided by that
            of the other patients: the values of such splits depend on each other, so the interval must be wider.

    Source: Nadeau and Bengio, Inference for the generalization error, Machine Learning 52, 2003.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    error = np.std(values, ddof=1) * np.sqrt(1 / len(values) + overlap)
    reach = student.ppf((1 + LEVEL) / 2, len(values) - 1) * error
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def estimate(values: np.ndarray, resampling: Resampling, reference: np.ndarray | None = None) -> Estimate:
    """Return the mean of an arm, or its paired difference to another arm, with an interval.

    Args:
        values: Values of the arm, (S, N, C); NaN where not defined.
        resampling: Resamples of S seeds and N cases.
        reference: Values of the other arm, (S, N, C), on the same cases and seeds. A class that only one arm has is left out:
            if a class is in no label, one voxel that an arm predicts by mistake would change which classes are averaged.
    """

    def mean(sampling: Resampling) -> np.ndarray:
        found = sampling.by_class(values)
        return mean_of_classes(found if reference is None else found - sampling.by_class(reference))

    whole, each = Resampling.whole(*values.shape[:2]), Resampling.each_seed(*values.shape[:2])
    by_patient = np.array([])
    if resampling.patients is not None:
        by_patient = mean(Resampling.each_patient(len(values), resampling.patients))
    return Estimate(
        float(mean(whole)[0]),
        *_interval(mean(resampling)),
        tuple(mean(each).tolist()),
        tuple(by_patient[~np.isnan(by_patient)].tolist()),
    )


def in_all(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return arrays of one shape with NaN wherever one of them is NaN, so that their means are of the same values."""
    missing = np.isnan(arrays).any(0)
    return [np.where(missing, np.nan, array) for array in arrays]


def first_reached(curve: np.ndarray, goal: np.ndarray, epochs: Sequence[int]) -> np.ndarray:
    """Return the first of the epochs (P,) at which a curve (P, B) reaches its goal, (B,) or (P, B), or infinity: (B,)."""
    reached = curve >= goal
    return np.where(reached.any(0), np.asarray(epochs, dtype=float)[reached.argmax(0)], np.inf)


def estimate_first_reached(
    curve: np.ndarray, goal: np.ndarray, epochs: Sequence[int], resampling: Resampling
) -> Estimate:
    """Return the epoch at which the mean of a curve reaches the mean of a goal, with an interval. See `first_reached`.

    Args:
        curve: Values at P epochs, (P, S, N, C).
        goal: Values to reach, (S, N, C).
        epochs: Epochs of the curve, (P,).
        resampling: Resamples of S seeds and N cases.
    """

    def reached(sampling: Resampling) -> np.ndarray:
        wanted = sampling.by_class(goal)
        pairs = [in_all([sampling.by_class(point), wanted]) for point in curve]
        points, goals = (np.stack([mean_of_classes(array) for array in arrays]) for arrays in zip(*pairs, strict=True))
        return first_reached(points, goals, epochs)

    return Estimate(float(reached(Resampling.whole(*goal.shape[:2]))[0]), *_interval(reached(resampling)))


def _interval(samples: np.ndarray) -> tuple[float, float]:
    samples = samples[~np.isnan(samples)]
    if not samples.size:
        return float("nan"), float("nan")
    # no interpolation, because samples may be infinite
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)
