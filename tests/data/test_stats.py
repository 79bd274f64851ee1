import json
import random
from pathlib import Path
from statistics import median

import pytest

from minimind.data import stats as stats_module
from minimind.data.stats import DatasetStats, Duplicates, LengthHistogram, inspect_data
from minimind.errors import DataError
from minimind.tokenizer import Tokenizer, encode_chat

ONE_TURN = {"q": "长江有多长？", "a": "约六千三百公里。"}
MORE_TURNS = {"q": "它流入哪里？", "a": "东海。", "history": [["长江有多长？", "约六千三百公里。"]]}
PAIR = {"prompt": "1+1=?", "chosen": "2", "rejected": "我不知道"}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.jsonl"
    records = [{"text": "江河"}, {"text": "The river"}, ONE_TURN, MORE_TURNS, ONE_TURN, PAIR]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join([*lines, "{broken", '{"id": 3}', "{broken"]), encoding="utf-8")
    return path


def test_counts_lengths_and_invalid_records(mixed: Path, tokenizer: Tokenizer) -> None:
    steps: list[int] = []
    report = inspect_data(str(mixed), tokenizer=tokenizer, progress=steps.append).metrics()
    size = mixed.stat().st_size
    assert sum(steps) == size
    assert (report["files"], report["bytes"]) == (1, size)
    assert report["schemas"] == {"qa": 3, "text": 2, "pairs": 1}
    assert report["records"] == 6
    assert (report["single_turn"], report["multi_turn"]) == (3, 1)
    assert (report["duplicates"], report["duplicates_are_exact"]) == (1, True)
    assert report["invalid_records"] == 3
    [first, second] = report["invalid_reasons"].items()
    assert first[0].startswith("not JSON")
    assert first[1] == {"records": 2, "first": [f"{mixed}:7", f"{mixed}:9"]}
    assert second == (
        "unknown schema; its fields are: id",
        {"records": 1, "first": [f"{mixed}:8"]},
    )
    lengths = [2, 9, 14, 14, 23, 10]
    assert report["characters"] == {
        "median": 10,
        "p90": 23,
        "p99": 23,
        "max": 23,
        "total": sum(lengths),
    }
    assert report["chinese_share"] == pytest.approx((2 + 12 + 12 + 19 + 4) / sum(lengths))


def test_tokens_are_counted_as_in_training(mixed: Path, tokenizer: Tokenizer) -> None:
    def chat(*turns: str) -> int:
        roles = ["user", "assistant"] * 3
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
        return len(encode_chat(tokenizer, messages)[0])

    question, answer = ONE_TURN["q"], ONE_TURN["a"]
    expected = [
        len(tokenizer.encode("江河")) + 1,
        len(tokenizer.encode("The river")) + 1,
        chat(question, answer),
        chat(question, answer, "它流入哪里？", "东海。"),
        chat(question, answer),
        chat("1+1=?", "2") + chat("1+1=?", "我不知道"),
    ]
    tokens = inspect_data(str(mixed), tokenizer=tokenizer).metrics()["tokens"]
    assert tokens["total"] == sum(expected)
    assert tokens["max"] == max(expected)
    assert tokens["median"] == sorted(expected)[2]
    assert inspect_data(str(mixed)).metrics()["tokens"] is None


def test_samples_are_distinct_short_and_printable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["一\x1b[31m红\n\n  二\r\n", "长" * 10_000, *(["同"] * 50)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    samples = inspect_data(str(path), num_samples=5).samples
    assert sorted(samples) == ["一\ufffd[31m红 ⏎ 二", "同", "长" * 160 + "…"]
    assert inspect_data(str(path), num_samples=2).samples == samples[:2]
    assert inspect_data(str(path), num_samples=0).samples == []


def test_samples_are_spread_over_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"第{n}条"}) for n in range(5_000)))
    positions = [int(s[1:-1]) for s in inspect_data(str(path), num_samples=40).samples]
    assert len(positions) == 40
    assert min(positions) < 1_000 < 4_000 < max(positions)
    assert 1_500 < median(positions) < 3_500


def test_percentiles_match_the_sorted_lengths() -> None:
    rng = random.Random(5)
    for count in (1, 2, 10, 1_000):
        values = [int(rng.expovariate(1 / 3_000)) for _ in range(count)]
        lengths = LengthHistogram()
        for value in values:
            lengths.add(value)
        values.sort()
        report = lengths.metrics()
        for name, share in [("median", 0.5), ("p90", 0.9), ("p99", 0.99)]:
            exact = values[-(-round(share * count * 100) // 100) - 1]
            assert exact * (1 - 1 / 2_048) <= report[name] <= exact
        assert (report["max"], report["total"]) == (values[-1], sum(values))
    assert set(LengthHistogram().metrics().values()) == {0}


def test_the_histogram_is_bounded() -> None:
    lengths = LengthHistogram()
    for length in range(0, 16 << 20, 37):
        lengths.add(length)
    assert len(lengths.counts) < 35_000


def test_duplicates_are_exact_and_beyond_the_limit_an_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stats_module, "_MAX_HASHES", 4_096)
    rng = random.Random(6)
    hashes = [rng.getrandbits(64) for _ in range(100_000)]
    duplicates = Duplicates()
    for fingerprint in hashes[:4_000]:
        duplicates.add(fingerprint)
    for fingerprint in hashes[:300]:
        duplicates.add(fingerprint, times=2)
    assert (duplicates.total, duplicates.is_exact) == (600, True)
    for fingerprint in hashes[4_000:]:
        duplicates.add(fingerprint)
    for fingerprint in hashes[50_000:]:
        duplicates.add(fingerprint)
    assert not duplicates.is_exact
    assert len(duplicates.counts) <= 4_096
    assert duplicates.total == pytest.approx(50_600, rel=0.1)


def test_merge_adds_the_statistics(mixed: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = tmp_path / "other.csv"
    other.write_text("q,a\n长江有多长？,约六千三百公里。\n早,早上好\nx\n", encoding="utf-8")
    merged = DatasetStats()
    for path in (mixed, other):
        merged.merge(inspect_data(str(path), tokenizer=tokenizer))
    together = inspect_data(str(tmp_path), tokenizer=tokenizer, num_samples=0)
    metrics = merged.metrics()
    assert metrics == together.metrics()
    assert metrics["duplicates"] == 2  # one of them in the other file
    assert metrics["invalid_records"] == 4


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        inspect_data(str(tmp_path / "nowhere.jsonl"))


def test_data_without_a_valid_record_has_statistics(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n" * 2_000)
    report = inspect_data(str(path)).metrics()
    assert (report["records"], report["invalid_records"], report["chinese_share"]) == (0, 2_000, 0)
