"""Write weights completely or not at all, and read them without running code from the file."""

from __future__ import annotations

import contextlib
import platform
import re
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, checksum_path, is_inflated, verify, write_checksum
from nnunetv2_macl.text import first_of

FORMAT_VERSION = 1


def save(content: dict[str, Any], file: Path, *, checksum: bool = False) -> None:
    """Save a checkpoint with `torch.save`, completely or not at all.

    Args:
        content: Tensors and plain types.
        file: File to write.
        checksum: Whether to write a checksum file too, see `files.checksum_path`.

    Raises:
        UserError: The file could not be written, see `atomic_write`.
    """
    # remove the old checksum first, so that a killed process leaves no file with a wrong checksum
    with contextlib.suppress(OSError):
        checksum_path(file).unlink()
    atomic_write(file, lambda stream: torch.save(content, stream), needed=_size(content))
    if checksum:
        write_checksum(file)


def _size(content: Any) -> int:
    """Return the size of all tensors in bytes."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(_size, content.values()))
    return sum(map(_size, content)) if isinstance(content, (list, tuple)) else 0


def load(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint of tensors, plain types and numpy's numbers, without running code from the file.

    Raises:
        UserError: The file does not exist, is damaged, or holds anything else. The message names the file.
    """
    verify(file)
    if unsafe := _why_unsafe(file):
        raise UserError(f"{file} cannot be loaded: {unsafe} Use another file.")
    with _numpy_numbers_allowed():
        try:
            content = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:
            raise UserError(f"{file} cannot be loaded: {_why_not(file, error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a checkpoint. Use another file.")
    return content


def _is_recent_torch() -> bool:
    return hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")  # since torch 2.6


def _numpy_numbers_allowed() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `torch.load` also accepts numpy's numbers and arrays, which nnU-Net's checkpoints contain."""
    if not _is_recent_torch():
        return contextlib.nullcontext()
    allowed: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdUS"}]
    for value in (np.float64(), np.empty(0)):
        function: Any = value.__reduce__()[0]
        # numpy 1 and 2 keep the function under different names, and a checkpoint has the name of its writer's
        allowed += [(function, f"numpy.{core}.multiarray.{function.__name__}") for core in ("core", "_core")]
    return torch.serialization.safe_globals(allowed)


def _why_unsafe(file: Path) -> str | None:
    """Return why a file must not be given to `torch.load`, or None if it may be.

    Before torch 2.6, `torch.load` runs code from programs and from files in its former tar format, also with weights_only.
    """
    with contextlib.suppress(Exception), tarfile.open(file, "r:") as tar:  # most files are no tar file
        if tar.next() is not None:
            return "it has torch's former tar format, which is not safe to load."
    if not zipfile.is_zipfile(file):
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile raises many kinds of errors, and torch may read more than it does
        return f"it is damaged ({error})."
    if any(member.filename.rpartition("/")[2] == "constants.pkl" for member in members):
        return "it is a program (TorchScript), and this package loads only weights."
    if inflated := next(filter(is_inflated, members), None):
        return f"{inflated.filename} in it is compressed, and would become {inflated.file_size:,} bytes."
    return None


def _why_not(file: Path, error: Exception) -> str:
    """Return why `torch.load` refused a file, without torch's advice to run code from the file."""
    objects: list[str] = []
    with contextlib.suppress(Exception):  # a file of another format, or torch before 2.6
        objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    if not objects and _is_recent_torch():
        # a file in torch's old format, whose objects the function above does not list
        objects = re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))
    if objects:
        return (
            f"it holds more than tensors and plain values, namely {first_of(objects, 3)}. Loading such objects can "
            "run code that is in the file, so this package does not load them. Use another file."
        )
    if "Unsupported global" in str(error):  # torch before 2.6
        return (
            f"it holds more than tensors and plain values. Here is PyTorch {torch.__version__}. PyTorch 2.6 or newer also loads "
            "numpy's numbers, which the checkpoints of nnU-Net hold. Type: pip install --upgrade torch"
        )
    # torch puts the advice to run code from the file before the reason
    reason = (str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [""])[0]
    # torch prints a part of its messages in bold
    reason = re.sub(r"\x1b\[\d*m", "", reason).rstrip(". ")
    return (
        f"torch cannot read it ({type(error).__name__}: {reason}). The file is damaged, or torch.save did not write it. "
        "Use another file."
    )


