"""A study: its options, its cells, and the paths in its folder."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2_macl import formats
from nnunetv2_macl.checkpoints import ENCODER_FILE
from nnunetv2_macl.compare.split import Split
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder, sha256, write_if_absent, write_json
from nnunetv2_macl.nnunet import FOLDER_VARIABLES, GROUP_VARIABLE, read_json
from nnunetv2_macl.planning.derive import DEFAULT_RECIPE
from nnunetv2_macl.recipe import load_recipe, parse_settings, settings_as_text
from nnunetv2_macl.semi_supervised.settings import parse_semi_settings
from nnunetv2_macl.text import pluralise
from nnunetv2_macl.training.run_folder import pretraining_folder

SCRATCH = "scratch"
# prefix of arms that are trained semi-supervised
SEMI = "semi"
# prefix of arms that are trained on pseudo-labels from the models of another arm
SELF_TRAINING = "self_train"
STUDY_FILE = "study.json"
# scores of a cell
RESULT_FILE = "result.json"
# default epochs, steps per epoch and learning rates of each kind of fine-tuning; adamw is the training of nnUNetTrainerMACL_short
FINETUNINGS: dict[str, tuple[int, int, list[float]]] = {
    "adamw": (8, 100, [3e-3]),
    "sgd": (100, 250, [1e-2, 1e-3]),
    "paper": (100, 250, [5e-4]),
}
# options that are not named like their field
_OPTIONS = {
    "dataset": "DATASET", "configuration": "-c", "plans": "-p", "batch_size": "-batch_size", "split": "--splits"
}  # fmt: skip

# names of options in studies of version 0.1, and their present names
_OLDER_NAMES = {"c": "configuration", "p": "plans"}


@dataclass(frozen=True)
class Options:
    """The options that define a study. Each field is named like its option on the command line (see `option`)."""

    dataset: str
    configuration: str
    plans: str
    arms: list[str]
    labels: list[str]
    seeds: int
    rates: list[float]
    test: str
    validation: str
    group_regex: str | None
    epochs: int
    iterations: int
    batch_size: int | None
    pretrain_epochs: int | None
    pretrain_iterations: int | None
    pretrain_batch_size: int | None
    disable_tta: bool
    plan: str | None = None
    finetuning: str = "sgd"
    split: int = 0  # index of the random draw of patients, from 0 to --splits - 1

    @property
    def pretrain_settings(self) -> list[str]:
        """Return the recipe's values that the --pretrain options set, as KEY=VALUE."""
        values = {
            "num_epochs": self.pretrain_epochs,
            "num_iterations_per_epoch": self.pretrain_iterations,
            "batch_size": self.pretrain_batch_size,
        }
        return settings_as_text({key: value for key, value in values.items() if value is not None})

    def check(self) -> None:
        """Raise UserError, with the name of the option, for an invalid value."""
        for key in ("seeds", "epochs", "iterations", "batch_size", "pretrain_epochs", "pretrain_iterations"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"{option(key)} must be 1 or more, got {value}.")
        if self.pretrain_batch_size is not None and self.pretrain_batch_size < 2:
            raise UserError(f"--pretrain_batch_size must be 2 or more, got {self.pretrain_batch_size}.")
        if wrong := [rate for rate in self.rates if not 0 < rate < 1]:
            raise UserError(f"--rates must be between 0 and 1, got {wrong[0]:g}.")
        if len(set(self.rates)) < len(self.rates):
            raise UserError(f"--rates has a rate twice: {' '.join(f'{rate:g}' for rate in self.rates)}. Give it once.")
        arms = [parse_arm(text) for text in self.arms]
        for arm in arms:
            arm.check(self.pretrain_settings)
        unlabelled = [arm.name for arm in arms if arm.trains_on_unlabelled]
        if self.finetuning == "paper" and unlabelled:
            raise UserError(
                f"--arms: {unlabelled[0]} cannot be trained with --finetuning paper. Give --finetuning sgd or adamw, or "
                "other arms."
            )
        for arm in arms:
            if arm.teacher is not None and arm.teacher not in [other.slug for other in arms]:
                teacher = arm.name.partition(":")[2]
                raise UserError(f"--arms: {arm.name} needs the models of {teacher}. Add it: --arms ... {teacher}")
        if SCRATCH not in self.arms:
            raise UserError(
                f"--arms must contain {SCRATCH}, because the other arms are compared with it, got {self.arms}."
            )
        _check_names(arms)


