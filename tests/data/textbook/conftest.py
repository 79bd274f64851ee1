"""A textbook of one small subject, and copies of it with an error."""

from collections.abc import Callable
from pathlib import Path

import pytest

from minimind.data.textbook import Subject, load_subjects

TSV = """\
name	length	mouth
长江	6300	东海|太平洋
黄河	5464	渤海
珠江	2320	南海
尼罗河	6670	地中海
伏尔加河	3530	里海
"""
TOML = """\
title = "河流"
language = "zh"

[[relations]]
column = "length"
key = ["{length}公里"]
statements = ["{name}长{length}公里。", "{name}的长度是{length}公里。", "{name}有{length}公里。"]
questions = [
    "{name}有多长？",
    "{name}多长？",
    "{name}的长度是多少？",
    "{name}全长多少公里？",
    "请说出{name}的长度。",
]
held_out = ["你知道{name}有多长吗？", "{name}有多少公里长？"]
answers = ["{name}全长{length}公里。", "{name}长{length}公里。"]
followups = ["它有多长？", "它全长多少公里？"]

[[relations]]
column = "mouth"
statements = ["{name}流入{mouth}。", "{name}注入{mouth}。", "{name}的水流到{mouth}。"]
questions = [
    "{name}流入哪里？",
    "{name}注入哪里？",
    "{name}最后流到哪里？",
    "{name}的水流到哪里去？",
    "说说{name}流入哪里。",
]
held_out = ["你知道{name}流入哪里吗？", "{name}汇入哪里？"]
answers = ["{name}流入{mouth}。", "{name}注入{mouth}。"]
followups = ["它流入哪里？", "它注入哪里？"]
"""

MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """Return a function that writes the small textbook, with each `old` text replaced by `new`."""

    def make(*changes: str) -> Path:
        texts = {"rivers.tsv": TSV, "rivers.toml": TOML}
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert any(old in text for text in texts.values()), f"“{old}” is in neither file"
            texts = {name: text.replace(old, new, 1) for name, text in texts.items()}
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return make


@pytest.fixture
def rivers(folder: MakeFolder) -> Subject:
    """The small textbook, without errors."""
    (subject,) = load_subjects(folder())
    return subject
