import contextlib
import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import zstandard

from minimind.errors import DataError
from minimind.evaluation.benchmarks import (
    Question,
    Questions,
    read_benchmark,
    subject_info,
    subjects,
)
from tests.support.small_benchmarks import CHINESE, EXAMPLES, write_table

IN_ORDER = [*CHINESE[4:], *CHINESE[:4]]  # accountant, logic


def contents(questions: Questions) -> list[tuple[str, list[str], str]]:
    return [(q.question, list(q.options), q.letter) for q in questions.questions]


def check(questions: Questions) -> None:
    assert contents(questions) == IN_ORDER
    assert [q.subject for q in questions.questions] == ["accountant"] * 3 + ["logic"] * 4
    assert len({q.id for q in questions.questions}) == 7
    assert {name: len(examples) for name, examples in questions.examples.items()} == {
        "accountant": 3,
        "logic": 3,
    }
    assert questions.invalid.total == 0


@pytest.mark.parametrize("below", ["", "ceval-exam"])
def test_ceval_is_read_from_folders(ceval_dir: Path, below: str) -> None:
    check(read_benchmark("ceval", [str(ceval_dir / below)]))


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_tables_behind_links_are_read(ceval_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "ceval-exam").mkdir()
    for split in (ceval_dir / "ceval-exam").iterdir():
        (tmp_path / "ceval-exam" / split.name).symlink_to(split)
    check(read_benchmark("ceval", [str(tmp_path)]))


@pytest.mark.parametrize("ending", ["zip", "tar.xz"])
def test_ceval_is_read_from_archives(ceval_dir: Path, tmp_path: Path, ending: str) -> None:
    archive = tmp_path / f"ceval-exam.{ending}"
    kind = {"zip": "zip", "tar.xz": "xztar"}[ending]
    shutil.make_archive(str(tmp_path / "ceval-exam"), kind, ceval_dir)
    check(read_benchmark("ceval", [str(tmp_path)]))
    check(read_benchmark("ceval", [str(archive)]))
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read_benchmark("ceval", [str(tmp_path)])


def test_archive_members_are_not_written_outside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    row = b"id,question,A,B,C,D,answer\n0,q,1,2,3,4,A\n"
    with zipfile.ZipFile(folder / "ceval.zip", "w") as packed:
        packed.writestr("../../val/logic_val.csv", row)
        packed.writestr("/val/accountant_val.csv", row)
    with tarfile.open(folder / "link.tar", "w") as tar:
        link = tarfile.TarInfo("val/logic_val.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("val/accountant_val.csv")
        info.size = len(row)
        tar.addfile(info, io.BytesIO(row))
    assert len(read_benchmark("ceval", [str(folder / "ceval.zip")]).questions) == 2
    assert len(read_benchmark("ceval", [str(folder / "link.tar")]).questions) == 1
    assert sorted(path.name for path in tmp_path.rglob("*.csv")) == []


def test_no_member_of_an_archive_is_dropped(tmp_path: Path) -> None:
    """More members than any benchmark has, or two of one name, are refused."""
    archive, row = tmp_path / "ceval.zip", "id,question,A,B,C,D,answer\n0,q,1,2,3,4,A\n"
    with zipfile.ZipFile(archive, "w") as packed:
        for number in range(10_000):
            packed.writestr(f"dev/other{number}.csv", "")
        packed.writestr("val/logic_val.csv", row)
    with pytest.raises(DataError, match=r"ceval.zip: has 10,001 CSV files"):
        read_benchmark("ceval", [str(archive)])
    with zipfile.ZipFile(archive, "w") as packed:
        for folder in ("a", "b"):
            packed.writestr(f"{folder}/val/logic_val.csv", row)
    both = "a/val/logic_val.csv and b/val/logic_val.csv have the same name"
    with pytest.raises(DataError, match=both):
        read_benchmark("ceval", [str(archive)])


@pytest.mark.parametrize("ending", ["zip", "tar.gz", "tar.xz", "tar.bz2"])
def test_a_damaged_archive_is_an_error(ceval_dir: Path, tmp_path: Path, ending: str) -> None:
    """One byte is another one, in twelve places."""
    kind = {"zip": "zip", "tar.gz": "gztar", "tar.xz": "xztar", "tar.bz2": "bztar"}[ending]
    archive = Path(shutil.make_archive(str(tmp_path / "ceval"), kind, ceval_dir))
    content = archive.read_bytes()
    for position in range(9, len(content), len(content) // 12):
        archive.write_bytes(
            content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]
        )
        with contextlib.suppress(DataError):
            read_benchmark("ceval", [str(archive)])
    middle = len(content) // 3
    archive.write_bytes(content[:middle] + bytes(100) + content[middle + 100 :])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read_benchmark("ceval", [str(archive)])


def test_an_encrypted_archive_is_an_error(ceval_dir: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "ceval"), "zip", ceval_dir))
    content = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = -1
        while (position := content.find(signature, position + 1)) >= 0:
            content[position + flags] |= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"_dev\.csv is encrypted; unpack it into a folder"):
        read_benchmark("ceval", [str(archive)])


