"""The model card of shared weights: Markdown with the YAML front matter that hubs read."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.base import Method
from nnunetv2_macl.methods.registry import loss_labels, methods_of
from nnunetv2_macl.planning.plan import describe_recipe, start_in_short
from nnunetv2_macl.recipe import recipe_from_values
from nnunetv2_macl.training.commands import plans_option

_LOSSES = {f"train_losses/{key}": name.split(",")[0] for key, name in loss_labels().items()}


def model_card(description: dict[str, Any], license_id: str) -> str:
    """Return a model card made from the description in exported weights."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in facts_of(description).items())
    reasons = (description.get("macl_plan") or {}).get("reasons") or {}
    plan = "\n".join(f"- `{key}`: {reason}" for key, reason in reasons.items())
    citations = "\n".join(f"- {citation}" for citation in description.get("citations", []))
    start = (description.get("macl_plan") or {}).get("pretrained_weights")
    configuration = description.get("configuration")
    collapsed = description.get("collapsed")
    recipe = description.get("recipe") or (description.get("macl_plan") or {}).get("recipe") or {}
    methods = recipe_methods(recipe)
    by = " and ".join(method.summary for method in methods) or "by another version of the package,"
    tags = "\n".join(f"- {tag}" for tag in dict.fromkeys(method.tag for method in methods))
    plans = plans_option(description.get("plans_name") or "nnUNetPlans")
    options = f"{shlex.quote(str(configuration))} 0 -tr nnUNetTrainerMACL{plans}"
    warning = (
        f"\n**This run collapsed: {collapsed}. Fine-tuning from it is not likely to help.**\n" if collapsed else ""
    )
    return f"""---
license: {license_id}
library_name: nnunetv2
pipeline_tag: image-segmentation
tags:
- medical-imaging
- nnU-Net
- self-supervised-learning
{tags}
---

# {description.get("dataset_name")}, {configuration}: pre-training for nnU-Net

Weights of an nnU-Net encoder and part of its decoder, pre-trained on images without labels, {by} with
nnunetv2_macl. They segment nothing yet: fine-tune them on labelled images.
{warning}
| | |
|---|---|
{facts}

## Use

```bash
nnUNetv2_macl_install THIS_FILE.zip
export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"
nnUNet_macl_weights=FOLDER_THAT_INSTALL_PRINTS nnUNetv2_train YOUR_DATASET {options}
```

`nnUNetv2_macl_transfer` shows which of the weights fit another network.

## How it was trained

{plan}
{_started_from(start) if start else ""}
## Limits

The weights were trained on images of one kind. Measure whether they help on other images. The images were those of patients.
This file contains no images, no names and no paths.

## Citation

{citations}
"""


def _started_from(start: dict[str, Any]) -> str:
    table = "\n".join(start["transfer"])
    return f"""
The network started from {start_in_short(start)}. The licence of those weights may apply to these as well.

```text
{table}
```
"""


def facts_of(description: dict[str, Any]) -> dict[str, str]:
    """Return the facts in the description of pre-trained weights as texts, name -> value."""
    plan = description.get("macl_plan") or {}
    fingerprint = description.get("dataset_fingerprint") or {}
    preprocessing = description.get("preprocessing") or {}
    recipe = description.get("recipe") or plan.get("recipe") or {}
    architecture = description.get("architecture") or {}
    facts: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if value not in (None, "", [], {}):
            facts[name] = str(value)

    add("data set", description.get("dataset_name") or plan.get("dataset_name"))
    configuration = description.get("configuration") or plan.get("configuration")
    add("plan", ", ".join(filter(None, (description.get("plans_name") or plan.get("plans_name"), configuration))))
    add("images", fingerprint.get("images"))
    add("also from", ", ".join(fingerprint.get("unlabelled_datasets") or plan.get("unlabelled_datasets") or []))
    if start := plan.get("pretrained_weights"):
        add("started from", start_in_short(start))
    add("channels", ", ".join(fingerprint.get("channel_names") or []))
    if description.get("fold") not in (None, "all"):
        add("left out", f"the validation images of fold {description['fold']}")
    own = fingerprint.get("nnunet") or {}
    if own.get("shapes_after_crop") and own.get("spacings"):
        add("median size", f"{_by(np.median(own['shapes_after_crop'], 0))} voxels")
        add("median spacing", f"{_by(np.median(own['spacings'], 0))} mm")
    add("spacing of the plan", preprocessing.get("spacing") and f"{_by(preprocessing['spacing'])} mm")
    add("network", (architecture.get("network_class_name") or "").rpartition(".")[2])
    add("patch", plan.get("patch_size") and f"{_by(plan['patch_size'])} voxels, batch {plan.get('batch_size')}")
    add("decoder stages", plan.get("decoder_stages"))
    add("recipe", describe_recipe(plan.get("recipe_name"), plan.get("settings")))
    # the values that say most about a training, those of its methods first
    own = [key for method in recipe_methods(recipe) for key in method.Config.model_fields]
    keys = ("method", *own, "optimizer", "learning_rate", "num_iterations_per_epoch", "seed")
    add("recipe values", ", ".join(f"{key} {recipe[key]}" for key in dict.fromkeys(keys) if key in recipe))
    add("epochs", description.get("epochs") or recipe.get("num_epochs"))
    losses = description.get("final_losses") or {}
    add("final losses", ", ".join(f"{short} {losses[key]:.3f}" for key, short in _LOSSES.items() if key in losses))
    add("collapsed", description.get("collapsed"))
    versions = description.get("package_versions") or {}
    add("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    return facts


def recipe_methods(recipe: dict[str, Any]) -> tuple[type[Method], ...]:
    """Return the methods of a recipe in a file from elsewhere; none if this version does not know the recipe."""
    try:
        return methods_of(recipe_from_values(recipe, "recipe").method)
    except UserError:
        return ()


def _by(sizes: Any) -> str:
    return " x ".join(f"{float(n):.4g}" for n in sizes)
