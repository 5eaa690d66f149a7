"""Compare the planner with examples computed by hand, and test its limits."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from steps import recipe_of

from nnunetv2_macl.cli.pretrain import pretrain_entry
from nnunetv2_macl.data import Sampling
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.methods.branches import plan_branches
from nnunetv2_macl.nnunet import DatasetConfiguration, checksum
from nnunetv2_macl.planning.derive import _joint_geometry, derive_or_load_plan, derive_plan
from nnunetv2_macl.planning.plan import check_plan, describe, plan_file, read_plan, was_edited, write_plan
from nnunetv2_macl.planning.positives import plan_position_groups, plan_threshold
from nnunetv2_macl.recipe import load_recipe


def pooled(poolings, axes=2):
    return [[1] * axes] + [[2] * axes] * poolings


ANISOTROPIC = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]


@pytest.mark.parametrize(
    "patch, strides, e, k, scale, planned",
    [
        ([512, 512], pooled(4), 5, 2, [4, 4], [512, 512]),  # network and values of the paper
        ([512, 512], pooled(7), 5, 4, [2, 2], [512, 512]),
        ([256, 224], pooled(6), 5, 3, [2, 2], [256, 256]),  # ACDC
        ([128, 128, 128], pooled(5, 3), 5, 2, [2, 2, 2], [128, 128, 128]),
        ([20, 256, 224], ANISOTROPIC, 5, 3, [2, 4, 4], [24, 256, 256]),
        ([56, 40], pooled(3), 4, 1, [2, 2], [64, 48]),  # hippocampus
        ([40, 56, 40], pooled(3, 3), 4, 1, [2, 2, 2], [48, 64, 48]),
    ],
)
def test_stages_scale_and_patch_of_examples(patch, strides, e, k, scale, planned):
    levels = plan_branches(patch, strides, recipe_of())
    assert (levels.auxiliary_stage, levels.decoder_stages, levels.scale) == (e, k, scale)
    assert levels.patch_size == planned


def test_where_no_scale_fits_both_branches_see_the_full_patch():
    levels = plan_branches([32, 32], [[1, 1], [2, 2], [4, 4], [4, 4]], recipe_of())
    assert (levels.auxiliary_stage, levels.decoder_stages, levels.scale) == (3, 1, [1, 1])
    assert (
        levels.patch_size == [64, 64] and "no scale" in levels.reason
    )  # With 32x32, the bottleneck would have one voxel.
    # a transformer with one map: both branches see the same image
    assert "intensity_on=auxiliary" in plan_branches([64, 64], [[16, 16]], recipe_of()).reason
    assert "intensity_on" not in levels.reason


@pytest.mark.parametrize("k", range(5))
def test_table_iv_with_the_papers_network(k):
    levels = plan_branches([512, 512], pooled(4), recipe_of(decoder_stages=k, auxiliary_stage="bottleneck"))
    assert levels.decoder_stages == k and levels.auxiliary_stage == 5
    assert levels.scale == [2**k] * 2


def test_a_recipe_that_does_not_fit_the_network_is_rejected():
    with pytest.raises(UserError, match=r"decoder_stages=9.*4 stages"):
        plan_branches([64, 64], pooled(3), recipe_of(decoder_stages=9))
    with pytest.raises(UserError, match=r"scale=3.*decoder_stages=1 auxiliary_stage=4 scale=2"):
        plan_branches([64, 64], pooled(3), recipe_of(scale=3))


@pytest.mark.parametrize("method", ["simclr", "gcl", "voxel"])
def test_the_order_of_joined_methods_does_not_change_the_plan(target, method):
    plans = {
        name: derive_plan(target, recipe_of(method=name))
        for name in (method, "restoration", f"{method}+restoration", f"restoration+{method}")
    }
    stages = {name: plan.decoder_stages for name, plan in plans.items()}
    assert stages[f"{method}+restoration"] == stages[f"restoration+{method}"]
    assert stages[f"{method}+restoration"] == max(stages[method], stages["restoration"]) >= 1


@pytest.mark.parametrize("key, value", [("auxiliary_stage", 3), ("scale", 2)])
def test_joined_methods_obey_or_refuse_the_keys_of_restoration(key, value):
    network = SimpleNamespace(patch_size=[64, 64], strides=pooled(3))
    for name in ("restoration", "gcl+restoration", "restoration+gcl"):
        geometry = _joint_geometry(network, recipe_of(method=name, decoder_stages=2, **{key: value}))
        assert getattr(geometry, key) in (value, [value, value])
    with pytest.raises(UserError, match=f"{key}=.*decoder_stages"):
        _joint_geometry(network, recipe_of(method="voxel+restoration", **{key: value}))


def test_threshold_is_lowered_until_positives_are_few():
    rng = np.random.default_rng(0)
    shapes = [[int(n), 100, 100] for n in rng.integers(60, 140, 40)]
    sampling = Sampling((1, 100, 100), 32, 1, 0)
    threshold, expected, reason = plan_threshold(shapes, sampling, recipe_of())
    assert 0.02 < threshold < 0.05 and expected - 1 <= 4 and "lowered from 0.1" in reason
    threshold, expected, _ = plan_threshold(shapes, sampling, recipe_of(limit_positives=False))
    assert threshold == 0.1 and expected - 1 == pytest.approx(2 * 31 * 0.19, rel=0.1)
    assert plan_threshold(shapes, sampling, recipe_of(threshold=0.0))[:2] == (0.0, 1.0)


def test_the_written_plan_can_be_read_and_explains_its_values(workspace, target):
    plan = derive_or_load_plan(target, recipe="restore", values={"batch_size": 8})
    file = plan_file(target)
    assert file == workspace.preprocessed / target.dataset_name / "nnUNetPlans_macl_2d.json"
    assert read_plan(file) == plan and not was_edited(file)
    words = describe(plan)
    for key in (
        "decoder_stages",
        "scale",
        "patch_size",
        "grid",
        "batch_size",
        "threshold",
        "expected_positives",
        "memory",
    ):
        assert key in words
    (unused,) = [line for line in words.splitlines() if "restoration does not use" in line]
    assert all(key in unused for key in ("dominant_patch_size", "grid", "threshold"))
    assert "does not use" not in describe(derive_or_load_plan(target, recipe="macl"))
    derive_or_load_plan(target, recipe="macl", values={"batch_size": 8})
    content = json.loads(file.read_text())
    explained = ", ".join(content["reasons"])
    assert all(key in explained for key in ("scale", "patch_size", "threshold", "batch_size", "memory_gib"))


def test_an_unedited_plan_of_an_older_version_is_derived_again(target):
    plan = derive_or_load_plan(target)
    file = plan_file(target)
    old = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("channel_map", "checksum")}
    file.write_text(json.dumps(old | {"checksum": checksum(old)}))
    assert derive_or_load_plan(target) == plan


def test_a_plan_records_the_options_of_its_recipe_and_plans_of_earlier_versions_load(target):
    settings = {"temperature": 0.2, "scaling": [0.8, 1.2], "optimizer": "adamw"}
    plan = derive_or_load_plan(target, recipe="macl_0.1", values=settings)
    file = plan_file(target)
    assert read_plan(file) == plan and (plan.recipe_name, plan.settings) == ("macl_0.1", settings)
    assert plan.recipe.items() >= settings.items()
    assert "-recipe macl_0.1 --set temperature=0.2 'scaling=[0.8, 1.2]' optimizer=adamw" in describe(plan)
    # The plan as the earlier version wrote it.
    content = json.loads(file.read_text())
    old = {key: value for key, value in content.items() if key not in ("recipe_name", "settings", "checksum")}
    # Version 0.1 named no method, and listed the keys of both methods.
    old["recipe"] = plan.recipe | {"weight_restoration": 0.0, "restoration_share": 0.6}
    del old["recipe"]["method"], old["recipe"]["downsample_first_stage"]
    old |= {"checksum": checksum(old)}
    file.write_text(json.dumps(old))
    assert not was_edited(file) and read_plan(file).as_json() == old
    assert read_plan(file).get_recipe() == plan.get_recipe() and describe(read_plan(file))
    # The recorded options do not describe an edited plan.
    file.write_text(json.dumps(content | {"threshold": 0.07}))
    assert read_plan(file).recipe_source is None


@pytest.mark.parametrize(
    "values", [{"decoder_stages": 0}, {"threshold": 0.3}, {"limit_positives": False}, {"auxiliary_stage": 3}]
)
def test_an_edited_plan_is_not_derived_again_for_a_setting(target, values):
    derive_or_load_plan(target, recipe="macl")
    file = plan_file(target)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"threshold": 0.07}))
    before = file.read_bytes()
    with pytest.raises(UserError, match=f"was edited.*{next(iter(values))}="):
        derive_or_load_plan(target, values=values)
    assert file.read_bytes() == before
    same = {key: derive_or_load_plan(target).recipe[key] for key in values}
    assert derive_or_load_plan(target, values=same | {"learning_rate": 0.5}).recipe["learning_rate"] == 0.5


def test_an_option_of_the_command_is_a_setting(target, monkeypatch):
    file = plan_file(target)

    def plan_of(*arguments):
        command = ["nnUNetv2_train_macl_pretrain", "901", "-c", "2d", "--plan_only", *arguments]
        monkeypatch.setattr("sys.argv", command)
        pretrain_entry()
        return json.loads(file.read_text())

    plan = plan_of("-num_epochs", "5", "-batch_size", "6")
    assert (
        plan
        == plan_of("--set", "num_epochs=5", "batch_size=6")
        == plan_of("-num_epochs", "5", "--set", "num_epochs=5", "--set", "batch_size=6")
    )
    assert (plan["recipe"]["num_epochs"], plan["batch_size"]) == (5, 6)
    with pytest.raises(SystemExit, match="'num_epochs' is set to 5 and to 3"):
        plan_of("-num_epochs", "3", "--set", "num_epochs=5")
    assert json.loads(file.read_text()) == plan


def test_options_replace_values_of_an_edited_plan(target):
    derive_or_load_plan(target, recipe="macl")
    file = plan_file(target)
    content = json.loads(file.read_text())
    content["threshold"] = 0.07
    content["recipe"]["temperature"] = 0.2
    file.write_text(json.dumps(content))
    for _ in range(2):  # The plan still counts as edited after the command line changed it.
        plan = derive_or_load_plan(target, values={"batch_size": 6})
        assert (plan.threshold, plan.recipe["temperature"], plan.batch_size) == (0.07, 0.2, 6)
        assert json.loads(file.read_text())["threshold"] == 0.07
    for size, at_once in ((2, 2), (20, 6)):
        plan = derive_or_load_plan(target, values={"patches_at_once": size})
        assert (plan.batch_size, plan.patches_at_once) == (6, at_once)
    with pytest.raises(UserError, match="was edited"):
        derive_or_load_plan(target, recipe="pcl")


def test_batches_in_3d_are_drawn_in_groups_if_the_method_compares_positions():
    groups = {
        name: plan_position_groups(3, 32, load_recipe(name, resource_folder("plans")))[0]
        for name in ("macl", "macl_0.1", "restore", "simclr")
    }
    assert groups == {"macl": 3, "macl_0.1": 3, "restore": 1, "simclr": 1}


@pytest.mark.parametrize(
    "key, value",
    [
        ("decoder_stages", 99),
        ("auxiliary_stage", "deep"),
        ("scale", [3, 3]),
        ("patch_size", [33, 40]),
        ("batch_size", 1),
        ("threshold", 2),
        ("unlabelled_datasets", "Dataset002_B"),
        ("format_version", 99),
    ],
)
def test_mistakes_in_an_edited_plan_are_named(target, key, value):
    derive_or_load_plan(target)
    file = plan_file(target)
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError) as error:
        derive_or_load_plan(target)
    assert key.replace("_", " ") in str(error.value).replace("_", " ") and str(file) in str(error.value)


def test_a_plan_derived_from_another_nnunet_plan_is_rejected(workspace, target):
    plan = derive_or_load_plan(target)
    file = plan_file(target)
    write_plan(plan, file)
    plans = workspace.preprocessed / target.dataset_name / "nnUNetPlans.json"
    content = json.loads(plans.read_text())
    content["configurations"]["2d"]["patch_size"] = [16, 16]
    plans.write_text(json.dumps(content))
    with pytest.raises(UserError, match=str(file)):
        check_plan(plan, DatasetConfiguration.load("901", "nnUNetPlans", "2d"), file)


def test_the_second_training_stage_of_macl_trains_the_decoder(target):
    with pytest.raises(UserError, match="decoder_stages is 0"):
        derive_plan(target, recipe_of(method="macl", training_stages=2, decoder_stages=0))