@pytest.mark.parametrize(
    ("ending", "compress"), [("", bytes), (".gz", gzip.compress), (".ZST", zstandard.compress)]
)
def test_csv_may_be_compressed(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"mine.csv{ending}"
    content = compress('\ufeffquestion,A,B,answer\n"泰山\r\n在哪里？",甲,乙,A\n'.encode())
    path.write_bytes(content)
    [question] = read_benchmark("choice", [str(path)]).questions
    assert (question.question, question.options) == ("泰山\n在哪里？", ("甲", "乙"))
    if ending:
        path.write_bytes(content[:-6])
        with pytest.raises(DataError, match=r"cannot be decompressed as .*damaged or truncated"):
            read_benchmark("choice", [str(path)])


def test_cmmlu_and_mmlu_are_distinguished_in_one_folder(tmp_path: Path) -> None:
    header = ["", "Question", "A", "B", "C", "D", "Answer"]
    for split, questions in (("test", CHINESE), ("dev", EXAMPLES)):
        write_table(tmp_path / "cmmlu" / split / "anatomy.csv", questions, header)
        write_table(tmp_path / "data" / split / f"anatomy_{split}.csv", questions[:2], None)
    questions = read_benchmark("cmmlu", [str(tmp_path)])
    assert contents(questions) == CHINESE
    assert [len(examples) for examples in questions.examples.values()] == [3]
    assert contents(read_benchmark("mmlu", [str(tmp_path)])) == CHINESE[:2]


def write_tables(folder: Path, names: Iterable[str]) -> None:
    """Write a table for each name, such as val/logic_val; with a header as C-Eval and CMMLU."""
    for name in names:
        header = ["id", "question", "A", "B", "C", "D", "answer"]
        write_table(folder / f"{name}.csv", CHINESE[:1], header)


def full(benchmark: str, split: str) -> list[str]:
    ending = "" if benchmark == "cmmlu" else f"_{split}"
    return [f"{split}/{subject}{ending}" for subject in subjects(benchmark)]


@pytest.mark.parametrize(
    ("task", "folder", "tables"),
    [
        ("mmlu", "cmmlu", ["test/anatomy"]),
        ("mmlu", "CMMLU_v1_0_1/x", ["test/anatomy_test"]),
        ("mmlu", "mmlu/cmmlu", ["test/anatomy"]),
        ("mmlu", "", ["test/anatomy"]),  # no "_test", as in CMMLU
        ("mmlu", "data", full("cmmlu", "test")),
        ("cmmlu", "data", full("mmlu", "test")),
        ("ceval", "data", full("mmlu", "val")),
        ("ceval", "data", ["val/college_physics_val"]),
    ],
)
def test_tables_of_another_benchmark_are_not_read(
    tmp_path: Path, task: str, folder: str, tables: list[str]
) -> None:
    """They share subjects, from an archive as from a folder."""
    write_tables(tmp_path / "exams" / folder, tables)
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path / "exams")
    for source in (str(tmp_path / "exams"), archive):
        with pytest.raises(DataError, match=f"found no {task}"):
            read_benchmark(task, [source])


@pytest.mark.parametrize(
    ("task", "folder", "tables"),
    [
        ("mmlu", "mmlu", ["test/anatomy"]),
        ("ceval", "x/ceval-exam-v2", ["val/college_physics_val"]),
        ("mmlu", "x", ["test/anatomy_test"]),
        ("cmmlu", "x", ["test/anatomy"]),
        ("ceval", "x", ["val/logic"]),
    ],
)
def test_a_part_of_a_benchmark_is_read(
    tmp_path: Path, task: str, folder: str, tables: list[str]
) -> None:
    write_tables(tmp_path / "exams" / folder, tables)
    for source in (tmp_path / "exams", tmp_path / "exams" / folder):
        assert contents(read_benchmark(task, [str(source)])) == CHINESE[:1]


