"""The harness of the benchmark scripts, and a rehearsal of the GPU report."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import decoding, pretraining
from benchmarks.gpu.context import Context
from benchmarks.gpu.markdown import failures, render
from benchmarks.gpu_report import PARTS, pretraining_seconds
from benchmarks.rounds import Contender, comparison, measure_in_turns, over_rounds, ratios, spread
from benchmarks.tokenizer_compression import ours
from minimind.tokenizer import train_tokenizer
from tests.conftest import TEXTS


def test_statistics_over_rounds() -> None:
    rounds = {
        "ours": [{"rate": 2700.0}, {"rate": 2835.0}, {"rate": 2710.0}],
        "theirs": [{"rate": 1500.0}, {"rate": 1600.0}],
    }
    metrics = over_rounds(rounds)
    assert metrics == {
        "ours": {"rate": {"median": 2710.0, "min": 2700.0, "max": 2835.0}},
        "theirs": {"rate": {"median": 1550.0, "min": 1500.0, "max": 1600.0}},
    }
    assert spread(metrics["ours"]["rate"]) == "2,700-2,835"


def test_ratios_are_taken_within_each_round() -> None:
    """The machine is half as fast in the second round, and the ratio stays 2."""
    rounds = {
        "ours": [{"rate": 2000.0}, {"rate": 1000.0}],
        "theirs": [{"rate": 1000.0}, {"rate": 500.0}],
    }
    assert ratios(rounds, "rate", "ours")["theirs"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert comparison(rounds, {"rate": ("tokens/s", 0)}, metric="rate", reference="ours")[2:] == [
        "| ours | 1,500 (1,000-2,000) | 1.00 (1.00-1.00) |",
        "| theirs | 750 (500-1,000) | 2.00 (2.00-2.00) |",
    ]


_CONTENDER = """
import argparse
import time
from pathlib import Path

from benchmarks.rounds import add_options, answer_requests, use_checkout

parser = argparse.ArgumentParser()
add_options(parser)
parser.add_argument("--checkout", type=Path)
args = parser.parse_args()
use_checkout(args.checkout)
log = Path(args.work) / "order"
count = 0
if args.contender == "b":
    time.sleep(0.5)  # a slow start, during which nobody may measure
    log.write_text("b is ready\\n")


def measure():
    global count
    import minimind

    print("noise of the measured code")
    count += 1
    if args.contender == "broken":
        raise ValueError("no such model")
    with log.open("a") as stream:
        stream.write(f"{args.contender} {count} {getattr(minimind, 'name', 'this one')}\\n")
    return {"count": count}


