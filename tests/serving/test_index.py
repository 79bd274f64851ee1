import httpx2 as httpx

from minimind.version import __version__
from tests.support.services import Process


def test_the_root_names_the_endpoints_and_the_documentation(process: Process) -> None:
    with httpx.Client(base_url=process.url) as client:
        index = client.get("/").json()
        assert (index["service"], index["version"]) == ("minimind", __version__)
        assert index["endpoints"] == [
            "GET /",
            "GET /health",
            "GET /metrics",
            "GET /v1/models",
            "GET /v1/models/{model}",
            "POST /v1/chat/completions",
            "POST /v1/completions",
        ]
        assert client.get(index["docs"]).status_code == 200