def test_benchmarks_in_one_folder_are_separated(tmp_path: Path) -> None:
    write_tables(tmp_path / "a", [*full("ceval", "val"), "dev/college_physics_dev"])
    write_tables(tmp_path / "b", [*full("mmlu", "test"), "dev/college_physics_dev"])
    for task, number in (("ceval", 52), ("mmlu", 57)):
        questions = read_benchmark(task, [str(tmp_path)])
        assert len(questions.questions) == number
        assert len(questions.examples["college_physics"]) == 1


def test_an_archive_beside_another_benchmark_is_read(tmp_path: Path) -> None:
    write_tables(tmp_path / "cmmlu", ["test/anatomy"])
    write_table(tmp_path / "x" / "test" / "anatomy_test.csv", CHINESE[1:3], None)
    shutil.make_archive(str(tmp_path / "mmlu"), "tar", tmp_path / "x")
    shutil.rmtree(tmp_path / "x")
    assert contents(read_benchmark("mmlu", [str(tmp_path)])) == CHINESE[1:3]
    assert contents(read_benchmark("cmmlu", [str(tmp_path)])) == CHINESE[:1]


def test_records_may_have_splits_and_passages(tmp_path: Path) -> None:
    rows = [
        {"id": f"{split}-{n}", "subject": "c3-m", "split": split, "passage": "一段话。"}
        | {"question": "问题？", "A": "甲", "B": "乙", "answer": "B"}
        for split in ("dev", "test", "train")
        for n in range(2)
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "c3.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    questions = read_benchmark("c3", [str(tmp_path)])
    assert questions.questions == [
        Question(f"c3-m-test-{n}", "c3-m", "问题？", ("甲", "乙"), 1, "一段话。") for n in (0, 1)
    ]
    assert len(questions.examples["c3-m"]) == 2


def test_invalid_rows_are_counted_with_reasons(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "question,A,B,C,D,answer\n"
        "right?,1,2,3,4,c\n"
        ",1,2,3,4,A\n"
        "one option?,1,,,,A\n"
        "which letter?,1,2,,,C\n"
        "too few?,1,2\n"
        '"of two\nlines?",1,2,3,,B\n',
        encoding="utf-8",
    )
    questions = read_benchmark("choice", [str(path)])
    assert contents(questions) == [
        ("right?", ["1", "2", "3", "4"], "C"),
        ("of two\nlines?", ["1", "2", "3"], "B"),
    ]
    assert questions.invalid.total == 4
    assert set(questions.invalid.reasons) == {
        "no question",
        "fewer than two options (columns A, B, …)",
        "the answer 'C' is not the letter of an option",
        "3 fields instead of 6",
    }


def test_duplicate_ids_get_a_suffix(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("id,question,A,B,answer\n1,a,1,2,A\n1,b,1,2,B\n", encoding="utf-8")
    assert [q.id for q in read_benchmark("choice", [str(path)]).questions] == [
        "mine-1",
        "mine-1 (2)",
    ]


def test_missing_and_unreadable_files_are_errors(tmp_path: Path, ceval_dir: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_benchmark("ceval", [str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"found no cmmlu.*minimind data get cmmlu"):
        read_benchmark("cmmlu", [str(ceval_dir)])
    with pytest.raises(DataError, match=r"--task c3:PATH$"):  # there is no download
        read_benchmark("c3", [str(ceval_dir)])
    path = tmp_path / "gbk.csv"
    path.write_bytes("question,A,B,answer\n泰山在哪里？,甲,乙,A\n".encode("gb18030"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_benchmark("choice", [str(path)])
    path.write_text("question,A,B,answer\n?,1,2,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"contains no question with an answer.*the answer ''"):
        read_benchmark("choice", [str(path)])


def test_the_hash_covers_questions_and_examples(ceval_dir: Path, tmp_path: Path) -> None:
    first = read_benchmark("ceval", [str(ceval_dir)])
    assert read_benchmark("ceval", [str(ceval_dir / "ceval-exam")]).sha256() == first.sha256()
    other = tmp_path / "ceval"
    shutil.copytree(ceval_dir / "ceval-exam", other)
    dev = other / "dev" / "logic_dev.csv"
    dev.write_text(dev.read_text("utf-8").replace("巴黎", "东京"), encoding="utf-8")
    assert read_benchmark("ceval", [str(tmp_path)]).sha256() != first.sha256()


def test_subjects_have_names_and_groups() -> None:
    assert [len(subjects(name)) for name in ("ceval", "cmmlu", "mmlu")] == [52, 67, 57]
    groups = {info.group for name in ("ceval", "cmmlu", "mmlu") for info in subjects(name).values()}
    assert groups == {"STEM", "humanities", "social sciences", "other"}
    assert subject_info("ceval", "law").name == "法学"
    assert subject_info("mine", "some_thing").name == "some thing"
