"""The data that a model was trained on, with its licences and what these forbid."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minimind.data.hub import Hub
from minimind.data.registry import find, is_name
from minimind.reporting.runs import Inputs, Run

UNKNOWN = "unknown"
_TEXTBOOK = "minimind's textbook"
_FREE = ("apache-2.0", "mit", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "bsd-3-clause", "odc-by")
_SHARE_ALIKE = re.compile(r"-sa-|^(a|l)?gpl|^gfdl")
_NON_COMMERCIAL = re.compile(r"-nc(-|$)")


@dataclass(frozen=True)
class TrainingData:
    """A source of training data. stages: the kinds of stages that read it.

    licence: as its publisher states it, several separated by commas, or "unknown". repositories:
    its names on the hubs that have it. languages: codes, none where unknown.
    """

    name: str
    stages: tuple[str, ...]
    licence: str = UNKNOWN
    repositories: Mapping[Hub, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ()

    @property
    def licences(self) -> list[str]:
        """The licences one by one, in lower case."""
        stated = self.licence.replace("(unchecked)", "").split(",")
        return [licence.strip().lower() for licence in stated]


def training_data_of(inputs: Inputs) -> list[TrainingData]:
    """Return the data of all stages that a model went through, in the order of first use.

    Adapters are left out, since a model directory does not contain them.
    """
    stages: dict[str, list[str]] = {}
    textbook: set[str] = set()
    for run in inputs.runs:
        if run.kind == "lora":
            continue
        for path in _source_paths(run):
            stages.setdefault(path, []).append(run.kind)
            if inputs.demos and Path(path).parent.name == "corpus":
                textbook.add(path)
    found: dict[str, TrainingData] = {}
    for path, kinds in stages.items():
        data = _describe(path, tuple(dict.fromkeys(kinds)), path in textbook)
        before = found.get(data.name)
        stages_of_both = (*(before.stages if before else ()), *data.stages)
        found[data.name] = replace(data, stages=tuple(dict.fromkeys(stages_of_both)))
    return list(found.values())


def licence_conflicts(sources: Sequence[TrainingData], licence: str | None) -> list[str]:
    """Return a sentence for each source whose licence may forbid this publication.

    licence: that of the model; None: none is stated. This is a reminder, not legal advice.
    """
    chosen = (licence or "").lower()
    shown = f"as {licence}" if licence else "without a licence"
    conflicts = []
    for source in sources:
        for one in source.licences:
            if one == UNKNOWN:
                conflicts.append(
                    f"{source.name}: its licence is unknown; make sure that you may publish a "
                    "model trained on it"
                )
            elif _NON_COMMERCIAL.search(one) and not _NON_COMMERCIAL.search(chosen):
                conflicts.append(
                    f"{source.name}: {one} forbids commercial use, and the model would be "
                    f"published {shown}"
                )
            elif _SHARE_ALIKE.search(one) and one != chosen:
                conflicts.append(
                    f"{source.name}: {one} requires derived works to be under the same licence, "
                    f"and the model would be published {shown}"
                )
            elif one not in _FREE and one != chosen and not _NON_COMMERCIAL.search(one):
                conflicts.append(f"{source.name}: {one} has terms of its own; read them first")
    return conflicts


def _source_paths(run: Run) -> list[str]:
    data = run.settings.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if not isinstance(sources, list):
        return []
    paths = [source.get("path") for source in sources if isinstance(source, dict)]
    return [path for path in paths if isinstance(path, str)]


def _describe(path: str, kinds: tuple[str, ...], is_textbook: bool) -> TrainingData:
    if is_textbook:
        return TrainingData(_TEXTBOOK, kinds, "apache-2.0", languages=("zh", "en"))
    if is_name(path):
        published = find(path)
        repositories = {each.hub: each.id for each in published.repositories()}
        languages = tuple(published.language.split("+"))
        return TrainingData(published.name, kinds, published.licence, repositories, languages)
    # The name of a file, not its folder: a model card should not publish paths of this machine.
    return TrainingData(Path(path).name, kinds)
