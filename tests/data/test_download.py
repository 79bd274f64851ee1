"""Downloads over real HTTP from a stand-in of both hubs that fails in many ways."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from minimind.data import download
from minimind.data.download import Located, fetch, is_present, locate, origin_of
from minimind.data.registry import Published, PublishedFile, PublishedSet
from minimind.errors import DataError, ResourceError, UsageError
from tests.support.hub_server import COMMIT, HubServer, run_hub_server, sha256

CONTENT = b"".join(b'{"text": "line %d"}\n' % n for n in range(500))
NAME = "tiny:part"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with run_hub_server() as server:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.2")
        monkeypatch.setattr(download, "_BACKOFF_S", 0.001)
        server.add("owner/tiny", "data/part.jsonl", CONTENT)
        yield server


def published(**changes: object) -> Published:
    """A dataset on Hugging Face; `changes` are other facts of the set or of the file."""
    of_file = {key: changes.pop(key) for key in ("sha256", "path") if key in changes}
    file = PublishedFile.model_validate({"path": "data/part.jsonl"} | of_file)
    facts = {"title": "", "stage": "pretrain", "language": "zh", "schema": "text", "source": ""}
    entry = PublishedSet.model_validate(
        facts | {"licence": "mit", "hf": "owner/tiny", "files": {"part": file}} | changes
    )
    return Published(NAME, entry, file)


class Client:
    """Download into a folder; keep the messages and the progress."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, list[str]()
        self.progress: list[tuple[int, int | None]] = []

    def get(self, dataset: Published | None = None, hub: str | None = None) -> Path:
        located = locate(
            dataset or published(),
            self.folder,
            hub,
            self.said.append,
        )  # type: ignore[arg-type]
        return self.fetch(located)

    def fetch(self, located: Located) -> Path:
        return fetch(
            located,
            self.folder,
            progress=lambda done, total: self.progress.append((done, total)),
            say=self.said.append,
        )

    def error(self, dataset: Published | None = None, hub: str | None = None) -> str:
        with pytest.raises(DataError) as caught:
            self.get(dataset, hub)
        return str(caught.value)

    def names(self) -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.name for path in files if not path.name.startswith("."))


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


def test_a_file_is_downloaded_with_its_origin(hub: HubServer, client: Client) -> None:
    path = client.get()
    assert path == client.folder / "tiny" / "part.jsonl"
    assert path.read_bytes() == CONTENT
    origin = origin_of(path)
    assert origin is not None
    del origin["stamp"]
    assert origin == {
        "name": NAME,
        "licence": "mit",
        "hub": "hf",
        "repository": "owner/tiny",
        "revision": COMMIT,
        "path": "data/part.jsonl",
        "bytes": len(CONTENT),
        "sha256": sha256(CONTENT),
    }
    assert client.names() == ["part.jsonl", "part.jsonl.origin"]
    assert client.progress[0] == (0, len(CONTENT))
    assert client.progress[-1] == (len(CONTENT), len(CONTENT))
    assert is_present(published(), path)
    assert client.said == []


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        (["cut:100"], ["", "bytes=100-"]),
        (["cut:100", "cut:50"], ["", "bytes=100-", "bytes=150-"]),
        (["cut:100", "no-range"], ["", "bytes=100-"]),  # sends all: begin again
        (["cut:100", "wrong-range"], ["", "bytes=100-", ""]),
        (["cut:100", "416"], ["", "bytes=100-", ""]),
        (["stall:100"], ["", "bytes=100-"]),
        (["503", "429", "500"], ["", "", "", ""]),
        (["drip"], [""]),
        (["corrupt"], ["", ""]),
        (["cut:100", "corrupt"], ["", "bytes=100-", ""]),
    ],
)
def test_broken_downloads_are_continued(
    hub: HubServer, client: Client, faults: list[str], ranges: list[str]
) -> None:
    hub.faults["data/part.jsonl"] = list(faults)
    assert client.get().read_bytes() == CONTENT
    assert hub.downloads() == ranges
    assert client.names() == ["part.jsonl", "part.jsonl.origin"]


def test_a_later_call_continues(hub: HubServer, client: Client) -> None:
    hub.faults["data/part.jsonl"] = ["cut:100", *["cut:0"] * 4]
    error = client.error()
    assert "the connection was closed after 100 of" in error
    assert "the same command continues" in error
    part = f"part.jsonl.{sha256(CONTENT)[:8]}.part"
    assert client.names() == [part]
    hub.requests.clear()
    assert client.get().read_bytes() == CONTENT
    assert hub.downloads() == ["bytes=100-"]
    assert "continuing data/part.jsonl at 0.0 MB" in client.said


def test_a_file_that_stays_damaged_is_not_kept(hub: HubServer, client: Client) -> None:
    hub.faults["data/part.jsonl"] = ["corrupt", "corrupt"]
    error = client.error()
    assert "delivered a damaged file twice (SHA-256 " in error
    assert f"instead of {sha256(CONTENT)}" in error
    assert client.names() == []


