import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.web.markdown import Part, label, parts_of

HARMLESS = {
    *("p", "br", "hr", "strong", "em", "s", "code", "pre", "blockquote", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}


class ParsedHTML(HTMLParser):
    """Elements, attributes and text of an HTML fragment."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {f"{name}={value}" for name, value in attrs}
        self.text += "\n" if tag == "br" else ""

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(answer: str) -> ParsedHTML:
    """Parse the HTML parts of an answer."""
    return ParsedHTML("".join(part.content for part in parts_of(answer) if part.kind == "html"))


def test_plain_text_stays_plain() -> None:
    for text in (
        *("长江有多长？", "a * b = c", "<b>x</b>", "1 < 2 :smile: $x$", "一\n二\n\n三"),
        *("　　床前明月光，\n　　疑是地上霜。", "C:\\Users\\me", "$a*b*c$", "[a](b)"),
    ):
        assert parts_of(text) == [Part("text", text)]
    assert parts_of("") == parts_of(" \n") == []


def test_code_blocks_are_separate_parts() -> None:
    answer = "看：\n```Python\n\nprint('<b>')\n```\n好。\n\n    a  [0]\n\n完。\n~~~\nhalf"
    assert parts_of(answer) == [
        Part("text", "看："),
        Part("code", "\nprint('<b>')\n", "python"),
        Part("text", "好。"),
        Part("code", "a  [0]\n"),
        Part("text", "完。"),
        Part("code", "half"),
    ]
    assert parts_of("```<script>\nx\n```")[0].language is None


CODE = [
    "x[0] < y", r"C:\Users\me", "a: int", "![b](c)", "$x$ :red[a] &lt;", "a  b", "f(*a, **k)",
    "www.d.e f@g.h", r"\*", "<b>", "~/x", "a | b", "*",
]  # fmt: skip


@pytest.mark.parametrize("code", CODE)
def test_code_is_shown_as_written(code: str) -> None:
    assert rendered(f"**a** `{code}` b").text.strip() == f"a {code} b"
    in_list = rendered(f"1. a\n\n   ```py\n   {code}\n     {code}\n   ```\n2. b").text
    assert f"{code}\n  {code}\n" in in_list
    assert f"{code}\n" in rendered(f"> a\n>\n>     {code}\n").text
    assert parts_of(f"a\n\n    {code}")[1] == Part("code", f"{code}\n")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**粗** 字", "<p><strong>粗</strong> 字</p>"),
        ("- 一\n- 二", "<ul><li>一</li><li>二</li></ul>"),
        ("3. 一\n4. 二", '<ol start="3"><li>一</li><li>二</li></ol>'),
        ("# 题\n文\n字", "<h1>题</h1><p>文<br>字</p>"),
        ("**a** <img src=x>", "<p><strong>a</strong> &lt;img src=x&gt;</p>"),
        ("**a** ![b](http://c)", "<p><strong>a</strong> ![b](http://c)</p>"),
        (r"`a` \`![b](c)`", "<p><code>a</code> `![b](c)`</p>"),
        (r"\*a\*", "<p>*a*</p>"),
        (
            r"**a** \(x\_1\) \[\{y\}\] $a*b*c$",
            r"<p><strong>a</strong> \(x\_1\) \[\{y\}\] $a*b*c$</p>",
        ),
        ("$5 **not** $6", "<p>$5 <strong>not</strong> $6</p>"),
        ("**a** &lt; www.d.e f@g.h", "<p><strong>a</strong> &amp;lt; www.d.e f@g.h</p>"),
        ("~~a~~ <http://b>", "<p><s>a</s> &lt;http://b&gt;</p>"),
        (
            "| a |\n|:-:|\n| <b> |",
            '<table><thead><tr><th style="text-align:center">a</th></tr></thead><tbody><tr>'
            '<td style="text-align:center">&lt;b&gt;</td></tr></tbody></table>',
        ),
    ],
)
def test_formatting_is_rendered_and_links_are_text(text: str, html: str) -> None:
    [part] = parts_of(text)
    assert (part.kind, re.sub(r"(?<=>)\n|\n(?=<)", "", part.content)) == ("html", html)


PIECES = [
    *("[", "](", ")", "![", "<", ">", "&lt;", "`", "```", "**", "*", "_", "~~", "$", "$$", "|"),
    *(
        "\n",
        "\n\n",
        "    ",
        "- ",
        "1. ",
        "> ",
        "# ",
        "|-|",
        "\\",
        "\\(",
        "\\)",
        '"',
        "'",
        ": ",
        "//",
    ),
    *("javascript:x", "http://b.example", "<script>", "<img src=x onerror=y>", "<!--", "-->"),
    *("a", "长", "@", "&#60;"),
]
CONSTANT = re.compile(r"style=text-align:(left|center|right)|start=\d+")


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_only_harmless_elements_are_produced(answer: str) -> None:
    found = rendered(f"**a** {answer}\n\n**b**")
    assert found.elements <= HARMLESS
    assert {
        a for a in found.attributes if not re.fullmatch(r"style=text-align:\w+|start=\d+", a)
    } == set()


@pytest.mark.parametrize("piece", ["\\(", "\\[", "$", "$$", "*", "`", "[", "> ", "|"])
def test_repeated_markup_is_rendered(piece: str) -> None:
    assert parts_of(f"**a** {piece * 5000}")


def test_labels_are_literal() -> None:
    expected = "长江_1 \\*\\*a\\*\\* \\:x\\: \\[b\\]\\(c\\) “好”"
    assert label("长江_1 **a** :x: [b](c) “好”") == expected
