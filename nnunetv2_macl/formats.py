"""Weights in other formats: read those of nnU-Net, nnssl and the MACL authors, and write those of nnU-Net and nnssl."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunetv2_macl import checkpoints
from nnunetv2_macl.checkpoints import PretrainedWeights
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.networks.planned import PlannedNetwork
from nnunetv2_macl.networks.registry import family_of, network_types
from nnunetv2_macl.nnunet import PLAN_KEYS, PREPROCESSING_KEYS, DatasetConfiguration, read_json
from nnunetv2_macl.sharing.package import write_package
from nnunetv2_macl.training.run_folder import PRETRAINER
from nnunetv2_macl.transfer import stem_kernels

logger = logging.getLogger(__name__)

FORMATS = ("nnssl", "nnunet")
PACKAGE = "zip"
ADAPTATION_PLAN = "nnssl_adaptation_plan"
AUTHORS_WEIGHTS = "model_state_dict"
_NNUNET_KEYS = {"network_weights", "init_args", "trainer_name"}
_NNUNET_V1_KEYS = {"state_dict", "optimizer_state_dict", "plot_stuff"}
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")

_UNETS = "dynamic_network_architectures.architectures.unet."
_PAPER_UNET = "nnunetv2_macl.networks.paper_unet.PaperUNet"
# The layers that a file may name. They are imported and called, so no others are allowed.
_ALLOWED_LAYERS = re.compile(r"torch\.nn\.(modules\.\w+\.)?[A-Z]\w*")

# The arguments, as in nnU-Net's plans, of the networks for which nnssl stores only a name.
_RESIDUAL_ENCODER_L = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
_NAMED = {name: ("ResidualEncoderUNet", _RESIDUAL_ENCODER_L) for name in ("ResEncL", "NoSkipResEncL")}


# --- reading -------------------------------------------------------------------------------------------------------------


def load_weights(path: Path) -> PretrainedWeights:
    """Load the weights of a run of this package, of nnssl, of nnU-Net's own training, or of the authors of MACL.

    Args:
        path: A path that `checkpoints.load_weights` takes, a checkpoint of nnU-Net v2 or of nnssl, or a file that the authors
            of MACL published.

    Raises:
        UserError: The path does not exist, or the file is damaged, holds more than tensors and plain values, is of nnU-Net v1,
            holds no weights of a network that can be pre-trained, or holds NaN. The message names the file.
    """
    # The two files of an nnU-Net v1 checkpoint are recognised by their names, if not by the content.
    files = [path] if path.is_file() else sorted(path.glob("*.model"))
    of_v1 = [file for file in files if file.name.endswith(".model.pkl") or Path(f"{file}.pkl").is_file()]
    content = checkpoints.load(path) if path.is_file() and not of_v1 else {}
    if of_v1 or content.keys() >= _NNUNET_V1_KEYS:
        raise UserError(
            f"{[*of_v1, path][0]} is a checkpoint of nnU-Net v1. Its weights are of networks that nnU-Net v2 does not build. "
            f"Use a checkpoint of nnU-Net v2 ({checkpoints.NNUNET_FILE})."
        )
    if ADAPTATION_PLAN in content:
        return _from_nnssl(content, path)
    if isinstance(content.get(AUTHORS_WEIGHTS), dict):
        return _from_authors(content[AUTHORS_WEIGHTS], path)
    if is_nnunet_checkpoint(content):
        return _from_nnunet(content, path)
    return checkpoints.load_weights(path)


def is_nnunet_checkpoint(content: dict[str, Any]) -> bool:
    """Return whether a checkpoint is of nnU-Net's own training, with any trainer."""
    # Only the checkpoints of this package have a kind.
    return "kind" not in content and content.keys() >= _NNUNET_KEYS