def test_small_files_are_verified_by_their_git_id(hub: HubServer, client: Client) -> None:
    hub.add("owner/tiny", "part.json", CONTENT)
    hub.faults["part.json"] = ["corrupt"]
    path = client.get(published(path="part.json"))
    assert path.read_bytes() == CONTENT
    assert [text for text in client.said if "is damaged (git blob " in text]


def test_another_version_than_the_registered_one_is_refused(client: Client) -> None:
    error = client.error(published(sha256="0" * 64))
    assert f"SHA-256 {sha256(CONTENT)} instead of {'0' * 64}" in error
    assert client.names() == []


def test_a_page_in_place_of_a_file_is_refused(hub: HubServer, client: Client) -> None:
    hub.add("owner/tiny", "page", b"<html>")
    hub.faults["data/part.jsonl"] = [f"{hub.url}/datasets/owner/tiny/resolve/main/page"]
    error = client.error()
    assert f"has 6 bytes at {hub.url}" in error and f"is listed with {len(CONTENT):,}" in error


def test_a_redirect_to_an_unreachable_host_names_the_remedy(hub: HubServer, client: Client) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but not listening: refuses connections
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        hub.faults["data/part.jsonl"] = [f"http://{host}/xet"] * 2
        error = client.error()
        assert f"redirects to {host}, which cannot be reached" in error
        assert "Set HF_ENDPOINT to another mirror" in error
        assert "/datasets/owner/tiny/resolve/main/data/part.jsonl" in error
        hub.add("owner/other", "data/part.jsonl", CONTENT, "modelscope")
        hub.faults["data/part.jsonl"] = [f"http://{host}/xet"] * 2
        error = client.error(published(modelscope="owner/other"), "hf")
    # Commands that train have no --hub, so the message names the one that has.
    command = f"minimind data get tiny:part --hub modelscope --dir {client.folder}"
    assert f"ModelScope has a copy: {command} downloads it. " in error
    hub.faults["data/part.jsonl"] = ["corrupt", "corrupt"]
    assert command in client.error(published(modelscope="owner/other"), "hf")


def test_a_redirect_of_modelscope_is_no_mirror(hub: HubServer, client: Client) -> None:
    hub.add("owner/tiny", "data/part.jsonl", CONTENT, "modelscope")
    hub.faults["data/part.jsonl"] = ["http://127.0.0.1:1/elsewhere"] * 2
    error = client.error(published(modelscope="owner/tiny", hf=None))
    assert "HTTPS_PROXY names a proxy" in error
    assert "HF_ENDPOINT" not in error and "--hub" not in error


def test_tokens_are_sent_to_the_hub_only(
    hub: HubServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with run_hub_server() as storage:
        storage.add("owner/tiny", "data/part.jsonl", CONTENT)
        address = f"{storage.url}/datasets/owner/tiny/resolve/main/data/part.jsonl"
        hub.faults["data/part.jsonl"] = ["cut:10", address]
        assert client.get().read_bytes() == CONTENT
        [(_, headers)] = storage.requests
    assert all(sent["authorization"] == "Bearer secret" for _, sent in hub.requests)
    assert "authorization" not in headers
    assert headers["range"] == "bytes=10-"


def test_modelscope_is_preferred_and_hugging_face_is_the_second_choice(
    hub: HubServer, client: Client
) -> None:
    hub.files.clear()
    for number in range(450):  # three pages
        hub.add("owner/tiny", f"{number}.jsonl", b"", "modelscope")
    hub.add("owner/tiny", "data/part.jsonl", CONTENT, "modelscope")
    both = published(modelscope="owner/tiny", revision=COMMIT)
    located = locate(both, client.folder, None, client.said.append)
    assert (located.repository.hub, located.repository.revision) == ("modelscope", "master")
    hub.faults["data/part.jsonl"] = ["cut:100"]
    assert client.fetch(located).read_bytes() == CONTENT
    assert client.said.pop().endswith("trying again in 0 s")

    hub.files = {("hf", "datasets", "owner/tiny", "data/part.jsonl"): CONTENT}
    located = locate(both, client.folder, None, client.said.append)
    assert located.repository.hub == "hf"
    [said] = client.said
    assert said.endswith(
        "does not have owner/tiny at master (HTTP 404 Not Found); trying Hugging Face"
    )
    with pytest.raises(UsageError, match="is not on ModelScope, but on Hugging Face"):
        locate(published(), client.folder, "modelscope", print)


def test_a_short_commit_is_completed(hub: HubServer, client: Client) -> None:
    client.get(published(revision=COMMIT[:7]))
    origin = origin_of(client.folder / "tiny" / "part.jsonl")
    assert origin and origin["revision"] == COMMIT
    assert "lists no commit abcdef0 of owner/tiny" in client.error(published(revision="abcdef0"))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("401", "(HTTP 401 Unauthorized). It may not exist, be private, or require that its terms"),
        ("403", "are accepted on http://127.0.0.1:"),
        ("404", "(HTTP 404 Not Found)"),
        ("html", "answered with something else than JSON"),
    ],
)
def test_refusals_are_explained(hub: HubServer, client: Client, status: str, message: str) -> None:
    hub.faults["owner/tiny"] = [status]
    error = client.error()
    assert error.startswith(f"{NAME}: 127.0.0.1:")
    assert message in error
    assert "It can also be downloaded by other means from http://127.0.0.1" in error
    assert ("set HF_TOKEN" in error) == (status in ("401", "403"))


