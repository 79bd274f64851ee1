import io

from rich.console import Console

from minimind.config import explain, load_recipe
from minimind.config.load import setting_names


def test_explain_shows_every_setting_and_its_origin() -> None:
    resolved = load_recipe("sft-base", overrides=["seed=7"], flags={"out": "[red]run"})
    console = Console(file=io.StringIO(), width=160)
    console.print(explain(resolved))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert list(rows)[1:] == setting_names()
    assert rows["seed"] == ["7", "command", "line"]
    assert rows["out"] == ['"[red]run"', "flag"]
    assert rows["device"] == ['"auto"', "default"]
    assert rows["optim.lr"][0] == "0.0001"
    assert rows["optim.lr"][1].startswith("sft-base.toml:")
    assert rows["schedule.name"][1].startswith("sft-small.toml:")


def test_explain_shows_entries_of_tables_and_unset_tables() -> None:
    resolved = load_recipe("sft-base", overrides=["data.variables.name=小明"])
    console = Console(file=io.StringIO(), width=160)
    console.print(explain(resolved))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["data.variables"] == ["{name", "=", '"小明"}', "command", "line"]
    assert rows["lora.rank"] == ["default"]
