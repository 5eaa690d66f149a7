"""Read nnU-Net's plan, configuration and folders of a data set, and explain missing ones to the user."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
    NoNormalization,
    RescaleTo01Normalization,
    RGBTo01Normalization,
    ZScoreNormalization,
)
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_macl.dataset_json import channel_names, check_dataset_json
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.networks import NAMES
from nnunetv2_macl.networks.registry import family_of, import_network, present_name

FOLDER_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
# variable that names the weights to fine-tune from
WEIGHTS_VARIABLE = "nnUNet_macl_weights"
# variable with a regular expression that finds the patient in the name of a case
GROUP_VARIABLE = "nnUNet_macl_group_regex"
# variable that names the trained model that labels unlabelled images: a trainer or the folder of its model
TEACHER_VARIABLE = "nnUNet_macl_teacher"
# in the order of preference, because most users of nnU-Net work in 3D
SUPPORTED_CONFIGURATIONS = ("3d_fullres", "3d_lowres", "2d")
# target of nnU-Net's default planner
DEFAULT_GPU_MEMORY_GB = 8.0
# schemes after which 0 is no mean of the image or of the labelled foreground, and
# schemes that do not use the intensities of the whole data set
_NO_ZERO_MEAN = tuple(s.__name__ for s in (NoNormalization, RescaleTo01Normalization, RGBTo01Normalization))
_OF_THE_IMAGE_ALONE = (*_NO_ZERO_MEAN, ZScoreNormalization.__name__)


# keys that decide how images are preprocessed: of a configuration, of a configuration with labels, and of the plan
_OF_IMAGES = (
    "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name", "resampling_fn_data",
    "resampling_fn_data_kwargs",
)  # fmt: skip
PREPROCESSING_KEYS = (
    "data_identifier", "preprocessor_name", "spacing", "patch_size", "normalization_schemes", "use_mask_for_norm",
    "resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs",
)  # fmt: skip
PLAN_KEYS = (
    "original_median_spacing_after_transp", "image_reader_writer", "transpose_forward", "transpose_backward",
    "experiment_planner_used",
)  # fmt: skip


def lacks_wandb() -> bool:
    """Return whether nnU-Net's variable switches W&B on, which is not installed."""
    is_on = os.environ.get("nnUNet_wandb_enabled", "0") in ("1", "True", "true")
    return is_on and importlib.util.find_spec("wandb") is None


def require_folders() -> None:
    """Raise UserError unless nnU-Net's three folder variables are set."""
    missing = [name for name in FOLDER_VARIABLES if not os.environ.get(name)]
    if missing:
        lines = "\n".join(f"    export {name}=/path/to/{name}" for name in missing)
        raise UserError(f"{' and '.join(missing)} not set, so nnU-Net cannot find its data. Type:\n{lines}")


def raw_folder(dataset_name: str) -> Path:
    return Path(os.environ["nnUNet_raw"]) / dataset_name


def preprocessed_folder(dataset_name: str) -> Path:
    return Path(os.environ["nnUNet_preprocessed"]) / dataset_name


def folders_with_id(number: str, *more: Path) -> list[Path]:
    """Return the folders of all data sets with an id, such as ``027``, in nnU-Net's folders that are set, and in ``more``.

    nnU-Net looks for ids in all three folders, and finds none of several data sets with the same id.
    """
    roots = [*more, *(Path(os.environ[name]) for name in FOLDER_VARIABLES if os.environ.get(name))]
    return sorted({path for root in roots for path in root.glob(f"Dataset{number}_*") if path.is_dir()})