def test_a_missing_file_names_a_similar_one(client: Client) -> None:
    error = client.error(published(path="data/parts.jsonl"))
    assert "has no file data/parts.jsonl; did you mean data/part.jsonl?" in error


def test_an_unreachable_hub_and_offline_mode(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        client.get()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    error = client.error()
    assert "127.0.0.1:1 cannot be reached (" in error
    assert f"and saved as {client.folder / 'tiny' / 'part.jsonl'}" in error
    assert len(client.said) == 2, "each repeated attempt is announced"


def test_a_present_file_is_verified(client: Client) -> None:
    path = client.get()
    path.write_bytes(CONTENT + b"\n")
    with pytest.raises(DataError, match=r"is not the published file tiny:part: its SHA-256 is"):
        is_present(published(), path)
    path.with_name("part.jsonl.origin").unlink()
    assert is_present(published(), path), "the user's own file, of which nothing is known"
    with pytest.raises(DataError, match="is not the published file"):
        is_present(published(sha256=sha256(CONTENT)), path)
    path.write_bytes(CONTENT)
    assert is_present(published(sha256=sha256(CONTENT)), path)


def test_parts_of_two_versions_are_not_joined(hub: HubServer, client: Client) -> None:
    hub.faults["data/part.jsonl"] = ["cut:100", *["cut:0"] * 4]
    client.error()
    hub.add("owner/tiny", "data/part.jsonl", CONTENT[::-1])
    assert client.get().read_bytes() == CONTENT[::-1]


def test_a_file_without_a_hash_is_not_continued_by_a_later_call(
    hub: HubServer, client: Client
) -> None:
    located = locate(published(), client.folder, None, client.said.append)
    located = replace(located, file=replace(located.file, sha256=None))
    hub.faults["data/part.jsonl"] = ["cut:100", *["cut:0"] * 4]
    with pytest.raises(DataError):
        client.fetch(located)
    hub.add("owner/tiny", "data/part.jsonl", CONTENT[::-1])
    assert client.fetch(located).read_bytes() == CONTENT[::-1]


def test_another_version_that_appears_meanwhile_is_replaced(hub: HubServer, client: Client) -> None:
    located = locate(published(), client.folder, None, client.said.append)
    target = client.folder / "tiny" / "part.jsonl"
    target.parent.mkdir()
    target.write_bytes(CONTENT[::-1])
    assert client.fetch(located).read_bytes() == CONTENT
    origin = origin_of(target)
    assert origin and origin["sha256"] == sha256(CONTENT)


def test_a_full_disk_is_reported_before_the_download(hub: HubServer, client: Client) -> None:
    located = locate(published(), client.folder, None, print)
    huge = replace(located, file=replace(located.file, size=1 << 60))
    message = r"needs 1,152,921,504\.67 GB, and .* GB are free.*: MINIMIND_DATA names the folder"
    with pytest.raises(ResourceError, match=message):
        client.fetch(huge)
    assert hub.downloads() == []


def test_the_origin_is_plain_json(client: Client) -> None:
    path = client.get()
    assert json.loads(path.with_name("part.jsonl.origin").read_text("utf-8"))["name"] == NAME


def test_two_downloads_of_one_file_do_not_mix(hub: HubServer, client: Client) -> None:
    hub.faults["data/part.jsonl"] = ["drip"]
    located = locate(published(), client.folder, None, print)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(client.fetch, [located] * 2))
    assert paths[0].read_bytes() == CONTENT
    assert hub.downloads() == [""], "the second waits for the first"


def test_the_stand_in_lists_files_as_the_real_hub_does(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its listing is read by the client of Hugging Face."""
    for variable in ("HF_ENDPOINT", "HF_HUB_DOWNLOAD_TIMEOUT"):  # the client keeps them for good
        monkeypatch.delenv(variable)
    client = pytest.importorskip("huggingface_hub")
    hub.add("owner/tiny", "small.json", b"{}")
    info = client.HfApi(endpoint=hub.url).dataset_info("owner/tiny", files_metadata=True)
    large, small = info.siblings
    assert (info.sha, info.card_data["license"]) == (COMMIT, "mit")
    assert (large.rfilename, large.lfs.sha256, large.size) == (
        "data/part.jsonl",
        sha256(CONTENT),
        len(CONTENT),
    )
    assert (small.lfs, small.blob_id) == (None, "9e26dfeeb6e641a33dae4961196235bdb965b21b")
