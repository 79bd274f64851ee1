import re
import time

import pytest

from minimind.cli import console


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (True, "yes"),
        (26_878_464, "26,878,464"),
        (12345.6, "12,346"),
        (0.123456, "0.1235"),
        ("[b]cpu[/b]", "[b]cpu[/b]"),
    ],
)
def test_format_number(value: object, expected: str) -> None:
    assert console.format_number(value) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (None, "unknown"),
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (12_345, "12.3 kB"),
        (4_500_000, "4.5 MB"),
        (1_250_000_000, "1.25 GB"),
        (1_250_000_000_000, "1,250.00 GB"),
    ],
)
def test_format_size(num_bytes: int | None, expected: str) -> None:
    assert console.format_size(num_bytes) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(12 << 10, "12 KB"), (800 << 20, "800 MB"), (3 << 29, "1.50 GB")],
)
def test_format_memory(num_bytes: int, expected: str) -> None:
    assert console.format_memory(num_bytes) == expected


def test_markup_is_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("[bold]长江[/bold] :smile: [1, 2]")
    console.show(console.table("[t]", ["[c]", "n"], [["[/x]", 1234]], numbers=1))
    out = capsys.readouterr().out
    assert out.startswith("[bold]长江[/bold] :smile: [1, 2]\n")
    assert all(part in out for part in ("[t]", "[c]", "[/x]", "1,234"))


def test_show_metrics_omits_nested_values(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_metrics("run", {"bits_per_byte": 1.5, "device": "cpu", "nested": {"secret": 1}})
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "1.5" in out
    assert "secret" not in out


def test_show_metrics_formats_the_peak_memory(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_metrics("run", {"peak_memory_bytes": 800 << 20})
    out = capsys.readouterr().out
    assert "peak memory │ 800 MB" in out


def test_a_rate_that_is_not_measured_yet_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with console.make_progress("byte") as bar:
        bar.add_task("reading", total=2000, note="")
    assert "?" not in capsys.readouterr().out


@pytest.mark.parametrize("unit", ["step", "byte"])
def test_progress_shows_count_and_note(unit: str, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = console.RichReporter()
    reporter.start("[training]", 2000, done=500, unit=unit)
    reporter.progress(1500, 2000, "loss 2.5")
    reporter.say("a line between")
    reporter.stop()
    reporter.stop()
    out = capsys.readouterr().out
    assert "[training]" in out
    assert "a line between\n" in out
    assert "loss 2.5" in out
    assert ("1,500/2,000" if unit == "step" else "1.5/2.0 kB") in out


def test_a_rate_of_one_step_in_minutes_is_shown() -> None:
    bar, clock = console.make_progress("step"), [0.0]
    bar.get_time = lambda: clock[0]
    task = bar.add_task("training", total=100, note="")
    for done in (10, 20, 30):
        clock[0] += 300
        bar.update(task, completed=done)
    assert bar.tasks[0].speed == pytest.approx(10 / 300)
    assert bar.tasks[0].time_remaining == 2100


def test_final_rate_is_the_average(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = console.RichReporter()
    reporter.start("answering", 510, done=500, unit="question")
    time.sleep(0.2)
    for done in range(501, 511):  # in a burst
        reporter.progress(done, 510)
    reporter.stop()
    rate = re.search(r"([\d.,]+) questions/s", capsys.readouterr().out)
    assert rate and 0 < float(rate[1].replace(",", "")) <= 10 / 0.2


def test_progress_without_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    with console.make_progress("document") as bar:
        bar.update(bar.add_task("reading", total=None, note=""), completed=1234)
    assert "1,234" in capsys.readouterr().out
