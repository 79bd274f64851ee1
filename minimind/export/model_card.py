"""The model card: README.md of a published model, generated from its run directories."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from minimind.data.hub import Hub
from minimind.errors import DataError
from minimind.export.training_data import TrainingData, licence_conflicts, training_data_of
from minimind.model import read_config
from minimind.reporting.page import Page
from minimind.reporting.plots import as_file
from minimind.reporting.render import drawings_of, to_markdown
from minimind.reporting.report import make_report
from minimind.reporting.runs import Inputs

_PLOTS = "plots"  # folder of the drawings, in the repository
_TEMPLATES = Environment(
    loader=PackageLoader("minimind.export"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class ModelCard:
    """A model card. files: text by path in the repository, README.md and its plots.

    conflicts: sentences about licences of the training data that may forbid the publication.
    """

    files: dict[str, str]
    data: Sequence[TrainingData]
    conflicts: Sequence[str]


def _records_of(model: Path, directory: Path) -> Path | None:
    """Return the folder with the runs of a model; None for a model directory without a run.

    The folder around such a directory, as `minimind merge` writes it, may hold other runs.
    """
    if model.resolve() != directory.resolve():
        return model
    parent = directory.resolve().parent
    is_of_run = directory.resolve().name == "model" and any(
        (parent / name).is_file() for name in ("recipe.toml", "summary.json")
    )
    return parent if is_of_run else None


def make_model_card(
    model: Path, directory: Path, repository: str, *, hub: Hub, licence: str | None = None
) -> ModelCard:
    """Describe a model: how to run it, training data, metrics, curves, samples, recipes, limits.

    model: model or run directory that the user named. directory: its model directory.
    repository: owner/name on `hub`, whose commands the card names. licence: identifier of the
    model's licence, None if none is stated.
    """
    config = read_config(directory)
    lead = "A small GPT; the records of its training are not here."
    page, inputs = Page(repository, lead, {}), Inputs()
    with suppress(DataError):  # a folder without runs
        if (source := _records_of(model, directory)) is not None:
            report = make_report([source])
            page, inputs = report.page, report.inputs
    page.title = repository.partition("/")[2]
    data = training_data_of(inputs)
    datasets = {source.repositories[hub] for source in data if hub in source.repositories}
    kinds = [run.kind for run in inputs.runs]
    head, separator, sections = to_markdown(page, _PLOTS).partition("\n## ")
    text = _TEMPLATES.get_template("model-card.md.jinja").render(
        repository=repository,
        hub=hub,
        licence=licence,
        datasets=sorted(datasets),
        head=head.strip("\n"),
        sections=(separator + sections).replace(str(Path.home()), "~"),
        config=config,
        data=data,
        languages=list(dict.fromkeys(code for source in data for code in source.languages)),
        only_pretrained=set(kinds) == {"pretrain"},
        has_preferences="dpo" in kinds,
    )
    plots = {f"{_PLOTS}/{name}": as_file(svg) for name, svg in drawings_of(page).items()}
    return ModelCard({"README.md": text} | plots, data, licence_conflicts(data, licence))
