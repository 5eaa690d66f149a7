"""Write the results of a study: ``compare.md``, ``compare.csv`` and ``compare.png``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nnunetv2_macl.compare.figure import draw
from nnunetv2_macl.compare.results import Results, write_csv
from nnunetv2_macl.compare.statistics import Estimate, Resampling, estimate, estimate_first_reached
from nnunetv2_macl.compare.steps import DONE_FILE
from nnunetv2_macl.compare.study import SCRATCH, Arm, Options, Study
from nnunetv2_macl.files import atomic_write
from nnunetv2_macl.nnunet import read_json
from nnunetv2_macl.text import duration, join_words, pluralise
from nnunetv2_macl.training.run_folder import cases_seen

REPORT_FILE, PICTURE_FILE = "compare.md", "compare.png"
# names of the kinds of fine-tuning in the report
FINETUNING_NAMES = {"sgd": "SGD", "adamw": "AdamW", "paper": "Adam, as in the paper"}
# with fewer, all differences have the same sign by chance more often than once in 20: 2 ** (1 - 5) > 0.05
FEWEST_PATIENTS = 6
# arms are not compared if none reaches this mean Dice
MIN_MEANINGFUL_DICE = 0.2


def write_report(study: Study) -> str:
    """Write ``compare.csv``, ``compare.md`` and ``compare.png`` of a study whose cells are done, and return the verdict."""
    results = Results.read(study)
    write_csv(results)
    draw(results, study.folder / PICTURE_FILE)
    whole = Resampling.whole(study.options.seeds, len(study.split.test))
    reached = [float(whole.mean(group.measures["dice"])[0]) for group in results.groups.values()]
    best = max((value for value in reached if not math.isnan(value)), default=0.0)
    sentence = verdict(differences(results), patients=patients_with_defined_dice(results), best=best)
    text = "\n".join(_lines(results, sentence)) + "\n"
    atomic_write(study.folder / REPORT_FILE, lambda file: file.write(text.encode()))
    return sentence


def write_overview(reports: Sequence[tuple[Options, Path]], file: Path) -> None:
    """Write a page with the verdict and the figure of each kind of fine-tuning, and links to their reports.

    Args:
        reports: Options and report of the studies of each kind.
        file: The page, in a folder that contains the reports.
    """
    lines = [f"# Does pre-training help? {reports[0][0].dataset}, {reports[0][0].configuration}", ""]
    for options, report in reports:
        # the verdict, and the cautions below it
        text = report.read_text(encoding="utf-8").partition("\n")[2]
        beginning = text.partition("\n![")[0].partition("\n#")[0].strip()
        link = report.relative_to(file.parent).as_posix()
        lines += [f"## Fine-tuning with {FINETUNING_NAMES[options.finetuning]}: {_budget(options)}", "", beginning, ""]
        if report.with_name(PICTURE_FILE).is_file():
            picture = report.with_name(PICTURE_FILE).relative_to(file.parent).as_posix()
            lines += [f"![Dice]({picture})", ""]
        lines += [f"Tables: [{link}]({link})", ""]
    text = "\n".join(lines)
    atomic_write(file, lambda stream: stream.write(text.encode()))


def differences(results: Results) -> dict[str, dict[int, Estimate]]:
    """Return the gain in mean Dice over scratch on the test cases, by arm and number of labels."""
    resampling = results.test_bootstrap
    return {
        arm.slug: {
            labels: estimate(
                results.groups[arm.slug, labels].measures["dice"],
                resampling,
                results.groups[SCRATCH, labels].measures["dice"],
            )
            for labels in results.study.split.labels
        }
        for arm in results.study.arms
        if arm.slug != SCRATCH
    }


def verdict(found: dict[str, dict[int, Estimate]], *, patients: int, best: float) -> str:
    """Return one sentence that says whether pre-training helps.

    An arm differs from scratch if the bootstrap interval excludes 0. The sentence says "perhaps" unless the t-intervals over
    the seeds and over the patients also exclude 0.

    Args:
        found: Gain in Dice over scratch, by arm and number of labels.
        patients: Number of test patients with a defined Dice, see `patients_with_defined_dice`.
        best: Mean Dice of the best arm.
    """
    if not found:
        return "Only scratch was trained, so there is nothing to compare it with."
    if patients < FEWEST_PATIENTS:
        return too_few_patients(patients)
    if best < MIN_MEANINGFUL_DICE:
        return no_conclusion(best)
    clauses = []
    for arm, by_labels in found.items():
        parts = []
        for sign, sure in itertools.product((1, -1), (True, False)):
            of_sign = {n: d for n, d in by_labels.items() if d.sign == sign and d.is_sure == sure}
            if of_sign:
                values = join_words(f"{d.value:+.3f} Dice with {n}" for n, d in of_sign.items())
                words = f"{'' if sure else 'perhaps '}{'better' if sign > 0 else 'worse'} than scratch"
                parts.append(
                    f"{words} ({values} labelled cases{'' if sure else ', and more --seeds or --test may decide'})"
                )
        if same := [n for n, d in by_labels.items() if not d.sign]:
            parts.append(f"not distinguishable from scratch with {join_words(same)} labelled cases")
        clauses.append(f"{arm} is {' and '.join(parts)}")
    if not any(difference.sign for by_labels in found.values() for difference in by_labels.values()):
        labels = dict.fromkeys(labels for by_labels in found.values() for labels in by_labels)
        return (
            f"No evidence of a difference: the Dice of {join_words(found)} is not distinguishable from that of scratch with "
            f"{join_words(labels)} labelled cases."
        )
    return f"{'; '.join(clauses)}."


def too_few_patients(patients: int) -> str:
    """Return the verdict if there are fewer than `FEWEST_PATIENTS` test patients with a Dice."""
    return (
        f"Too few to tell: {pluralise(patients, 'test patient')} with a Dice (undefined for a class in neither prediction nor "
        f"label), but at least {FEWEST_PATIENTS} are needed to distinguish a difference from chance."
    )


def collapse_notes(results: Results, where: str = "") -> list[str]:
    """Return a sentence for each pre-training of a study that has collapsed. ``where`` names the study."""
    return [
        f"**The pre-training with recipe {recipe}{f' of {where}' if where else ''} has collapsed:** {reason}. So its result does "
        "not show what the method can do."
        for recipe, reason in results.collapsed.items()
    ]


def no_conclusion(best: float) -> str:
    """Return the verdict if the best mean Dice is below `MIN_MEANINGFUL_DICE`."""
    return (
        f"No conclusion: no arm has learned to segment (best Dice {best:.2f}), so train longer, with more --epochs or "
        "--iterations."
    )


def _lines(results: Results, sentence: str) -> list[str]:
    study = results.study
    options, split = study.options, study.split
    resampling = results.test_bootstrap
    groups = results.groups
    tested = pluralise(len(split.test), "test case")
    few = [
        what
        for what, number, enough in (("seeds", options.seeds, 5), ("test patients", _patients(study, split.test), 20))
        if number < enough
    ]
    lines = [f"# Does pre-training help? {options.dataset}, {options.configuration}", "", f"**{sentence}**", ""]
    if few:
        lines += [f"There are few {join_words(few)}, so the intervals are rough and too narrow.", ""]
    for note in collapse_notes(results):
        lines += [note, ""]
    lines += ["![Dice](compare.png)", "", f"## Dice on {tested}", ""]
    lines += _table(results, lambda arm, n: with_interval(estimate(groups[arm, n].measures["dice"], resampling)))
    lines += ["", "## Dice above scratch, on the same cases and seeds", ""]
    found = differences(results)
    lines += _table(results, lambda arm, n: with_interval(found[arm][n], "+") + _by_seed(found[arm][n]), skip=SCRATCH)
    for name, title in (("hd95", "HD95"), ("asd", "ASD")):
        lines += ["", f"## {title} in mm on {tested}", ""]
        lines += _table(results, lambda arm, n, name=name: _distance(groups[arm, n].measures[name], resampling))  # type: ignore[misc]
    if len(results.classes) > 1:
        lines += ["", "## Dice by class", ""]
        lines += _table(
            results,
            lambda arm, n: ", ".join(
                f"{_plain(name)} {number(Resampling.whole(*v.shape[:2]).mean(v[:, :, [c]])[0])}"
                for v in [groups[arm, n].measures["dice"]]
                for c, name in enumerate(results.classes)
            ),
        )
    lines += ["", "## Epochs until the validation Dice reaches scratch's final value", ""]
    lines += _table(results, lambda arm, n: _reached(results, arm, n))
    lines += ["", "## Learning rate, chosen on the validation cases", ""]
    lines += _table(results, lambda arm, n: f"{groups[arm, n].rate:g}")
    return [*lines, "", "## How this was measured", "", *(f"- {line}" for line in _method(results))]


def _table(results: Results, entry: Callable[[str, int], str], skip: str = "") -> list[str]:
    labels = results.study.split.labels
    rows = [f"| labelled cases | {' | '.join(map(str, labels))} |", f"|---|{'---|' * len(labels)}"]
    rows += [
        f"| {arm.slug} | {' | '.join(entry(arm.slug, n) for n in labels)} |"
        for arm in results.study.arms
        if arm.slug != skip
    ]
    return rows


def _plain(name: str) -> str:
    """Return a name without the meaning that its characters have in Markdown."""
    return re.sub(r"([\\`*_\[\]!|<>])", r"\\\1", name)


def number(value: float, sign: str = "", digits: int = 3) -> str:
    return "not defined" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def with_interval(e: Estimate, sign: str = "", digits: int = 3) -> str:
    if math.isnan(e.value):
        return "not defined"
    return f"{e.value:{sign}.{digits}f} ({e.low:{sign}.{digits}f} to {e.high:{sign}.{digits}f})"


def _by_seed(e: Estimate) -> str:
    return f"; by seed {', '.join(number(value, '+') for value in e.repeats)}" if len(e.repeats) > 1 else ""


def _distance(values: np.ndarray, resampling: Resampling) -> str:
    missing = int(np.isnan(values).sum())
    return with_interval(estimate(values, resampling), digits=2) + (
        f", {missing} of {values.size} not defined" if missing else ""
    )


def _reached(results: Results, arm: str, labels: int) -> str:
    group, scratch = results.groups[arm, labels], results.groups[SCRATCH, labels]
    resampling = results.validation_bootstrap
    e = estimate_first_reached(group.curve, scratch.curve[-1], results.curve_epochs, resampling)

    def words(epochs: float) -> str:
        return "never" if math.isinf(epochs) else f"{epochs:.0f}"

    time = "" if math.isinf(e.value) else f", {duration(e.value * group.epoch_seconds)}"
    interval = "" if math.isinf(e.low) else f" ({words(e.low)} to {words(e.high)})"
    return f"{words(e.value)}{interval}{time}"


def _patients(study: Study, cases: list[str]) -> int:
    return len({study.patients[case] for case in cases})


def patients_with_defined_dice(results: Results) -> int:
    """Return the number of test patients with a Dice in an arm and in scratch, for the arm and labels with fewest of them."""
    study = results.study
    numbers = [_patients(study, study.split.test)]
    for arm, labels in itertools.product((arm.slug for arm in study.arms), study.split.labels):
        both = (results.groups[name, labels].measures["dice"] for name in (arm, SCRATCH))
        # (seeds, cases, classes)
        defined = np.logical_and(*(~np.isnan(dice) for dice in both)).any((0, 2))
        numbers.append(_patients(study, [case for case, has in zip(study.split.test, defined, strict=True) if has]))
    return min(numbers)


def _budget(options: Options) -> str:
    return f"{pluralise(options.epochs, 'epoch')} of {pluralise(options.iterations, 'step')}"


def _start(arm: Arm) -> str:
    if arm.weights:
        return f"{Path(arm.weights).name}. It is not known whether these weights were trained on the test cases"
    if not arm.recipe:
        return "nnU-Net's own initialisation"
    parts = "the encoder only" if arm.encoder_only else "the encoder and the trained decoder stages"
    return f"{parts}, pre-trained with recipe {arm.recipe_and_settings}"


def _images(study: Study, planned: str) -> str:
    """Return the numbers of images that the pre-trainings have seen, as words; ``planned`` if a run's folder does not say."""
    found: dict[str, list[str]] = {}
    for arm in study.pretrainings:
        words = planned
        if (seen := cases_seen(study.pretraining_run(arm))) is not None:
            names = set().union(*seen.values())
            words = _number_of_images(len(names), len(names - study.patients.keys()))
        found.setdefault(words, []).append(arm.recipe_and_settings)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{words} ({join_words(recipes)})" for words, recipes in found.items())


