"""The report of a run that is finished, was stopped, or has only a log."""

import json
import math
import re
import shutil
import socket
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import set_folders

from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.report import page, write_report, write_report_after_run
from nnunetv2_macl.report.features import nearest, pca_colours
from nnunetv2_macl.report.pretraining import _summary
from nnunetv2_macl.report.run import read_run


@pytest.fixture(scope="module")
def finished(planned, tmp_path_factory):
    """Return a workspace of its own with a run of three epochs."""
    space = planned.copy(tmp_path_factory.mktemp("report") / "nnunet")
    space.pretrain("901", "-c", "2d", "-recipe", "macl", epochs=3, steps=2)
    return space


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """Return a copy of the run's folder that a test may change, and set nnU-Net's variables."""
    set_folders(monkeypatch, finished.folder)
    folder = finished.run_folder("nnUNetTrainerMACLPretrain")
    shutil.copytree(folder.parent, tmp_path / folder.parent.name)
    return tmp_path / folder.parent.name / "fold_all"


class Page(HTMLParser):
    """Checks that all tags are closed, and collects references and text of the page."""

    VOID = ("meta", "img", "br", "link", "path", "use", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.words = [], set(), [], ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "action", "data")]
        assert not [k for k, _ in attributes if k.startswith("on")], "a script in an attribute"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words += " " + " ".join(data.split())


def test_the_report_of_a_finished_run(run):
    file = write_report(run)
    text = file.read_text()
    shown = Page(text)
    assert file == run / "report.html" and file.stat().st_size < page.MOST_BYTES
    assert not shown.tags & {"script", "link", "iframe", "object", "embed"}
    assert all(r.startswith(("data:image/", "#")) for r in shown.references), "something is fetched"
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    for words in (
        "finished, 3 of 3 epochs", "9 images, none of their labels", "nnUNetv2_train 901 2d 0 -tr nnUNetTrainerMACL -device cpu",
        "L_g, image level", "nearest before", "random patches", "JBHI 2026", "nnunetv2 2.", "own_view_weight",
        "Dataset901_Generated, labelled (labels are not read)", "Dataset901_Generated, unlabelled",
    ):  # fmt: skip
        assert words in shown.words, words
    for reason in read_run(run).plan.reasons.values():
        assert reason in shown.words
    # four patches with slice and two pictures of colours; six queries with three neighbours before and after; the views
    assert text.count("data:image/") == 4 * 3 + 6 * (1 + 2 * 3) + 1
    # all ids of the figures are unique
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_the_summary_shows_a_loss_of_the_epochs_that_train_it(run):
    known = read_run(run)
    rows = dict(_summary(replace(known, log=known.log | {"train_losses/global": [4.0, 3.0, math.nan]})))
    assert rows["L_g, image level"].startswith("4.000 → 3.000")