def _from_nnunet(content: dict[str, Any], file: Path) -> PretrainedWeights:
    """Return the encoder and the decoder of a trained network. Segmentation layers fit only its labels and are left out."""
    try:
        arguments = content["init_args"]
        if not isinstance(arguments["plans"], dict):  # nnU-Net would open a path
            raise TypeError("'plans' is no plan")
        trained_for = DatasetConfiguration.from_plans(
            PlansManager(arguments["plans"]), arguments["configuration"], arguments["dataset_json"]
        )
        architecture, preprocessing = trained_for.architecture(), trained_for.preprocessing()
        if not trained_for.channel_names:
            raise KeyError("channel_names")
        family = family_of(architecture["network_class_name"])
        # The names have prefixes if the network was distributed or compiled when it was saved.
        named = {_WRAPPERS.sub("", key): value for key, value in content["network_weights"].items()}
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{file} is a checkpoint of nnU-Net without a usable plan of its network: {reason}. Use the checkpoint that "
            f"nnU-Net's training wrote at its end ({checkpoints.NNUNET_FILE})."
        ) from None
    weights = {
        key: value for key, value in named.items() if isinstance(value, Tensor) and family.part_of(key) is not None
    }
    if not weights:
        raise UserError(f"{file} is a checkpoint of nnU-Net that holds no weights of a network. Use another file.")
    stem = stem_kernels(family, weights)
    description = {
        "kind": "nnunet",
        "dataset_name": trained_for.dataset_name,
        "plans_name": trained_for.plans_name,
        "configuration": trained_for.name,
        "fold": arguments.get("fold"),
        "epochs": content.get("current_epoch"),
        "preprocessing": preprocessing,
        "dataset_fingerprint": {"channel_names": trained_for.channel_names},
        # a training of this package names the sources of its pre-trained weights
        "citations": list(
            dict.fromkeys([*((content.get("macl") or {}).get("citations") or []), checkpoints.NNUNET_CITATION])
        ),
    }
    if stem and trained_for.is_cascaded:
        description["network_input_channels"] = weights[stem[0]].shape[1]
    images = architecture["input_channels"]
    weights |= {key: weights[key][:, :images] for key in stem}
    return PretrainedWeights([file], weights, architecture, description)


def _from_nnssl(content: dict[str, Any], file: Path) -> PretrainedWeights:
    try:
        plan = content[ADAPTATION_PLAN]
        name, kwargs = plan["architecture_plans"]["arch_class_name"], plan["architecture_plans"]["arch_kwargs"]
        channels = plan["pretrain_num_input_channels"]
        prefixes = {f"{plan['key_to_encoder']}.": "encoder.stages.", f"{plan['key_to_stem']}.": "encoder.stem."}
        network_weights = dict(content["network_weights"])
        configurations = plan["pretrain_plan"]["configurations"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is not a complete nnssl checkpoint: {ADAPTATION_PLAN} or network_weights lacks {error}. Use another file."
        ) from None
    short = str(name).rpartition(".")[2]
    if short in _NAMED and not kwargs:
        short, kwargs = _NAMED[short]
    if short not in ("PlainConvUNet", "ResidualEncoderUNet") or not isinstance(kwargs, dict):
        raise UserError(
            f"{file} holds weights of the network '{name}', but only those of PlainConvUNet, ResidualEncoderUNet and "
            f"ResEncL fit nnU-Net's U-Nets. Use another file."
        )
    weights: dict[str, Tensor] = {}
    for key, value in network_weights.items():
        # Test the encoder first, because the stem of a plain U-Net is a part of it.
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is not None and isinstance(value, Tensor):
            weights[prefixes[prefix] + key.removeprefix(prefix)] = value
    description = {
        "kind": "nnssl",
        "citations": [_as_text(citation) for citation in content.get("citations") or []],
        "trainer_name": content.get("trainer_name"),
        "configuration": next(iter(configurations), None),
    }
    architecture = {"network_class_name": f"{_UNETS}{short}", "arch_kwargs": kwargs, "input_channels": channels}
    return PretrainedWeights([file], weights, architecture, description)


def _as_text(citation: Any) -> str:
    """Return a citation in an nnssl checkpoint, which is a dictionary, as text."""
    if isinstance(citation, dict) and isinstance(citation.get("apa_citations"), (list, tuple)):
        return f"{citation.get('name')}: {'; '.join(map(str, citation['apa_citations']))}"
    return citation if isinstance(citation, str) else json.dumps(citation)


