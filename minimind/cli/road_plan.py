"""What a road will take, before it begins: data, licences, sizes, tokens and time of each step."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from minimind.cli import console
from minimind.cli.eval import task_datasets
from minimind.cli.plan import duration
from minimind.cli.steps import planned_tokens
from minimind.errors import MinimindError

if TYPE_CHECKING:
    from minimind.config.road import Road, RoadStage
    from minimind.config.settings import Recipe

_BYTES_PER_TOKEN = 3.7  # of Chinese text, with a vocabulary of 6,400 tokens
_TRIAL_S = 3.0  # duration of the speed measurement
_UNKNOWN = "unknown"
_NUM_MEASURED = 100  # conversations


def show_plan(road: "Road", recipes: "Mapping[str, Recipe]") -> None:
    """Print a table of all steps. Downloads nothing, and trains only to measure the speed."""
    rate = _measure_rate(next(iter(recipes.values())))
    stages = {name: estimate_tokens(recipe, road.stages[name]) for name, recipe in recipes.items()}
    seconds = {
        name: recipe.weighted_tokens(tokens) / rate if (tokens := stages[name]) and rate else None
        for name, recipe in recipes.items()
    }
    rows = _rows("tokenizer", road.tokenizer.data)
    for name, recipe in recipes.items():
        tokens, time = stages[name], seconds[name]
        rows += _rows(
            f"{name} ({road.stages[name].recipe})",
            [
                *(source.path for source in recipe.data.sources),
                *road.stages[name].own_answers,
            ],
            _UNKNOWN if tokens is None else f"{tokens / 1e6:,.3g} million",
            _UNKNOWN if time is None else duration(time),
        )
    rows += _rows("evaluation", task_datasets(road.evaluation.tasks))
    columns = ["step", "data", "licence", "size", "training tokens", "time"]
    console.show(console.table("Road", columns, rows, numbers=3))
    known = [time for time in seconds.values() if time is not None]
    if known and len(known) == len(seconds):
        device = next(iter(recipes.values())).device
        has_own_answers = any(stage.own_answers for stage in road.stages.values())
        console.say(
            f"Training takes about {duration(sum(known))} on {device}, at {rate:,.0f} tokens/s "
            "in pretraining. Tokens are estimated from the size of the data"
            + "; the time for own answers is not included"
            * has_own_answers
        )


def all_stage_tokens(
    recipes: "Mapping[str, Recipe]", stages: "Mapping[str, RoadStage] | None" = None
) -> int | None:
    """Return the `weighted_tokens` of all stages; None if those of one are unknown.

    stages: those of a road, which may have own answers.
    """
    tokens = {
        name: estimate_tokens(recipe, stages[name] if stages else None)
        for name, recipe in recipes.items()
    }
    counts = [recipes[name].weighted_tokens(count) for name, count in tokens.items() if count]
    return sum(counts) if len(counts) == len(tokens) else None


def estimate_tokens(recipe: "Recipe", stage: "RoadStage | None" = None) -> int | None:
    """Estimate the training tokens of a stage from the size of its data; None if unknown."""
    if recipe.training.steps:
        return planned_tokens(recipe)
    sizes = [(source.weight, _facts(source.path)[1]) for source in recipe.data.sources]
    if any(size is None for _, size in sizes):
        return None
    num_bytes = sum(weight * (size or 0) for weight, size in sizes)
    if stage and stage.own_answers:
        if not (mean := _mean_size(stage.own_answers)):
            return None
        num_bytes += 2 * stage.num_own_answers * mean  # both sides
    return round(recipe.training.epochs * num_bytes / _BYTES_PER_TOKEN)


def _mean_size(paths: "Sequence[str]") -> float:
    """Return the mean size of the first conversations, in bytes; 0 if there are none here yet."""
    from minimind.data.input_files import list_files
    from minimind.data.invalid import InvalidRecords
    from minimind.data.read import read_records

    try:
        records = read_records(
            [file for path in paths for file in list_files(path)], invalid=InvalidRecords()
        )
        sizes = [len(record.as_text().encode()) for record in islice(records, _NUM_MEASURED)]
    except MinimindError:
        return 0.0
    return sum(sizes) / max(len(sizes), 1)


def _rows(step: str, data: Sequence[str], tokens: str = "", time: str = "") -> list[list[object]]:
    """Return a row per dataset; the first one describes the step too."""
    rows: list[list[object]] = []
    for path in data or [""]:
        licence, size = _facts(path) if path else ("", None)
        rows.append(["", path, licence, console.format_size(size) if path else "", "", ""])
    rows[0][0], rows[0][4], rows[0][5] = step, tokens, time
    return rows


def _facts(path: str) -> tuple[str, int | None]:
    """Return the licence and the bytes of data, on disk or as the registry records them."""
    from minimind.data.input_files import list_files
    from minimind.data.registry import data_folder, find, is_name
    from minimind.data.textbook import is_textbook

    if is_textbook(path):
        return "part of minimind", None
    if not is_name(path):
        return "your own", sum(file.stat().st_size for file in list_files(path))
    published = find(path)
    file = published.path_in(data_folder())
    return published.licence, file.stat().st_size if file.is_file() else published.file.bytes


def _measure_rate(recipe: "Recipe") -> float | None:
    """Measure the tokens per second of pretraining; None if the model does not fit here."""
    from minimind.planning.plan import make_plan

    data = recipe.data.model_copy(update={"sources": [], "validation": []})
    # The tokenizer does not exist yet; the speed hardly depends on it.
    alone = recipe.model_copy(update={"data": data, "tokenizer": None})
    return make_plan(alone, seconds=_TRIAL_S).tokens_per_second
