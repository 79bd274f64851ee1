import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import models

from minimind.data import encode as encode_module
from minimind.data import read as read_module
from minimind.data import stamps
from minimind.data import store as store_module
from minimind.data.packing import IGNORED, ChatSequences
from minimind.data.schemas import convert
from minimind.data.store import Kind, Split, TokenStore, default_folder, open_store
from minimind.errors import DataError, ResourceError
from minimind.tokenizer import Tokenizer, encode_chat
from minimind.tokenizer.bpe import new_bpe
from minimind.tokenizer.format import SPECIAL_TOKENS

TEXTS = [f"第{n}段：长江流入东海。The river is {n} miles long." for n in range(1_500)]
CHATS = [[("早", "早上好")], [("你是谁？", "我是模型。"), ("你好吗？", "我很好，谢谢。")]] * 40


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    records: list[dict[str, object]] = [
        {"history": turns[:-1], "q": turns[-1][0], "a": turns[-1][1]} for turns in CHATS
    ]
    return write_lines(tmp_path / "chats.jsonl", records)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "stores"


def documents(store: TokenStore, split: Split = "train") -> list[list[int]]:
    """Token ids of each document."""
    found = []
    for shard in store.shards(split):
        assert len(shard.tokens) == (shard.ends[-1] if len(shard.ends) else 0)
        pieces = np.split(np.asarray(shard.tokens), shard.ends[:-1])
        found += [piece.tolist() for piece in pieces]
    return found


def names(home: Path) -> list[str]:
    """Endings of what lies in the folder of the stores."""
    return sorted(path.name.partition(".")[2].partition("-")[0] for path in home.iterdir())


# --- Preference pairs


def pair_records(count: int) -> list[dict[str, object]]:
    """Two pairs a prompt."""
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