def _from_authors(content: dict[str, Any], file: Path) -> PretrainedWeights:
    """Read the weights of the paper's network. The projectors in the file belong to no U-Net and are left out."""
    architecture = read_json(resource_folder("plans") / "networks" / "paper.json", "Install again.")["architecture"]
    stages = architecture["arch_kwargs"]["n_stages"]
    names = _names_of_authors(stages - 1)
    # In some of the files, names have the prefix of a distributed network.
    theirs = {_WRAPPERS.sub("", str(key)).rpartition(".")[::2]: value for key, value in content.items()}
    weights: dict[str, Tensor] = {}
    for (module, parameter), value in theirs.items():
        if isinstance(value, Tensor):
            weights |= {f"{name}.{parameter}": value for name in names.get(module, ())}
    absent = [module for module in names if (module, "weight") not in theirs]
    if absent:
        raise UserError(
            f"{file} holds {AUTHORS_WEIGHTS}, but not that of the MACL authors' network: it lacks {absent[0]}. "
            "Use another file."
        )
    first = [weights[f"encoder.stages.{stage}.0.convs.0.conv.weight"] for stage in range(stages)]
    kwargs = architecture["arch_kwargs"] | {"features_per_stage": [len(weight) for weight in first]}
    return PretrainedWeights(
        [file],
        weights,
        {"network_class_name": _PAPER_UNET, "arch_kwargs": kwargs, "input_channels": first[0].shape[1]},
        {"kind": "macl_authors", "citations": [checkpoints.MACL_CITATION]},
    )


def _names_of_authors(poolings: int) -> dict[str, tuple[str, ...]]:
    """Map each module of the authors' network to its names in `PaperUNet`. A layer has two names there."""

    def layers(block: str) -> list[tuple[str, str]]:
        return [(f"{block}.conv", f"{block}.all_modules.0"), (f"{block}.norm", f"{block}.all_modules.1")]

    names: dict[str, tuple[str, ...]] = {}
    for level in range(1, poolings + 1):
        # The authors count decoder levels from the image, and nnU-Net counts them from the bottleneck.
        names[f"online_decoder.upscale{level + 1}"] = (f"decoder.transpconvs.{poolings - level}",)
        for block in (0, 1):
            for number, layer in enumerate(layers(f"encoder.stages.{level - 1}.0.convs.{block}")):
                names[f"share_encoder.contr_{level}_{block + 1}.{number}"] = layer
            for number, layer in enumerate(layers(f"decoder.stages.{poolings - level}.convs.{block}")):
                names[f"online_decoder.expand_{level}_{block + 1}.{number}"] = layer
    for block in (0, 1):
        # a ReLU is between the two convolutions of the centre
        names[f"share_encoder.center.{2 * block}"] = layers(f"encoder.stages.{poolings}.0.convs.{block}")[0]
    return names


# --- writing -------------------------------------------------------------------------------------------------------------


def export(source: Path, file: Path, name: str | None = None, license_id: str = "unknown") -> None:
    """Write pre-trained weights in another format.

    Args:
        source: A path that `load_weights` takes.
        file: File to write.
        name: Format: ``nnunet`` for ``nnUNetv2_train -pretrained_weights``; ``nnssl`` for ``nnUNetv2_preprocess_like_nnssl``
            and ``nnUNetv2_train_pretrained`` of nnU-Net's master branch; or ``zip`` for ``nnUNetv2_macl_install``. None: ``zip``
            if the name of the file ends so.
        license_id: Licence of the weights, for the model card in a ``zip``.

    Raises:
        UserError: The format is unknown or cannot hold the weights, or the file cannot be written.
    """
    source, file = source.expanduser(), file.expanduser()
    if name is None and file.suffix == ".zip":
        name = PACKAGE
    if name not in (*FORMATS, PACKAGE):
        got = f"got '{name}'" if name else f"because {file.name} does not end in .zip"
        raise UserError(f"--format must be one of {', '.join((*FORMATS, PACKAGE))}, {got}.")
    if file.is_dir():
        raise UserError(f"-o {file} is a folder. Give a file: -o {file / 'weights.pth'}")
    if name == PACKAGE:
        write_package(source, file, license_id)
        return
    pretrained = load_weights(source)
    content = as_nnunet(pretrained) if name == "nnunet" else as_nnssl(pretrained)
    checkpoints.save(content, file, checksum=True)
    logger.info("%s holds %d tensors, in the format %s.", file, len(content["network_weights"]), name)
    part_of = family_of(pretrained.architecture["network_class_name"]).part_of
    if name == "nnunet" and any(part_of(key) != "encoder" for key in pretrained.elsewhere):
        logger.warning(
            "%s has no decoder, so the exported decoder is not pre-trained. Give the run's folder, which has both.",
            source,
        )
    if name == "nnssl":
        schemes = set(pretrained.description["preprocessing"]["normalization_schemes"]) - {"ZScoreNormalization"}
        if schemes:
            logger.info(
                "The weights were trained with %s, but nnUNetv2_preprocess_like_nnssl will use ZScoreNormalization.",
                ", ".join(sorted(schemes)),
            )
        has_command = importlib.util.find_spec("nnunetv2.experiment_planning.like_nnssl") is not None
        logger.info(
            "Next%s: nnUNetv2_preprocess_like_nnssl -d DATASET -n NAME -pc %s",
            "" if has_command else ", with nnU-Net's master branch, because the installed nnU-Net lacks the command",
            shlex.quote(str(file)),
        )
    else:
        logger.info("Next: nnUNetv2_train DATASET CONFIGURATION FOLD -pretrained_weights %s", shlex.quote(str(file)))


