"""Estimates compared with exact counts, over formats, record lengths and languages."""

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from minimind.data import compression, formats
from minimind.data import estimate as estimate_module
from minimind.data.encode import Kind
from minimind.data.estimate import estimate_tokens
from minimind.data.packing import ChatSequences, PairSequences
from minimind.data.stats import inspect_data
from minimind.data.store import open_store
from minimind.tokenizer import Tokenizer

CHINESE = "长江是中国最长的河流。大熊猫生活在山里，主要的食物是竹子。一年有四个季节，春天花开。"
ENGLISH = (
    "The river begins on the plateau in the west. A giant panda eats bamboo all day long, and "
)
Write = Callable[[list[str]], bytes]


def _lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()


def _parquet(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), stream)
    return stream.getvalue()


FORMATS: dict[str, Write] = {
    "jsonl": _lines,
    "jsonl.gz": lambda texts: gzip.compress(_lines(texts), 1),
    "jsonl.zst": lambda texts: zstandard.compress(_lines(texts)),
    "json": lambda texts: json.dumps([{"text": t} for t in texts], ensure_ascii=False).encode(),
    "parquet": _parquet,
    "txt": lambda texts: "\n\n".join(texts).encode(),
    "csv": lambda texts: ("text\n" + "".join(f'"{t}"\n' for t in texts)).encode(),
}


def _texts(letters: str, length: int, size: int, seed: int = 0) -> list[str]:
    """Return records of about `length` characters of shuffled text, `size` characters in total."""
    rng = random.Random(seed)
    pool = [rng.sample(letters, len(letters)) for _ in range(50)]
    texts = []
    while size > 0:
        count = max(1, round(length * rng.uniform(0.5, 1.5) / len(letters)))
        texts.append("".join("".join(rng.choice(pool)) for _ in range(count)))
        size -= len(texts[-1])
    return texts


def _exact(path: Path, tokenizer: Tokenizer) -> int:
    tokens = inspect_data(str(path), tokenizer=tokenizer, num_samples=0).tokens
    assert tokens is not None
    return tokens.total