def test_a_pair_is_two_documents_with_the_same_prompt_and_the_last_answers_masked(
    tmp_path: Path, home: Path, tokenizer: Tokenizer
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", pair_records(6))
    store = open_store(str(path), tokenizer, kind="pairs", folder=home)
    found = documents(store)
    assert len(found) == 12
    [shard] = store.shards("train")
    assert shard.mask is not None
    masks = np.split(np.asarray(shard.mask), shard.ends[:-1])
    for number, record in enumerate(map(convert, pair_records(6))):
        asked, _ = encode_chat(tokenizer, (record.chosen or [])[:3], add_generation_prompt=True)
        for place, side in enumerate((record.chosen, record.rejected)):
            ids, mask = encode_chat(tokenizer, side or [])
            here = found[2 * number + place]
            assert here == ids
            assert here[: len(asked)] == asked, "the same ids, whatever the answer"
            learned = masks[2 * number + place].tolist()
            assert learned == [0] * len(asked) + mask[len(asked) :], "not the earlier answer"
            assert sum(learned) > 1


def test_pairs_of_one_prompt_are_held_out_together(
    tmp_path: Path, home: Path, tokenizer: Tokenizer
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", pair_records(400))
    store = open_store(str(path), tokenizer, kind="pairs", folder=home, validation_fraction=0.3)
    sides: list[set[str]] = []
    for split in ("train", "validation"):
        texts = [tokenizer.decode(ids) for ids in documents(store, split)]
        assert len(texts) % 2 == 0
        sides.append({text.partition("？")[0] for text in texts})
    assert len(sides[0]) > 100 and len(sides[1]) > 30
    assert not sides[0] & sides[1]


def test_other_records_are_no_pairs_and_pairs_are_no_conversations(
    tmp_path: Path, chats: Path, home: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError) as caught:
        open_store(str(chats), tokenizer, kind="pairs", folder=home)
    assert str(caught.value).startswith(
        f"{chats}: no preference pairs found (records left out: 80 no preference pairs), each "
        "with chosen and rejected answers"
    )
    pairs = write_lines(tmp_path / "pairs.jsonl", pair_records(20))
    with pytest.raises(DataError, match="no conversations found"):
        open_store(str(pairs), tokenizer, kind="chat", folder=home)


# --- Made once, found again


def test_each_text_is_a_document_with_an_end(texts: Path, home: Path, tokenizer: Tokenizer) -> None:
    steps: list[tuple[int, int]] = []
    store = open_store(
        str(texts),
        tokenizer,
        kind="text",
        folder=home,
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
    assert names(home) == ["", "lock"]


def test_conversations_have_masks(chats: Path, home: Path, tokenizer: Tokenizer) -> None:
    store = open_store(str(chats), tokenizer, kind="chat", folder=home)
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
    tmp_path: Path, home: Path, tokenizer: Tokenizer
) -> None:
    talk = [
        {"role": "user", "content": "长江有多长？"},
        {"role": "assistant", "content": "不知道。", "weight": 0},
        {"role": "user", "content": "再想想。"},
        {"role": "assistant", "content": "约六千三百公里。", "weight": 1},
    ]
    path = write_lines(tmp_path / "talks.jsonl", [{"messages": talk}])
    store = open_store(str(path), tokenizer, kind="chat", folder=home)
    said = [{"role": str(m["role"]), "content": str(m["content"])} for m in talk]
    ids, mask = encode_chat(tokenizer, said)
    [shard] = store.shards("train")
    assert shard.tokens.tolist() == ids
    assert shard.mask is not None
    answer = tokenizer.encode("不知道。")
    start = next(i for i in range(len(ids)) if ids[i : i + len(answer)] == answer)
    assert mask[start : start + len(answer) + 1] == [1] * (len(answer) + 1)
    mask[start : start + len(answer) + 1] = [0] * (len(answer) + 1)
    assert shard.mask.tolist() == mask
    windows = ChatSequences([shard], len(ids) - 1, pad=tokenizer.end_of_text, seed=0)
    labels = windows.sequence(0)[1]
    learned = [*tokenizer.encode("约六千三百公里。"), tokenizer.im_end]
    assert labels[labels != IGNORED].tolist() == learned
    with pytest.raises(DataError, match="1 excludes an answer from the loss, which pretraining"):
        open_store(str(path), tokenizer, kind="text", folder=home)


def test_an_answer_marked_as_not_supervised_in_a_pair(
    tmp_path: Path, home: Path, tokenizer: Tokenizer
) -> None:
    begin = [{"role": "user", "content": "早"}]
    sides = {
        name: [
            *begin,
            {"role": "assistant", "content": f"{name}1", "train": False},
            {"role": "user", "content": "再说"},
            {"role": "assistant", "content": f"{name}2"},
        ]
        for name in ("chosen", "rejected")
    }
    path = write_lines(tmp_path / "pairs.jsonl", [dict(sides)])
    [shard] = open_store(str(path), tokenizer, kind="pairs", folder=home).shards("train")
    assert shard.mask is not None
    learned = shard.tokens[shard.mask == 1].tolist()
    expected = [[*tokenizer.encode(f"{name}2"), tokenizer.im_end] for name in sides]
    assert learned == [token for answer in expected for token in answer]


def test_keys_that_are_not_used_are_said_each_time(
    tmp_path: Path, home: Path, tokenizer: Tokenizer
) -> None:
    records: list[dict[str, object]] = [
        {"text": f"第{n}段", "id": n, "tags": ["a"], "note": None, "empty": ""} for n in range(9)
    ]
    path = write_lines(tmp_path / "texts.jsonl", [*records, {"text": "末段", "id": 9}])
    told: list[str] = []
    for _ in range(2):
        open_store(str(path), tokenizer, kind="text", folder=home, say=told.append)
    assert told == [f"{path}: keys of records that are not used: id (10), tags (9)"] * 2
    keys: dict[str, object] = {f"k{n}": n for n in range(150)}
    many = write_lines(tmp_path / "many.jsonl", [{"text": "x"} | keys])
    store = open_store(str(many), tokenizer, kind="text", folder=home, say=told.append)
    assert told[-1].endswith(" and 93 more, which `minimind data inspect` lists")
    assert store.manifest["unused_keys"]["other keys"] == 50
    assert len(store.manifest["unused_keys"]) == 101


def test_earlier_rejected_turns_are_filled_and_counted(
    tmp_path: Path, home: Path, tokenizer: Tokenizer
) -> None:
    chosen = [{"role": "user", "content": "早"}, {"role": "assistant", "content": "早上好"}]
    rejected = [
        chosen[0],
        {"role": "assistant", "content": "我是{{name}}"},
        {"role": "user", "content": "再说"},
        {"role": "assistant", "content": "不"},
    ]
    path = write_lines(tmp_path / "pairs.jsonl", [{"chosen": chosen, "rejected": rejected}])
    fill = {"name": "小明"}
    store = open_store(str(path), tokenizer, kind="pairs", fill=fill, folder=home)
    assert store.manifest["filled"] == ["name"]
    assert "我是小明" in tokenizer.decode(documents(store)[1])
    assert store.manifest["train"]["characters"] == len("早早上好我是小明再说不")
    with pytest.raises(DataError, match=r"nothing fills \{\{name\}\}, which is in 1 of 1 records"):
        open_store(str(path), tokenizer, kind="pairs", fill={"author": "李雷"}, folder=home)


def test_conversations_can_be_pretrained_on(chats: Path, home: Path, tokenizer: Tokenizer) -> None:
    store = open_store(str(chats), tokenizer, kind="text", folder=home)
    ids, _ = encode_chat(tokenizer, convert({"q": "早", "a": "早上好"}).messages or [])
    assert documents(store)[0] == [*ids, tokenizer.end_of_text]
    assert store.shards("train")[0].mask is None


def test_a_store_is_made_once_for_the_same_input(
    texts: Path, home: Path, tokenizer: Tokenizer
) -> None:
    def opened(kind: Kind = "text", **settings: float) -> tuple[Path, bool]:
        steps: list[int] = []
        store = open_store(
            str(texts),
            tokenizer,
            kind=kind,
            folder=home,
            progress=lambda done, total: steps.append(done),
            **settings,  # type: ignore[arg-type]
        )
        return store.folder, bool(steps)

    first, made = opened()
    assert made
    assert opened() == (first, False)
    second, made = opened(validation_fraction=0.1)
    assert made
    assert second != first
    os.utime(texts, ns=(1, 1))
    assert opened() == (first, False), "the same contents"
    third = first
    with texts.open("a", encoding="utf-8") as stream:
        stream.write('{"text": "one more"}\n')
    os.utime(texts, ns=(1, 1))
    fourth, made = opened()
    assert made
    assert len(documents(TokenStore(fourth))) == len(documents(TokenStore(third))) + 1


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_rewritten_with_the_same_size_and_time_is_tokenized_anew(
    texts: Path, home: Path, tokenizer: Tokenizer, in_place: bool
) -> None:
    before = texts.stat()
    first = documents(open_store(str(texts), tokenizer, kind="text", folder=home))
    changed = texts.read_bytes().replace("长江流入东海".encode(), "黄河流入渤海".encode())
    target = texts if in_place else texts.with_name("other.jsonl")
    target.write_bytes(changed)
    target.replace(texts)
    os.utime(texts, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (texts.stat().st_size, texts.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    told: list[str] = []
    store = open_store(str(texts), tokenizer, kind="text", folder=home, say=told.append)
    assert told == [f"{texts} has changed since it was tokenized; it is tokenized again"]
    assert documents(store) != first
    assert "黄河流入渤海" in tokenizer.decode(documents(store)[0])
    assert names(home) == ["", "lock"], "one store, not one of each version"


def test_an_old_file_is_hashed_once(
    texts: Path, home: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def sha256_of(file: Path) -> str:
        hashed.append(file)
        return stamps.sha256_of(file)

    monkeypatch.setattr(store_module, "sha256_of", sha256_of)
    monkeypatch.setattr(stamps, "_SETTLED_NS", -(1 << 62))  # each file counts as old
    for _ in range(3):
        open_store(str(texts), tokenizer, kind="text", folder=home)
    assert hashed == [texts]
    os.utime(texts)
    for _ in range(3):
        open_store(str(texts), tokenizer, kind="text", folder=home)
    assert hashed == [texts, texts], "times changed once, the contents did not"
    monkeypatch.setattr(stamps, "_SETTLED_NS", 1 << 62)  # each file counts as just written
    os.utime(texts)
    for _ in range(2):
        open_store(str(texts), tokenizer, kind="text", folder=home)
    assert len(hashed) == 4


def test_a_store_in_a_folder_of_others_is_used(
    texts: Path, home: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = open_store(str(texts), tokenizer, kind="text", folder=home)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (home / f"{made.folder.name}.lock").unlink(missing_ok=True)
    os.utime(texts)
    store = open_store(str(texts), tokenizer, kind="text", folder=home)
    assert store.folder == made.folder
    assert names(home) == [""], "without a lock"


def test_another_tokenizer_makes_another_store(
    texts: Path, home: Path, tokenizer: Tokenizer
) -> None:
    words = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    alphabet = sorted(set(tokenizer._bpe.get_vocab()) - set(words))
    letters = [name for name in alphabet if len(name) == 1]
    for name in letters + [a + b + c for a in letters for b in letters[:16] for c in letters[:16]]:
        words[name] = len(words)
    bpe = new_bpe()
    bpe.model = models.BPE(words, [])
    bpe.add_special_tokens(SPECIAL_TOKENS)
    wide = Tokenizer(bpe)
    assert wide.vocab_size > 1 << 16
    narrow_store = open_store(str(texts), tokenizer, kind="text", folder=home)
    wide_store = open_store(str(texts), wide, kind="text", folder=home)
    assert narrow_store.shards("train")[0].tokens.dtype == np.uint16
    assert wide_store.shards("train")[0].tokens.dtype == np.uint32
    assert wide.decode(documents(wide_store)[7][:-1]) == TEXTS[7]


def test_long_input_is_cut_into_shards(
    texts: Path, home: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_SHARD_TOKENS", 5_000)
    store = open_store(str(texts), tokenizer, kind="text", folder=home)
    assert len(store.shards("train")) > 2
    assert documents(store) == [[*tokenizer.encode(text), tokenizer.end_of_text] for text in TEXTS]


def test_a_book_on_one_line(
    home: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    monkeypatch.setattr(encode_module, "_PIECE", 1_000)
    monkeypatch.setattr(encode_module, "_AT_ONCE", 3_000)
    with_lines = "".join("春夏秋冬" * rng.randrange(1, 90) + "\n天" for _ in range(200))
    books = ["始", with_lines, "山" * 12_345, "终"]
    path = write_lines(tmp_path / "books.jsonl", [{"text": book} for book in books])
    made = documents(open_store(str(path), tokenizer, kind="text", folder=home))
    assert [ids[-1] for ids in made] == [tokenizer.end_of_text] * len(books)
    assert [tokenizer.decode(ids[:-1]) for ids in made] == books
    assert made[1][:-1] == tokenizer.encode(with_lines)  # as if nothing had been cut


def test_token_counts(texts: Path, home: Path, tokenizer: Tokenizer) -> None:
    store = open_store(str(texts), tokenizer, kind="text", folder=home)
    counts = store.unigram_counts(tokenizer.vocab_size)
    whole = np.concatenate([np.array(ids) for ids in documents(store)])
    assert counts.tolist() == np.bincount(whole, minlength=tokenizer.vocab_size).tolist()
    first = store.unigram_counts(tokenizer.vocab_size, most=100)
    assert first.tolist() == np.bincount(whole[:100], minlength=tokenizer.vocab_size).tolist()


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "stores"
    monkeypatch.delenv("MINIMIND_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "minimind" / "stores"


# --- Held out


def test_what_is_held_out_depends_on_the_text_alone(
    tmp_path: Path, home: Path, tokenizer: Tokenizer
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
            str(folder), tokenizer, kind="text", validation_fraction=0.1, folder=home
        )
        sides = [documents(store, split) for split in ("train", "validation")]
        assert sum(map(len, sides)) == len(order)
        assert not {tuple(ids) for ids in sides[0]} & {tuple(ids) for ids in sides[1]}
        held_out.append({tuple(ids) for ids in sides[1]})
    assert held_out[0] == held_out[1] == held_out[2]
    assert 100 < len(held_out[0]) < 200


# --- Bad input


def test_bad_lines_are_put_aside_and_told(texts: Path, home: Path, tokenizer: Tokenizer) -> None:
    with texts.open("a", encoding="utf-8") as stream:
        stream.write('{broken\n{"q": "问", "a": ""}\n')
    told: list[str] = []
    store = open_store(str(texts), tokenizer, kind="text", folder=home, say=told.append)
    aside = Path(store.manifest["bad_lines_file"])
    assert aside.parent == home
    assert store.manifest["bad_lines"] == 2
    lines = [json.loads(line)["line"] for line in aside.read_text("utf-8").splitlines()]
    assert lines == [1_501, 1_502]
    assert told == [f"{texts}: invalid lines: 2, see {aside}"]
    shutil.rmtree(store.folder)
    open_store(str(texts), tokenizer, kind="text", folder=home)
    assert len(aside.read_text("utf-8").splitlines()) == 2


def test_too_many_bad_lines(texts: Path, home: Path, tokenizer: Tokenizer) -> None:
    with texts.open("a", encoding="utf-8") as stream:
        stream.write("{broken\n" * 100)
    with pytest.raises(DataError, match=r"79 of 1,579 lines are bad.*They are in (.*)\. Fix") as e:
        open_store(str(texts), tokenizer, kind="text", folder=home)
    [aside] = home.glob("*.bad-lines.jsonl")
    assert str(aside) in str(e.value)
    assert names(home) == ["bad", "lock"]
    store = open_store(str(texts), tokenizer, kind="text", folder=home, max_bad_fraction=0.1)
    assert store.manifest["bad_lines"] == 100


def test_records_of_another_kind(
    texts: Path, chats: Path, home: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"no conversations found \(records left out: 1,500 no conversations\)"
    ):
        open_store(str(texts), tokenizer, kind="chat", folder=home)
    told: list[str] = []
    both = f"{tmp_path}/*.jsonl"
    store = open_store(both, tokenizer, kind="chat", folder=home, say=told.append)
    assert store.manifest["train"]["documents"] == len(CHATS)
    assert store.manifest["skipped"] == {"no conversations": len(TEXTS)}
    assert told == [f"{both}: left out 1,500 of 1,580 records: no conversations"]
    with pytest.raises(DataError, match="no field text; its fields are: history, q, a"):
        open_store(str(chats), tokenizer, kind="text", schema="text", folder=home)


def test_a_source_that_changes_meanwhile(texts: Path, home: Path, tokenizer: Tokenizer) -> None:
    def append(done: int, total: int) -> None:
        if done == 0:
            return
        with texts.open("a", encoding="utf-8") as stream:
            stream.write('{"text": "late"}\n')

    with pytest.raises(DataError, match="it has changed while it was read"):
        open_store(str(texts), tokenizer, kind="text", folder=home, progress=append)
    assert names(home) == ["lock"]


def test_an_end_of_whoever_watches_is_no_full_disk(
    texts: Path, home: Path, tokenizer: Tokenizer
) -> None:
    def progress(done: int, total: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        open_store(str(texts), tokenizer, kind="text", folder=home, progress=progress)
    assert names(home) == ["lock"]


# --- Damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda store: os.truncate(store / "train-00000.tokens", 100),
        lambda store: (store / "train-00000.ends").write_bytes(b"x" * 9),
        lambda store: (store / "train-00000.mask").unlink(),
        lambda store: (store / "manifest.json").unlink(),
        lambda store: (store / "manifest.json").write_text(""),
        lambda store: (store / "manifest.json").write_text("[]"),
        lambda store: (store / "manifest.json").write_text('{"dtype": "uint16"}'),
    ],
)
def test_a_damaged_store_is_noticed_and_made_again(
    damage: object, chats: Path, home: Path, tokenizer: Tokenizer
) -> None:
    store = open_store(str(chats), tokenizer, kind="chat", folder=home)
    before = documents(store)
    assert callable(damage)
    damage(store.folder)
    told: list[str] = []
    again = open_store(str(chats), tokenizer, kind="chat", folder=home, say=told.append)
    assert told == [f"the token store {store.folder} is damaged; it is made again"]
    assert documents(again) == before
    told.clear()
    open_store(str(chats), tokenizer, kind="chat", folder=home, say=told.append)
    assert told == []


# --- Several processes

CHILD = """
    import os, signal, sys, time
    from pathlib import Path
    from minimind.data.store import open_store
    from minimind.tokenizer import Tokenizer

    data, words, home = sys.argv[1:4]

    def progress(done, total):
        {during}

    def say(text):
        print(text, flush=True)

    store = open_store(
        data,
        Tokenizer.load(Path(words)),
        kind="text",
        folder=Path(home),
        progress=progress,
        say=say,
    )
    print(store.folder, flush=True)
"""


def child(during: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that makes a store; it does `during` whenever some of it is written."""
    code = textwrap.dedent(CHILD).format(during=during)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


WAIT_FOR_A_LINE = "done and (print('in the middle', flush=True) or sys.stdin.readline())"


@pytest.fixture
def paused(texts: Path, home: Path, tokenizer_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of making the store of `texts`; any input lets it go on."""
    code = textwrap.dedent(CHILD).format(during=WAIT_FOR_A_LINE)
    command = [sys.executable, "-c", code, str(texts), str(tokenizer_dir), str(home)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "in the middle\n"
        yield process
        process.kill()


def test_what_a_killed_process_leaves_is_removed(
    texts: Path, home: Path, tokenizer: Tokenizer, paused: subprocess.Popen[str]
) -> None:
    other = write_lines(texts.with_name("other.jsonl"), [{"text": "别的"}])
    open_store(str(other), tokenizer, kind="text", folder=home)
    assert len(list(home.glob("*.making-*"))) == 1  # still at work
    paused.send_signal(signal.SIGKILL)
    paused.wait()
    other.write_text('{"text": "又是别的"}', encoding="utf-8")
    open_store(str(other), tokenizer, kind="text", folder=home)
    assert list(home.glob("*.making-*")) == []
    store = open_store(str(texts), tokenizer, kind="text", folder=home)
    assert len(documents(store)) == len(TEXTS)


def test_two_processes_that_make_the_same_store(
    texts: Path, home: Path, tokenizer_dir: Path, paused: subprocess.Popen[str]
) -> None:
    with child("print('makes it too', flush=True)", texts, tokenizer_dir, home) as second:
        assert second.stdout
        assert second.stdout.readline() == f"waiting for another process that tokenizes {texts}\n"
        said, _ = paused.communicate("go on\n" * 100)
        rest = second.stdout.read()
    assert (paused.returncode, second.returncode) == (0, 0)
    folder = said.splitlines()[-1]
    assert rest == f"{folder}\n"
    assert len(documents(TokenStore(Path(folder)))) == len(TEXTS)
    assert names(home) == ["", "lock"]


def test_a_process_that_waits_takes_over_from_one_that_dies(
    texts: Path, home: Path, tokenizer_dir: Path, paused: subprocess.Popen[str]
) -> None:
    with child("print('makes it', flush=True)", texts, tokenizer_dir, home) as second:
        assert second.stdout
        assert "waiting" in second.stdout.readline()
        paused.kill()
        said = second.stdout.read().splitlines()
    assert second.returncode == 0
    assert "makes it" in said
    assert len(documents(TokenStore(Path(said[-1])))) == len(TEXTS)


# --- A full disk


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


def test_a_full_disk(
    texts: Path, small_disk: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_module, "READ_AHEAD", 1 << 10)
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


def test_a_limit_on_the_size_of_files(texts: Path, home: Path, tokenizer: Tokenizer) -> None:
    """What a full disk does, on machines where no small one can be mounted."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (1, 1_000, 10_000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(
                ResourceError, match=r"File too large.*It takes about .*data\.store="
            ):
                open_store(str(texts), tokenizer, kind="text", folder=home)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(home) == ["lock"]
    signal.signal(signal.SIGXFSZ, handler)
    assert len(documents(open_store(str(texts), tokenizer, kind="text", folder=home))) == len(TEXTS)


def test_a_folder_that_cannot_be_made(texts: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ResourceError, match=r"cannot make the token store here.*data\.store=DIR"):
        open_store(str(texts), tokenizer, kind="text", folder=texts / "stores")


def test_placeholders_are_filled_and_what_fills_them_is_part_of_the_key(
    tmp_path: Path, home: Path, tokenizer: Tokenizer
) -> None:
    records: list[dict[str, object]] = [{"text": f"{n}：我是{{{{name}}}}。"} for n in range(20)]
    records += [{"text": "作者是{{author}}，{{author}}。"}, {"text": "{{other}}"}]
    path = str(write_lines(tmp_path / "who.jsonl", records))
    said: list[str] = []
    folders = set()
    for fill in ({"name": "小明"}, {"name": "小红"}, {"name": "小明", "author": "李雷"}, None):
        store = open_store(path, tokenizer, kind="text", fill=fill, folder=home, say=said.append)
        folders.add(store.folder)
        text = tokenizer.decode([token for ids in documents(store) for token in ids])
        assert text.count("{{name}}") == (0 if fill else 20)
        assert "{{other}}" in text
        if fill:
            assert text.count(fill["name"]) == 20
    assert len(folders) == 4
    assert [line.split(": ", 1)[1] for line in said] == [
        "nothing fills {{author}}, which is in 1 of 22 records; give data.variables.author=…",
        "nothing fills {{author}}, which is in 1 of 22 records; give data.variables.author=…",
        "nothing fills {{name}}, which is in 20 of 22 records; give data.variables.name=…",
        "nothing fills {{author}}, which is in 1 of 22 records; give data.variables.author=…",
    ]