def dataset_name(name_or_id: str | int) -> str:
    """Return the full name of a data set, given by name or id as in nnU-Net.

    Raises:
        UserError: There is no such data set, or there are several with this id.
    """
    try:
        # a shell adds a slash if it completes the name of a folder
        name = str(maybe_convert_to_dataset_name(str(name_or_id).rstrip("/\\")))
        if raw_folder(name).is_dir() or preprocessed_folder(name).is_dir():
            if not re.match("Dataset[0-9]{3}_", name):
                raise UserError(
                    f"{name} is not a name that nnU-Net accepts: DatasetXXX_NAME, with three digits. Rename the folder."
                )
            return name
    except (RuntimeError, ValueError):
        pass
    known = sorted(
        {
            folder.name
            # nnU-Net looks for ids in all three folders
            for variable in FOLDER_VARIABLES
            for folder in Path(os.environ[variable]).glob("Dataset*")
        }
    )
    here = [k for k in known if raw_folder(k).is_dir() or preprocessed_folder(k).is_dir()]
    same_id = [k for k in known if str(name_or_id).isdigit() and k.startswith(f"Dataset{int(name_or_id):03d}")]
    if len(same_id) > 1:
        raise UserError(f"Several data sets have the id {name_or_id}: {', '.join(same_id)}. Give the full name of one.")
    raise UserError(
        f"There is no data set '{name_or_id}' in {os.environ['nnUNet_raw']} or {os.environ['nnUNet_preprocessed']}. "
        f"Give an id or a full name. Existing data sets: {', '.join(here) or 'none'}."
    )