# --- exported weights ----------------------------------------------------------------------------------------------------

ENCODER_FILE, DECODER_FILE, NETWORK_FILE = "macl_encoder.pth", "macl_decoder.pth", "macl_network.pth"
# nnU-Net writes this file at the end of a training
NNUNET_FILE = "checkpoint_final.pth"

MACL_CITATION = (
    "Zeng et al. Multi-level Asymmetric Contrastive Learning for Medical Image Segmentation Pre-training. IEEE JBHI 2026. "
    "doi:10.1109/JBHI.2026.3669549"
)
NNUNET_CITATION = (
    "Isensee et al. nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation. "
    "Nature Methods 18, 203-211 (2021). doi:10.1038/s41592-020-01008-z"
)


# who trained weights, by their kind
ORIGINS = {"macl": "MACL", "nnssl": "nnssl", "nnunet": "nnU-Net", "macl_authors": "the MACL authors'"}


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights for a U-Net and their origin.

    Raises:
        UserError: A weight is no tensor, or holds NaN or infinite values.
    """

    files: list[Path]
    weights: dict[str, Tensor]  # by the U-Net's own names
    architecture: dict[str, Any]
    description: dict[str, Any]
    elsewhere: frozenset[str] = frozenset()  # names of trained weights that only another file of the run holds

    def __post_init__(self) -> None:
        names = ", ".join(map(str, self.files))
        for key, weight in self.weights.items():
            if not isinstance(weight, Tensor):
                raise UserError(
                    f"{names} is damaged: {key} is a {type(weight).__name__}, not a tensor. Use another copy."
                )
            if not weight.isfinite().all():
                raise UserError(f"{names} holds NaN or infinite values, in {key}. Use other weights.")

    @property
    def channel_names(self) -> list[str]:
        """Return the names of the image channels that the weights were trained on; empty if unknown."""
        return (self.description.get("dataset_fingerprint") or {}).get("channel_names") or []

    @property
    def kind(self) -> str:
        """Return the kind of the file. An exported file has the kind of the weights from which it was made."""
        return str(self.description.get("origin_kind") or self.description.get("kind"))

    @property
    def origin(self) -> str:
        """Return who trained the weights: MACL, nnssl, nnU-Net or the MACL authors."""
        return ORIGINS.get(self.kind, ORIGINS["macl"])


def export_weights(
    folder: Path,
    *,
    encoder: dict[str, Tensor],
    decoder: dict[str, Tensor],
    unet_weights: dict[str, Tensor],
    description: dict[str, Any],
) -> None:
    """Write the weights of a pre-training: ``macl_encoder.pth``, ``macl_decoder.pth`` and ``macl_network.pth``.

    Args:
        folder: Folder of the run.
        encoder, decoder: Trained weights by the U-Net's own names.
        unet_weights: Initial state dict of the whole U-Net, in which the trained weights replace the initial ones. The first
            convolution of a cascade's second stage has further inputs, whose weights stay as they are.
        description: Architecture, data, recipe and losses, as plain JSON types. ``network_input_channels`` is the number of
            inputs of the whole U-Net, which may have more inputs than image channels.

    Raises:
        UserError: A file could not be written.
    """
    trained = encoder | decoder
    taken = under_all_names(unet_weights, trained)
    whole = {key: pad_input_channels(taken.get(key, fresh), fresh) for key, fresh in unet_weights.items()}
    fresh_inputs = [key for key, value in trained.items() if value.shape != unet_weights[key].shape]
    for name, kind, weights in (
        (ENCODER_FILE, "macl_encoder", encoder),
        (DECODER_FILE, "macl_decoder", decoder),
        (NETWORK_FILE, "macl_network", whole),
    ):
        content = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "network_weights": _detached(weights),
            "trained_keys": sorted(trained),
            "package_versions": package_versions(),
            **description,
        }
        if kind == "macl_network":
            # keys of nnU-Net's own checkpoints, for tools that read them
            content |= {"trainer_name": "nnUNetTrainer", "init_args": {"configuration": description["configuration"]}}
            content["fresh_inputs"] = fresh_inputs
        save(content, folder / name, checksum=True)


def first_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Return the first name of each tensor in a state dict, by each of its names.

    A network that uses a module in two places lists its weights twice: nnU-Net's decoder also contains the encoder.
    """
    first: dict[tuple, str] = {}
    # compare memory, because state_dict() returns a new tensor for each name of a parameter
    return {
        key: first.setdefault((value.device, value.data_ptr(), value.shape, value.stride()), key)
        for key, value in state.items()
    }


