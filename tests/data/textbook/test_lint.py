import re
from collections.abc import Callable
from pathlib import Path

import pytest

from minimind.data.textbook import Subject, load_subjects
from minimind.data.textbook.lint import lint

MakeFolder = Callable[..., Path]


def test_the_packaged_tables_are_clean() -> None:
    assert lint(load_subjects()) == []


def test_the_small_table_is_clean(rivers: Subject) -> None:
    assert lint([rivers]) == []


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        (['"{name}长{length}公里。", ', ""], "relation on length: statements needs at least 3"),
        (['    "{name}多长？",\n', ""], "relation on length: questions needs at least 5"),
        ([', "{name}汇入哪里？"', ""], "relation on mouth: held_out needs at least 2"),
        ([', "{name}注入{mouth}。"]', "]"], "relation on mouth: answers needs at least 2"),
        ([', "它注入哪里？"', ""], "relation on mouth: followups needs none or at least 2"),
        (["黄河\t", "长江\t"], "rivers.tsv:[23]: the name 长江 occurs more than once"),
        (
            [
                "mouth\n",
                "mouth\tdepth\n",
                *(
                    x
                    for sea in ("太平洋", "渤海", "南海", "地中海", "里海")
                    for x in (f"{sea}\n", f"{sea}\t9\n")
                ),
            ],
            "rivers.tsv:2: no relation uses depth of 长江",
        ),
        (
            ["{name}流入哪里？", "你知道{name}流入哪里么？"],
            "“你知道长江流入哪里么？” has a frame reserved",
        ),
        (
            ["它流入哪里？", "你知道它流入哪里吗？"],
            "“你知道它流入哪里吗？” has a frame reserved",
        ),
        (
            ['answers = ["{name}流入{mouth}。', 'answers = ["{name}流入大海。'],
            r"rivers.tsv:2 \(mouth\): “长江流入大海。” does not match the keys",
        ),
        (['answers = ["{name}流入{mouth}。', 'answers = ["{name}流入{mouth}'], "does not match"),
        (['answers = ["{name}流入{mouth}。', 'answers = ["{name}不在{mouth}。'], "does not match"),
        (
            ['answers = ["{name}流入{mouth}。', 'answers = ["流入{mouth}，流入{mouth}。'],
            "“流入东海，流入东海。” is not a well-formed answer",
        ),
        (
            ["{name}流入哪里？", "{name}有多长？"],
            r"“长江有多长” asks for .*东海.*, but for .*6300公里",
        ),
        (["它流入哪里？", "它有多长？"], "“长江它有多长” asks for"),
        (
            ["{name}流入哪里？", "{name}汇入哪里"],
            "“长江汇入哪里” contains the held-out “长江汇入哪里” of",
        ),
        (["{name}流入哪里？", "说说看，{name}汇入哪里？"], "contains the held-out “长江汇入哪里”"),
        (["它流入哪里？", "告诉我长江汇入哪里。"], "contains the held-out “长江汇入哪里”"),
    ],
)
def test_each_rule_reports_its_violation(
    folder: MakeFolder, changes: list[str], finding: str
) -> None:
    findings = lint(load_subjects(folder(*changes)))
    assert any(re.search(finding, one) for one in findings), findings


def test_a_relation_without_rows_is_reported(folder: MakeFolder) -> None:
    emptied = [
        text
        for length in ("6300", "5464", "2320", "6670", "3530")
        for text in (f"\t{length}\t", "\t\t")
    ]
    findings = lint(load_subjects(folder(*emptied)))
    assert (
        "rivers.toml: relation on length: no row has all the cells that its templates use"
        in findings
    )


def test_the_same_question_for_two_facts_is_reported(folder: MakeFolder, tmp_path: Path) -> None:
    path = folder()
    for name in ("rivers.toml", "rivers.tsv"):
        text = (path / name).read_text("utf-8").replace("6300", "6397")
        (path / name.replace("rivers", "streams")).write_text(text, encoding="utf-8")
    findings = lint(load_subjects(path))
    assert any(
        re.search(r"streams\.tsv:2 \(length\): “长江有多长” .*rivers\.tsv:2", f) for f in findings
    )
    assert not any("(mouth)" in finding for finding in findings)
