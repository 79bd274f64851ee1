import re
from collections.abc import Callable
from pathlib import Path

import pytest

from minimind.data.textbook import Subject, load_subjects
from minimind.errors import DataError

MakeFolder = Callable[..., Path]


def test_a_table_is_rendered_as_facts_in_sentences(rivers: Subject) -> None:
    assert (rivers.title, rivers.language) == ("河流", "zh")
    assert (len(rivers.rows), len(rivers.facts), rivers.num_facts) == (5, 10, 10)
    length, mouth = rivers.facts_of(rivers.rows[0])
    assert length.name == "长江" and length.asks_by_name
    assert length.statements[0] == "长江长6300公里。"
    assert length.questions[-1] == "请说出长江的长度。"
    assert length.held_out == ("你知道长江有多长吗？", "长江有多少公里长？")
    assert length.answers == ("长江全长6300公里。", "长江长6300公里。")
    assert length.followups == ("它有多长？", "它全长多少公里？")
    assert length.keys == (("6300公里",),)
    # Sentences use the first of several right values; each is a right answer.
    assert mouth.answers == ("长江流入东海。", "长江注入东海。")
    assert mouth.keys == (("东海", "太平洋"),)


def test_distractors_are_values_of_other_rows(rivers: Subject) -> None:
    length, mouth = rivers.facts_of(rivers.rows[0])
    assert length.distractors() == ["5464公里", "2320公里", "6670公里", "3530公里"]
    assert mouth.distractors() == ["渤海", "南海", "地中海", "里海"]
    assert mouth.answer_from(rivers.rows[1], "{name}流入{mouth}。") == "长江流入渤海。"


def test_distractors_exclude_right_values(folder: MakeFolder) -> None:
    (subject,) = load_subjects(folder("5464\t渤海", "5464\t太平洋"))
    assert "太平洋" not in subject.facts_of(subject.rows[0])[1].distractors()


def test_a_question_can_ask_for_the_name(folder: MakeFolder) -> None:
    changes = ['key = ["{length}公里"]', 'key = ["{name}"]', "{name}有多长？", "哪条河长{length}？"]
    (subject,) = load_subjects(folder(*changes))
    fact = subject.facts_of(subject.rows[1])[0]
    assert fact.keys == (("黄河",),) and not fact.asks_by_name
    assert fact.distractors() == ["长江", "珠江", "尼罗河", "伏尔加河"]
    assert fact.answer_from(subject.rows[0], "{name}长{length}公里。") == "长江长5464公里。"


def test_an_empty_cell_is_not_a_fact(folder: MakeFolder) -> None:
    (subject,) = load_subjects(folder("黄河\t5464\t", "黄河\t\t"))
    assert subject.num_facts == 9
    (mouth,) = subject.facts_of(subject.rows[1])
    assert mouth.relation.column == "mouth"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("珠江\t2320\t南海", "珠江\t2320", "rivers.tsv:4: 2 cells, first “珠江”; .* header, 3"),
        ("珠江\t2320", "\t2320", "rivers.tsv:4: .*a row needs a name"),
        ("2320", " 2320", "rivers.tsv:4: a cell begins or ends with a space"),
        ("东海|", "东海||", "rivers.tsv:2: a cell has an empty value"),
        ("name\t", "名\t", "rivers.tsv:1: the header must be `name`"),
        ("length\tmouth", "length\tlength", "rivers.tsv:1: the header must be"),
        (
            "{name}注入{mouth}。",
            "{name}注入{sea}。",
            r"rivers.toml:\d+: “.*” uses sea.*columns are",
        ),
        ("{name}注入{mouth}。", "{name}注入{mouth。", r"rivers.toml:\d+: “{name}注入{mouth。”"),
        ('title = "河流"', "title = 河流", "rivers.toml: not valid TOML"),
        ('language = "zh"', 'language = "fr"', r"rivers.toml: needs .* a language \(zh or en\)"),
        ('title = "河流"', 'titel = "河流"', "rivers.toml: needs a title"),
        ('title = "河流"', 'title = "河流"\nauthor = ""', "rivers.toml: author: unknown setting"),
        ("[[relations]]", 'fact_columns = ["depth"]\n[[relations]]', "no column depth"),
        (
            'column = "mouth"',
            'column = "sea"',
            "relation on sea: `column` must be .* length, mouth",
        ),
        ("followups", "follow_ups", "relation on length: follow_ups: unknown setting"),
        (
            'answers = ["{name}流入',
            'answers = [7, "{name}流入',
            "`answers` must be a list of strings",
        ),
        ("statements", "distractors", "`statements` must be a list of strings"),
    ],
)
def test_errors_name_file_and_line(folder: MakeFolder, old: str, new: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_subjects(folder(old, new))


def test_the_line_of_an_invalid_template_is_right(folder: MakeFolder) -> None:
    path = folder("{name}汇入哪里？", "{name}汇入哪个{sea}？")
    with pytest.raises(DataError) as error:
        load_subjects(path)
    match = re.search(r"rivers\.toml:(\d+):", str(error.value))
    assert match
    line = (path / "rivers.toml").read_text("utf-8").splitlines()[int(match[1]) - 1]
    assert "{sea}" in line


def test_missing_and_unreadable_files_are_errors(folder: MakeFolder, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="empty: no subjects"):
        load_subjects(empty)
    path = folder()
    (path / "rivers.tsv").write_bytes("name\tlength\n长江\t6300\n".encode("gbk"))
    with pytest.raises(DataError, match=r"rivers\.tsv: cannot be read"):
        load_subjects(path)
    load_subjects.cache_clear()
    (path / "rivers.tsv").unlink()
    with pytest.raises(DataError, match=r"rivers\.tsv: cannot be read"):
        load_subjects(path)
