import json
from pathlib import Path

from typer.testing import CliRunner

from minimind.cli.main import app


def test_it_tells_what_there_is_and_tries_it(tmp_path: Path) -> None:
    findings = tmp_path / "doctor.json"
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json", str(findings)])
    assert result.exit_code == 0, result.output
    assert "All is well" in result.output
    found = json.loads(findings.read_text())
    assert found["machine"]["device"] == "cpu"
    promise = "an answer does not depend on other requests, to the bit"
    assert found["machine"]["batch invariance"] == promise
    assert [check["passed"] for check in found["checks"]] == [True, True, True]
    assert all(e["install"].startswith("pip install") for e in found["missing"])


def test_a_device_that_is_not_there_is_said_in_a_line() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cuda:99"])
    assert result.exit_code == 1
    assert "is not there" in result.output
