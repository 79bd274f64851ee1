import pytest

from minimind.data.prepare.normalize import normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<s>第一篇</s> <s>第二篇</s>", "第一篇\n\n第二篇"),
        ("文<|endoftext|><unk><pad>字", "文\n\n字"),
        ("if a < s > b: <script>", "if a < s > b: <script>"),
        ("caf\u0065\u0301", "caf\u00e9"),
        ("ＡＢＣ，１２３", "ＡＢＣ，１２３"),  # NFC keeps the width
        ("一\r\n二\r三\u2028四\u0085五", "一\n二\n三\n四\n五"),
        ("零\u200b宽\ufeff和\x00控制\x7f符\u00ad号", "零宽和控制符号"),
        ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),
        ("\u3000\u3000缩进的段落\n \u3000第二段", "缩进的段落\n第二段"),
        ("def f():\n    return 1\n\tx  =  2   # y", "def f():\n    return 1\n\tx = 2 # y"),
        ("a\xa0\xa0b\u3000c\t\td", "a b c d"),
        ("行尾  \n\n \n\n下一段\n\n", "行尾\n\n下一段"),
        (" \u3000<s>\n", ""),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(expected) == expected
