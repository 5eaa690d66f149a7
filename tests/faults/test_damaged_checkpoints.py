"""Damaged checkpoints and exported weights are recognised, and not used."""

import hashlib
import random
import shutil
import subprocess

import pytest
import torch

from faults.test_killed import RUN, checkpoint, load, write
from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import checksum_path, verify
from nnunetv2_macl.training import resume


def damage(file, kind):
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        del content[-len(content) // 3 :]
    elif kind == "a bit flipped":
        content[len(content) // 2] ^= 4  # in the weights, where torch itself would not notice it
    elif kind == "empty":
        content = b""
    elif kind == "zeros":
        content = bytes(len(content))
    file.unlink()  # the previous checkpoint may be the same file under another name
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "a bit flipped", "empty", "zeros", "another run's", "no checkpoint"])
def test_the_previous_checkpoint_is_used_and_the_bad_one_kept(tmp_path, kind):
    write(tmp_path, 1)
    write(tmp_path, 2)
    latest = tmp_path / resume.LATEST
    if kind == "another run's":
        checkpoints.save(checkpoint(2, run=RUN | {"macl_plan": {"recipe": "b"}}), latest)
    elif kind == "no checkpoint":
        checkpoints.save({"something": 1}, latest)
    else:
        damage(latest, kind)
    bad, messages = latest.read_bytes(), []
    assert load(tmp_path, messages.append)["step"] == 1
    (aside,) = tmp_path.glob("*.corrupt")
    assert aside.read_bytes() == bad and not latest.exists()
    (message,) = messages
    assert all(name in message for name in (str(latest), aside.name, resume.PREVIOUS))
    if kind == "another run's":
        assert "macl_plan.recipe is b there and a here" in message
    write(tmp_path, 3)
    damage(latest, "truncated")
    assert load(tmp_path)["step"] == 1  # the bad checkpoint did not become the previous one
    assert len(list(tmp_path.glob("*.corrupt*"))) == 2


def test_without_a_good_checkpoint_no_new_run_starts(tmp_path):
    assert load(tmp_path) is None
    write(tmp_path, 1)
    damage(tmp_path / resume.LATEST, "truncated")
    with pytest.raises(UserError, match=r"checkpoint_latest\.pth.*Leave out --c"):
        load(tmp_path)
    assert (tmp_path / resume.LATEST).exists()
    (tmp_path / resume.LATEST).rename(tmp_path / "checkpoint_latest.pth.corrupt")
    with pytest.raises(UserError, match="No checkpoint"):
        load(tmp_path)


def test_a_checkpoint_of_a_newer_version_is_refused_and_kept(tmp_path):
    write(tmp_path, 1)
    checkpoints.save(checkpoint(2) | {"format_version": 99}, tmp_path / resume.FINAL)
    with pytest.raises(UserError, match="format version 99"):
        load(tmp_path)
    assert (tmp_path / resume.FINAL).exists()


def test_every_flipped_bit_is_detected_or_harmless(tmp_path):
    file, generator = tmp_path / "a.pth", random.Random(0)
    content = {"weights": torch.arange(300.0), "bias": torch.arange(5), "name": "x"}
    checkpoints.save(content, file)
    good, detected = file.read_bytes(), 0
    for _ in range(400):
        bad = bytearray(good)
        bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
        file.write_bytes(bad)
        try:
            found = checkpoints.load(file)
        except UserError:
            detected += 1
        else:
            assert found["name"] == "x" and all(torch.equal(found[k], content[k]) for k in ("weights", "bias"))
    assert detected > 200


def test_exported_files_have_a_checksum_file(tmp_path):
    file = tmp_path / "gewichte für später.pth"
    checkpoints.save({"weights": torch.arange(3000.0)}, file, checksum=True)
    assert verify(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert checksum_path(file).read_text(encoding="utf-8") == f"{digest}  {file.name}\n"  # the format of sha256sum
    if shutil.which("sha256sum"):
        command = ["sha256sum", "-c", checksum_path(file).name]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    good = file.read_bytes()
    file.write_bytes(good + b"x")
    with pytest.raises(UserError, match=r"später\.pth is damaged: its SHA-256"):
        checkpoints.load(file)
    checkpoints.save({"weights": torch.zeros(1)}, file)  # the old checksum is removed
    assert not verify(file) and checkpoints.load(file)
    damage(file, "zeros")
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoints.load(file)