answer_requests(measure)
"""


def test_contenders_measure_in_turns_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keeps its process over the rounds, the order alternates, a checkout has its own code."""
    (tmp_path / "a_contender.py").write_text(_CONTENDER)
    other = tmp_path / "checkout" / "minimind"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("name = 'the checkout'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["--work", str(tmp_path)]
    contenders = [
        Contender("a", "a_contender", arguments),
        Contender("b", "a_contender", [*arguments, "--checkout", str(other.parent)]),
    ]
    measured = measure_in_turns(contenders, rounds=2, threads=1, work=tmp_path)
    assert [[metrics["count"] for metrics in measured[name]] for name in "ab"] == [[1, 2], [1, 2]]
    assert measured["a"][0]["peak_mb"] > 5
    assert (tmp_path / "order").read_text().splitlines() == [
        "b is ready", "a 1 this one", "b 1 the checkout", "b 2 the checkout", "a 2 this one"
    ]  # fmt: skip
    broken = Contender("broken", "a_contender", arguments)
    measured = measure_in_turns([broken, contenders[0]], rounds=1, threads=1, work=tmp_path)
    assert list(measured) == ["a"]
    with pytest.raises(SystemExit, match=r"(?s)broken failed with status 1:.*no such model"):
        measure_in_turns([broken], rounds=1, threads=1, work=tmp_path)


def test_a_cut_vocabulary_is_the_one_that_training_gives(tokenizer_dir: Path) -> None:
    size, count = ours(tokenizer_dir, 400)
    small = train_tokenizer(TEXTS, vocab_size=400)
    assert size == small.vocab_size == 400
    assert [count(text) for text in TEXTS] == [len(small.encode(text)) for text in TEXTS]


def gpu_context(folder: Path) -> Context:
    return Context("a-part", folder, "cpu", True, [], [], 1.0)


def test_the_prefix_cache_cannot_serve_the_prompts_of_decoding_speed(tmp_path: Path) -> None:
    context, seen = gpu_context(tmp_path), []

    def generate(prompts: list[list[int]], tokens: int = decoding.sizes(context)[1]) -> int:
        seen.extend(map(tuple, prompts))
        return len(prompts) * tokens

    decoding.timed_rounds(context, generate, 1)
    decoding.first_token_ms(context, generate)
    decoding.timed_rounds(context, generate, 3)
    assert len(set(seen)) == len(seen) == 4 + 9 + 12


def test_the_output_of_a_part_is_saved_as_it_comes(tmp_path: Path) -> None:
    """The command reads the record, and waits for a line that has not ended."""
    context = gpu_context(tmp_path)
    program = f"""
import pathlib, sys, time
print("x" * 30_000 + "first", end="", flush=True)
record = pathlib.Path({str(context.record_file)!r})
while not record.exists() or "first" not in record.read_text():
    time.sleep(0.01)
print(" second")
sys.exit(3)
"""
    context.run_command([sys.executable, "-c", program])
    record = json.loads(context.record_file.read_text())
    assert record["exit_status"] == 3
    assert record["output"].endswith("xfirst second\n")
    assert len(record["output"]) == 12_000


def test_pretraining_that_is_killed_leaves_its_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, record = tmp_path / "run", {"date": "", "command": "", "machine": {}}

    def killed(*arguments: str, meanwhile: Callable[[], None]) -> None:
        meanwhile()
        run.mkdir()
        lines = '{"kind": "train", "step": 1, "loss": 2.5}\n{"kind": "train", "st'
        (run / "metrics.jsonl").write_text(lines)
        meanwhile()
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "_minimind", killed)
    context = gpu_context(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretraining._train(context, "pretrain", [], run, 40)
    part: dict[str, Any] = json.loads(context.record_file.read_text())
    assert [(x["step"], x["loss"]) for x in part["pretrain"]["curve"]] == [(1, 2.5)]
    report = render(record | {"parts": {"pretraining": part | {"status": "stopped"}}})
    assert "pretrain: 40 steps, stopped before the last" in report and "| 1 | 2.5 |" in report


def test_pretraining_leaves_time_for_the_stages_after_it() -> None:
    assert pretraining_seconds(100.0, 500.0) == 100.0
    assert pretraining_seconds(100.0, 140.0) == 50.0
    assert pretraining_seconds(100.0, 15.0) == 20.0
    assert pretraining_seconds(5.0, 15.0) == 5.0
    *others, last = PARTS
    assert last == "pretraining" and sum(PARTS[x].limit_s for x in others) <= 570 - 60


@pytest.mark.slow
def test_gpu_report_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    """All parts at tiny sizes: files for the user, and no part or measurement that failed."""
    texts, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    texts.write_text(
        "".join(f'{{"text": "第{n}条：长江是中国最长的河流。"}}\n' for n in range(400))
    )
    turn = '{"conversations": [{"role": "user", "content": "你好%d"}, {"role": "assistant", '
    turn += '"content": "你好！"}]}\n'
    chats.write_text("".join(turn % n for n in range(400)))
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--tiny", "--device", "cpu"]
    command += ["--seconds", "5", "--limit", "1800", "--out", str(tmp_path / "out")]
    command += ["--texts", str(texts), "--chats", str(chats)]
    subprocess.run(command, check=True, timeout=1900)
    record = json.loads((tmp_path / "out" / "gpu-report.json").read_text("utf-8"))
    statuses = {name: part["status"] for name, part in record["parts"].items()}
    assert statuses == dict.fromkeys(["prepare", *PARTS], "done"), statuses
    errors = {name: failures(part) for name, part in record["parts"].items()}
    assert not any(errors.values()), errors
    assert [record["parts"][name]["exit_status"] for name in ("doctor", "tests")] == [0, 0]
    report = (tmp_path / "out" / "gpu-report.md").read_text("utf-8")
    assert "# GPU report" in report and "## Failures" not in report
