"""Accounting of invalid records: counted by reason, quarantined in a file, bounded in number."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from minimind.data.locations import Location, UrlPath, new_file
from minimind.errors import DataError, ResourceError

NOT_UTF_8 = "not UTF-8"
CONVERT_TO_UTF_8 = "convert it: iconv -f {} -t UTF-8 OLD > NEW"
_EXCERPT = 200  # characters
_MIN_RECORDS = 1000  # before the fraction of invalid records is checked
_MAX_QUARANTINED = 10_000
_MAX_REASONS = 100
_NUM_EXAMPLES = 3  # locations kept for each reason
_ADVICE = (
    "Fix the file (`minimind data inspect` shows its contents), name its schema, instead of with "
    '--data, with \'data.sources=[{path="FILE", schema="NAME"}]\', or allow more with '
    "data.max_invalid_fraction=…"
)
FIX_OR_LEAVE_OUT = "Fix the file (`minimind data inspect` shows its contents), or leave it out"


@dataclass
class InvalidRecords:
    """Invalid records, counted by reason; the first of them are quarantined in the file `path`.

    A location is FILE:LINE, or FILE:ROW for Parquet. If more than the fraction `max_fraction` of
    the records is invalid, `add` raises a DataError that ends with `advice`.
    """

    path: Location | None = None
    max_fraction: float = 1.0
    num_valid: int = 0
    total: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    locations: dict[str, list[str]] = field(default_factory=dict)  # the first of each reason
    first: str = ""  # location and reason of the first one
    advice: str = _ADVICE
    _lines: list[str] = field(default_factory=list)  # for a URL, which cannot be appended to

    def add(self, file: Location, line: int, reason: str, content: Any = "") -> None:
        """Count and quarantine a record. Raises DataError when too many are invalid."""
        # Reasons quote text from the file, such as field names: replace control characters.
        reason = "".join(c if c.isprintable() else "\ufffd" for c in reason[:_EXCERPT])
        self.first = self.first or f"{file}:{line}: {reason}"
        counted_as = reason
        if counted_as not in self.reasons and len(self.reasons) >= _MAX_REASONS:
            counted_as = "another reason"
        self.reasons[counted_as] += 1
        self.total += 1
        locations = self.locations.setdefault(counted_as, [])
        if len(locations) < _NUM_EXAMPLES:
            locations.append(f"{file}:{line}")
        if self.path and self.total <= _MAX_QUARANTINED:
            self._quarantine({"file": str(file), "line": line, "reason": reason}, content)
        self.check(self.max_fraction)

    def describe(self) -> str:
        """Return the location and reason of the first one, and the counts by reason."""
        counts = [f"{count:,} × {reason}" for reason, count in self.reasons.most_common(3)]
        others = len(self.reasons) - len(counts)
        counts += [f"{others} other reasons"] * bool(others)
        seen = self.num_valid + self.total
        return f"{self.first}. {self.total:,} of {seen:,} records are invalid: {', '.join(counts)}"

    def merge(self, other: "InvalidRecords") -> None:
        """Add the counts of `other`, without writing or checking."""
        self.num_valid += other.num_valid
        self.total += other.total
        self.first = self.first or other.first
        self.reasons.update(other.reasons)
        for reason, locations in other.locations.items():
            self.locations[reason] = (self.locations.get(reason, []) + locations)[:_NUM_EXAMPLES]

    def _quarantine(self, entry: dict[str, Any], content: Any) -> None:
        assert self.path
        entry["text"] = _excerpt(content)
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        if isinstance(self.path, UrlPath):
            self._lines.append(line)
            return
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(line)
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot write the quarantined records ({error.strerror}); "
                "free some disk space, or choose another folder with data.store=DIR"
            ) from error

    def save(self) -> None:
        """Write the quarantined records if `path` is a URL; files have them already."""
        if self.path and self._lines:
            with new_file(self.path) as file:
                file.write_text("".join(self._lines), "utf-8", "backslashreplace", "\n")

    def check(self, max_fraction: float, *, final: bool = False) -> None:
        """Raise DataError when more than `max_fraction` of the records so far are invalid.

        Unless all records have been read (`final`), the fraction of fewer than 1,000 records is not
        checked.
        """
        seen = self.num_valid + self.total
        if self.total <= max_fraction * seen or not (final or seen >= _MIN_RECORDS):
            return
        raise too_many(self.describe(), self.total, self.path, self.advice)


def too_many(summary: str, total: int, path: Location | None, advice: str = _ADVICE) -> DataError:
    """Return the error for `total` invalid records. summary: as of `InvalidRecords.describe`."""
    where = hint = ""
    if path:
        which = "They" if total <= _MAX_QUARANTINED else f"The first {_MAX_QUARANTINED:,}"
        where = f". {which} are in {path}"
    if NOT_UTF_8 in summary:
        hint = f" If the file is GBK, {CONVERT_TO_UTF_8.format('GB18030')}."
    return DataError(f"{summary}.{hint} {advice}{where}")


def _excerpt(content: Any) -> str:
    if isinstance(content, bytes):
        content = content[: _EXCERPT * 4].decode("utf-8", "backslashreplace")
    if not isinstance(content, str):
        try:
            content = json.dumps(content, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):
            return ""
    return content[:_EXCERPT]
