"""Export the weights of a run with a description of their origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from nnunetv2_macl import checkpoints
from nnunetv2_macl.factory import build_segmentation_network
from nnunetv2_macl.methods.model import PretrainingModel
from nnunetv2_macl.methods.registry import citations_of, methods_of
from nnunetv2_macl.nnunet import DatasetConfiguration, read_json
from nnunetv2_macl.planning.plan import MACLPlan


def export_run(
    folder: Path, configuration: DatasetConfiguration, plan: MACLPlan, model: PretrainingModel, outcome: dict[str, Any]
) -> None:
    """Write the three files of weights, see `checkpoints.export_weights`.

    Args:
        folder: Folder of the run.
        configuration: Configuration that was pre-trained.
        plan: Plan of the run.
        model: The trained model.
        outcome: ``fold``, ``epochs``, number of ``images``, ``final_losses``, ``collapsed``.

    Raises:
        UserError: A file could not be written.
    """
    encoder, decoder = model.network.trained_weights()
    torch.manual_seed(plan.get_recipe().seed)
    fresh = build_segmentation_network(configuration)
    checkpoints.export_weights(
        folder,
        encoder=encoder,
        decoder=decoder,
        unet_weights=fresh.state_dict(),
        description={
            "architecture": configuration.architecture(),
            "network_input_channels": determine_num_input_channels(
                configuration.plans_manager, configuration.manager, configuration.dataset_json
            ),
            "preprocessing": configuration.preprocessing(),
            "dataset_name": configuration.dataset_name,
            "plans_name": configuration.plans_name,
            "configuration": configuration.name,
            "fold": outcome["fold"],
            "dataset_fingerprint": {
                "images": outcome["images"],
                "unlabelled_datasets": plan.unlabelled_datasets,
                "channel_names": configuration.channel_names,
                "nnunet": read_json(configuration.folder / "dataset_fingerprint.json", ""),
            },
            "macl_plan": plan.as_json(),
            "recipe": plan.recipe,
            "epochs": outcome["epochs"],
            "final_losses": outcome["final_losses"],
            "collapsed": outcome["collapsed"],
            "citations": list(
                dict.fromkeys(
                    [
                        *citations_of(methods_of(plan.get_recipe().method)),
                        *(plan.pretrained_weights or {}).get("citations", ()),
                    ]
                )
            ),
        },
    )
