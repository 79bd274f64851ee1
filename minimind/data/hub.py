"""Published benchmarks by name, downloaded from the Hugging Face Hub (the extra `hub`)."""

from dataclasses import dataclass
from pathlib import Path

from minimind.errors import DataError, UsageError, install_line


@dataclass(frozen=True)
class Published:
    """A file of a dataset on the Hub, and the name under which it is stored locally."""

    repository: str
    file: str
    name: str
    revision: str = "main"  # a commit, or a branch, which may move

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a commit, so that the file never changes."""
        return len(self.revision) == 40

    @property
    def url(self) -> str:
        """URL for a download in a browser."""
        path = f"{self.repository}/resolve/{self.revision}/{self.file}"
        return f"https://huggingface.co/datasets/{path}"


PUBLISHED = {
    # Pinned to the last commit that contains the zip.
    "ceval": Published(
        "ceval/ceval-exam",
        "ceval-exam.zip",
        "ceval-exam.zip",
        "1577cea73fafe135738871aca0d5339994dbb41d",
    ),
    # Not pinned to a commit. The file name contains the version.
    "cmmlu": Published("haonan-li/cmmlu", "cmmlu_v1_0_1.zip", "cmmlu_v1_0_1.zip"),
    "mmlu": Published(
        "cais/mmlu", "data.tar", "mmlu.tar", "c30699e8356da336a370243923dbaf21066bb9fe"
    ),
    "gsm8k": Published(
        "openai/gsm8k",
        "main/test-00000-of-00001.parquet",
        "gsm8k.parquet",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
    ),
}


def download_hint(name: str) -> str:
    """Return the end of an error message that names the download command, or ""."""
    if name not in PUBLISHED:
        return ""
    return f". `minimind data get {name}` downloads it"


def download(name: str, folder: Path) -> Path:
    """Return the file of a published dataset in `folder`; download it if it is not there.

    Raises UsageError for an unknown name or a missing library, DataError when the download fails.
    """
    if name not in PUBLISHED:
        raise UsageError(f"{name} is not a known dataset; available are {', '.join(PUBLISHED)}")
    published = PUBLISHED[name]
    target = folder / published.name
    if target.is_file():
        return target
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise UsageError(
            f"downloading needs huggingface_hub: {install_line('hub')}. "
            f"Or put {published.url} into {folder} yourself"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        downloaded = hf_hub_download(
            published.repository,
            published.file,
            repo_type="dataset",
            revision=published.revision,
            local_dir=folder,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        # The library's messages have many lines; the first says what happened.
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), "no answer")
        raise DataError(
            f"{name}: the download failed ({reason}). Check the network connection. If the Hub "
            "cannot be reached, set HF_ENDPOINT to a mirror, or download "
            f"{published.url} on another machine and put it into {folder}"
        ) from error
    if Path(downloaded) != target:
        Path(downloaded).replace(target)
    return target
