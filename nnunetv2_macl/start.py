"""Pre-training that starts from weights instead of a freshly initialised network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunetv2_macl import formats
from nnunetv2_macl.checkpoints import PretrainedWeights
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import build_model
from nnunetv2_macl.files import sha256
from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.model import PretrainingModel
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.recipe import Recipe
from nnunetv2_macl.transfer import Transfer, kernel_norms, plan_transfer, rescale_kernels


def plan_start(
    weights: Path, configuration: DatasetConfiguration, geometry: Geometry, recipe: Recipe
) -> dict[str, Any]:
    """Return the entry of the MACL plan about the weights that pre-training starts from.

    Args:
        weights: A file or folder that `formats.load_weights` accepts.
        configuration: The configuration that is pre-trained.
        geometry: The decoder stages that are pre-trained.
        recipe: The recipe of the run.

    Returns:
        ``path``; ``files``, the SHA-256 checksum of each file by its name; ``origin``, ``dataset_name``, ``fold``, ``left_out``
        and ``citations`` of the weights, None or empty if the files do not contain them; ``encoder`` and ``decoder``, the number
        of loaded tensors; ``transfer``, lines of text with the loaded tensors of each stage; and, if the weights are of a
        pre-training that started from others, ``started_from``, the entry of its plan.

    Raises:
        UserError: There are no weights, or less than a quarter of the encoder's parameters fits.
    """
    pretrained = formats.load_weights(weights)
    transfer = _fit(pretrained, configuration, build_model(configuration, geometry, recipe))
    # The weights may have started from others, which may have seen labels.
    earlier = (pretrained.description.get("macl_plan") or {}).get("pretrained_weights")
    taken = {part: "{} of {}".format(*transfer.count(part)) for part in ("encoder", "decoder")}
    return {
        "path": str(weights.resolve()),
        "files": _checksums(pretrained),
        "origin": pretrained.origin,
        "dataset_name": pretrained.description.get("dataset_name"),
        "fold": pretrained.description.get("fold"),
        "left_out": pretrained.description.get("left_out"),
        "citations": pretrained.description.get("citations") or [],
        **taken,
        "transfer": transfer.table().splitlines(),
        **({"started_from": earlier} if earlier else {}),
    }


def start_from_weights(
    model: PretrainingModel, configuration: DatasetConfiguration, start: dict[str, Any], *, rescale: bool
) -> Transfer:
    """Copy the weights that a MACL plan names into the pre-training network.

    Args:
        model: The freshly initialised pre-training network.
        configuration: The configuration that is pre-trained.
        start: The entry of the plan, as `plan_start` returned it.
        rescale: Whether to give kernels the norms of fresh ones, which SGD needs, see `rescale_kernels`.

    Raises:
        UserError: The files are missing, have changed since the plan was made, or do not fit the network.
    """
    pretrained = formats.load_weights(Path(start["path"]))
    found = _checksums(pretrained)
    if found != start["files"]:
        changed = next(name for name in {**found, **start["files"]} if found.get(name) != start["files"].get(name))
        raise UserError(
            f"{changed} in {start['path']} is not the file that the MACL plan was made with: its SHA-256 is "
            f"{found.get(changed)}, and the plan says {start['files'].get(changed)}. Give -pretrained_weights again, to start "
            "from the file as it is now."
        )
    transfer = _fit(pretrained, configuration, model)
    fresh = kernel_norms(model)
    model.load_weights(transfer.weights)
    if rescale:
        rescale_kernels(model, fresh)
    return transfer


def _fit(pretrained: PretrainedWeights, configuration: DatasetConfiguration, model: PretrainingModel) -> Transfer:
    encoder, decoder = model.network.trained_weights()
    return plan_transfer(
        pretrained,
        encoder | decoder,
        configuration.architecture(),
        channel_names=(pretrained.channel_names, configuration.channel_names),
        advice="Leave out -pretrained_weights to start from a freshly initialised network.",
    )


def _checksums(pretrained: PretrainedWeights) -> dict[str, str]:
    return {file.name: sha256(file) for file in pretrained.files}
