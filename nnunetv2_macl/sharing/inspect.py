"""Description of a file: a checkpoint, weights, a MACL plan, a package, or a checkpoint of nnU-Net or nnssl."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from nnunetv2_macl import checkpoints, files, formats
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.registry import citations_of
from nnunetv2_macl.nnunet import read_json
from nnunetv2_macl.planning.plan import describe, read_plan, was_edited
from nnunetv2_macl.sharing.install import unpacked
from nnunetv2_macl.sharing.model_card import facts_of, recipe_methods
from nnunetv2_macl.sharing.package import MANIFEST, MEMBERS

_KINDS = {
    "macl_encoder": "encoder weights, pre-trained by MACL",
    "macl_decoder": "decoder weights, pre-trained by MACL",
    "macl_network": "weights of a whole nnU-Net network, partly pre-trained, for -pretrained_weights",
    "macl_checkpoint": "checkpoint of a MACL pre-training run, which --c continues",
}


def inspect(file: Path) -> str:
    """Return a text that says what a file is, how it was trained, and whether it is damaged.

    Raises:
        UserError: The file is unknown or damaged. The message names the file.
    """
    if file.is_dir():
        known = sorted(path.name for path in file.iterdir() if path.suffix in (".pth", ".zip") or "macl" in path.name)
        raise UserError(
            f"{file} is a folder. Give a file in it: {', '.join(known[:8]) or 'it holds none of nnunetv2_macl'}."
        )
    if not file.is_file():
        raise UserError(f"There is no file {file}. Check the path.")
    read = _plan if file.suffix == ".json" else _package if _is_package(file) else _checkpoint
    try:
        return read(file)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # The file names its kind, but its content is not as this kind has it.
        raise UserError(f"{file} is damaged: {type(error).__name__}: {error}. Get it again.") from None


def _is_package(file: Path) -> bool:
    """Return whether a file is a package. A checkpoint is a ZIP file too, but its members are in a folder."""
    try:
        with zipfile.ZipFile(file) as archive:
            return file.suffix == ".zip" or MANIFEST in archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return file.suffix == ".zip"


def _package(file: Path) -> str:
    with unpacked(file) as (manifest, _):
        facts = {"licence": str(manifest.get("license"))} | facts_of(manifest)
    whole = f"yes: {len(MEMBERS)} files agree with their SHA-256 checksums"
    return _as_text(file, "package of MACL weights, for nnUNetv2_macl_install", facts, whole, manifest.get("citations"))


def _plan(file: Path) -> str:
    content = read_json(file, "Get it again.")
    if not isinstance(content, dict) or "recipe" not in content:
        raise UserError(f"{file} is no file of nnunetv2_macl: it is not a MACL plan (PLANS_macl_CONFIGURATION.json).")
    plan = read_plan(file)
    words = "\n".join(map(_printable, describe(plan).splitlines()))
    whole = "yes, and not edited" if not was_edited(file) else "yes, and edited by a user"
    return _as_text(file, "MACL plan", {"epochs": str(plan.recipe.get("num_epochs"))}, whole, None) + f"\n\n{words}"


def _checkpoint(file: Path) -> str:
    content = checkpoints.load(file)
    if what := _kind_of_others(content):
        pretrained = formats.load_weights(file)
        keys = ("dataset_name", "plans_name", "configuration", "fold", "epochs")
        facts = {key: str(pretrained.description[key]) for key in keys if pretrained.description.get(key) is not None}
        facts["network"] = pretrained.architecture["network_class_name"].rpartition(".")[2]
        facts |= {"trainer": str(content["trainer_name"])} if "trainer_name" in content else {}
        facts["tensors"] = str(len(pretrained.weights))
        return _as_text(file, what, facts, _wholeness(file), pretrained.description["citations"])
    kind = content.get("kind")
    if kind not in _KINDS:
        raise UserError(f"{file} is no file of nnunetv2_macl: it holds {', '.join(map(str, list(content)[:8]))}.")
    if kind == "macl_checkpoint":
        plan = content["run"]["macl_plan"]
        log = (content.get("logging") or {}) if isinstance(content.get("logging"), dict) else {}
        losses = {key: values[-1] for key, values in log.items() if key.startswith("train_losses/") and values}
        description = {
            "macl_plan": plan,
            "epochs": f"{content.get('current_epoch')} of {plan['recipe']['num_epochs']}",
            "final_losses": losses,
            "collapsed": content.get("collapsed"),
        }
        citations = citations_of(recipe_methods(plan["recipe"]))
        return _as_text(file, _KINDS[kind], facts_of(description), _wholeness(file), citations)
    facts = facts_of(content) | {"tensors": str(len(content["network_weights"]))}
    if (origin := content.get("origin_kind")) in checkpoints.ORIGINS:
        facts["trained by"] = checkpoints.ORIGINS[origin]
    return _as_text(file, _KINDS[kind], facts, _wholeness(file), content.get("citations"))


def _kind_of_others(content: dict[str, Any]) -> str | None:
    if formats.ADAPTATION_PLAN in content:
        return "checkpoint of nnssl"
    if formats.is_nnunet_checkpoint(content):
        return "checkpoint of nnU-Net's training with labels, to fine-tune from"
    return "weights that the authors of MACL published" if formats.AUTHORS_WEIGHTS in content else None


def _wholeness(file: Path) -> str:
    """Return whether a checkpoint that could be loaded is intact, and how this is known."""
    if files.verify(file):
        return f"yes: it agrees with {files.checksum_path(file).name}"
    return f"yes, by the checksums inside the file. There is no {files.checksum_path(file).name} next to it"


def _as_text(file: Path, kind: str, facts: dict[str, str], whole: str, citations: Any) -> str:
    rows = {"what": kind, **facts, "intact": whole}
    width = max(map(len, rows))
    lines = [(name, value) for name, value in rows.items()] + [("cite", str(citation)) for citation in citations or []]
    return "\n".join([str(file), *(f"  {name.ljust(width)}  {_printable(value)}" for name, value in lines)])


def _printable(text: str) -> str:
    """Replace the characters that could control a terminal, because the file may come from anyone."""
    return "".join(c if c.isprintable() else " " for c in text)
