"""Recipes and MACL plans with random content are valid or raise a UserError."""

import json
from copy import deepcopy

import pytest
from conftest import set_folders
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import plan as make_plan
from steps import recipe_of

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.plan import MACLPlan, check_plan, describe, read_plan, was_edited
from nnunetv2_macl.recipe import Recipe, load_recipe

SETTINGS = settings(
    max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
KEYS = [*recipe_of().as_dict(), "inherits_from", "unknown"]
NUMBERS = st.integers(-(10**30), 10**30) | st.floats() | st.sampled_from([0, 1, -1, 0.5, 1e308, 2**63])
TEXTS = st.text(max_size=8) | st.sampled_from(["auto", "macl", "bottleneck", "ema", "sgd", "../x", "\0", "a" * 5000])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@SETTINGS
@given(content=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5) | VALUES | st.binary(max_size=60))
def test_random_recipes_are_valid_or_refused(folder, content):
    file = folder / "recipe.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(file, resource_folder("plans"))
    except UserError as error:
        assert len(str(error)) > 20
        return
    assert isinstance(recipe, Recipe) and sum(recipe.losses.values()) > 0


@pytest.fixture(scope="module")
def configuration(planned):
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch, planned.folder)
        yield DatasetConfiguration.load("901", "nnUNetPlans", "2d")


@pytest.fixture(scope="module")
def good(configuration):
    from nnunetv2_macl.planning.derive import derive_plan

    return derive_plan(configuration, recipe_of()).as_json()


PLAN_KEYS = st.sampled_from([*make_plan(4, 4, recipe_of()).as_json(), "unknown"])


@SETTINGS
@given(
    changes=st.dictionaries(PLAN_KEYS, VALUES, max_size=3),
    recipe=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
    missing=st.sets(PLAN_KEYS, max_size=1),
)
def test_random_plans_are_valid_or_refused(folder, configuration, good, changes, recipe, missing):
    content = deepcopy(good)
    content["recipe"] |= recipe
    content = {key: value for key, value in (content | changes).items() if key not in missing}
    file = folder / "plan.json"
    file.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    try:
        was_edited(file)
        plan = read_plan(file)
        check_plan(plan, configuration, file)
    except UserError as error:
        assert len(str(error)) > 20
        return
    assert isinstance(plan, MACLPlan) and plan.sampling.batch_size >= 2
    assert plan.get_recipe() and describe(plan) and plan.as_json()
