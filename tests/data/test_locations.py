"""URLs behave like paths. `memory://` is an object store in this process."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from minimind.data.input_files import list_files, list_locations
from minimind.data.locations import (
    UrlPath,
    is_url,
    location,
    new_file,
    new_files,
    remove,
    write_json,
)
from minimind.data.prepare.shards import read_array, read_elements, write_array
from minimind.data.stamps import settled_stamp_of, sha256_of, stamp_of
from minimind.errors import DataError, ResourceError, UsageError
from minimind.files import read_json_object


@pytest.fixture
def bucket() -> Iterator[UrlPath]:
    yield UrlPath("memory://bucket")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/folder")
    for text in ("skypile:part", "C:\\texts", "texts/*.jsonl", "/texts"):
        assert not is_url(text)
    assert location("file:///texts/a%20b") == Path("/texts/a b")
    assert location("s3://bucket/folder/") == UrlPath("s3://bucket/folder")
    assert location("texts") == Path("texts")


def test_parts_and_children(bucket: UrlPath) -> None:
    file = bucket / "a" / "part.jsonl.zst"
    assert (str(file), file.name, file.stem) == (
        "memory://bucket/a/part.jsonl.zst",
        "part.jsonl.zst",
        "part.jsonl",
    )
    assert (file.suffix, file.suffixes) == (".zst", [".jsonl", ".zst"])
    assert not file.exists()
    assert list((bucket / "a").iterdir()) == []
    write_json(file, {"值": 1})
    assert pickle.loads(pickle.dumps(file)) == file
    assert file.is_file()
    assert not (bucket / "a").is_file()
    assert list((bucket / "a").glob("*.zst")) == [file]
    assert list((bucket / "a").glob("*.json")) == []
    assert read_json_object(file) == {"值": 1}


def test_stamps_change_with_the_content(bucket: UrlPath) -> None:
    file = bucket / "a.txt"
    with new_file(file) as temporary:
        temporary.write_bytes(b"one")
    before = stamp_of(file)
    assert before[0] == file.stat().st_size == 3
    assert settled_stamp_of(file) == before
    assert sha256_of(file) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    with new_file(file) as temporary:
        temporary.write_bytes(b"two")
    assert stamp_of(file) != before


def test_nothing_is_uploaded_after_an_error(bucket: UrlPath) -> None:
    with pytest.raises(ZeroDivisionError), new_file(bucket / "a") as temporary:
        temporary.write_text("one")
        raise ZeroDivisionError
    assert not (bucket / "a").exists()
    with new_files(bucket / "b") as folder:
        (folder / "plots").mkdir()
        (folder / "plots" / "1.svg").write_text("<svg/>")
    assert (bucket / "b" / "plots" / "1.svg").read_text("utf-8") == "<svg/>"
    remove([bucket / "b" / "plots" / "1.svg"])
    assert not (bucket / "b" / "plots" / "1.svg").exists()


def test_inputs_are_listed_in_the_order_of_files(bucket: UrlPath, tmp_path: Path) -> None:
    for name in ("b/1.jsonl", "b-2/1.jsonl.gz", "a.txt", "a.pdf", ".hidden/c.txt", "b/.d.txt"):
        for root in (bucket, tmp_path):
            target = location(f"{root}/{name}")
            with new_file(target) as temporary:
                temporary.write_bytes(b"{}")
    local = [file.relative_to(tmp_path).as_posix() for file in list_files(str(tmp_path))]
    assert [str(file) for file in list_locations("memory://bucket")] == [
        f"memory://bucket/{name}" for name in local
    ]
    assert list_locations(f"file://{tmp_path}") == list_files(str(tmp_path))
    assert list_locations("memory://bucket/*/*.jsonl") == [bucket / "b" / "1.jsonl"]
    assert list_locations("memory://bucket/a.txt") == [bucket / "a.txt"]
    for missing in ("memory://bucket/c", "memory://other/*.txt"):
        with pytest.raises(DataError, match="there is no such file"):
            list_locations(missing)
    with pytest.raises(DataError, match="read only by `minimind data prepare`"):
        list_files("memory://bucket")


def test_a_part_of_an_array_is_read(bucket: UrlPath, tmp_path: Path) -> None:
    numbers = np.arange(60, dtype=np.uint32).reshape(3, 20)
    for folder in (bucket, tmp_path):
        assert write_array(folder / "a.npy", numbers)["name"] == "a.npy"
        write_array(folder / "b.npy", numbers[0])
        np.testing.assert_array_equal(read_array(folder / "a.npy"), numbers)
        np.testing.assert_array_equal(read_elements(folder / "a.npy", 2), numbers[2])
        np.testing.assert_array_equal(read_elements(folder / "a.npy", 1, 4, 3), numbers[1, 4:7])
        np.testing.assert_array_equal(read_elements(folder / "b.npy", start=5), numbers[0, 5:])
        with pytest.raises(DataError, match="cannot be read"):
            read_elements(folder / "c.npy")


def test_errors_name_the_remedy(monkeypatch: pytest.MonkeyPatch, bucket: UrlPath) -> None:
    with pytest.raises(UsageError, match=r"foo://x: Protocol not known.*s3://"):
        UrlPath("foo://x").exists()
    with pytest.raises(UsageError, match=r"install .*gdrive|install .*gdrive_fsspec"):
        UrlPath("gdrive://x").exists()

    class DriverError(Exception):
        pass

    def fail(*arguments: object) -> None:
        raise DriverError("no\nroute")

    monkeypatch.setattr(MemoryFileSystem, "info", fail)
    with pytest.raises(
        ResourceError, match=r"bucket: cannot be accessed \(DriverError: no route\)"
    ):
        bucket.stat()
