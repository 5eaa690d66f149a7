"""MACL pre-training on unlabelled images for nnU-Net v2.

What is named here is what may be imported from a program: it is loaded when it is first used, so that ``import
nnunetv2_macl`` is quick and loads neither torch nor nnU-Net. Losses, views and network know torch only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from nnunetv2_macl.errors import UserError as UserError
    from nnunetv2_macl.losses import DenseContrastiveLoss as DenseContrastiveLoss
    from nnunetv2_macl.losses import EquivarianceLoss as EquivarianceLoss
    from nnunetv2_macl.losses import MultiLevelContrastiveLoss as MultiLevelContrastiveLoss
    from nnunetv2_macl.losses import PositionalContrastiveLoss as PositionalContrastiveLoss
    from nnunetv2_macl.losses import downsample as downsample
    from nnunetv2_macl.losses import positive_mask as positive_mask
    from nnunetv2_macl.losses import reference_values as reference_values
    from nnunetv2_macl.methods.base import Geometry as Geometry
    from nnunetv2_macl.methods.base import Progress as Progress
    from nnunetv2_macl.methods.base import StepRandom as StepRandom
    from nnunetv2_macl.methods.model import PretrainingModel as PretrainingModel
    from nnunetv2_macl.networks.registry import pretrainable as pretrainable
    from nnunetv2_macl.recipe import Recipe as Recipe
    from nnunetv2_macl.recipe import load_recipe as load_recipe
    from nnunetv2_macl.recipe import recipe_from_values as recipe_from_values
    from nnunetv2_macl.report import write_report as write_report
    from nnunetv2_macl.run import pretrain as pretrain
    from nnunetv2_macl.training.finetune import nnUNetTrainerMACL as nnUNetTrainerMACL
    from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain as nnUNetTrainerMACLPretrain
    from nnunetv2_macl.views import RandomAffine as RandomAffine
    from nnunetv2_macl.views import RandomIntensity as RandomIntensity

_FOUND_IN = {
    "DenseContrastiveLoss": "losses",
    "EquivarianceLoss": "losses",
    "Geometry": "methods.base",
    "RandomIntensity": "views",
    "MultiLevelContrastiveLoss": "losses",
    "PositionalContrastiveLoss": "losses",
    "PretrainingModel": "methods.model",
    "Progress": "methods.base",
    "Recipe": "recipe",
    "RandomAffine": "views",
    "StepRandom": "methods.base",
    "UserError": "errors",
    "downsample": "losses",
    "load_recipe": "recipe",
    "nnUNetTrainerMACL": "training.finetune",
    "nnUNetTrainerMACLPretrain": "training.pretrain",
    "positive_mask": "losses",
    "pretrain": "run",
    "pretrainable": "networks.registry",
    "recipe_from_values": "recipe",
    "reference_values": "losses",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _FOUND_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FOUND_IN[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FOUND_IN])
