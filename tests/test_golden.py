"""Five steps of pre-training give the losses and norms of weights in tests/data/golden.json."""

import json

import golden
import pytest

VALUES = json.loads(golden.COMMITTED.read_text())


@pytest.fixture(scope="module")
def prepared(planned, tmp_path_factory):
    """Return a workspace with the generated data set, plans of small networks and recipe files."""
    space = planned.copy(tmp_path_factory.mktemp("golden") / "nnunet")
    golden.add_plans(space.folder)
    return space


@pytest.mark.parametrize("case", golden.committed_cases(), ids=lambda case: case.name)
def test_training_gives_the_committed_values(case, prepared, monkeypatch):
    for name, value in prepared.environment.items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    result = golden.train_case(case, prepared.folder)
    expected = VALUES[case.name]
    assert result.losses == pytest.approx(expected["losses"], rel=golden.TOLERANCE)
    assert result.norms == pytest.approx(expected["norms"], rel=golden.TOLERANCE)
