"""Recipes of the package, inheritance, settings, and messages about mistakes."""

import json

import pytest

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.recipe import load_recipe, parse_settings, settings_as_text

FOLDER = resource_folder("plans")


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.json")))
def test_every_recipe_of_the_package_is_valid(name):
    recipe = load_recipe(name, FOLDER)
    assert recipe.description


def test_recipes_have_the_settings_of_their_methods():
    pcl, simclr = load_recipe("pcl", FOLDER), load_recipe("simclr", FOLDER)
    assert (pcl.method, simclr.method, pcl.threshold, pcl.limit_positives) == ("pcl", "simclr", 0.1, False)
    assert simclr.intensity == 1 and pcl.intensity == 0
    paper = load_recipe("paper", FOLDER)
    assert (paper.decoder_stages, paper.scale, paper.temperature, paper.threshold) == (2, 4, 0.1, 0.1)
    assert (paper.weight_global, paper.weight_dense, paper.weight_equivariance) == (1.0, 0.5, 1.0)
    assert (paper.optimizer, paper.momentum, paper.weight_decay, paper.schedule) == ("sgd", 0.9, 1e-5, "cosine")
    assert paper.own_view_weight == 0 and not paper.limit_positives and paper.batch_size == 16
    epochs = {name: load_recipe(name, FOLDER).num_epochs for name in ("macl", "restore", "simclr", "macl_0.1", "paper")}
    assert epochs == {"macl": 16, "restore": 16, "simclr": 16, "macl_0.1": 250, "paper": 100}


def test_recipes_of_version_0_1_keep_their_number_of_epochs(tmp_path):
    old = {"weight_global": 0.0, "weight_dense": 0.0, "weight_equivariance": 0.0, "weight_restoration": 1.0}
    recipe = load_recipe(write(tmp_path, old), FOLDER)
    assert (recipe.method, recipe.num_epochs) == ("restoration", 250)
    assert load_recipe(write(tmp_path, old | {"num_epochs": 7}), FOLDER).num_epochs == 7
    assert load_recipe(write(tmp_path, {"method": "restoration"}), FOLDER).num_epochs == 16
    assert load_recipe("macl", FOLDER, {"weight_restoration": 0}).num_epochs == 16


def write(folder, content):
    file = folder / "mine.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.mark.parametrize(
    "of_the_recipe, new, losses",
    [
        ({"method": "macl+restoration"}, {"weight_dense": 0.05}, ["global", "dense", "equivariance", "restoration"]),
        ({"method": "restoration"}, {"weight_global": 0.1}, ["global", "restoration"]),
        ({"inherits_from": "restore", "weight_global": 0.02}, {}, ["global", "restoration"]),
        ({"inherits_from": "restore", "weight_global": 0.02}, {"weight_restoration": 0}, ["global"]),
        ({"method": "macl"}, {"weight_restoration": 1}, ["global", "dense", "equivariance", "restoration"]),
    ],
)
def test_a_new_weight_does_not_switch_a_named_method_off(tmp_path, of_the_recipe, new, losses):
    recipe = load_recipe(write(tmp_path, of_the_recipe), FOLDER, new)
    assert sorted(loss for loss, weight in recipe.losses.items() if weight) == sorted(losses)
    if "restoration" in losses:
        assert recipe.weight_restoration == 1


def test_a_recipe_of_the_users_own_inherits(tmp_path):
    recipe = load_recipe(write(tmp_path, {"inherits_from": "pcl", "temperature": 0.2}), FOLDER)
    assert (recipe.temperature, recipe.method) == (0.2, "pcl")
    file = write(tmp_path, {"inherits_from": "pcl"})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # the mark that Windows' Notepad writes
    assert load_recipe(file, FOLDER).method == "pcl"


