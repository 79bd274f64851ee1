"""Published data sets by name, downloaded from the Hugging Face hub: the extra `hub`."""

from dataclasses import dataclass
from pathlib import Path

from minimind.errors import DataError, UsageError, install_line


@dataclass(frozen=True)
class Published:
    """One file of a data set on the hub, what it is called here, and in which commit it is."""

    repository: str
    file: str
    name: str
    revision: str = "main"  # a commit, or a branch, which moves

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, so that the file is always the same."""
        return len(self.revision) == 40

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        there = f"{self.repository}/resolve/{self.revision}/{self.file}"
        return f"https://huggingface.co/datasets/{there}"


PUBLISHED = {
    # The commit with which its conversion to another layout began, of which nobody knows whether it
    # leaves the archive.
    "ceval": Published(
        "ceval/ceval-exam",
        "ceval-exam.zip",
        "ceval-exam.zip",
        "1577cea73fafe135738871aca0d5339994dbb41d",
    ),
    # Not pinned: no commit of it is known to us, and the name of the file holds its version.
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
    """A sentence for errors: how to download a data set; empty if it is not published."""
    if name not in PUBLISHED:
        return ""
    return f". With a network, `minimind data get {name}` downloads it"


def download(name: str, folder: Path) -> Path:
    """The file of a published data set, in `folder`; one that is there is not downloaded again.

    Raises UsageError for an unknown name or a missing library, DataError when the hub does not
    give it.
    """
    if name not in PUBLISHED:
        raise UsageError(f"{name} is not known; known are {', '.join(PUBLISHED)}")
    published = PUBLISHED[name]
    place = folder / published.name
    if place.is_file():
        return place
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
        found = hf_hub_download(
            published.repository,
            published.file,
            repo_type="dataset",
            revision=published.revision,
            local_dir=folder,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        # The library's own words run over many lines, which begin with what happened.
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), "no answer")
        raise DataError(
            f"{name}: the hub does not give it ({reason}). Is there a network? Where the hub "
            "cannot be reached, HF_ENDPOINT names a mirror; or download "
            f"{published.url} elsewhere and put it into {folder}"
        ) from error
    if Path(found) != place:
        Path(found).replace(place)
    return place