@pytest.fixture
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide all sizes by 256, so that files of a quarter megabyte are sampled like large ones."""
    monkeypatch.setattr(estimate_module, "_MAX_BYTES", 1 << 17)
    monkeypatch.setattr(estimate_module, "_SAMPLE_CHARACTERS", 30_000)
    monkeypatch.setattr(compression, "_BUFFER_BYTES", 1 << 12)
    monkeypatch.setattr(compression, "_COMPRESSED_BUFFER_BYTES", 1 << 10)
    monkeypatch.setattr(formats, "_CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(formats, "_MAX_DOCUMENT", 1 << 11)


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("letters", [CHINESE, ENGLISH], ids=["zh", "en"])
@pytest.mark.parametrize("length", [100, 1_000, 2_200, 10_000])
def test_estimates_are_within_ten_percent_in_each_format(
    letters: str, length: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = _texts(letters, length, 400_000)
    (tmp_path / "exact.jsonl").write_bytes(_lines(texts))
    exact = _exact(tmp_path / "exact.jsonl", tokenizer)
    for name, write in FORMATS.items():
        path = tmp_path / f"texts.{name}"
        path.write_bytes(write(texts))
        assert estimate_tokens(str(path), tokenizer) == pytest.approx(exact, rel=0.1), name


def test_files_of_megabytes_with_the_default_sizes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = _texts(CHINESE, 1_500, 1_000_000) + _texts(ENGLISH, 1_500, 500_000)
    exact = sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))
    monkeypatch.setattr(estimate_module, "_SAMPLE_CHARACTERS", 100_000)  # to save time
    for name in ("jsonl", "jsonl.gz", "parquet"):
        path = tmp_path / f"texts.{name}"
        path.write_bytes(FORMATS[name](texts))
        estimate = estimate_tokens(str(path), tokenizer, kind="text")
        assert estimate == pytest.approx(exact, rel=0.05), name


@pytest.mark.usefixtures("small_samples")
def test_heterogeneous_text_within_and_across_files(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "_MAX_BYTES", 1 << 19)  # the complete file is read
    path = tmp_path / "sorted.jsonl"
    path.write_bytes(_lines(_texts(ENGLISH, 300, 150_000) + _texts(CHINESE, 300, 80_000)))
    assert estimate_tokens(str(path), tokenizer) == pytest.approx(_exact(path, tokenizer), rel=0.1)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(40):
        letters, size = (ENGLISH, 8_000) if number < 30 else (CHINESE, 25_000)
        texts = _texts(letters, 300, size, seed=number)
        (folder / f"{number:02}.jsonl.gz").write_bytes(gzip.compress(_lines(texts), 1))
    assert estimate_tokens(str(folder), tokenizer) == pytest.approx(
        _exact(folder, tokenizer), rel=0.1
    )


@pytest.mark.parametrize("shape", [None, "llama2", "llama3"])
def test_plan_inspect_and_training_count_the_same_tokens(
    shape: str | None,
    tmp_path: Path,
    tokenizer: Tokenizer,
    foreign_dir: Callable[[str], Path],
) -> None:
    tokenizer_ = Tokenizer.load(foreign_dir(shape)) if shape else tokenizer
    turns = [{"role": "user", "content": "问{{name}}"}, {"role": "assistant", "content": "答"}]
    system = {"role": "system", "content": "你是助手"}
    chats = [{"messages": turns}] * 50 + [{"messages": [system, *turns]}]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, [*chats, {"text": "长江"}])), encoding="utf-8")
    variables = {"name": "小明"}
    store = open_store(
        str(path), tokenizer_, kind="chat", variables=variables, folder=tmp_path / "stores"
    )
    tokens = store.manifest["train"]["tokens"]
    assert estimate_tokens(str(path), tokenizer_, kind="chat", variables=variables) == tokens
    text = open_store(str(path), tokenizer_, kind="text", folder=tmp_path / "stores")
    assert estimate_tokens(str(path), tokenizer_, kind="text") == text.manifest["train"]["tokens"]
    unsubstituted = open_store(str(path), tokenizer_, kind="chat", folder=tmp_path / "stores")
    report = inspect_data(str(path), tokenizer=tokenizer_)
    assert report.tokens is not None
    text_tokens = len(tokenizer_.text_start) + len(tokenizer_.encode("长江")) + 1
    assert report.tokens.total == unsubstituted.manifest["train"]["tokens"] + text_tokens
    skipped = {"does not fit the model's own chat template": 1} if shape == "llama2" else {}
    assert report.metrics()["skipped"] == skipped
    assert estimate_tokens(str(path), tokenizer_) == report.tokens.total


def test_data_without_records_of_the_kind_has_no_tokens(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "长江"}\n{broken\n', encoding="utf-8")
    assert estimate_tokens(str(path), tokenizer, kind="chat") == 0
    assert estimate_tokens(str(path), tokenizer, kind="text") > 0


@pytest.mark.parametrize("kind", ["chat", "pairs"])
def test_tokens_that_sequences_have_no_room_for_are_not_counted(
    kind: Kind, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    def messages(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "问"}, {"role": "assistant", "content": answer}]

    records: list[dict[str, object]] = [
        {"chosen": messages("好" * 3), "rejected": messages("坏" * length)}
        if kind == "pairs"
        else {"messages": messages("好" * length)}
        for length in (5, 90, 5000)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    store = open_store(str(path), tokenizer, kind=kind, folder=tmp_path / "stores")
    make = ChatSequences if kind == "chat" else PairSequences
    sequences = make(store.shards("train"), 64, pad_id=0, seed=0)
    positions = round(sequences.report.packing_efficiency * len(sequences) * 64)
    num_documents = 3 if kind == "chat" else 6  # the last token of each is only a label
    used = estimate_tokens(str(path), tokenizer, kind=kind, seq_len=64)
    assert used == positions + num_documents < 1000 < estimate_tokens(str(path), tokenizer)


def test_empty_files_have_no_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number in range(17):
        (tmp_path / f"{number}.jsonl").touch()
    assert estimate_tokens(str(tmp_path), tokenizer) == 0
