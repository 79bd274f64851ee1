"""Statistics of the benchmark scripts, and a rehearsal of the GPU report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_report import PARTS
from benchmarks.rounds import over_rounds, spread
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


def test_a_cut_vocabulary_is_the_one_that_training_gives(tokenizer_dir: Path) -> None:
    size, count = ours(tokenizer_dir, 400)
    small = train_tokenizer(TEXTS, vocab_size=400)
    assert size == small.vocab_size == 400
    assert [count(text) for text in TEXTS] == [len(small.encode(text)) for text in TEXTS]


@pytest.mark.slow
def test_gpu_report_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    """All parts at tiny sizes: files for the user, and no part that failed."""
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
    assert "# " in (tmp_path / "out" / "gpu-report.md").read_text("utf-8")