def _check_names(arms: Sequence[Arm]) -> None:
    """Raise UserError if two arms would share a folder."""
    for number, arm in enumerate(arms):
        if arm.slug in [other.slug for other in arms[:number]]:
            raise UserError(
                f"--arms: two arms have the name {arm.slug}. Give each arm once. If the arms are different files or folders, "
                "rename one of them."
            )
        for other in arms[:number]:
            share = (
                arm.recipe is not None and other.recipe is not None and arm.pretraining_name == other.pretraining_name
            )
            if share and arm.recipe_and_settings != other.recipe_and_settings:
                raise UserError(
                    f"--arms: {other.recipe_and_settings} and {arm.recipe_and_settings} would share the folder "
                    f"{arm.pretraining_name}. Give the files different names."
                )


def options_by_finetuning(
    kinds: Sequence[str],
    *,
    epochs: Sequence[int] | None = None,
    iterations: Sequence[int] | None = None,
    rates: list[float] | None = None,
    **others: Any,
) -> list[Options]:
    """Return the options of one study for each kind of fine-tuning. The studies differ only in their fine-tuning.

    Args:
        kinds: Keys of `FINETUNINGS`.
        epochs: Epochs of each kind, or one number for all. None: the defaults.
        iterations: Steps per epoch of each kind, or one number for all. None: the defaults.
        rates: Learning rates of every kind. None: the defaults.
        others: The other fields of `Options`.

    Raises:
        UserError: A kind is named twice, or the numbers of values and of kinds differ.
    """
    if len(set(kinds)) < len(kinds):
        raise UserError(f"--finetuning names a kind twice: {' '.join(kinds)}. Give each kind once.")

    def of_each(key: str, values: Sequence[int] | None, defaults: list[int]) -> list[int]:
        if values is None:
            return defaults
        if len(values) not in (1, len(kinds)):
            raise UserError(
                f"{option(key)} {_typed(list(values))} has {pluralise(len(values), 'value')}, and --finetuning "
                f"{' '.join(kinds)} has {pluralise(len(kinds), 'kind')}. Give one value, or one for each kind."
            )
        return list(values) * (len(kinds) // len(values))

    epochs = of_each("epochs", epochs, [FINETUNINGS[kind][0] for kind in kinds])
    iterations = of_each("iterations", iterations, [FINETUNINGS[kind][1] for kind in kinds])
    lengths = zip(kinds, epochs, iterations, strict=True)
    return [
        Options(finetuning=kind, epochs=e, iterations=i, rates=rates or FINETUNINGS[kind][2], **others)
        for kind, e, i in lengths
    ]


@dataclass(frozen=True)
class Arm:
    """The initial weights of a fine-tuning, and whether it is semi-supervised."""

    name: str  # as on the command line
    slug: str  # as in file names
    recipe: str | None = None  # recipe of the pre-training, or None
    settings: tuple[str, ...] = ()  # values that replace those of the recipe, as KEY=VALUE, sorted by key
    encoder_only: bool = False  # whether the pre-trained decoder is left out
    weights: str | None = None  # a file of existing weights, or None
    semi: tuple[str, ...] | None = (
        None  # settings of semi-supervised training, as KEY=VALUE; None: labelled images only
    )
    teacher: str | None = None  # slug of the arm whose models label the unlabelled images, or None

    @property
    def trains_on_unlabelled(self) -> bool:
        """Return whether the fine-tuning uses unlabelled images too."""
        return self.semi is not None or self.teacher is not None

    @property
    def recipe_and_settings(self) -> str:
        """Return the recipe and its settings as an arm names them: NAME,KEY=VALUE,..."""
        return ",".join([str(self.recipe), *self.settings])

    @property
    def recipe_name(self) -> str:
        """Return the name of the recipe, without the folder and the ending of a file."""
        return Path(str(self.recipe)).name.removesuffix(".json")

    @property
    def recipe_slug(self) -> str:
        """Return the recipe and its settings as file names contain them."""
        return "-".join([_slug(self.recipe_name), *(_slug(text).strip("-") for text in self.settings)])

    @property
    def pretraining_name(self) -> str:
        """Return the name of the pre-training's folder."""
        # a user's recipe file may have the name of a recipe of the package
        return ("file-" if Path(str(self.recipe)).is_absolute() else "") + self.recipe_slug

    def check(self, further_settings: Sequence[str] = ()) -> None:
        """Raise UserError unless the recipe, with its settings and further ones, or the weights can be loaded."""
        if self.recipe is not None:
            # `parse_settings` refuses a key that the arm and a --pretrain option set to different values
            values = parse_settings([*further_settings, *self.settings], f"Arm {self.name} and the --pretrain options")
            load_recipe(self.recipe, resource_folder("plans"), values)
        if self.weights is not None:
            formats.load_weights(Path(self.weights))


def parse_arm(text: str) -> Arm:
    """Return the arm that a text of the command line describes.

    Raises:
        UserError: There is no such arm.
    """
    kind, _, what = text.partition(":")
    name, *semi = kind.split(",")
    if name == SEMI and what:
        parse_semi_settings(semi, f"Arm {text}")
        start = parse_arm(what)
        if start.trains_on_unlabelled:
            raise UserError(f"--arms: {what} in {text} already trains on unlabelled images. Use only one of the two.")
        return replace(start, name=f"{kind}:{start.name}", slug=f"{_slug(kind)}-{start.slug}", semi=tuple(sorted(semi)))
    if kind == SELF_TRAINING and what:
        start = parse_arm(what)
        return replace(start, name=f"{kind}:{start.name}", slug=f"{kind}-{start.slug}", semi=None, teacher=start.slug)
    if text == SCRATCH:
        return Arm(text, text)
    if text in ("encoder", "pretrained"):
        return Arm(text, text, recipe=DEFAULT_RECIPE, encoder_only=text == "encoder")
    if kind == "recipe" and what:
        # a comma in a list is followed by a value, and a comma between settings by KEY=
        name, *texts = [what] if Path(what).is_file() else re.split(r",(?=[^,=]+=)", what)
        recipe = str(Path(name).resolve()) if Path(name).is_file() else name
        settings = tuple(sorted(settings_as_text(parse_settings(texts, f"Arm {text}"))))
        arm = Arm(",".join([f"{kind}:{recipe}", *settings]), "", recipe=recipe, settings=settings)
        return replace(arm, slug=f"recipe-{arm.recipe_slug}")
    if kind == "weights" and what:
        file = Path(what).expanduser().resolve()
        return Arm(f"{kind}:{file}", f"weights-{_slug(file.stem)}", weights=str(file))
    raise UserError(
        f"--arms: there is no arm '{text}'. The arms are {SCRATCH}, encoder, pretrained, "
        f"recipe:NAME_OR_FILE, recipe:NAME_OR_FILE,KEY=VALUE,..., weights:FILE, and {SEMI}:ARM and {SELF_TRAINING}:ARM with "
        "one of these."
    )


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text)[:60]


