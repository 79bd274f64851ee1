import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.planning import selftest as module
from minimind.planning.selftest import Check


def test_doctor_describes_the_machine_and_runs_the_self_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def selftest(device: str) -> list[Check]:
        devices.append(device)
        return [Check(name, True, 0.1, "equal") for name in ("train", "stop", "resume")]

    monkeypatch.setattr(module, "selftest", selftest)  # tests/planning/test_selftest.py
    json_file = tmp_path / "doctor.json"
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json", str(json_file)])
    assert result.exit_code == 0, result.output
    assert devices == ["cpu"]
    assert "Everything works" in result.output
    found = json.loads(json_file.read_text())
    assert found["machine"]["device"] == "cpu"
    promise = "an answer does not depend on other requests, to the bit"
    assert found["machine"]["batch invariance"] == promise
    for purpose in ("training", "decoding"):
        assert found["machine"][f"{purpose} on a CPU"] == "torch, slower: MINIMIND_NATIVE=0"
    assert [check["passed"] for check in found["checks"]] == [True, True, True]
    assert all(e["install"].startswith("pip install") for e in found["missing"])


def test_a_missing_device_is_an_error() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cuda:99"])
    assert result.exit_code == 1
    assert "is not available" in result.output
