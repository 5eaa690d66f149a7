"""Means equal nnU-Net's, and intervals have their nominal coverage."""

import numpy as np
import pytest

from nnunetv2_macl.compare.report import verdict
from nnunetv2_macl.compare.statistics import Estimate, Resampling, estimate, estimate_first_reached, first_reached

NAN = np.nan


def names(number):
    return [f"p{n}" for n in range(number)]


def test_mean_leaves_out_undefined_values():
    # two seeds, two cases, two classes
    values = np.array([[[0.8, NAN], [0.6, 0.2]], [[1.0, NAN], [0.4, 0.4]]])
    assert Resampling.whole(2, 2).mean(values) == pytest.approx([(0.7 + 0.3) / 2])
    assert np.isnan(Resampling.whole(2, 2).mean(np.full((2, 2, 2), NAN)))
    only_one_class = np.where([True, False], values, NAN)
    assert Resampling.whole(2, 2).mean(only_one_class) == pytest.approx([0.7])


def test_resampled_means_are_the_means_of_the_drawn_cases():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(3, 6, 2))
    values[rng.uniform(size=values.shape) < 0.2] = NAN
    resampling = Resampling.draw(names(6), 3, resamples=20, seed=1)
    for b, mean in enumerate(resampling.mean(values)):
        drawn = values.repeat(resampling.seeds[b], axis=0).repeat(resampling.cases[b], axis=1)
        assert mean == pytest.approx(np.nanmean(np.nanmean(drawn, axis=(0, 1))))


def test_all_cases_of_a_patient_are_drawn_together():
    resampling = Resampling.draw(["a", "a", "b", "c", "c", "c"], 4, resamples=300)
    a, other_a, b, *c = resampling.cases.T
    assert (a == other_a).all() and all((c[0] == other).all() for other in c)
    assert (a + b + c[0] == 3).all() and (resampling.seeds.sum(1) == 4).all()
    assert a.min() == 0 and a.max() == 3


def test_intervals_with_known_results():
    base = np.random.default_rng(0).uniform(0.2, 0.9, (3, 20, 2))
    resampling = Resampling.draw(names(20), 3)
    # a constant difference has an interval of width 0, because the comparison is paired
    assert estimate(base + 0.05, resampling, base) == Estimate(
        pytest.approx(0.05), *[pytest.approx(0.05)] * 2, pytest.approx((0.05,) * 3), pytest.approx((0.05,) * 20)
    )
    assert estimate(base, resampling, base).sign == 0
    unpaired = estimate(base, resampling)
    assert unpaired.low < unpaired.value < unpaired.high and unpaired.high - unpaired.low > 0.05
    assert (estimate(base - 0.05, resampling, base).sign, estimate(base + 0.05, resampling, base).sign) == (-1, 1)


def test_one_seed_and_many_cases_give_the_normal_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=(1, 400, 1))
    e = estimate(values, Resampling.draw(names(400), 1))
    half = 1.96 * values.std() / 20
    assert (e.low, e.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.012)


def test_variation_between_seeds_widens_the_interval():
    rng = np.random.default_rng(0)
    noise, of_seed = rng.normal(0, 0.01, (4, 50, 1)), np.array([-0.05, 0.0, 0.02, 0.06])[:, None, None]
    resampling = Resampling.draw(names(50), 4)
    narrow, wide = estimate(noise, resampling), estimate(noise + of_seed, resampling)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_intervals_have_their_nominal_coverage():
    """Without a true difference, but with noise of patients, seeds and both, about 95 of 100 intervals contain 0."""
    rng = np.random.default_rng(7)
    held = 0
    for trial in range(200):
        base = rng.normal(0.7, 0.1, (1, 30, 1)) + np.zeros((3, 1, 1))
        difference = rng.normal(0, 0.005, (3, 1, 1)) + rng.normal(0, 0.03, (1, 30, 1)) + rng.normal(0, 0.03, (3, 30, 1))
        resampling = Resampling.draw(names(30), 3, resamples=400, seed=trial)
        held += estimate(base + difference, resampling, base).sign == 0
    assert 0.9 <= held / 200 <= 0.99


def test_the_first_epoch_that_reaches_a_goal():
    curve = np.array([[0.1, 0.5, 0.2], [0.6, 0.6, 0.3], [0.7, 0.4, 0.4]])
    assert first_reached(curve, np.array([0.6, 0.5, 0.5]), [2, 4, 6]).tolist() == [4, 2, np.inf]
    flat = np.ones((3, 2, 5, 1)) * np.array([0.2, 0.5, 0.8])[:, None, None, None]
    resampling = Resampling.draw(names(5), 2, resamples=50)
    assert estimate_first_reached(flat, np.full((2, 5, 1), 0.5), [1, 2, 3], resampling) == Estimate(2, 2, 2)
    assert estimate_first_reached(flat, np.full((2, 5, 1), 0.9), [1, 2, 3], resampling).value == np.inf


