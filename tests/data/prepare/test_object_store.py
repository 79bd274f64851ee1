"""Preparation in an S3 service (moto), with processes that are killed, and with two Ray nodes."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind.data.locations import UrlPath
from minimind.data.prepare.pipeline import prepare
from minimind.data.prepare.settings import load_prepare_settings
from minimind.errors import ResourceError
from minimind.training.reporter import Reporter
from tests.data.prepare.test_pipeline import SETTINGS, hashes, inputs, run

__all__ = ["inputs"]

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(inputs: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket of an S3 service on this machine, with the inputs below `in`."""
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        while True:
            assert server.poll() is None, "the service has ended"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        s3fs.S3FileSystem.clear_instance_cache()  # of another service
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        for file in inputs:
            system.put_file(str(file), f"bucket/in/{file.name}")
        yield "s3://bucket"
    finally:
        server.terminate()
        server.wait()


def download(bucket: str, folder: Path) -> Path:
    import s3fs

    s3fs.S3FileSystem().get(f"{bucket}/", f"{folder}/", recursive=True)
    return folder


def without_quarantine(values: dict[str, str]) -> dict[str, str]:
    """Leave out the quarantined records, which name the input file."""
    return {name: value for name, value in values.items() if not name.startswith("invalid")}


def test_killed_anywhere_it_continues(
    bucket: str, inputs: list[Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    run(inputs, tmp_path / "local", tokenizer=tokenizer_dir)
    out = UrlPath(f"{bucket}/out")
    command = [sys.executable, "-m", "minimind", "data", "prepare", f"{bucket}/in", *SETTINGS,
               "--out", str(out), "--tokenizer", str(tokenizer_dir), "--workers", "2"]  # fmt: skip
    for stage in ("read", "filter", "match", "write"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not any((out / "work" / stage).glob("*.json")):
                assert process.poll() is None, f"it ended before {stage}"
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert not list((out / "work").iterdir())
    copy = download(str(out), tmp_path / "copy")
    assert without_quarantine(hashes(copy)) == without_quarantine(hashes(tmp_path / "local"))


def test_two_ray_nodes_share_a_bucket(
    bucket: str,
    inputs: list[Path],
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    run(inputs, tmp_path / "local", tokenizer=tokenizer_dir)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        prepare(
            [f"{bucket}/in"],
            UrlPath(f"{bucket}/ray"),
            load_prepare_settings("zh", SETTINGS),
            tokenizer=tokenizer_dir,
            workers=2,
            memory_bytes=2_000_000_000,
            engine="ray",
            reporter=Reporter(),
        )
    finally:
        cluster.shutdown()
    copy = download(f"{bucket}/ray", tmp_path / "copy")
    assert without_quarantine(hashes(copy)) == without_quarantine(hashes(tmp_path / "local"))


def test_a_missing_bucket_and_a_service_that_is_down(
    bucket: str, inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_prepare_settings("zh", SETTINGS)
    with pytest.raises(ResourceError, match="check that the bucket exists"):
        prepare([str(inputs[0])], UrlPath("s3://no-bucket/out"), settings, reporter=Reporter())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ResourceError, match=r"s3://bucket/out.*cannot be accessed \(Endpoint"):
        prepare([str(inputs[0])], UrlPath(f"{bucket}/out"), settings, reporter=Reporter())
