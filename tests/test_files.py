import os
from pathlib import Path

import pytest

from minimind.files import write_atomically


def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_atomically(path, "一\n")
    write_atomically(path, "two \ud800")
    assert path.read_bytes() == b"two ?"
    assert [one.name for one in path.parent.iterdir()] == ["a.json"]


def test_what_cannot_be_replaced_stays_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomically(path, "text")
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_links_stay_links_and_pipes_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    write_atomically(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    write_atomically(Path(os.devnull), "gone")
    assert Path(os.devnull).is_char_device()