def under_all_names(state: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under every name that a network's state dict has for them."""
    found = {key: weights.get(key, weights.get(first)) for key, first in first_names(state).items()}
    return {key: value for key, value in found.items() if value is not None}


def pad_input_channels(trained: Tensor, fresh: Tensor) -> Tensor:
    """Return trained weights, completed with fresh ones for the further inputs of a cascade's second stage."""
    if trained.shape == fresh.shape:
        return trained
    fitted = fresh.clone()
    fitted[:, : trained.shape[1]] = trained
    return fitted


def _detached(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU. A tensor with several names is copied, and so written, only once."""
    names = first_names(weights)
    copies = {first: weights[first].detach().cpu().clone() for first in names.values()}
    return {key: copies[first] for key, first in names.items()}


def package_versions() -> dict[str, str]:
    names = ("nnunetv2_macl", "nnunetv2", "dynamic_network_architectures", "torch", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def load_weights(path: Path) -> PretrainedWeights:
    """Read exported weights.

    Args:
        path: Folder of a run, for encoder and decoder, or one of the three files, for its content.

    Raises:
        UserError: The file does not exist, is damaged, or holds NaN or no weights of this package. The message names the file.
    """
    if path.is_dir():
        files = [path / ENCODER_FILE, path / DECODER_FILE]
        if not files[0].is_file():
            inner = [
                str(file.parent) for depth in ("*", "*/*") for file in sorted(path.glob(f"{depth}/{ENCODER_FILE}"))
            ][:5]
            inner += [str(file) for depth in (".", "fold_*") for file in sorted(path.glob(f"{depth}/{NNUNET_FILE}"))][
                :5
            ]
            where = f"Give one of: {', '.join(inner)}" if inner else "Give a pre-training run's folder: .../fold_all"
            raise UserError(f"There is no {ENCODER_FILE} in the folder {path}. {where}")
        if not files[1].is_file():
            raise UserError(f"There is no {DECODER_FILE} in {path}. Give {files[0]} to use the encoder alone.")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(
            f"There are no pre-trained weights at {path}. Give a pre-training run's folder, or a file in it."
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        content = load(file)
        if content.get("kind") not in ("macl_encoder", "macl_decoder", "macl_network"):
            raise UserError(
                f"{file} holds no weights that this package can use. The file holds {', '.join(map(str, list(content)[:6]))}. "
                f"Give {ENCODER_FILE} or its folder, or a checkpoint of nnU-Net v2 (checkpoint_final.pth) or of nnssl."
            )
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {content.get('format_version')!r}, but this nnunetv2_macl reads {FORMAT_VERSION}. "
                "Update nnunetv2_macl in the way you installed it."
            )
        try:
            trained, architecture = set(content["trained_keys"]), content["architecture"]
            weights |= {key: value for key, value in content["network_weights"].items() if key in trained}
            for key in content.get("fresh_inputs", ()):
                weights[key] = weights[key][:, : architecture["input_channels"]]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{file} is damaged: {type(error).__name__}: {error}. Use another copy, or pre-train again."
            ) from None
    description = {k: v for k, v in content.items() if k not in ("network_weights", "trained_keys", "fresh_inputs")}
    return PretrainedWeights(files, weights, architecture, description, frozenset(trained - weights.keys()))


def first_difference(theirs: Any, ours: Any, name: str = "") -> str | None:
    """Return a text that names the first difference between two architectures, or None."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            difference = first_difference(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return None
    return None if theirs == ours else f"{name} is {theirs} there and {ours} here"
