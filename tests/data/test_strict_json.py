import pytest

from minimind.data.strict_json import parse_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{broken", "not JSON: "),
        ("", "not JSON: "),
        ('{"a": 1} {"a": 1}', "Extra data"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\x00"}', "a NUL character"),
        ('{"a": {"\\u0000": 1}}', "a NUL character"),
        ('{"a": [{"b": "\\udc00"}]}', "lone surrogate"),
        ('{"\\uD800": 1}', "lone surrogate"),
        ('{"a": {"b": 1, "b": 1}}', "a duplicate key"),
        ('{"a": [Infinity]}', "Infinity is not JSON"),
    ],
)
def test_nonstandard_json_is_rejected(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_escaped_backslashes_and_surrogate_pairs_are_accepted() -> None:
    assert parse_json('{"text": "\\\\u0000 and \\\\ud800"}') == {"text": "\\u0000 and \\ud800"}
    assert parse_json('"\\ud83d\\ude00 \\uac00"') == "😀 가"