def test_the_same_run_gives_the_same_report(run):
    first, second = (write_report(run, run / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_the_report_of_a_stopped_or_running_run(run):
    (run / "checkpoint_final.pth").rename(run / "checkpoint_latest.pth")
    words = Page(write_report(run).read_text()).words
    assert "stopped, 3 of 3 epochs" in words and "nnUNetv2_train_macl_pretrain 901 -c 2d -device cpu --c" in words
    (run / ".macl_running.json").write_text('{"host": "elsewhere", "pid": 1, "started": "now"}')
    assert "running, 3 of 3" in Page(write_report(run).read_text()).words
    gone = {"host": socket.gethostname(), "pid": 2**22 + 1}
    (run / ".macl_running.json").write_text(json.dumps(gone))
    assert "stopped, 3 of 3" in Page(write_report(run).read_text()).words


def test_the_report_names_the_users_trainer_and_leaves_out_the_time_before_a_resume(run, tmp_path):
    content = checkpoints.load(run / "checkpoint_final.pth")
    content["logging"]["epoch_end_timestamps"][1] += 36_000.0
    content["logging"]["patches_per_second"] = [2.0, 4.0, 4.0]
    checkpoints.save(content, run / "checkpoint_final.pth")
    (run.parent / "debug.json").unlink(missing_ok=True)
    mine = tmp_path / "MyTrainer__nnUNetPlans__2d"
    run.parent.rename(mine)
    words = Page(write_report(mine / "fold_all").read_text()).words
    # an epoch has 2 steps of 4 patches
    assert "Time 0:00:08" in words and "2 s per epoch" in words
    assert f"export nnUNet_macl_weights={mine / 'fold_all'}" in words
    (mine / "fold_all" / "checkpoint_final.pth").rename(mine / "fold_all" / "checkpoint_latest.pth")
    words = Page(write_report(mine / "fold_all").read_text()).words
    assert "nnUNetv2_train 901 2d all -tr MyTrainer -device cpu --c" in words


def test_the_report_needs_no_checkpoint(run):
    there = read_run(run).log
    (run / "checkpoint_final.pth").unlink()
    (run / "views.png").unlink()
    here = read_run(run)
    assert here.images == 9 and here.epochs == 3
    np.testing.assert_array_equal(here.log["train_losses"], there["train_losses"])
    assert {"train_losses/global", "references/collapse", "positives", "lrs"} <= set(here.log)
    for key, values in here.log.items():
        np.testing.assert_array_equal(values, there[key])
    words = Page(write_report(run).read_text()).words
    assert "There is no checkpoint yet" in words and "no views.png" in words and "L_d, pixel level" in words
    (run / "epochs.csv").unlink()
    assert "No epoch is finished" in Page(write_report(run).read_text()).words


def test_the_report_without_access_to_the_images(run, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    words = Page(write_report(run).read_text()).words
    assert "has not preprocessed" in words and "finished, 3 of 3" in words
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in Page(write_report(run).read_text()).words


def test_collapse_and_warnings_are_shown_as_escaped_text(run):
    checkpoint = checkpoints.load(run / "checkpoint_final.pth")
    checkpoints.save(checkpoint | {"collapsed": "L_g is 5.919 <b>"}, run / "checkpoint_final.pth")
    with next(iter(run.glob("training_log_*.txt"))).open("a") as log:
        log.write("2026-01-01 10:00:00.000000: WARNING: <script>alert(1)</script>\n")
    text = write_report(run).read_text()
    assert "<script" not in text and "<b>" not in text
    words = Page(text).words
    assert "The run has collapsed:" in words and "Recipe keys to try" in words
    assert "WARNING: <script>alert(1)</script>" in words


def test_an_earlier_run_has_a_report(run):
    earlier = run / "previous_20260101_100000"
    earlier.mkdir()
    for file in [file for file in run.iterdir() if file != earlier]:
        file.rename(earlier / file.name)
    assert read_run(earlier).configuration.dataset_name == read_run(earlier).plan.dataset_name


def test_the_report_reads_the_newest_good_checkpoint(run):
    (run / "checkpoint_final.pth").rename(run / "checkpoint_previous.pth")
    assert read_run(run).weights and read_run(run).state == "stopped"
    (run / "checkpoint_latest.pth").write_bytes(b"damaged")
    assert read_run(run).weights
    (run / "checkpoint_previous.pth").unlink()
    with pytest.raises(UserError, match=r"checkpoint_latest\.pth"):
        read_run(run)


def test_images_that_the_run_excluded_are_not_shown(run):
    from nnunetv2_macl.report.features import _cases

    assert len(_cases(read_run(run))) == 9
    seen = json.loads((run / "macl_cases.json").read_text())
    first, *others = seen["Dataset901_Generated"]
    (run / "macl_cases.json").write_text(json.dumps(seen | {"Dataset901_Generated": others}))
    assert first not in {case.name for case in _cases(read_run(run))}
    assert len(_cases(read_run(run))) == 8
    # nnU-Net also trains a fold that splits_final.json does not list.
    assert len(_cases(read_run(run.rename(run.with_name("fold_7"))))) == 8


def test_mistakes_are_reported(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="There is no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"macl_plan\.json.*fold_all"):
        write_report(run.parent)
    messages = []
    write_report_after_run(tmp_path / "nowhere", messages.append)
    assert "No report was written" in messages[0] and "nnUNetv2_macl_report" in messages[0]
    (run / "report.html").unlink()
    monkeypatch.setattr(page, "MOST_BYTES", 10)
    with pytest.raises(UserError, match=r"bytes, .* 10\."):
        write_report(run)
    assert not (run / "report.html").exists()


def test_the_networks_before_and_after_are_a_fresh_one_and_that_of_the_run(run):
    from nnunetv2_macl.report.features import _networks

    networks = _networks(read_run(run))
    weights = [network.state_dict() for network in networks.values()]
    trained = checkpoints.load(run / "checkpoint_final.pth")["network_weights"]
    assert all(torch.equal(weights[1][key], trained[f"network.{key}"]) for key in weights[1])
    key = "encoder.stages.1.0.convs.0.conv.weight"
    assert not torch.equal(weights[0][key], weights[1][key])


# --- features ---------------------------------------------------------------------------------------------------------------


def test_equal_features_have_equal_colours():
    generator = np.random.default_rng(0)
    kinds = generator.normal(size=(3, 16))
    where = generator.integers(0, 3, (2, 5, 6))
    dense = torch.from_numpy(np.moveaxis(kinds[where], -1, 1))
    colours = pca_colours(dense)
    assert colours.shape == (2, 5, 6, 3) and colours.min() >= 0 and colours.max() <= 1
    means = np.stack([colours[where == kind].mean(0) for kind in range(3)])
    for kind in range(3):
        np.testing.assert_allclose(
            colours[where == kind], np.broadcast_to(means[kind], colours[where == kind].shape), atol=1e-9
        )
    distances = np.abs(means[:, None] - means[None]).max(-1)[np.triu_indices(3, 1)]
    assert distances.min() > 0.3


@pytest.mark.parametrize("channels", [1, 2])
def test_colours_of_constant_features_are_finite(channels):
    assert np.isfinite(pca_colours(torch.ones(1, channels, 2, 2))).all()


def test_neighbours_are_of_other_cases_and_sorted_by_distance():
    angles = np.deg2rad([0, 1, 5, 20, 90, 180, 185, 270])
    pooled = np.stack((np.cos(angles), np.sin(angles), np.ones(8)), 1)
    cases = np.array([0, 0, 1, 2, 3, 4, 5, 6])
    rows = nearest(pooled, cases[:, None] != cases[None])
    assert rows.shape == (6, 3)
    assert rows[0].tolist()[:2] == [2, 3] and 1 not in rows[0]
    assert rows[5][0] == 6
