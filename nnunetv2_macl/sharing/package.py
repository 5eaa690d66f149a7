"""The package file: what it contains, and what is kept out of it."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nnunetv2_macl import checkpoints
from nnunetv2_macl.checkpoints import DECODER_FILE, ENCODER_FILE, PretrainedWeights
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, why_not_a_name
from nnunetv2_macl.planning.plan import is_edited, with_checksum
from nnunetv2_macl.sharing.model_card import model_card

logger = logging.getLogger(__name__)

FORMAT = "nnunetv2_macl package"
FORMAT_VERSION = 1
MANIFEST, PLAN, FINGERPRINT, CARD, SUMS = (
    "manifest.json", "macl_plan.json", "dataset_fingerprint.json", "README.md", "SHA256SUMS",
)  # fmt: skip
MEMBERS = (MANIFEST, ENCODER_FILE, DECODER_FILE, PLAN, FINGERPRINT, CARD, SUMS)
# The keys of a description that name the folder in which a package is installed.
FOLDER_NAMES = ("dataset_name", "plans_name", "configuration")

# The keys of a description that are shared. Any other key may hold private data.
_SHARED_KEYS = (
    "dataset_name", "plans_name", "configuration", "fold", "architecture", "network_input_channels", "preprocessing",
    "dataset_fingerprint", "macl_plan", "recipe", "epochs", "final_losses", "collapsed", "package_versions", "citations",
)  # fmt: skip
_FINGERPRINT_KEYS = (
    "foreground_intensity_properties_per_channel", "median_relative_size_after_cropping", "shapes_after_crop", "spacings",
)  # fmt: skip
# A path reaches to the end of the text, because names of folders may contain spaces.
_A_PATH = re.compile(r"""(?<![\w:/.)\]])(?:file://|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\|/(?=[\w.~]))[^'"<>|\n]*""")
# A fixed date gives all packages of the same weights the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)


def write_package(source: Path, file: Path, license_id: str = "unknown") -> None:
    """Write the weights of a run to one file to share.

    Args:
        source: Folder of a finished run, or one that `install` made.
        file: File to write.
        license_id: Licence of the weights for the model card, as hubs write it (``cc-by-4.0``).

    Raises:
        UserError: The folder holds no weights, or weights that could not be installed, or the file cannot be written.
    """
    if source.is_file():
        raise UserError(
            f"{source} is a file, and a package holds encoder and decoder. Give the run's folder: {source.parent}"
        )
    if not source.is_dir():
        raise UserError(f"There is no folder {source}. Give the folder of a pre-training run, where {ENCODER_FILE} is.")
    contents = {name: _shared(checkpoints.load_weights(source / name)) for name in (ENCODER_FILE, DECODER_FILE)}
    description = {key: value for key, value in contents[ENCODER_FILE].items() if key in _SHARED_KEYS}
    if why := why_not_installable(description):
        raise UserError(
            f"{source} cannot become a package, because it could not be installed: {why}. Write a checkpoint instead: "
            f"nnUNetv2_macl_export {shlex.quote(str(source))} -o weights.pth --format nnunet"
        )
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "license": license_id} | description
    members = {
        MANIFEST: _json(manifest),
        PLAN: _json(description.get("macl_plan", {})),
        FINGERPRINT: _json((description.get("dataset_fingerprint") or {}).get("nnunet") or {}),
        CARD: model_card(description, license_id).encode(),
    }
    for name, content in contents.items():
        stream = io.BytesIO()
        torch.save(content, stream)
        members[name] = stream.getvalue()
    members[SUMS] = "".join(
        f"{hashlib.sha256(members[name]).hexdigest()}  {name}\n" for name in sorted(members)
    ).encode()
    atomic_write(file, lambda stream: _write(stream, members))
    logger.info(
        "%s: %.1f MiB with %s. It contains no images, no case names and no paths.\n"
        "On another machine, type: nnUNetv2_macl_install %s",
        file, file.stat().st_size / 2**20, ", ".join(members), shlex.quote(file.name),
    )  # fmt: skip
    if description.get("collapsed"):
        logger.warning("The run of these weights collapsed. The model card says so.")


def why_not_installable(description: dict[str, Any]) -> str | None:
    """Return why no folder of nnU-Net can have the names in a description, or None if one can."""
    for key in FOLDER_NAMES:
        name = description.get(key)
        if not isinstance(name, str):
            return f"its {key} is {name!r}, not a name"
        if why := why_not_a_name(name):
            return f"its {key} is {name!r}, which no folder can have on every system, because {why}"
    if not re.match("Dataset[0-9]{3}_.", name := description["dataset_name"]):
        return f"its dataset_name is {name!r}, not DatasetXXX_NAME with three digits"
    return None


def _write(stream: BinaryIO, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(stream, "w") as archive:
        # the model card first: it is what people look for
        for name in sorted(members, key=(CARD, MANIFEST, *MEMBERS).index):
            member = zipfile.ZipInfo(name, _DATE)
            member.external_attr = 0o644 << 16
            # Compression does not make weights smaller.
            member.compress_type = zipfile.ZIP_STORED if name.endswith(".pth") else zipfile.ZIP_DEFLATED
            archive.writestr(member, members[name])


def _shared(pretrained: PretrainedWeights) -> dict[str, Any]:
    """Return the content of exported weights that is safe to share, as the content of a checkpoint."""
    description = pretrained.description
    shared = {key: without_paths(description[key]) for key in _SHARED_KEYS if key in description}
    if isinstance(fingerprint := shared.get("dataset_fingerprint"), dict):
        own = fingerprint.get("nnunet")
        kept = {key: own[key] for key in _FINGERPRINT_KEYS if key in own} if isinstance(own, dict) else {}
        shared["dataset_fingerprint"] = fingerprint | {"nnunet": kept}
    plan = shared.get("macl_plan") or {}
    start = plan.get("pretrained_weights")
    while isinstance(start, dict):
        # Names of folders may contain any character, so that no expression finds the end of every path.
        start["path"] = ""
        start["left_out"] = None
        start = start.get("started_from")
    for recipe in (shared.get("recipe"), plan.get("recipe"), plan.get("settings")):
        # The description of a user's own recipe may contain anything.
        if isinstance(recipe, dict) and "description" in recipe:
            recipe["description"] = ""
    if plan and not is_edited(description["macl_plan"]):
        # what was removed above is no edit of a user
        shared["macl_plan"] = with_checksum(plan)
    return {
        "format_version": description["format_version"],
        "kind": description["kind"],
        "network_weights": pretrained.weights,
        "trained_keys": sorted(pretrained.weights),
        **shared,
    }


def without_paths(value: Any) -> Any:
    """Return JSON content without the paths in its texts."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    return _A_PATH.sub("(path removed)", value) if isinstance(value, str) else value


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()