def option(key: str) -> str:
    """Return the command-line option that sets a field of `Options`."""
    return _OPTIONS.get(key, f"--{key}")


@dataclass(frozen=True)
class Trial:
    """One training: an arm, a number of labelled cases, a seed and a learning rate."""

    arm: str
    labels: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.arm}_{self.labels}cases_seed{self.seed}_lr{self.rate:g}"


@dataclass(frozen=True)
class Study:
    """A study and its folder."""

    folder: Path
    options: Options
    split: Split  # use of each case
    patients: dict[str, str]  # patient of each case, by case
    # SHA-256 of the files that the options name (weights, recipes and the plan), by file
    files: dict[str, str] = field(default_factory=dict)
    # whether images, plan and pre-trainings are in the parent folder, for studies that differ only in their fine-tuning
    shares: bool = False

    def open(self, check_only: bool = False) -> Study:
        """Write the study into its folder, or extend the study there by its arms and seeds. Return it.

        With ``check_only``, nothing is written. The study that is returned has only the arms of ``options``. Further ones stay
        in the folder.

        Raises:
            UserError: The folder holds something else, or a study with other options or other cases. The message names them.
        """
        study = replace(self, files=_checksums(self.options))
        folder, options, file = self.folder, self.options, self.folder / STUDY_FILE
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file. Give a folder: -o FOLDER")
        study._check_siblings()
        # list the folder before looking for the study's file, because another process may create the study meanwhile
        others = [path for path in folder.iterdir() if STUDY_FILE not in path.name] if folder.is_dir() else []
        if not file.is_file():
            if others:
                raise UserError(f"{folder} is not empty and holds no study. Give another folder: -o FOLDER")
            if check_only:
                return study
            write_if_absent(study._as_json(), file)
        there = self.read(folder)
        changed = study._changed_options(there, besides=("arms", "seeds"))
        if options.seeds < there.options.seeds:
            changed.append(f"--seeds {options.seeds} (was {there.options.seeds})")
        changed += [f"the file {name}" for name, was in there.files.items() if study.files.get(name, was) != was]
        if changed:
            raise UserError(
                f"{folder} holds a study that began with other options or files. Changed: {', '.join(changed)}. "
                "Give the options and files that the study began with, or another folder: -o FOLDER"
            )
        begun = replace(self.split, subsets=self.split.subsets[: there.options.seeds])
        if there.split != begun or there.patients != self.patients:
            raise UserError(
                f"{folder} holds a study of other cases: the images of {options.dataset} have changed since the study began. "
                "Put the images back, or give another folder: -o FOLDER"
            )
        arms = [*there.options.arms, *(arm for arm in options.arms if arm not in there.options.arms)]
        _check_names([parse_arm(arm) for arm in arms])
        # finished cells are kept; only the new arms and seeds are trained
        grown = replace(study, options=replace(options, arms=arms), files=there.files | study.files)
        if grown != there and not check_only:
            write_json(grown._as_json(), file)
        return study

    @classmethod
    def read(cls, folder: Path) -> Study:
        """Return the study that a folder holds.

        Raises:
            UserError: The folder has no ``study.json``, or a damaged one.
        """
        file = folder / STUDY_FILE
        fix = "Give another folder: -o FOLDER"
        content = read_json(file, fix)
        try:
            split = content["split"]
            subsets = [{int(labels): cases for labels, cases in subset.items()} for subset in split["subsets"]]
            return cls(
                folder,
                Options(**{_OLDER_NAMES.get(key, key): value for key, value in content["options"].items()}),
                Split(split["test"], split["validation"], subsets),
                content["patients"],
                content.get("files", {}),
                content.get("shares", False),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"This version of nnunetv2_macl cannot read the study in {file}: {error}. {fix}") from None

    def _changed_options(self, there: Study, besides: Sequence[str]) -> list[str]:
        """Return the options whose values differ from those of a study on disk, as words, without the fields ``besides``."""
        return [
            f"{option(f.name)} {_typed(getattr(self.options, f.name))} (was {_typed(getattr(there.options, f.name))})"
            for f in fields(Options)
            if f.name not in besides and getattr(self.options, f.name) != getattr(there.options, f.name)
        ]

    def _check_siblings(self) -> None:
        """Raise UserError if studies that share the pre-trainings have other options for them, or other cases."""
        of_finetuning = ("arms", "seeds", "finetuning", "epochs", "iterations", "rates")
        for file in sorted(self.base.glob(f"*/{STUDY_FILE}")) if self.shares else ():
            there = Study.read(file.parent)
            changed = self._changed_options(there, besides=of_finetuning)
            changed += [f"the file {name}" for name, was in there.files.items() if self.files.get(name, was) != was]
            if there.patients != self.patients or there.split.test != self.split.test:
                changed.append(f"the images of {self.options.dataset}")
            own = [arm for arm in self.options.arms if arm not in there.options.arms]
            _check_names([parse_arm(arm) for arm in (*there.options.arms, *own)])
            if changed:
                raise UserError(
                    f"{file.parent} holds a study with the same pre-trainings and other options. Changed: {', '.join(changed)}. "
                    "Give its options, or another folder: -o FOLDER"
                )

    def _as_json(self) -> dict[str, Any]:
        return {
            "options": asdict(self.options),
            "split": asdict(self.split),
            "patients": self.patients,
            "files": self.files,
            "shares": self.shares,
        }

    @cached_property
    def arms(self) -> list[Arm]:
        return [parse_arm(text) for text in self.options.arms]

    @property
    def cells(self) -> list[Trial]:
        return [
            Trial(arm.slug, labels, seed, rate)
            for seed in range(self.options.seeds)
            for labels in self.split.labels
            for rate in self.options.rates
            for arm in self.arms
        ]

    @property
    def arms_left_out(self) -> list[str]:
        """Return the names of the arms in the study's folder that this study does not have."""
        return [arm for arm in Study.read(self.folder).options.arms if arm not in self.options.arms]

    def arm(self, slug: str) -> Arm:
        return next(arm for arm in self.arms if arm.slug == slug)

    @property
    def pretrainings(self) -> list[Arm]:
        """Return one arm of each pre-training, because several arms may start from the same one."""
        return list({arm.recipe_and_settings: arm for arm in self.arms if arm.recipe is not None}.values())

    def fold(self, cell: Trial) -> int:
        """Return the index of the cell's split in the study's ``splits_final.json``."""
        return cell.seed * len(self.split.labels) + self.split.labels.index(cell.labels)

    @property
    def splits(self) -> list[dict[str, list[str]]]:
        """Return the content of ``splits_final.json``, in the order of `fold`."""
        return [
            {"train": cases, "val": self.split.validation} for subset in self.split.subsets for cases in subset.values()
        ]

    def write_splits(self) -> None:
        """Write ``splits_final.json`` unless it has all splits, because the study may have more seeds than before.

        A file with more splits stays, because a study with another kind of fine-tuning may have more seeds.
        """
        there = read_json(self.splits_file, "") if self.splits_file.is_file() else []
        if there[: len(self.splits)] != self.splits:
            write_json(self.splits, self.splits_file)

    # --- paths -----------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> Path:
        """Return the folder of the images, the plan and the pre-trainings."""
        return self.folder.parent if self.shares else self.folder

    @property
    def raw(self) -> Path:
        return self.base / "nnUNet_raw" / self.options.dataset

    @property
    def preprocessed(self) -> Path:
        return self.base / "nnUNet_preprocessed" / self.options.dataset

    @property
    def splits_file(self) -> Path:
        return self.preprocessed / "splits_final.json"

    @property
    def plan_file(self) -> Path:
        return self.preprocessed / f"{self.options.plans}.json"

    @property
    def planning_folder(self) -> Path:
        return self.base / "planning"

    def pretraining_folder(self, arm: Arm) -> Path:
        return self.base / "pretraining" / arm.pretraining_name

    def pretraining_run(self, arm: Arm) -> Path:
        """Return the folder of the pre-training's run, which nnU-Net names after the excluded fold."""
        results = self.pretraining_folder(arm) / "nnUNet_results"
        return (
            pretraining_folder(results, self.options.dataset, self.options.plans, self.options.configuration) / "fold_0"
        )

    @property
    def pretraining_runs(self) -> list[Path]:
        """Return the folders of the pre-trainings that have begun, also of arms that this study does not have."""
        return list((self.base / "pretraining").glob("*/nnUNet_results/*/*/fold_0"))

    def cell_folder(self, cell: Trial) -> Path:
        return self.folder / "cells" / cell.name

    def teacher(self, cell: Trial) -> Trial | None:
        """Return the cell whose model labels the unlabelled images for a cell, if any."""
        arm = self.arm(cell.arm).teacher
        return None if arm is None else replace(cell, arm=arm)

    def generation(self, cell: Trial) -> int:
        """Return the number of teachers that are trained one after the other before a cell."""
        teacher = self.teacher(cell)
        return 0 if teacher is None else 1 + self.generation(teacher)

    def weights(self, arm: Arm) -> Path | None:
        """Return the weights that fine-tuning starts from, as a value of ``nnUNet_macl_weights``."""
        if arm.recipe is None:
            return Path(arm.weights) if arm.weights else None
        run = self.pretraining_run(arm)
        return run / ENCODER_FILE if arm.encoder_only else run

    def environment(self, results: Path) -> dict[str, str]:
        """Return nnU-Net's three folder variables, which point into the study, and the variable of the patients.

        The latter in the user's shell may be meant for another data set.
        """
        places = (self.raw.parent, self.preprocessed.parent, results)
        folders = {name: str(place) for name, place in zip(FOLDER_VARIABLES, places, strict=True)}
        return folders | {GROUP_VARIABLE: self.options.group_regex or ""}


def study_folders(folder: Path) -> list[Path]:
    """Return the folders of the studies in a folder: itself, or those of its splits and kinds of fine-tuning."""
    # three levels: the folder, its splits, their kinds of fine-tuning
    files = itertools.chain.from_iterable(sorted(folder.glob(f"{'*/' * depth}{STUDY_FILE}")) for depth in range(3))
    return [file.parent for file in files]


def _checksums(options: Options) -> dict[str, str]:
    """Return the SHA-256 of the files that the options name: weights, recipes and the plan."""
    arms = [parse_arm(text) for text in options.arms]
    weights = [arm.weights for arm in arms if arm.weights is not None]
    files = [arm.recipe for arm in arms if arm.recipe is not None and Path(arm.recipe).is_absolute()]
    sums = {name: " ".join(map(sha256, formats.load_weights(Path(name)).files)) for name in weights}
    return sums | {name: sha256(Path(name)) for name in [*files, *filter(None, [options.plan])]}


def _typed(value: Any) -> str:
    return (
        " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) if isinstance(value, list) else str(value)
    )
