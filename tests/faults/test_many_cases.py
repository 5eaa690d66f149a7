"""A start opens no preprocessed case, for any number of cases, and several machines may divide the work."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DATASET

from nnunetv2_macl.data import Case
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.preprocessing import cases
from nnunetv2_macl.preprocessing import index as index_module
from nnunetv2_macl.preprocessing.index import INDEX, Index
from nnunetv2_macl.preprocessing.sources import group_channels
from nnunetv2_macl.training.inputs import unlabelled_cases


@pytest.fixture
def configuration(workspace):
    return DatasetConfiguration.load("901", "nnUNetPlans", "2d")


def preprocess(configuration, **options):
    return cases.preprocess_unlabelled(configuration, [], processes=1, **options)


def folder(configuration):
    return cases.unlabelled_folder(configuration) / DATASET


def generate(configuration, workspace, number):
    """Write empty raw images, and preprocessed cases as an earlier start without an index would leave them."""
    raw, target = workspace.raw / DATASET / "imagesUn", folder(configuration)
    for file in raw.iterdir():
        file.unlink()
    signature = configuration.preprocessing_checksum()
    for case in (f"patient {i:06d} ä" for i in range(number)):
        image = raw / f"{case}_0000.nii.gz"
        os.close(os.open(image, os.O_CREAT))
        (target / f"{case}.b2nd").write_bytes(b"x" * 10)
        fingerprint = {"files": [[image.name, 0, os.stat(image).st_mtime_ns]], "channels": None, "plan": signature}
        fingerprint["reader"] = configuration.plans_manager.image_reader_writer_class.__name__
        (target / f"{case}.json").write_text(json.dumps({"made_from": fingerprint, "bytes": 10}))


@pytest.fixture
def opened(monkeypatch):
    """Return a list that collects the names of the JSON files that are read."""
    names, original = [], index_module.read_json

    def read(path, fix):
        names.append(Path(path).name)
        return original(path, fix)

    monkeypatch.setattr(index_module, "read_json", read)
    return names


def test_the_second_start_opens_only_the_index(configuration, workspace, opened):
    generate(configuration, workspace, 300)
    assert len(preprocess(configuration).cases) == 300 and len(opened) == 301
    opened.clear()
    assert len(preprocess(configuration).cases) == 300 and opened == [INDEX]
    before = (folder(configuration) / INDEX).stat().st_mtime_ns
    preprocess(configuration)
    assert (folder(configuration) / INDEX).stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_start_with_200_000_cases_is_fast(configuration, workspace, opened):
    generate(configuration, workspace, 200_000)
    preprocess(configuration)
    opened.clear()
    began = time.monotonic()
    assert len(preprocess(configuration).cases) == 200_000 and opened == [INDEX]
    print(f"{time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("damage", ["gone", "cut", "another plan's", "a list", "entries of nonsense"])
def test_a_damaged_index_is_replaced(configuration, workspace, opened, damage):
    generate(configuration, workspace, 5)
    preprocess(configuration)
    file = folder(configuration) / INDEX
    content = json.loads(file.read_text())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_text(file.read_text()[:50])
    elif damage == "another plan's":
        file.write_text(json.dumps(content | {"plan": "x"}))
    else:
        file.write_text(
            json.dumps([] if damage == "a list" else content | {"cases": dict.fromkeys(content["cases"], 7)})
        )
    opened.clear()
    assert len(preprocess(configuration).cases) == 5 and len(opened) == 5 + 1


def test_cases_that_are_newer_than_the_index_are_checked(configuration, workspace, opened):
    generate(configuration, workspace, 3)
    preprocess(configuration)
    target = folder(configuration)
    first, second, _ = sorted(target.glob("patient*.b2nd"))
    first.write_bytes(b"y" * 10)  # written again with the right size, so its JSON file decides
    second.write_bytes(b"x" * 9)  # cut short
    index = Index(target, configuration.preprocessing_checksum())
    opened.clear()
    fingerprint = {p: json.loads(p.with_suffix(".json").read_text())["made_from"] for p in (first, second)}
    assert index.is_done(first.stem, fingerprint[first]) and not index.is_done(second.stem, fingerprint[second])
    assert len(opened) == 2


@pytest.mark.slow
def test_machines_that_divide_the_work_lose_no_case(configuration, workspace, opened):
    """The index may lack the cases of another machine. They are then checked, but not preprocessed again."""
    target = folder(configuration)
    for file in target.iterdir():
        file.unlink()
    preprocess(configuration, part=slice(0, None, 2))
    kept = (target / INDEX).read_bytes()
    preprocess(configuration, part=slice(1, None, 2))
    (target / INDEX).write_bytes(kept)  # the first machine wrote last
    opened.clear()
    written = {file.name: file.stat().st_mtime_ns for file in target.glob("*.b2nd")}
    assert len(preprocess(configuration).cases) == 4 and len(opened) == 1 + 2
    assert {file.name: file.stat().st_mtime_ns for file in target.glob("*.b2nd")} == written
    opened.clear()
    preprocess(configuration)
    assert opened == [INDEX]


def test_old_temporary_files_of_killed_preprocessing_are_removed(configuration, workspace):
    target = folder(configuration)
    for name, age in ((".new.b2nd.abc.tmp", 0), (".old.b2nd.abc.tmp", 10 * 86400)):
        (target / name).write_bytes(b"half")
        os.utime(target / name, (time.time() - age, time.time() - age))
    preprocess(configuration)
    assert (target / ".new.b2nd.abc.tmp").exists() and not (target / ".old.b2nd.abc.tmp").exists()


def test_each_of_many_files_has_its_own_fingerprint(tmp_path):
    for number in range(100):
        (tmp_path / f"case_{number:03d}_0000.nii.gz").write_bytes(b"x" * number)
    found = group_channels(tmp_path, ".nii.gz")
    sizes = {case: channels[0].fingerprint[:2] for case, channels in found.items()}
    assert sizes == {f"case_{n:03d}": [f"case_{n:03d}_0000.nii.gz", n] for n in range(100)}


def test_the_training_uses_the_images_that_the_command_has_found(tmp_path):
    """Checking many images a second time would take as long as the rest of the start."""
    found = cases.Preprocessed([Case("a", "a.b2nd")], {tmp_path / "b": "b cannot be read."})
    log = []
    trainer = SimpleNamespace(print_to_log_file=lambda text, **options: log.append((text, options)))
    with cases.images_found(found):
        assert unlabelled_cases(trainer) is found
    assert log == [("Left out: b cannot be read.", {"also_print_to_console": False})]
    assert cases.found_images() is None
