import pytest

from minimind.web.markdown import Part, label, parts_of


def test_plain_text_stays_plain() -> None:
    for text in ("长江有多长？", "a * b = c", "<b>x</b>", "1 < 2 :smile: $x$", "一\n二\n\n三"):
        assert parts_of(text) == [Part("text", text)]
    assert parts_of("") == parts_of(" \n") == []


def test_code_is_set_apart() -> None:
    answer = "看：\n```Python\nprint('<b>')\n```\n好。\n```\nhalf"
    assert parts_of(answer) == [
        Part("text", "看："),
        Part("code", "print('<b>')", "python"),
        Part("text", "好。"),
        Part("code", "half", None),
    ]
    assert parts_of("```<script>\nx\n```")[0].language is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("**粗** 字", "**粗** 字"),
        ("- 一\n- 二", "- 一  \n- 二"),
        ("1. 一\n2. 二", "1. 一  \n2. 二"),
        ("# 题\n文", "# 题  \n文"),
        ("**a** <img src=x>", "**a** \\<img src=x>"),
        ("**a** ![b](http://c)", "**a** \\!\\[b\\](http\\:\u2060//c)"),
        ("`a` \\`![b](c)`", "`a` \\\\`\\!\\[b\\](c)`"),
        ("`a`\n~~~\nb\n~~~", "`a`  \n\\~\\~\\~  \nb  \n\\~\\~\\~"),
        (
            "**a** :red[b] $c$ &lt; www.d.e f@g.h",
            "**a** \\:red\\[b\\] \\$c\\$ \\&lt; www\u2060.d.e f\u2060\\@g.h",
        ),
    ],
)
def test_what_sets_text_stays_and_what_reaches_out_does_not(text: str, shown: str) -> None:
    assert parts_of(text) == [Part("markdown", shown)]


def test_labels_are_literal() -> None:
    expected = "长江_1 \\*\\*a\\*\\* \\:x\\: \\[b\\]\\(c\\) “好”"
    assert label("长江_1 **a** :x: [b](c) “好”") == expected
