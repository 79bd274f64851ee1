import pytest

from minimind.errors import UsageError
from minimind.service_url import parse_service_url


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://a.com/proxy", "https://a.com/proxy/v1"),
        ("https://a.com/vendor", "https://a.com/vendor/v1"),
        ("https://open.bigmodel.cn/api/paas/v4", "https://open.bigmodel.cn/api/paas/v4"),
        ("https://ark.cn-beijing.volces.com/api/v3/", "https://ark.cn-beijing.volces.com/api/v3"),
        ("https://a.com/v1beta/openai/", "https://a.com/v1beta/openai"),
        ("https://a.com/v1beta", "https://a.com/v1beta"),
    ],
)
def test_v1_is_appended_unless_the_path_names_a_version(text: str, base: str) -> None:
    assert parse_service_url(text) == (base, "127.0.0.1" in text)


@pytest.mark.parametrize("text", ["http://localhost:1", "http://[::1]:1/v1"])
def test_local_hosts(text: str) -> None:
    assert parse_service_url(text)[1]


@pytest.mark.parametrize(
    "text",
    [
        "", "ftp://a", "http://", "file:///etc/passwd", "http://a/?b=1",
        "http://[::1", "http://127.0.0.1:99999", "http://a:b",
    ],
)  # fmt: skip
def test_invalid_urls(text: str) -> None:
    with pytest.raises(UsageError, match="is not the URL of a service; give one such as"):
        parse_service_url(text)
