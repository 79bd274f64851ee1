import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind.data.input_files import list_files, would_match
from minimind.errors import DataError
from tests.support.data_files import records_of


def test_folders_and_globs_list_supported_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.txt.zst", "a/d.md", ".hidden.jsonl", ".git/x.txt", "a/e.TSV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    here = str(tmp_path)
    names = ["a/c.txt.zst", "a/e.TSV", "b.jsonl"]
    assert list_files(here) == [tmp_path / name for name in names]
    assert list_files(f"{here}/**/*") == [tmp_path / name for name in names]
    assert list_files(f"{here}/*.jsonl") == [tmp_path / "b.jsonl"]
    assert list_files(f"{here}/a/d.md") == [tmp_path / "a/d.md"]  # reading it gives the error
    (tmp_path / "x[1].jsonl").write_text("x")
    assert list_files(f"{here}/x[1].jsonl") == [tmp_path / "x[1].jsonl"]


def test_files_that_a_path_would_match(tmp_path: Path) -> None:
    """The same as those that it matches once they exist."""
    files = [
        tmp_path / name
        for name in (
            "b.jsonl",
            "a/c.jsonl",
            "a/d/e.jsonl",
            "a/.f/g.jsonl",
            ".h/i.jsonl",
            "[j]/k.txt",
        )
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    here = str(tmp_path)
    paths = (here, f"{here}/a", f"{here}/*", f"{here}/*/*", f"{here}/**", f"{here}/**/*.jsonl")
    paths += (f"{here}/a/**/e*", f"{here}/[ab]/?.jsonl", f"{here}/[[]j]/*", f"{here}/.*/*.jsonl")
    for path in (*paths, f"{here}/b.jsonl", f"{here}/[j]/*"):
        listed = list_files(path)
        assert [file for file in files if would_match(path, file)] == sorted(
            listed, key=files.index
        ), path
    assert not would_match("minimind:dpo", files[0])
    assert not would_match(f"{here}/none", files[0])


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_folders_behind_links_are_listed_once(tmp_path: Path) -> None:
    data, disk = tmp_path / "data", tmp_path / "disk"
    for name in ("data/z/own.jsonl", "disk/wiki/deep/1.jsonl", "disk/.hidden/2.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (data / "wiki").symlink_to(disk / "wiki")
    (data / "wiki-again").symlink_to(disk / "wiki")
    (data / ".hidden").symlink_to(disk / ".hidden")
    (data / "a").symlink_to(data / "z")  # also listed by its own name
    (data / "missing").symlink_to(tmp_path / "nowhere")
    (disk / "wiki" / "up").symlink_to(data)
    (data / "loop").symlink_to(data / "loop")
    assert list_files(str(data)) == [data / "wiki/deep/1.jsonl", data / "z/own.jsonl"]
    (tmp_path / "link").symlink_to(data)
    link = tmp_path / "link"
    assert list_files(str(link)) == [link / "wiki/deep/1.jsonl", link / "z/own.jsonl"]


NAMES = ["[v1]", "a@2", "x*", "a,b", "a b", "q?", "[!x]", "{a}", "~", "a@0.5", "**"]


@pytest.mark.parametrize("name", NAMES)
def test_an_existing_path_has_precedence_over_glob_syntax(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("v", "a", "xy", "q1", "b", f"deep/{name}", "deep/v", name):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "1.jsonl").write_text("x")
    here = Path(name) if name != "~" else Path("./~")
    path = str(here) if name != "~" else "./~"
    if name != "~":
        assert list_files(path) == [here / "1.jsonl"]
        assert list_files(f"{path}/*.jsonl") == [here / "1.jsonl"]
        assert list_files(f"deep/{path}/*.jsonl") == [Path("deep", name, "1.jsonl")]
    assert list_files(f"{tmp_path}/{name}/[0-9].jsonl") == [tmp_path / name / "1.jsonl"]
    file = Path(f"{name}.jsonl")
    file.write_text("x")
    assert list_files(f"{tmp_path}/{file}") == [tmp_path / file]


def test_precedence_of_names_is_decided_in_each_folder(tmp_path: Path) -> None:
    for folder in ("1/[v]", "1/v", "2/v"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jsonl").write_text("x")
    files = list_files(f"{tmp_path}/*/[v]/*.jsonl")
    assert files == [tmp_path / "1/[v]/a.jsonl", tmp_path / "2/v/a.jsonl"]


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("a.jsonl,b c.jsonl", "--data a.jsonl --data b --data c.jsonl"),
        ("a.jsonl, b.jsonl", "--data a.jsonl --data b.jsonl"),
        ("a.jsonl b.jsonl", "--data a.jsonl --data b.jsonl"),
        ("*.jsonl,a.jsonl", "--data '*.jsonl' --data a.jsonl"),
        ("gone.jsonl，b.jsonl", "--data gone.jsonl --data b.jsonl"),
        ("a.jsonl@2,b.jsonl@1", ""),
    ],
)
def test_several_paths_in_one_argument_give_a_hint(
    path: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text('{"text": "x"}')
    with pytest.raises(DataError) as caught:
        list_files(path)
    assert (f"Give each path separately: repeat --data ({options})" in str(caught.value)) == bool(
        options
    )


def test_paths_without_files_give_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "note.md").write_text("x")
    (tmp_path / "pretrain.jsonl").write_text("x")
    monkeypatch.chdir(tmp_path)
    for path, reason in [
        ("docs", "the folder has no files of a supported format; supported are .jsonl"),
        ("docs/*", "none of the 1 files has a supported format"),
        ("docs/*.jsonl", "no file matches"),
        ("pretrian.jsonl", "no such file or folder; . contains pretrain.jsonl"),
        ("dosc/a/b.jsonl", "no such file or folder; . contains docs"),
        (f"{tmp_path}/docs/a/b.jsonl", f"; the folder {tmp_path}/docs exists, but contains no a"),
        ("a\0b", "no such file"),
        ("a" * 5_000, "aaa: "),  # the reason comes from the operating system
    ]:
        with pytest.raises(DataError) as caught:
            list_files(path)
        assert reason in str(caught.value)


def test_a_path_on_a_drive_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda path: False)  # as for E:\\ without its disk
    with pytest.raises(DataError, match="there is no such file or folder"):
        list_files("nowhere/texts.jsonl")


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder of another user with an unreadable folder and an unreadable file."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no POSIX permissions")
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    try:
        (folder / "closed").mkdir()
        (folder / "closed" / "a.jsonl").write_text('{"text": "a"}')
        (folder / "b.jsonl").write_text('{"text": "b"}')
        (folder / "b.jsonl").chmod(0)
        (folder / "closed").chmod(0)
        folder.chmod(0o755)
        if user == 0:
            os.seteuid(65534)  # root can read everything
        yield folder
    finally:
        if user == 0:
            os.seteuid(0)
        (folder / "closed").chmod(0o755)
        shutil.rmtree(folder)


def test_missing_permission_names_the_path(locked: Path) -> None:
    for path in (locked / "closed", locked / "closed" / "a.jsonl", locked):
        with pytest.raises(DataError, match=r"closed.*: no permission to read it"):
            list_files(str(path))
    with pytest.raises(DataError, match=r"b\.jsonl: no permission to read it"):
        records_of(locked / "b.jsonl")
