import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import models

from minimind.data import stamps, store_writer
from minimind.data import store as store_module
from minimind.data.store import Kind, TokenStore, default_folder, open_store
from minimind.errors import DataError, ResourceError
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.bpe import new_bpe
from minimind.tokenizer.format import SPECIAL_TOKENS
from tests.support.token_stores import TEXTS, documents, names, write_lines


def test_unused_keys_are_reported_each_time(
    tmp_path: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    records: list[dict[str, object]] = [
        {"text": f"第{n}段", "id": n, "tags": ["a"], "note": None, "empty": ""} for n in range(9)
    ]
    path = write_lines(tmp_path / "texts.jsonl", [*records, {"text": "末段", "id": 9}])
    notices: list[str] = []
    for _ in range(2):
        open_store(str(path), tokenizer, kind="text", folder=store_folder, say=notices.append)
    assert notices == [f"{path}: unused keys of records: id (10), tags (9)"] * 2
    keys: dict[str, object] = {f"k{n}": n for n in range(150)}
    many = write_lines(tmp_path / "many.jsonl", [{"text": "x"} | keys])
    store = open_store(str(many), tokenizer, kind="text", folder=store_folder, say=notices.append)
    assert notices[-1].endswith(" and 93 more, listed by `minimind data inspect`")
    assert store.manifest["unused_keys"]["other keys"] == 50
    assert len(store.manifest["unused_keys"]) == 101


def test_a_store_is_built_once_for_the_same_input(
    texts: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    def opened(kind: Kind = "text", **settings: float) -> tuple[Path, bool]:
        steps: list[int] = []
        store = open_store(
            str(texts),
            tokenizer,
            kind=kind,
            folder=store_folder,
            progress=lambda done, total: steps.append(done),
            **settings,  # type: ignore[arg-type]
        )
        return store.folder, bool(steps)

    first, built = opened()
    assert built
    assert opened() == (first, False)
    second, built = opened(validation_fraction=0.1)
    assert built
    assert second != first
    os.utime(texts, ns=(1, 1))
    assert opened() == (first, False), "the same contents"
    third = first
    with texts.open("a", encoding="utf-8") as stream:
        stream.write('{"text": "one more"}\n')
    os.utime(texts, ns=(1, 1))
    fourth, built = opened()
    assert built
    assert len(documents(TokenStore(fourth))) == len(documents(TokenStore(third))) + 1


def test_the_fraction_of_invalid_records_holds_for_an_existing_store(
    tmp_path: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    packed = {"text": "<s>一</s> <s>二</s> <s>三</s>"}  # three records of the store
    path = write_lines(tmp_path / "texts.jsonl", [packed] * 7)
    with path.open("a", encoding="utf-8") as stream:
        stream.write("{broken\n" * 3)

    def opened(fraction: float) -> list[str]:
        notices: list[str] = []
        store = open_store(
            str(path),
            tokenizer,
            kind="text",
            folder=store_folder,
            max_invalid_fraction=fraction,
            say=notices.append,
        )
        assert len(documents(store)) == 21
        return notices

    first = opened(0.3)
    [quarantine] = store_folder.glob("*.invalid.jsonl")
    assert [notice.partition(". ")[2] for notice in first] == [
        "3 of 10 records are invalid: 3 × not JSON: Expecting property name enclosed in double "
        f"quotes. They are left out; see {quarantine}"
    ]
    assert opened(0.3) == first, "reported each time"
    with pytest.raises(DataError) as caught:
        opened(0.29)
    assert "3 of 10 records are invalid" in str(caught.value)
    assert "or allow more with data.max_invalid_fraction=…" in str(caught.value)
    assert str(caught.value).endswith(f". They are in {quarantine}")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_rewritten_file_of_the_same_size_and_time_is_tokenized_again(
    texts: Path, store_folder: Path, tokenizer: Tokenizer, in_place: bool
) -> None:
    before = texts.stat()
    first = documents(open_store(str(texts), tokenizer, kind="text", folder=store_folder))
    changed = texts.read_bytes().replace("长江流入东海".encode(), "黄河流入渤海".encode())
    target = texts if in_place else texts.with_name("other.jsonl")
    target.write_bytes(changed)
    target.replace(texts)
    os.utime(texts, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (texts.stat().st_size, texts.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    notices: list[str] = []
    store = open_store(str(texts), tokenizer, kind="text", folder=store_folder, say=notices.append)
    assert notices == [f"{texts} has changed since it was tokenized; tokenizing it again"]
    assert documents(store) != first
    assert "黄河流入渤海" in tokenizer.decode(documents(store)[0])
    assert names(store_folder) == ["", "lock"], "one store, not one per version"


def test_an_old_file_is_hashed_once(
    texts: Path, store_folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def sha256_of(file: Path) -> str:
        hashed.append(file)
        return stamps.sha256_of(file)

    monkeypatch.setattr(store_module, "sha256_of", sha256_of)
    monkeypatch.setattr(store_writer, "sha256_of", sha256_of)
    monkeypatch.setattr(stamps, "_SETTLED_NS", -(1 << 62))  # every file counts as old
    for _ in range(3):
        open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    assert hashed == [texts]
    os.utime(texts)
    for _ in range(3):
        open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    assert hashed == [texts, texts], "times changed once, the contents did not"
    monkeypatch.setattr(stamps, "_SETTLED_NS", 1 << 62)  # every file counts as just written
    os.utime(texts)
    for _ in range(2):
        open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    assert len(hashed) == 4


def test_a_store_in_a_read_only_folder_is_used(
    texts: Path, store_folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    existing = open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (store_folder / f"{existing.folder.name}.lock").unlink(missing_ok=True)
    os.utime(texts)
    store = open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    assert store.folder == existing.folder
    assert names(store_folder) == [""], "without a lock"


def test_another_tokenizer_builds_another_store(
    texts: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    vocab = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    alphabet = sorted(set(tokenizer._bpe.get_vocab()) - set(vocab))
    letters = [name for name in alphabet if len(name) == 1]
    for name in letters + [a + b + c for a in letters for b in letters[:16] for c in letters[:16]]:
        vocab[name] = len(vocab)
    bpe = new_bpe()
    bpe.model = models.BPE(vocab, [])
    bpe.add_special_tokens(SPECIAL_TOKENS)
    wide = Tokenizer(bpe)
    assert wide.vocab_size > 1 << 16
    narrow_store = open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    wide_store = open_store(str(texts), wide, kind="text", folder=store_folder)
    assert narrow_store.shards("train")[0].tokens.dtype == np.uint16
    assert wide_store.shards("train")[0].tokens.dtype == np.uint32
    assert wide.decode(documents(wide_store)[7][:-1]) == TEXTS[7]


def test_unigram_counts_are_those_of_the_training_split(
    texts: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    store = open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    counts = store.unigram_counts(tokenizer.vocab_size)
    tokens = np.concatenate([np.array(ids) for ids in documents(store)])
    assert counts.tolist() == np.bincount(tokens, minlength=tokenizer.vocab_size).tolist()
    first = store.unigram_counts(tokenizer.vocab_size, max_tokens=100)
    assert first.tolist() == np.bincount(tokens[:100], minlength=tokenizer.vocab_size).tolist()


def test_the_default_folder_is_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "stores"
    monkeypatch.delenv("MINIMIND_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "minimind" / "stores"


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
def test_a_damaged_store_is_rebuilt(
    damage: object, chats: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    store = open_store(str(chats), tokenizer, kind="chat", folder=store_folder)
    before = documents(store)
    assert callable(damage)
    damage(store.folder)
    notices: list[str] = []
    again = open_store(str(chats), tokenizer, kind="chat", folder=store_folder, say=notices.append)
    assert notices == [f"the token store {store.folder} is damaged; building it again"]
    assert documents(again) == before
    notices.clear()
    open_store(str(chats), tokenizer, kind="chat", folder=store_folder, say=notices.append)
    assert notices == []


CHILD = """
    import os, signal, sys, time
    from pathlib import Path
    from minimind.data.store import open_store
    from minimind.tokenizer import Tokenizer

    data, tokenizer, store_folder = sys.argv[1:4]

    def progress(done, total):
        {during}

    def say(text):
        print(text, flush=True)

    store = open_store(
        data,
        Tokenizer.load(Path(tokenizer)),
        kind="text",
        folder=Path(store_folder),
        progress=progress,
        say=say,
    )
    print(store.folder, flush=True)
"""


def child(during: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that builds a store and runs `during` at each progress report."""
    code = textwrap.dedent(CHILD).format(during=during)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


WAIT_FOR_A_LINE = "done and (print('in the middle', flush=True) or sys.stdin.readline())"


@pytest.fixture
def paused(texts: Path, store_folder: Path, tokenizer_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process paused while it builds the store of `texts`; each input line continues it."""
    code = textwrap.dedent(CHILD).format(during=WAIT_FOR_A_LINE)
    command = [sys.executable, "-c", code, str(texts), str(tokenizer_dir), str(store_folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "in the middle\n"
        yield process
        process.kill()


def test_leftovers_of_a_killed_process_are_removed(
    texts: Path, store_folder: Path, tokenizer: Tokenizer, paused: subprocess.Popen[str]
) -> None:
    other = write_lines(texts.with_name("other.jsonl"), [{"text": "别的"}])
    open_store(str(other), tokenizer, kind="text", folder=store_folder)
    assert len(list(store_folder.glob("*.tmp-*"))) == 1  # still running
    paused.send_signal(signal.SIGKILL)
    paused.wait()
    other.write_text('{"text": "又是别的"}', encoding="utf-8")
    open_store(str(other), tokenizer, kind="text", folder=store_folder)
    assert list(store_folder.glob("*.tmp-*")) == []
    store = open_store(str(texts), tokenizer, kind="text", folder=store_folder)
    assert len(documents(store)) == len(TEXTS)


def test_two_processes_build_the_same_store_once(
    texts: Path, store_folder: Path, tokenizer_dir: Path, paused: subprocess.Popen[str]
) -> None:
    with child("print('builds it too', flush=True)", texts, tokenizer_dir, store_folder) as second:
        assert second.stdout
        assert second.stdout.readline() == f"waiting for another process that tokenizes {texts}\n"
        output, _ = paused.communicate("continue\n" * 100)
        rest = second.stdout.read()
    assert (paused.returncode, second.returncode) == (0, 0)
    folder = output.splitlines()[-1]
    assert rest == f"{folder}\n"
    assert len(documents(TokenStore(Path(folder)))) == len(TEXTS)
    assert names(store_folder) == ["", "lock"]


def test_a_waiting_process_takes_over_from_a_killed_one(
    texts: Path, store_folder: Path, tokenizer_dir: Path, paused: subprocess.Popen[str]
) -> None:
    with child("print('builds it', flush=True)", texts, tokenizer_dir, store_folder) as second:
        assert second.stdout
        assert "waiting" in second.stdout.readline()
        paused.kill()
        output = second.stdout.read().splitlines()
    assert second.returncode == 0
    assert "builds it" in output
    assert len(documents(TokenStore(Path(output[-1])))) == len(TEXTS)


def test_a_folder_that_cannot_be_created_is_an_error(texts: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ResourceError, match=r"cannot create the token store here.*data\.store=DIR"):
        open_store(str(texts), tokenizer, kind="text", folder=texts / "stores")


def test_variables_are_substituted_and_part_of_the_key(
    tmp_path: Path, store_folder: Path, tokenizer: Tokenizer
) -> None:
    records: list[dict[str, object]] = [{"text": f"{n}：我是{{{{name}}}}。"} for n in range(20)]
    records += [{"text": "作者是{{author}}，{{author}}。"}, {"text": "{{other}}"}]
    path = str(write_lines(tmp_path / "who.jsonl", records))
    notices: list[str] = []
    folders = set()
    for variables in ({"name": "小明"}, {"name": "小红"}, {"name": "小明", "author": "李雷"}, None):
        store = open_store(
            path,
            tokenizer,
            kind="text",
            variables=variables,
            folder=store_folder,
            say=notices.append,
        )
        folders.add(store.folder)
        text = tokenizer.decode([token for ids in documents(store) for token in ids])
        assert text.count("{{name}}") == (0 if variables else 20)
        assert "{{other}}" in text
        if variables:
            assert text.count(variables["name"]) == 20
    assert len(folders) == 4
    assert [line.split(": ", 1)[1] for line in notices] == [
        "1 of 22 records contain {{author}}, which has no value; set data.variables.author=…",
        "1 of 22 records contain {{author}}, which has no value; set data.variables.author=…",
        "20 of 22 records contain {{name}}, which has no value; set data.variables.name=…",
        "1 of 22 records contain {{author}}, which has no value; set data.variables.author=…",
    ]