@pytest.mark.parametrize(
    "content, words",
    [
        ({"temprature": 0.1}, ["temprature", "'temperature'"]),
        ({"qqq": 1}, ["qqq", "weight_global"]),
        ({"temperature": "hot"}, ["'temperature'", "number", "'hot'"]),
        ({"temperature": 0}, ["temperature", "greater than 0", "got 0"]),
        ({"temperature": True}, ["temperature", "True"]),
        ('{"temperature": NaN}', ["temperature", "nan"]),
        ({"num_epochs": 0}, ["num_epochs", "greater than or equal to 1", "got 0"]),
        ({"num_epochs": 2.5}, ["num_epochs", "integer", "2.5"]),
        ({"num_epochs": 10**19}, ["num_epochs", "1000000"]),
        ({"batch_size": 10**7}, ["batch_size", "65536"]),
        ({"optimizer": "lion"}, ["optimizer", "'sgd', 'adam' or 'adamw'", "'lion'"]),
        ({"decoder_stages": "two"}, ["decoder_stages", "'auto'", "'two'"]),
        ({"scaling": [1.3, 0.7]}, ["scaling", "[1.3, 0.7]"]),
        ({"weight_global": 0, "weight_dense": 0}, ["weight_global", "weight_dense"]),
        ([1], ["JSON object", "list"]),
        ("{", ["JSON"]),
        ({"method": "macl+voxel"}, ["macl and voxel", "macl+restoration"]),
        ({"method": "simclr+pcl"}, ["simclr and pcl"]),
        ({"method": "restoration+restoration"}, ["restoration", "twice"]),
        ({"method": "dira+restoration"}, ["dira and restoration", "weight_restoration"]),
        ({"method": "restoration+dira"}, ["restoration and dira", "weight_restoration"]),
        ({"inherits_from": "nothing"}, ["'nothing'", "macl"]),
        ({"inherits_from": 3}, ["inherits_from", "3"]),
        ({"inherits_from": "mine.json"}, ["inherits"]),
    ],
)
def test_mistakes_are_named(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, content), FOLDER)
    for word in [*words, *([] if "nothing" in words[0] else ["mine"])]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "text, value",
    [
        ("temperature=0.2", 0.2),
        ("num_epochs=5", 5),
        ("mirroring=false", False),
        ("base_temperature=null", None),
        ("optimizer=adamw", "adamw"),
        ('optimizer="adamw"', "adamw"),
        ("scale=auto", "auto"),
        ("scaling=[0.8, 1.2]", [0.8, 1.2]),
        ("description=a = b", "a = b"),
        ("description=", ""),
    ],
)
def test_a_setting_gives_the_value_of_a_recipe_file(text, value):
    key = text.partition("=")[0]
    assert parse_settings([text], "here") == {key: value}
    assert load_recipe("macl", FOLDER, parse_settings([text], "here")) == load_recipe("macl", FOLDER, {key: value})


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.json")))
def test_settings_as_text_can_be_parsed_again(name):
    values = load_recipe(name, FOLDER).as_dict() | {"description": "2024", "base_temperature": None}
    assert parse_settings(settings_as_text(values), "here") == values


@pytest.mark.parametrize(
    "key, value", [("temprature", 0.1), ("inherits", "macl"), ("rotation", 270), ("scaling", [1.3, 0.7])]
)
def test_a_wrong_setting_has_the_message_of_a_recipe_file(tmp_path, key, value):
    file = write(tmp_path, {key: value})
    with pytest.raises(UserError) as in_the_file:
        load_recipe(file, FOLDER)
    with pytest.raises(UserError) as on_the_command_line:
        parse_settings([f"{key}={value if isinstance(value, str) else json.dumps(value)}"], "Command line")
    assert str(on_the_command_line.value) == str(in_the_file.value).replace(f"Recipe {file}", "Command line")


def test_contradicting_settings_are_rejected():
    assert parse_settings(["seed=5", "seed=5"], "here") == {"seed": 5}
    with pytest.raises(UserError, match=r"'seed' .*5.*6"):
        parse_settings(["seed=5", "temperature=0.2", "seed=6"], "here")
    for text in ("temperature", "=0.2", ""):
        with pytest.raises(UserError, match=f"KEY=VALUE, got '{text}'"):
            parse_settings([text], "here")
    with pytest.raises(UserError, match=r"restore\.json .*weight_restoration=0"):
        load_recipe("restore", FOLDER, {"weight_restoration": 0})