def _number_of_images(images: int, unlabelled: int) -> str:
    return f"{images} images without their labels, {unlabelled} of them from imagesUn"


def _method(results: Results) -> list[str]:
    study = results.study
    options, split = study.options, study.split
    planned = read_json(study.planning_folder / DONE_FILE, "")
    share = len(study.patients) - len(split.test) - len(split.validation)
    lines = [f"{arm.slug} starts from {_start(arm)}." for arm in study.arms]
    if study.arms_left_out:
        lines.append(
            f"The study has further arms, which failed or which its last command did not name: "
            f"{join_words(study.arms_left_out)}."
        )
    rates = ", ".join(f"{rate:g}" for rate in options.rates)
    teachers = any(arm.teacher for arm in study.arms)
    patches = ". All arms but self_train see" if teachers else ", and sees"
    patches += " the same labelled patches in the same order"
    lines.append(
        f"Each arm trains for {_budget(options)}, with the same labelled cases and seeds{patches}. For each arm and "
        f"number of labels, the best of the learning rates {rates} is used: the one with the highest mean Dice on the "
        "validation cases over the seeds."
    )
    if teachers:
        lines.append("An arm self_train-ARM needs the steps of its teacher, ARM, in addition.")
    shares = f"{pluralise(len(split.test), 'case')} for test, {len(split.validation)} for validation"
    lines.append(
        f"The images were split by {'patient' if options.group_regex else 'case'}: {shares}. The labelled cases were drawn "
        f"from the other {share}, {pluralise(options.seeds, 'time')} with one seed each; a smaller set is part of the larger "
        "ones of its seed. In addition, every arm used the labels of the validation cases."
    )
    used = {n: sorted({len(subset[n]) for subset in split.subsets}) for n in split.labels}
    if any(counts != [n] for n, counts in used.items()):
        words = "; ".join(f"{n}: {join_words(counts)}" for n, counts in used.items())
        lines.append(f"Whole patients were drawn, so the actual numbers of labelled cases were {words}.")
    if results.pretraining_seconds:
        times = "; ".join(
            f"{recipe} took {duration(seconds)}" for recipe, seconds in results.pretraining_seconds.items()
        )
        images = _number_of_images(share + planned["unlabelled"], planned["unlabelled"])
        apart = (
            "and no image of a test or validation patient"
            if options.group_regex
            else "and no test or validation case. Without --group_regex, it is not known whether some show the same patients"
        )
        lines.append(
            f"Pre-training used {_images(study, images)}, {apart}. Pre-training ran once per recipe, so the intervals do not "
            f"include the variation between pre-trainings. The times above do not include pre-training ({times})."
        )
    planning = (
        f"All arms use the plan {Path(options.plan).name} unchanged. It may have been made from the test cases too."
        if options.plan
        else f"All arms use the plan that nnU-Net ({planned['planner']}) made from all {share + len(split.validation)} cases of "
        "the training share and their labels."
    )
    how = {"sgd": "nnU-Net", "adamw": "nnU-Net, but with AdamW", "paper": "the paper"}
    lines.append(f"Fine-tuning follows {how[options.finetuning]}.")
    # the paper's training does not mirror, so the network is not trained for mirrored images
    mirroring = "without" if options.disable_tta or options.finetuning == "paper" else "with"
    if "patch_size" in planned:
        size = "x".join(map(str, planned["patch_size"]))
        planning += f" Its patches have {size} voxels, in batches of {planned['batch_size']}."
    lines.append(f"{planning} The last checkpoint predicts, {mirroring} mirroring.")
    lines.append(
        "nnU-Net computes the Dice. The mean is taken over cases and seeds for each class, then over classes. A class that is "
        "in neither segmentation is left out. A difference leaves out a class that is in no label and that only one arm has "
        "predicted. MONAI computes HD95 and ASD, in mm (the unit of the files' spacing). They are defined only for a class "
        "that is in both segmentations, so compare them only where no value is missing."
    )
    drawn = "patients" if options.group_regex else "cases"
    lines.append(
        f"Intervals in brackets are 95 % intervals of a bootstrap over {drawn} and seeds. All arms share its draws, so "
        "differences are paired. The intervals are not corrected for multiple comparisons, and few seeds make them too narrow. "
        f"The verdict therefore says 'perhaps' unless Student's intervals over the seeds and over the {drawn} also exclude 0."
    )
    lines.append(
        "The curves show the Dice of whole validation cases at the network's resolution without mirroring, after "
        f"{join_words(results.curve_epochs)} epochs. Times include training and nnU-Net's online validation."
    )
    return lines
