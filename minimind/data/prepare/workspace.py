"""The output folder: identity of a preparation, markers of finished tasks, final manifest.

DIR/manifest.json           inputs, settings, counts, hashes of all files; written last
    report.html, report.md
    text/part-00000.jsonl.zst …   the prepared text: --data DIR/text
    tokens/KEY/             token store: data.store=DIR/tokens
    invalid/00000.jsonl     invalid records of each input file (quarantine)
    work/identity.json      inputs and settings of the preparation in progress
         STAGE/NAME.json    result of a finished task
         STAGE/…            its files; `work` is removed at the end
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from minimind.data.input_files import list_locations
from minimind.data.locations import Location, UrlPath, is_below, remove, remove_folder, write_json
from minimind.data.stamps import sha256_of, stamp_of
from minimind.errors import DataError, ResourceError, UsageError
from minimind.files import read_json_object

FORMAT = 1  # of the manifest; also changes when the same settings give another output
MANIFEST, IDENTITY = "manifest.json", "identity.json"
_OUTPUTS = ("manifest.json", "near-duplicates.json", "report.html", "report.md", "report-plots")
_KNOWN = {*_OUTPUTS, "text", "tokens", "invalid", "work"}


@dataclass(frozen=True)
class Workspace:
    """An output folder, of this machine or a URL."""

    folder: Location

    @property
    def text(self) -> Location:
        return self.folder / "text"

    @property
    def tokens(self) -> Location:
        return self.folder / "tokens"

    @property
    def invalid(self) -> Location:
        return self.folder / "invalid"

    @property
    def token_parts(self) -> Location:
        """Return the folder in which the token store is written.

        A URL cannot rename a folder, so there it is the final one.
        """
        return self.tokens / "text" if isinstance(self.folder, UrlPath) else self.stage("tokens")

    def stage(self, name: str) -> Location:
        """Return the folder of a stage."""
        return self.folder / "work" / name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; the operating system releases it if the process dies.

        A URL has no locks: there the folder is only checked. Raises UsageError if another process
        holds it or if it has files of something else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self.folder.iterdir()} - _KNOWN
        except FileExistsError:
            raise UsageError(f"--out {self.folder} is a file; choose a folder") from None
        # Hidden ones are the lock, and what file managers and network disks leave.
        if foreign := sorted(name for name in names if not name.startswith(".")):
            raise UsageError(
                f"--out {self.folder} contains other files, such as {foreign[0]}; choose a new "
                "or empty folder"
            )
        if isinstance(self.folder, UrlPath):
            yield
            return
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another process is preparing data in {self.folder}; wait until it has finished, "
                "or choose another --out"
            ) from None
        except OSError as error:
            raise ResourceError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another --out"
            ) from error
        try:
            for temporary in self.folder.rglob(".*.tmp"):  # of a killed process
                temporary.unlink()
            yield
        finally:
            lock.release()

    def results(self, stage: str) -> dict[str, dict[str, Any]]:
        """Return the results of the finished tasks of a stage, by name."""
        results = {}
        for marker in self.stage(stage).glob("[!.]*.json"):
            try:
                results[marker.stem] = read_json_object(marker)
            except ValueError as error:
                raise DataError(
                    f"{marker} is damaged ({error}); remove it and run the same command again"
                ) from None
        return results

    def record(self, stage: str, name: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Record a finished task; return its result as it will be read again."""
        path = self.stage(stage) / f"{name}.json"
        write_json(path, result)
        return read_json_object(path)

    def remove_files(self, stage: str, pattern: str = "*") -> None:
        """Remove the files of a stage that the following stages do not need; keep the markers."""
        remove(path for path in self.stage(stage).glob(pattern) if path.suffix != ".json")

    def begin(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Begin or continue a preparation; return the manifest if it is finished.

        Raises UsageError if the folder belongs to a preparation with other settings or inputs.
        """
        for path in (self.folder / MANIFEST, self.folder / "work" / IDENTITY):
            try:
                earlier = read_json_object(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{path}: damaged ({error}); remove {self.folder} and start again"
                ) from error
            stored = earlier["identity"] if path.name == MANIFEST else earlier
            self._check(stored, identity)
            if path.name == MANIFEST:
                self._check_outputs(earlier)
                self._remove_work()  # of a process that was killed at the very end
                return earlier
            return None
        write_json(self.folder / "work" / IDENTITY, identity)
        return None

    def _check(self, earlier: dict[str, Any], identity: dict[str, Any]) -> None:
        before, now = flatten(earlier), flatten(identity)
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        changed = [key for key in changed if not key.startswith("inputs.")] or changed
        if changed:
            key = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UsageError(
                f"{self.folder} was prepared from other inputs or settings: {key} was "
                f"{_shown(before.get(key))} and is now {_shown(now.get(key))}{more}. "
                "Choose another --out, or remove the folder"
            )

    def _check_outputs(self, manifest: dict[str, Any]) -> None:
        for entry in manifest["files"]:
            path = self.text / entry["name"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise DataError(
                    f"{path} is missing or incomplete, though the preparation was finished; "
                    f"remove {self.folder} and start again"
                )

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest and remove the working files."""
        write_json(self.folder / MANIFEST, manifest)
        self._remove_work()

    def _remove_work(self) -> None:
        if (self.folder / "work").exists():
            remove_folder(self.folder / "work")


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries and lists of dictionaries, by dotted key."""
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        items = enumerate(values)  # type: ignore[assignment]
    else:
        return {prefix.rstrip("."): values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def list_inputs(paths: Sequence[str], out: Location) -> list[Location]:
    """Return the files that `paths` name, without those of the output folder.

    It may be inside an input folder. Raises UsageError for a path without other files.
    """
    files: dict[Location, None] = {}
    for path in paths:
        inputs = [file for file in list_locations(path) if not is_below(file, out)]
        if not inputs:
            raise UsageError(f"{path}: all of its files are in --out {out}; choose another --out")
        files |= dict.fromkeys(inputs)
    return list(files)


def check_unchanged(
    files: Sequence[Location],
    results: Mapping[str, Mapping[str, Any]],
    name_of: Callable[[int], str],
) -> None:
    """Raise UsageError if an input file differs from the one that was read before.

    results: of the stage `read`, by task name. As in token stores, a file is hashed again only if
    its stamp differs.
    """
    for number, file in enumerate(files):
        earlier = results.get(name_of(number))
        if earlier is None or earlier["input"]["stamp"] == stamp_of(file):
            continue
        if earlier["input"]["sha256"] != sha256_of(file):
            raise UsageError(
                f"{file} has changed since it was read; choose another --out, or remove the folder"
            )