def test_repeats_have_the_difference_of_each_seed():
    rng = np.random.default_rng(3)
    base, values = rng.uniform(size=(2, 4, 9, 2))
    values[rng.uniform(size=values.shape) < 0.2] = NAN
    e = estimate(values, Resampling.draw(names(9), 4), base)
    assert e.repeats == pytest.approx(np.nanmean(np.nanmean(values, 1), -1) - base.mean((1, 2)))


def test_a_class_that_only_one_arm_predicts_is_not_compared():
    """The last class is in no label. One arm predicts a voxel of it by mistake in one case, where its Dice is 0."""
    rng = np.random.default_rng(3)
    base = rng.uniform(0.6, 0.9, size=(3, 10, 3))
    base[:, :, 2] = NAN
    other = base.copy()
    other[0, 4, 2] = 0
    resampling = Resampling.draw(names(10), 3)
    assert estimate(base, resampling, other) == estimate(base, resampling, base)
    curve = np.stack([other, base])
    assert estimate_first_reached(curve, base, [1, 2], resampling) == Estimate(1, 1, 1)
    # a class that is in some labels counts with the cases where it is predicted by mistake
    base[:, :5, 2] = other[:, :5, 2] = 0.8
    other[:, 7, 2] = 0
    assert estimate(base, resampling, other).value == pytest.approx((0.8 - 5 / 6 * 0.8) / 3)


@pytest.mark.parametrize(
    "seeds, patients, of_seeds, of_patients", [(3, 30, 0.03, 0.0), (5, 6, 0.0, 0.04)], ids=["seeds", "patients"]
)
def test_few_seeds_or_patients_that_agree_by_chance_are_not_significant(seeds, patients, of_seeds, of_patients):
    """Three seeds without a true difference agree in sign in a quarter of the trials, and mislead the bootstrap.

    All seeds share their test patients, so the interval over the seeds does not see the variation between patients.
    """
    rng = np.random.default_rng(5)
    found = significant = 0
    for trial in range(300):
        base = rng.normal(0.7, 0.1, (1, patients, 1)) + np.zeros((seeds, 1, 1))
        difference = rng.normal(0, of_seeds, (seeds, 1, 1)) + rng.normal(0, of_patients, (1, patients, 1))
        difference = difference + rng.normal(0, 0.005, (seeds, patients, 1))
        e = estimate(base + difference, Resampling.draw(names(patients), seeds, resamples=200, seed=trial), base)
        assert len(e.by_patient) == patients and np.mean(e.by_patient) == pytest.approx(e.value)
        found += bool(e.sign)
        significant += bool(e.sign) and e.is_sure
    assert found / 300 > 0.08 and significant / 300 < 0.08


@pytest.mark.parametrize(
    "by_seed, agree",
    [((0.05, 0.06, 0.07), True), ((0.004, 0.03, 0.05), False), ((-0.02, -0.02), True), ((0.05,), False), ((), False)],
)
def test_significance_across_seeds(by_seed, agree):
    assert Estimate(0.0, 0.0, 0.0, by_seed).is_sure == agree


BETTER, WORSE, SAME = (
    Estimate(0.03, 0.01, 0.05, (0.03, 0.028, 0.032)),
    Estimate(-0.02, -0.03, -0.01, (-0.02, -0.019, -0.021)),
    Estimate(0.01, -0.01, 0.03, (0.01, -0.02, 0.04)),
)
PERHAPS = Estimate(0.028, 0.004, 0.05, (0.004, 0.03, 0.05))


@pytest.mark.parametrize(
    "found, words, not_words",
    [
        (
            {"pretrained": {5: SAME, 10: SAME}},
            ["No evidence of a difference", "pretrained", "5 and 10"],
            ["better", "worse"],
        ),
        (
            {"pretrained": {5: BETTER, 10: SAME}},
            ["better than scratch (+0.030 Dice with 5", "not", "from scratch with 10"],
            ["No"],
        ),
        (
            {"encoder": {5: SAME}, "pretrained": {5: WORSE}},
            ["encoder is not", "pretrained is worse than scratch (-0.020"],
            ["better"],
        ),
        (
            {"encoder": {5: SAME}, "pretrained": {5: PERHAPS, 10: BETTER}},
            [
                "pretrained is better than scratch (+0.030 Dice with 10 labelled cases) and perhaps better than scratch (+0.028 "
                "Dice with 5 labelled cases,",
                "--seeds",
            ],
            ["worse"],
        ),
        ({}, ["Only scratch"], []),
    ],
)
def test_the_verdict_is_one_sentence_with_the_values(found, words, not_words):
    sentence = verdict(found, patients=20, best=0.7)
    assert all(word in sentence for word in words) and not any(word in sentence for word in not_words), sentence
    assert sentence.endswith(".") and sentence.count(". ") == 0


def test_too_few_patients_give_no_verdict():
    assert "better" not in verdict({"pretrained": {5: BETTER}}, patients=5, best=0.7)
    assert "5 test patients" in verdict({"pretrained": {5: BETTER}}, patients=5, best=0.7)


def test_arms_that_learned_nothing_give_no_verdict():
    sentence = verdict({"pretrained": {5: WORSE}}, patients=20, best=0.17)
    assert "worse" not in sentence and "0.17" in sentence and "--epochs" in sentence