def read_json(path: Path, fix: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: The file does not exist or cannot be read. The message ends with ``fix``.
    """
    try:
        # utf-8-sig, because editors on Windows write a byte order mark
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. {fix}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. {fix}") from None


def read_dataset_json(file: Path, fix: str, *, labels: bool = False) -> dict[str, Any]:
    """Return the checked content of a dataset.json.

    Raises:
        UserError: See `read_json` and `check_dataset_json`.
    """
    return check_dataset_json(read_json(file, fix), file, labels=labels)


@dataclass(frozen=True)
class DatasetConfiguration:
    """A configuration of nnU-Net's plan for a data set."""

    dataset_name: str
    plans_name: str
    name: str
    plans_manager: PlansManager
    dataset_json: dict[str, Any]

    @classmethod
    def from_plans(cls, plans: PlansManager, configuration: str, dataset_json: dict[str, Any]) -> DatasetConfiguration:
        """Return a configuration of a plan. The plan names itself and its data set."""
        return cls(plans.dataset_name, plans.plans_name, configuration, plans, dataset_json)

    @classmethod
    def load(cls, dataset: str | int, plans_name: str, configuration: str | None = None) -> DatasetConfiguration:
        """Read the plan and dataset.json of a data set from nnU-Net's preprocessed folder.

        Args:
            dataset: Id or full name.
            plans_name: Plans identifier.
            configuration: Name; None takes the first of `SUPPORTED_CONFIGURATIONS` that the plan has.

        Raises:
            UserError: There is no such data set, plan or configuration; the files do not belong together; or the network cannot
                be pre-trained.
        """
        require_folders()
        name = dataset_name(dataset)
        folder = preprocessed_folder(name)
        fix = _how_to_plan(name, plans_name, configuration)
        file = folder / f"{plans_name}.json"
        plans = read_json(file, fix if file.is_file() else _other_plans(folder) + fix)
        described = folder / "dataset.json"
        dataset_json = read_dataset_json(described, fix, labels=True)
        if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict):
            raise UserError(f"{file} is no nnU-Net plan. {fix}")
        for key, wanted in (("plans_name", plans_name), ("dataset_name", name)):
            if plans.get(key) != wanted:
                raise UserError(
                    f"{file} has the {key} '{plans.get(key)}', but its path belongs to '{wanted}'. nnU-Net would use the name "
                    f'in the file. Correct it in the file: "{key}": "{wanted}"'
                )
        available = list(plans["configurations"])
        if configuration is None:
            configuration = next((c for c in SUPPORTED_CONFIGURATIONS if c in available), None)
            if configuration is None:
                raise UserError(
                    f"{file} has none of {', '.join(SUPPORTED_CONFIGURATIONS)}, only {', '.join(available)}. {fix}"
                )
        if configuration not in available:
            raise UserError(
                f"{file} has no configuration '{configuration}'. Use one of these with -c: {', '.join(available)}."
            )
        found = cls(name, plans_name, configuration, PlansManager(plans), dataset_json)
        if not isinstance(found.manager.network_arch_init_kwargs, dict):
            # nnUNetv2_preprocess_like_nnssl writes such a plan for networks that nnssl knows by name
            raise UserError(
                f"{file} names the network {found.manager.network_arch_class_name} without its layers, which this package needs. "
                "Use a plan of nnU-Net's own planner, and give it the weights with -pretrained_weights: -p nnUNetResEncUNetLPlans"
            )
        found.check_network()
        planned, channels = len(found.manager.normalization_schemes), found.channel_names
        if planned != len(channels):
            raise UserError(
                f"{file} plans {configuration} for {planned} channels, but {described} names {len(channels)}: "
                f"{', '.join(channels) or 'none'}. The data set has changed, and nnU-Net keeps those parts of an older plan that "
                f"it does not plan again. Rename the plan, then plan again: "
                f"{shlex.join(['mv', str(file), f'{file}.old'])}\n{fix}"
            )
        return found

    @property
    def manager(self) -> ConfigurationManager:
        return self.plans_manager.get_configuration(self.name)

    def check_network(self) -> None:
        """Raise UserError unless the network of the plan can be pre-trained, see `family_of`."""
        try:
            import_network(self.manager.network_arch_class_name)
            family_of(self.manager.network_arch_class_name)
        except UserError as error:
            raise UserError(f"{self.folder / self.plans_name}.json, {self.name}: {error}") from None

    @property
    def is_cascaded(self) -> bool:
        """Return whether this is the second stage of a cascade, whose network also takes the first stage's segmentation."""
        return self.manager.previous_stage_name is not None

    @property
    def parent_name(self) -> str:
        """Return the configuration from which a cascade's second stage inherits images and network, or else this one."""
        inherits_from = self.plans_manager.plans["configurations"][self.name].get("inherits_from")
        return inherits_from if self.is_cascaded and inherits_from else self.name

    @property
    def normalises_in_mask(self) -> bool:
        """Return whether a channel is normalised within the nonzero region only. nnU-Net then masks augmented images, too."""
        return any(self.manager.use_mask_for_norm)

    @property
    def id(self) -> int:
        return int(self.dataset_name[7:10])

    @property
    def folder(self) -> Path:
        """Return nnU-Net's preprocessed folder of the data set."""
        return preprocessed_folder(self.dataset_name)

    @property
    def cases_folder(self) -> Path:
        """Return the folder of the preprocessed training cases."""
        return self.folder / self.manager.data_identifier

    @property
    def patch_size(self) -> list[int]:
        return [int(n) for n in self.manager.patch_size]

    @property
    def strides(self) -> list[list[int]]:
        """Return the stride of each encoder stage, per axis."""
        axes, family = len(self.patch_size), family_of(self.manager.network_arch_class_name)
        strides = family.stage_strides(self.manager.network_arch_init_kwargs)
        return [[s] * axes if isinstance(s, int) else [int(n) for n in s] for s in strides]

    @property
    def channel_names(self) -> list[str]:
        return channel_names(self.dataset_json)

    @property
    def channels_without_zscore(self) -> list[int]:
        """Return the indices of the image channels that nnU-Net does not normalise by a mean.

        These have ``noNorm``, ``rescale_to_0_1`` or ``rgb_to_0_1`` in dataset.json.
        """
        return [number for number, scheme in enumerate(self.manager.normalization_schemes) if scheme in _NO_ZERO_MEAN]

    def gpu_memory_target(self) -> tuple[float, str]:
        """Return the GPU memory in GB that nnU-Net planned for, and the origin of this number.

        A plan names its planner but not the target, so this is the planner's default. A target that was changed with
        -gpu_memory_target cannot be found in the plan.
        """
        name = self.plans_manager.plans.get("experiment_planner_used")
        planner = name and recursive_find_python_class(
            str(Path(nnunetv2.__path__[0]) / "experiment_planning"), name, "nnunetv2.experiment_planning"
        )
        parameters = inspect.signature(planner).parameters if planner else {}
        default = getattr(parameters.get("gpu_memory_target_in_gb"), "default", None)
        if isinstance(default, (int, float)):
            return float(default), f"the default target of {name}, which made the nnU-Net plan"
        return (
            DEFAULT_GPU_MEMORY_GB,
            f"nnU-Net's default, because {name or 'an unnamed planner'} has no target of its own",
        )

    def architecture(self) -> dict[str, Any]:
        """Return what determines the shapes of the weights, in plain JSON types. Weights fit if this is equal."""
        manager = self.manager
        return json.loads(
            json.dumps(
                {
                    "network_class_name": present_name(manager.network_arch_class_name),
                    "arch_kwargs": manager.network_arch_init_kwargs,
                    "input_channels": len(self.channel_names),
                }
            )
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return how nnU-Net preprocesses images for this network, in plain JSON types."""
        configuration, plans = self.manager.configuration, self.plans_manager.plans
        content = {key: configuration.get(key) for key in PREPROCESSING_KEYS}
        content |= {key: plans.get(key) for key in PLAN_KEYS}
        return json.loads(json.dumps(content))

    def preprocessing_checksum(self, *, of_storage: bool = True) -> str:
        """Return a checksum that changes if and only if nnU-Net would preprocess or store an image differently.

        Args:
            of_storage: Whether the way of storing counts, which depends on the patch size.
        """
        configuration, plans = self.manager.configuration, self.plans_manager.plans
        schemes = self.manager.normalization_schemes
        # only of schemes that use them, because intensities change a little with every new case
        intensities = {
            channel: properties
            for channel, properties in self.plans_manager.foreground_intensity_properties_per_channel.items()
            if schemes[int(channel)] not in _OF_THE_IMAGE_ALONE
        }
        settings = {key: configuration.get(key) for key in _OF_IMAGES if of_storage or key != "patch_size"}
        return checksum([settings, plans.get("transpose_forward"), intensities])

    def plan_checksum(self) -> str:
        """Return a checksum that changes if the nnU-Net plan changes in anything from which the MACL plan is derived."""
        return checksum([self.architecture(), self.patch_size, self.preprocessing_checksum()])


def checksum(content: Any) -> str:
    """Return the SHA-256 of plain JSON content, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _how_to_plan(name: str, plans_name: str, configuration: str | None) -> str:
    raw, number = raw_folder(name), int(name[7:10])
    if (raw / "imagesUn").is_dir() and not (raw / "imagesTr").is_dir():
        return (
            f"{name} has no labelled cases (imagesTr), which nnU-Net needs for planning. Its images can be used to pre-train for "
            f"another data set. Type: nnUNetv2_train_macl_pretrain DATASET -u {number}"
        )
    command = f"Type: nnUNetv2_plan_and_preprocess -d {number}"
    if plans_name == "nnUNetPlans":
        return command
    if preset := re.fullmatch(r"nnUNetResEncUNet(M|L|XL)Plans", plans_name):
        return f"{command} -pl nnUNetPlannerResEnc{preset[1]}"
    # the names that nnUNetv2_macl_network gives, the longest network first, because the name of one may end with that of another
    networks = "|".join(sorted(NAMES, key=len, reverse=True))
    if found := re.fullmatch(rf"(?P<base>.+?)_(?P<network>{networks})(_(?P<size>[A-Z]+))?", plans_name):
        base = "" if found["base"] == "nnUNetPlans" else f" -p {shlex.quote(found['base'])}"
        size = f" -size {found['size']}" if found["size"] else ""
        return (
            f"Type: nnUNetv2_macl_network {number} {found['network']} -c {configuration or 'CONFIGURATION'}{base}{size}"
        )
    return f"{command} -pl PLANNER -overwrite_plans_name {plans_name}"


def _other_plans(folder: Path) -> str:
    others = []
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError):  # the folder may contain other files
            if "configurations" in file.read_text(errors="ignore"):
                others.append(file.stem)
    return f"Existing plans: -p {' or '.join(others)}. " if others else ""