def as_nnunet(pretrained: PretrainedWeights) -> dict[str, Any]:
    """Return the content of a checkpoint of a whole U-Net. Layers that were not pre-trained are freshly initialised.

    Raises:
        UserError: The weights do not fit the architecture in their file.
    """
    state = _own_network(pretrained).state_dict()
    inputs = pretrained.description.get("network_input_channels", pretrained.architecture["input_channels"])
    if inputs != pretrained.architecture["input_channels"]:
        state = _build(pretrained.architecture, inputs).state_dict()
    taken = checkpoints.under_all_names(state, pretrained.weights)
    fresh_inputs = [key for key, value in pretrained.weights.items() if value.shape != state[key].shape]
    known = {key: value for key, value in pretrained.description.items() if key not in ("kind", "format_version")}
    return {
        **known,
        "format_version": checkpoints.FORMAT_VERSION,
        "kind": "macl_network",
        # Weights of another origin remain so, because nnU-Net's may have been trained with labels.
        **({"origin_kind": pretrained.kind} if pretrained.kind in checkpoints.ORIGINS else {}),
        "network_weights": state
        | {key: checkpoints.pad_input_channels(value, state[key]) for key, value in taken.items()},
        "fresh_inputs": fresh_inputs,
        "trained_keys": sorted(pretrained.weights),
        "architecture": pretrained.architecture,
        # The keys of nnU-Net's own checkpoints
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": pretrained.description.get("configuration")},
    }


def as_nnssl(pretrained: PretrainedWeights) -> dict[str, Any]:
    """Return the content of a checkpoint of nnssl, with everything that nnU-Net's master branch needs.

    Source: nnssl's adaptation plan, and its reader in nnU-Net's ``experiment_planning/like_nnssl.py``.

    Raises:
        UserError: The network is 2D or a `PlannedNetwork`, the encoder is not complete, or the preprocessing is not known.
    """
    files = ", ".join(str(file) for file in pretrained.files)
    network = _own_network(pretrained)
    if isinstance(network, PlannedNetwork):
        raise UserError(
            f"{files} holds weights of {type(network).__name__}, which nnssl's format does not describe. Share them as a "
            "package: -o FILE.zip"
        )
    part_of = family_of(type(network)).part_of
    lacking = [key for key in network.state_dict() if part_of(key) == "encoder" and key not in pretrained.weights]
    if lacking:
        raise UserError(
            f"{files} holds no complete encoder: it lacks {lacking[0]}. Give the pre-training run's folder, or "
            f"{checkpoints.ENCODER_FILE} in it."
        )
    preprocessing = pretrained.description.get("preprocessing")
    if preprocessing is None:
        raise UserError(
            f"{files} does not say how its images were preprocessed, which nnssl's format needs. Pre-train again."
        )
    if len(preprocessing["patch_size"]) != 3:
        raise UserError(
            f"{files} holds weights of a 2D network, and nnssl's format is for 3D networks. Type: --format nnunet"
        )
    return {
        "network_weights": dict(pretrained.weights),
        ADAPTATION_PLAN: _adaptation_plan(pretrained, preprocessing, network),
        "trainer_name": PRETRAINER,
        "citations": _citations(pretrained),
    }


