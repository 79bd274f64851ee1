from pathlib import Path

import pytest

from minimind.errors import ResourceError
from minimind.planning import selftest as module
from minimind.planning.selftest import selftest


@pytest.mark.numeric
def test_a_working_machine_passes() -> None:
    checks = selftest("cpu")
    assert [check.passed for check in checks] == [True, True, True]
    assert checks[-1].note == "equal"


@pytest.mark.numeric
def test_the_first_failure_is_reported_and_ends_the_self_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(run: Path, *rest: object, **settings: object) -> None:
        raise ResourceError("the disk is full")

    monkeypatch.setattr(module, "run_stage", full)
    checks = selftest("cpu")
    assert [(check.passed, check.note) for check in checks[1:]] == [(False, "the disk is full")]


@pytest.mark.numeric
def test_a_missing_device_is_an_error() -> None:
    with pytest.raises(ResourceError, match="cuda:99 is not available"):
        selftest("cuda:99")
