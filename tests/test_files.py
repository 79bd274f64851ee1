import os
from pathlib import Path

import pytest

from minimind.files import atomic_file, read_json, write_atomically, write_json


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_writing_replaces_the_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_atomically(path, "一\n")
    write_atomically(path, "two \ud800")
    assert path.read_bytes() == b"two ?"
    assert names(path.parent) == ["a.json"]


def test_a_failed_write_changes_nothing_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomically(path, "text")
    assert names(tmp_path) == ["a.json"]
    file = tmp_path / "a.json" / "b.json"
    write_atomically(file, "old")
    with pytest.raises(ZeroDivisionError), atomic_file(file) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert file.read_text() == "old"
    assert sorted(names(path)) == ["b.json", "in the way"]


def test_symbolic_links_stay_links_and_devices_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    write_atomically(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    write_atomically(Path(os.devnull), "gone")
    assert Path(os.devnull).is_char_device()


def test_the_file_exists_only_with_its_full_content_and_has_the_given_mode(tmp_path: Path) -> None:
    path = tmp_path / "private"
    with atomic_file(path, mode=0o600) as temporary:
        temporary.write_text("secret")
        assert not path.exists()
    assert path.read_text() == "secret"
    assert path.stat().st_mode & 0o777 == 0o600


def test_json_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"名": [1, None]})
    assert read_json(path) == {"名": [1, None]}
    assert "名" in path.read_text("utf-8")