def _adaptation_plan(pretrained: PretrainedWeights, preprocessing: dict[str, Any], network: Any) -> dict[str, Any]:
    architecture, description = pretrained.architecture, pretrained.description
    kwargs = architecture["arch_kwargs"]
    # nnssl calls segmentations masks.
    configuration = {key.replace("fn_seg", "fn_mask"): preprocessing[key] for key in PREPROCESSING_KEYS}
    # nnU-Net plans the median spacing of the data set.
    configuration["spacing_style"] = "median"
    return {
        "architecture_plans": {
            # Both nnssl and nnU-Net find these networks by the name without the module.
            "arch_class_name": architecture["network_class_name"].rpartition(".")[2],
            "arch_kwargs": kwargs,
            "arch_kwargs_requiring_import": _named_classes(kwargs),
        },
        "pretrain_plan": {
            "dataset_name": description["dataset_name"],
            "plans_name": description["plans_name"],
            **{key: preprocessing[key] for key in PLAN_KEYS},
            "configurations": {configuration["spacing_style"]: configuration},
        },
        "pretrain_num_input_channels": architecture["input_channels"],
        "recommended_downstream_patchsize": preprocessing["patch_size"],
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": list(network.keys_to_in_proj),
        "key_to_lpe": None,
    }


def _citations(pretrained: PretrainedWeights) -> list[dict[str, Any]]:
    network = pretrained.architecture["network_class_name"].rpartition(".")[2]
    # Recipes of version 0.1 name no method, and weights of other origins have no recipe.
    unnamed = checkpoints.ORIGINS.get(pretrained.kind, "macl")
    method = (pretrained.description.get("recipe") or {}).get("method", unnamed)
    others = [text for text in pretrained.description.get("citations", []) if text != checkpoints.NNUNET_CITATION]
    return [
        {"type": "Architecture", "name": network, "apa_citations": [checkpoints.NNUNET_CITATION]},
        {"type": "Pretraining Method", "name": method, "apa_citations": others},
    ]


def _named_classes(kwargs: dict[str, Any]) -> list[str]:
    return [key for key, value in kwargs.items() if isinstance(value, str)]


def _own_network(pretrained: PretrainedWeights) -> nn.Module:
    """Return the network that the weights belong to, with the same fresh initialisation at every call.

    Raises:
        UserError: The file names other classes than known networks and torch's layers, or the weights do not fit.
    """
    files = ", ".join(str(file) for file in pretrained.files)
    architecture = pretrained.architecture
    name, kwargs = architecture["network_class_name"], architecture["arch_kwargs"]
    named = _named_classes(kwargs)
    if name not in network_types() or not all(_ALLOWED_LAYERS.fullmatch(kwargs[key]) for key in named):
        known = ", ".join(sorted(known.rpartition(".")[2] for known in network_types()))
        raise UserError(
            f"{files} names the network {name} with {', '.join(f'{key} {kwargs[key]}' for key in named)}. Only {known} with "
            "torch's own layers can be exported."
        )
    network = _build(architecture, architecture["input_channels"])
    state = network.state_dict()
    for key, value in pretrained.weights.items():
        if key not in state or state[key].shape != value.shape:
            here = list(state[key].shape) if key in state else "not there"
            raise UserError(
                f"The weights in {files} do not fit the architecture in the file: {key} is {list(value.shape)} in the "
                f"file and {here} in the network. Either the file was changed, or its trainer builds another network than its "
                "plan names. You can fine-tune from these weights, but not export them."
            )
    return network


def _build(architecture: dict[str, Any], input_channels: int) -> nn.Module:
    name, kwargs = architecture["network_class_name"], architecture["arch_kwargs"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Any number of classes is fine, because readers ignore the segmentation layers.
        return get_network_from_plans(name, kwargs, _named_classes(kwargs), input_channels, 2, deep_supervision=True)
