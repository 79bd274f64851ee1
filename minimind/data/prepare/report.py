"""Report of a preparation: what was dropped and why, with samples and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind.reporting.page import Bar, Folded, Page, Plots, Table
from minimind.reporting.plots import Line, draw
from minimind.reporting.render import write_page

_PAIRS_SHOWN = 20
_PAIR_CHARACTERS = 300


def write_report(
    manifest: Mapping[str, Any], pairs: Sequence[Mapping[str, str]], path: Path
) -> None:
    """Write the report as HTML, and as Markdown next to it. pairs: sampled near-duplicates."""
    before, after = manifest["input_documents"], manifest["documents"]
    cards = {
        "documents": f"{after:,}",
        "of the input": f"{before:,}",
        "kept": f"{after / max(before, 1):.1%}",
        "text": f"{manifest['text_bytes'] / 1e6:,.1f} MB",
    }
    if manifest["tokens"]:
        cards["tokens"] = f"{sum(manifest['tokens'].values()):,}"
    page = Page("Prepared data", f"From {len(manifest['inputs']):,} input files.", cards)
    page.add(
        "Dropped documents",
        "Each document is dropped for the first reason that holds, in the order of the stages.",
        _reasons(manifest),
        *_samples(manifest),
    )
    page.add("Lengths", "Documents by length, before and after.", _lengths(manifest["lengths"]))
    page.add(
        "Near-duplicates",
        "A sample of removed documents, and the document that was kept in place of each. All "
        "sampled pairs are in near-duplicates.json.",
        _cluster_table(manifest["cluster_sizes"]),
        Folded("Sampled pairs", _pairs(pairs)) if pairs else None,
    )
    page.add("Input", "Invalid records are in the folder invalid.", _inputs(manifest["inputs"]))
    write_page(page, path)


def _reasons(manifest: Mapping[str, Any]) -> Table:
    total = max(manifest["input_documents"], 1)
    rows = [
        [
            reason,
            f"{entry['documents']:,}",
            f"{entry['documents'] / total:.2%}",
            f"{entry['characters']:,}",
            Bar(min(entry["documents"] / total, 1.0)),
        ]
        for reason, entry in manifest["dropped"].items()
    ]
    return Table(["reason", "documents", "share", "characters", ""], rows, numbers=(1, 2, 3))


def _samples(manifest: Mapping[str, Any]) -> list[Folded]:
    return [
        Folded(f"Samples: {reason}", Table(["text"], [[text] for text in entry["samples"]]))
        for reason, entry in manifest["dropped"].items()
    ]


def _lengths(lengths: Mapping[str, Mapping[str, int]]) -> Plots | None:
    """Plot the number of documents by length; both axes are logarithmic."""
    lines = [
        Line(name, sorted((float(size), float(count)) for size, count in counts.items()))
        for name, counts in lengths.items()
        if counts
    ]
    if not lines:
        return None
    drawing = draw(lines, "characters", "documents", salt="lengths", logarithmic=True)
    return Plots([("Documents by length, in powers of two", drawing)])


def _cluster_table(sizes: Mapping[str, int]) -> Table:
    rows = [
        [f"{int(size):,} to {2 * int(size) - 1:,}", f"{count:,}"] for size, count in sizes.items()
    ]
    return Table(["documents in a cluster", "clusters"], rows, numbers=(1,))


def _pairs(pairs: Sequence[Mapping[str, str]]) -> Table:
    rows = [
        [pair["removed"][:_PAIR_CHARACTERS], pair["kept"][:_PAIR_CHARACTERS]]
        for pair in pairs[:_PAIRS_SHOWN]
    ]
    return Table(["removed", "kept"], rows, kind="texts")


def _inputs(inputs: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            Path(entry["path"]).name,
            f"{entry['bytes'] / 1e6:,.1f}",
            f"{entry['invalid']['records']:,}",
            ", ".join(f"{count:,} × {r}" for r, count in entry["invalid"]["reasons"].items()),
        ]
        for entry in inputs
    ]
    return Table(["file", "MB", "invalid records", "reasons"], rows, numbers=(1, 2))
