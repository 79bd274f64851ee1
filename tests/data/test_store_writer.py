import json
import os
import random
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from minimind.data import compression, formats, store_writer
from minimind.data import encode as encode_module
from minimind.data import read as read_module
from minimind.data.packing import IGNORED, ChatSequences
from minimind.data.schemas import convert
from minimind.data.store import open_store
from minimind.errors import DataError, ResourceError
from minimind.tokenizer import Tokenizer, encode_chat
from tests.support.token_stores import CHATS, TEXTS, documents, names, write_lines


def pair_records(count: int) -> list[dict[str, object]]:
    """Return preference pairs, two per prompt."""
    return [
        {
            "conversations": [
                {"role": "user", "content": f"第{number // 2}段在哪里？"},
                {"role": "assistant", "content": "在西边。"},
                {"role": "user", "content": "多长？"},
            ],
            "chosen": {"role": "assistant", "content": f"{number}公里。\n\n很长。"},
            "rejected": {"role": "assistant", "content": f"我不知道{number % 3}。"},
        }
        for number in range(count)
    ]


def test_a_pair_is_two_documents_with_one_prompt_and_only_last_answers_supervised(
    tmp_path: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", pair_records(6))
    store = open_store(str(path), tokenizer, kind="pairs", folder=store_folder)
    encoded = documents(store)
    assert len(encoded) == 12
    [shard] = store.shards("train")
    assert shard.mask is not None
    masks = np.split(np.asarray(shard.mask), shard.ends[:-1])
    for number, record in enumerate(map(convert, pair_records(6))):
        prompt, _ = encode_chat(tokenizer, (record.chosen or [])[:3], add_generation_prompt=True)
        for index, side in enumerate((record.chosen, record.rejected)):
            ids, mask = encode_chat(tokenizer, side or [])
            document = encoded[2 * number + index]
            assert document == ids
            assert document[: len(prompt)] == prompt, "the prompt has the same ids with any answer"
            supervised = masks[2 * number + index].tolist()
            assert supervised == [0] * len(prompt) + mask[len(prompt) :], "not the earlier answer"
            assert sum(supervised) > 1


def test_all_pairs_of_a_prompt_are_in_one_split(
    tmp_path: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", pair_records(400))
    store = open_store(
        str(path), tokenizer, kind="pairs", folder=store_folder, validation_fraction=0.3
    )
    sides: list[set[str]] = []
    for split in ("train", "validation"):
        texts = [tokenizer.decode(ids) for ids in documents(store, split)]
        assert len(texts) % 2 == 0
        sides.append({text.partition("？")[0] for text in texts})
    assert len(sides[0]) > 100 and len(sides[1]) > 30
    assert not sides[0] & sides[1]


def test_pairs_and_conversations_are_not_interchangeable(
    tmp_path: Path, chats: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError) as caught:
        open_store(str(chats), tokenizer, kind="pairs", folder=store_folder)
    assert str(caught.value).startswith(
        f"{chats}: no preference pairs found (skipped records: 80 no preference pairs), each "
        "with chosen and rejected answers"
    )
    pairs = write_lines(tmp_path / "pairs.jsonl", pair_records(20))
    with pytest.raises(DataError, match="no conversations found"):
        open_store(str(pairs), tokenizer, kind="chat", folder=store_folder)


def test_each_text_is_a_document_that_ends_with_end_of_text(
    texts: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    steps: list[tuple[int, int]] = []
    store = open_store(
        str(texts),
        tokenizer,
        kind="text",
        folder=store_folder,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert documents(store) == [[*tokenizer.encode(text), tokenizer.end_of_text] for text in TEXTS]
    assert documents(store, "validation") == []
    assert all(shard.mask is None for shard in store.shards("train"))
    size = texts.stat().st_size
    assert steps == sorted(steps)
    assert steps[-1] == (size, size)
    train = store.manifest["train"]
    assert train["documents"] == len(TEXTS)
    assert train["tokens"] == sum(map(len, documents(store)))
    assert train["characters"] == sum(map(len, TEXTS))
    assert train["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert names(store_folder) == ["", "lock"]


@pytest.mark.skipif(os.name == "nt", reason="it has no POSIX permissions")
@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_the_umask_decides_who_may_read_a_store(
    texts: Path, store_folder: Path, tokenizer: Tokenizer, umask: int
) -> None:
    before = os.umask(umask)
    try:
        store = open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o777 & ~umask
    files = {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()}
    assert files == {0o666 & ~umask}


def test_conversations_have_loss_masks(
    chats: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    store = open_store(str(chats), tokenizer, kind="chat", folder=store_folder)
    [shard] = store.shards("train")
    assert shard.mask is not None
    expected = [
        encode_chat(tokenizer, convert(json.loads(line)).messages or [])
        for line in chats.read_text("utf-8").splitlines()
    ]
    assert documents(store) == [ids for ids, _ in expected]
    assert shard.mask.tolist() == [mark for _, mask in expected for mark in mask]
    spoken = "".join(text for turns in CHATS for turn in turns for text in turn)
    assert store.manifest["train"]["characters"] == len(spoken)


def test_answers_marked_as_not_supervised_are_encoded_but_masked(
    tmp_path: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    chat = [
        {"role": "user", "content": "长江有多长？"},
        {"role": "assistant", "content": "不知道。", "weight": 0},
        {"role": "user", "content": "再想想。"},
        {"role": "assistant", "content": "约六千三百公里。", "weight": 1},
    ]
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": chat}])
    store = open_store(str(path), tokenizer, kind="chat", folder=store_folder)
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in chat]
    ids, mask = encode_chat(tokenizer, messages)
    [shard] = store.shards("train")
    assert shard.tokens.tolist() == ids
    assert shard.mask is not None
    answer = tokenizer.encode("不知道。")
    start = next(i for i in range(len(ids)) if ids[i : i + len(answer)] == answer)
    assert mask[start : start + len(answer) + 1] == [1] * (len(answer) + 1)
    mask[start : start + len(answer) + 1] = [0] * (len(answer) + 1)
    assert shard.mask.tolist() == mask
    sequences = ChatSequences([shard], len(ids) - 1, pad_id=tokenizer.end_of_text, seed=0)
    labels = sequences.sequence(0)[1]
    supervised = [*tokenizer.encode("约六千三百公里。"), tokenizer.im_end]
    assert labels[labels != IGNORED].tolist() == supervised
    with pytest.raises(DataError, match="1 excludes an answer from the loss, which pretraining"):
        open_store(str(path), tokenizer, kind="text", folder=store_folder)


def test_an_answer_of_a_pair_marked_as_not_supervised_is_masked(
    tmp_path: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    prompt = [{"role": "user", "content": "早"}]
    sides = {
        name: [
            *prompt,
            {"role": "assistant", "content": f"{name}1", "train": False},
            {"role": "user", "content": "再说"},
            {"role": "assistant", "content": f"{name}2"},
        ]
        for name in ("chosen", "rejected")
    }
    path = write_lines(tmp_path / "pairs.jsonl", [dict(sides)])
    [shard] = open_store(str(path), tokenizer, kind="pairs", folder=store_folder).shards("train")
    assert shard.mask is not None
    supervised = shard.tokens[shard.mask == 1].tolist()
    expected = [[*tokenizer.encode(f"{name}2"), tokenizer.im_end] for name in sides]
    assert supervised == [token for answer in expected for token in answer]


def test_earlier_rejected_turns_are_substituted_and_counted(
    tmp_path: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    chosen = [{"role": "user", "content": "早"}, {"role": "assistant", "content": "早上好"}]
    rejected = [
        chosen[0],
        {"role": "assistant", "content": "我是{{name}}"},
        {"role": "user", "content": "再说"},
        {"role": "assistant", "content": "不"},
    ]
    path = write_lines(tmp_path / "pairs.jsonl", [{"chosen": chosen, "rejected": rejected}])
    variables = {"name": "小明"}
    store = open_store(str(path), tokenizer, kind="pairs", variables=variables, folder=store_folder)
    assert store.manifest["substituted"] == ["name"]
    assert "我是小明" in tokenizer.decode(documents(store)[1])
    assert store.manifest["train"]["characters"] == len("早早上好我是小明再说不")
    with pytest.raises(DataError, match=r"1 of 1 records contain \{\{name\}\}, which has no value"):
        open_store(
            str(path), tokenizer, kind="pairs", variables={"author": "李雷"}, folder=store_folder
        )


def test_pretraining_accepts_conversations(
    chats: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    store = open_store(str(chats), tokenizer, kind="text", folder=store_folder)
    ids, _ = encode_chat(tokenizer, convert({"q": "早", "a": "早上好"}).messages or [])
    assert documents(store)[0] == [*ids, tokenizer.end_of_text]
    assert store.shards("train")[0].mask is None


def test_long_input_is_split_into_shards(
    texts: Path, store_folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "_SHARD_TOKENS", 5_000)
    store = open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    assert len(store.shards("train")) > 2
    assert documents(store) == [[*tokenizer.encode(text), tokenizer.end_of_text] for text in TEXTS]


def test_a_book_in_one_record_is_encoded_piecewise(
    store_folder: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    monkeypatch.setattr(encode_module, "_PIECE_CHARACTERS", 1_000)
    monkeypatch.setattr(encode_module, "_BATCH_CHARACTERS", 3_000)
    with_lines = "".join("春夏秋冬" * rng.randrange(1, 90) + "\n天" for _ in range(200))
    books = ["始", with_lines, "山" * 12_345, "终"]
    path = write_lines(tmp_path / "books.jsonl", [{"text": book} for book in books])
    encoded = documents(open_store(str(path), tokenizer, kind="text", folder=store_folder))
    assert [ids[-1] for ids in encoded] == [tokenizer.end_of_text] * len(books)
    assert [tokenizer.decode(ids[:-1]) for ids in encoded] == books
    assert encoded[1][:-1] == tokenizer.encode(with_lines)  # the same as without a split


def test_the_split_depends_only_on_the_text(
    tmp_path: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    rng = random.Random(3)
    held_out = []
    for name, order in [("a", TEXTS), ("b", rng.sample(TEXTS, len(TEXTS))), ("c", TEXTS + TEXTS)]:
        folder = tmp_path / name
        folder.mkdir()
        cut = rng.randrange(len(order))
        write_lines(folder / "1.jsonl", [{"text": text} for text in order[:cut]])
        write_lines(folder / "2.jsonl", [{"text": text} for text in order[cut:]])
        store = open_store(
            str(folder), tokenizer, kind="text", validation_fraction=0.1, folder=store_folder
        )
        splits = [documents(store, split) for split in ("train", "validation")]
        assert sum(map(len, splits)) == len(order)
        assert not {tuple(ids) for ids in splits[0]} & {tuple(ids) for ids in splits[1]}
        held_out.append({tuple(ids) for ids in splits[1]})
    assert held_out[0] == held_out[1] == held_out[2]
    assert 100 < len(held_out[0]) < 200


def test_invalid_records_are_quarantined_and_reported(
    texts: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    with texts.open("a", encoding="utf-8") as stream:
        stream.write('{broken\n{"q": "问", "a": ""}\n')
    notices: list[str] = []
    store = open_store(str(texts), tokenizer, kind="text", folder=store_folder, say=notices.append)
    quarantine = Path(store.manifest["invalid_records_file"])
    assert quarantine.parent == store_folder
    assert store.manifest["invalid_records"] == 2
    lines = [json.loads(line)["line"] for line in quarantine.read_text("utf-8").splitlines()]
    assert lines == [1_501, 1_502]
    reasons = [json.loads(line)["reason"] for line in quarantine.read_text("utf-8").splitlines()]
    assert notices == [
        f"{texts}:1501: {reasons[0]}. 2 of 1,502 records are invalid: "
        f"1 × {reasons[0]}, 1 × {reasons[1]}. They are left out; see {quarantine}"
    ]
    shutil.rmtree(store.folder)
    open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    assert len(quarantine.read_text("utf-8").splitlines()) == 2


def test_too_many_invalid_records_are_an_error(
    texts: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    with texts.open("a", encoding="utf-8") as stream:
        stream.write("{broken\n" * 100)
    with pytest.raises(
        DataError, match=r":1501: not JSON.* 79 of 1,579 records are invalid: 79 × .*They are in "
    ) as e:
        open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    [quarantine] = store_folder.glob("*.invalid.jsonl")
    assert str(quarantine) in str(e.value)
    assert names(store_folder) == ["invalid.jsonl", "lock"]
    store = open_store(
        str(texts), tokenizer, kind="text", folder=store_folder, max_invalid_fraction=0.1
    )
    assert store.manifest["invalid_records"] == 100


def test_records_of_another_kind_are_skipped(
    texts: Path, chats: Path, store_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"no conversations found \(skipped records: 1,500 no conversations\)"
    ):
        open_store(str(texts), tokenizer, kind="chat", folder=store_folder)
    notices: list[str] = []
    both = f"{tmp_path}/*.jsonl"
    store = open_store(both, tokenizer, kind="chat", folder=store_folder, say=notices.append)
    assert store.manifest["train"]["documents"] == len(CHATS)
    assert store.manifest["skipped"] == {"no conversations": len(TEXTS)}
    assert notices == [f"{both}: skipped 1,500 of 1,580 records: no conversations"]
    with pytest.raises(DataError, match="no field text or content; its fields are: history, q, a"):
        open_store(str(chats), tokenizer, kind="text", schema="text", folder=store_folder)


def test_a_file_that_changes_while_it_is_read_is_an_error(
    texts: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    def append(done: int, total: int) -> None:
        if done == 0:
            return
        with texts.open("a", encoding="utf-8") as stream:
            stream.write('{"text": "late"}\n')

    with pytest.raises(DataError, match="the file changed while it was read"):
        open_store(str(texts), tokenizer, kind="text", folder=store_folder, progress=append)
    assert names(store_folder) == ["lock"]


def test_a_broken_pipe_in_progress_is_not_a_full_disk(
    texts: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    def progress(done: int, total: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        open_store(str(texts), tokenizer, kind="text", folder=store_folder, progress=progress)
    assert names(store_folder) == ["lock"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_reports_the_bytes_needed(
    texts: Path, small_disk: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "_BUFFER_BYTES", 1 << 10)
    monkeypatch.setattr(formats, "_CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(read_module, "_BATCH_RECORDS", 100)
    with pytest.raises(ResourceError) as caught:
        open_store(str(texts), tokenizer, kind="text", folder=small_disk)
    message = str(caught.value)
    assert str(small_disk) in message
    assert "No space left on device" in message
    assert "data.store=DIR" in message
    needed = int(message.split("It takes about ")[1].split()[0].replace(",", ""))
    elsewhere = open_store(str(texts), tokenizer, kind="text", folder=texts.parent / "stores")
    sizes = [path.stat().st_size for path in elsewhere.folder.glob("train-*")]
    assert needed == pytest.approx(sum(sizes), rel=0.2)
    assert names(small_disk) == ["lock"]


def test_a_file_size_limit_is_reported_like_a_full_disk(
    texts: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    """A substitute for a full disk where a small disk cannot be mounted."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (1, 1_000, 10_000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(
                ResourceError, match=r"File too large.*It takes about .*data\.store="
            ):
                open_store(str(texts), tokenizer, kind="text", folder=store_folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(store_folder) == ["lock"]
    signal.signal(signal.SIGXFSZ, handler)
    assert len(
        documents(open_store(str(texts), tokenizer, kind="text", folder=store_folder))
    ) == len(TEXTS)
