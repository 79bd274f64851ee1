import io
import json
import shutil
import tarfile
import zipfile
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
from tests.support.small_exams import CHINESE, EXAMPLES, write_table

IN_ORDER = [*CHINESE[4:], *CHINESE[:4]]  # accountant, logic


def asked(found: Questions) -> list[tuple[str, list[str], str]]:
    return [(q.question, list(q.options), q.letter) for q in found.asked]


def check(found: Questions) -> None:
    assert asked(found) == IN_ORDER
    assert [q.subject for q in found.asked] == ["accountant"] * 3 + ["logic"] * 4
    assert len({q.id for q in found.asked}) == 7
    assert {name: len(some) for name, some in found.examples.items()} == {
        "accountant": 3,
        "logic": 3,
    }
    assert found.bad.total == 0


@pytest.mark.parametrize("below", ["", "ceval-exam"])
def test_ceval_as_it_is_unpacked(ceval_dir: Path, below: str) -> None:
    check(read_benchmark("ceval", [str(ceval_dir / below)]))


@pytest.mark.parametrize("ending", ["zip", "tar.xz"])
def test_ceval_as_it_is_downloaded(ceval_dir: Path, tmp_path: Path, ending: str) -> None:
    archive = tmp_path / f"ceval-exam.{ending}"
    kind = {"zip": "zip", "tar.xz": "xztar"}[ending]
    shutil.make_archive(str(tmp_path / "ceval-exam"), kind, ceval_dir)
    check(read_benchmark("ceval", [str(tmp_path)]))
    check(read_benchmark("ceval", [str(archive)]))
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read_benchmark("ceval", [str(tmp_path)])


def test_names_in_an_archive_lead_nowhere_else(tmp_path: Path) -> None:
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
    assert len(read_benchmark("ceval", [str(folder / "ceval.zip")]).asked) == 2
    assert len(read_benchmark("ceval", [str(folder / "link.tar")]).asked) == 1
    assert sorted(path.name for path in tmp_path.rglob("*.csv")) == []


def test_cmmlu_and_mmlu_have_files_of_their_own(tmp_path: Path) -> None:
    header = ["", "Question", "A", "B", "C", "D", "Answer"]
    for split, questions in (("test", CHINESE), ("dev", EXAMPLES)):
        write_table(tmp_path / "cmmlu" / split / "anatomy.csv", questions, header)
        write_table(tmp_path / "data" / split / f"anatomy_{split}.csv", questions[:2], None)
    found = read_benchmark("cmmlu", [str(tmp_path)])
    assert asked(found) == CHINESE
    assert [len(some) for some in found.examples.values()] == [3]
    assert asked(read_benchmark("mmlu", [str(tmp_path)])) == CHINESE[:2]


def test_records_a_line_with_splits_and_passages(tmp_path: Path) -> None:
    rows = [
        {"id": f"{split}-{n}", "subject": "c3-m", "split": split, "passage": "一段话。"}
        | {"question": "问题？", "A": "甲", "B": "乙", "answer": "B"}
        for split in ("dev", "test", "train")
        for n in range(2)
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "c3.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    found = read_benchmark("c3", [str(tmp_path)])
    assert found.asked == [
        Question(f"c3-m-test-{n}", "c3-m", "问题？", ("甲", "乙"), 1, "一段话。") for n in (0, 1)
    ]
    assert len(found.examples["c3-m"]) == 2


def test_rows_that_are_no_questions_are_put_aside(tmp_path: Path) -> None:
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
    found = read_benchmark("choice", [str(path)])
    assert asked(found) == [
        ("right?", ["1", "2", "3", "4"], "C"),
        ("of two\nlines?", ["1", "2", "3"], "B"),
    ]
    assert found.bad.total == 4
    assert set(found.bad.reasons) == {
        "no question",
        "fewer than two options (columns A, B, …)",
        "the answer 'C' is not the letter of an option",
        "3 fields instead of 6",
    }


def test_an_id_that_comes_twice_is_two_questions(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("id,question,A,B,answer\n1,a,1,2,A\n1,b,1,2,B\n", encoding="utf-8")
    assert [q.id for q in read_benchmark("choice", [str(path)]).asked] == ["mine-1", "mine-1 (2)"]


def test_what_is_not_there_or_not_text_is_told(tmp_path: Path, ceval_dir: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_benchmark("ceval", [str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"holds no cmmlu.*minimind data get cmmlu"):
        read_benchmark("cmmlu", [str(ceval_dir)])
    with pytest.raises(DataError, match=r"--task c3:PATH$"):  # nothing downloads it
        read_benchmark("c3", [str(ceval_dir)])
    path = tmp_path / "gbk.csv"
    path.write_bytes("question,A,B,answer\n泰山在哪里？,甲,乙,A\n".encode("gb18030"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_benchmark("choice", [str(path)])
    path.write_text("question,A,B,answer\n?,1,2,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no question with an answer in it.*the answer ''"):
        read_benchmark("choice", [str(path)])


def test_other_questions_have_another_sum(ceval_dir: Path, tmp_path: Path) -> None:
    first = read_benchmark("ceval", [str(ceval_dir)])
    assert read_benchmark("ceval", [str(ceval_dir / "ceval-exam")]).sha256() == first.sha256()
    other = tmp_path / "ceval"
    shutil.copytree(ceval_dir / "ceval-exam", other)
    dev = other / "dev" / "logic_dev.csv"
    dev.write_text(dev.read_text("utf-8").replace("巴黎", "东京"), encoding="utf-8")
    assert read_benchmark("ceval", [str(tmp_path)]).sha256() != first.sha256()


def test_subjects_have_names_and_groups() -> None:
    assert [len(subjects(exam)) for exam in ("ceval", "cmmlu", "mmlu")] == [52, 67, 57]
    groups = {info.group for exam in ("ceval", "cmmlu", "mmlu") for info in subjects(exam).values()}
    assert groups == {"STEM", "humanities", "social sciences", "other"}
    assert subject_info("ceval", "law").name == "法学"
    assert subject_info("mine", "some_thing").name == "some thing"
