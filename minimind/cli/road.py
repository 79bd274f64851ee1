"""`minimind road ROAD`: tokenizer, all training stages, evaluation and report on published data."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.eval import HARNESS, evaluate, task_datasets
from minimind.cli.options import Device
from minimind.cli.pairs import write_own_pairs
from minimind.cli.road_results import answer_questions, show_results
from minimind.cli.steps import (
    Step,
    check_results,
    copy_final_model,
    finished_summary,
    remove_results,
    run_steps,
    timed,
    train_stage,
    train_tokenizer_once,
)
from minimind.errors import ConfigError, UsageError
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.config.road import Road, RoadStage
    from minimind.config.settings import Recipe
    from minimind.training.stage import StageResult

_ROAD_FILE = "road.json"
_SET_BY_ROAD = ("out", "tokenizer", "device", "model.init", "data.sources")


def road(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ROAD", help="A road file, or a packaged road: small, moe, base, night."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for all results; default: out/ROAD.")
    ] = None,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the previous run.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List the steps with data, licences, sizes, tokens and time, and exit.",
        ),
    ] = False,
    yes: Yes = False,
) -> None:
    """Run all steps from published data to a chat model.

    The steps: tokenizer, pretraining, fine-tuning, preference optimization, evaluation, report.
    """
    from minimind.config.road import OWN_ANSWERS, load_road
    from minimind.model.device import choose_device
    from minimind.reporting.report import make_report

    if dry_run and fresh:
        raise UsageError("--dry-run discards nothing; give either --dry-run or --fresh")
    settings = load_road(name)
    out = out or Path("out") / Path(name).stem
    if out.is_file():
        raise UsageError(f"--out {out} is a file; choose a folder")
    recipes = stage_recipes(settings, out, str(choose_device(device)))
    if dry_run:
        from minimind.cli.road_plan import show_plan

        show_plan(settings, recipes)
        return
    previous = _previous_road(out)
    if previous and not fresh:
        _check_changes(out, previous, settings)
    names = [*recipes, *(previous.stages if previous else ()), "eval", OWN_ANSWERS]
    check_results(out, "road", names, [_ROAD_FILE], fresh=fresh)
    _check_inputs(settings, recipes, yes)
    if fresh:
        remove_results(out, names, [_ROAD_FILE])
    elif previous and _answers_change(previous, settings):
        (out / "summary.json").unlink(missing_ok=True)
    write_json(out / _ROAD_FILE, settings.model_dump())
    with timed(out, "road") as total_seconds:
        passed, summary = _run(settings, out, recipes, total_seconds)
    make_report([out]).write(out / "report.html")
    show_results(out, summary, recipes)
    if not passed:
        raise typer.Exit(1)


def stage_recipes(road: "Road", out: Path, device: str) -> dict[str, "Recipe"]:
    """Load the recipe of each stage, which starts from the last model before it.

    Raises ConfigError with the name of the stage.
    """
    recipes: dict[str, Recipe] = {}
    model: str | None = None
    for name, stage in road.stages.items():
        try:
            recipe = _stage_recipe(name, stage, model, out, device)
        except ConfigError as error:
            raise ConfigError(f"stages.{name}: {error}") from None
        recipes[name] = recipe
        if recipe.lora is None:
            model = name
    return recipes


def _stage_recipe(
    name: str, stage: "RoadStage", model: str | None, out: Path, device: str
) -> "Recipe":
    """Load the recipe of a stage. model: the name of the stage that it starts from."""
    from minimind.config import load_recipe
    from minimind.config.load import leaves

    flags = leaves(stage.settings)
    for key in _SET_BY_ROAD:
        if any(f"{given}.".startswith(f"{key}.") for given in flags):
            what = "data of the stage" if key == "data.sources" else "road"
            raise ConfigError(f"settings.{key}: remove it, because the {what} determines it")
    flags |= {"out": str(out / name), "tokenizer": str(out / "tokenizer"), "device": device}
    if stage.data:
        flags["data.sources"] = stage.data
    recipe = load_recipe(stage.recipe, flags=flags).recipe
    if stage.own_answers and recipe.objective != "dpo":
        raise ConfigError(
            f"own_answers: the recipe {stage.recipe} has the objective {recipe.objective}; only "
            "preference optimization (dpo) uses own answers"
        )
    if recipe.objective == "pretrain" and recipe.lora is None and model:
        raise ConfigError(
            f"the recipe {stage.recipe} pretrains a new model, but the stage {model} has already "
            f"done that. Use a recipe for fine-tuning, or add the data to stages.{model}"
        )
    if model is None and (recipe.objective != "pretrain" or recipe.lora):
        raise ConfigError(
            f"the recipe {stage.recipe} trains an existing model, and no stage before it pretrains "
            "one. The first stage needs a recipe such as pretrain-small"
        )
    if not (recipe.data.sources or stage.own_answers):
        raise ConfigError('there is no training data; add a line such as data = ["minimind:sft"]')
    if model is None:
        return recipe
    return load_recipe(stage.recipe, flags=flags | {"model.init": str(out / model)}).recipe


def _previous_road(out: Path) -> "Road | None":
    """Return the road that `out` has results of, if any."""
    from minimind.config.road import Road
    from minimind.files import read_json

    try:
        return Road(**read_json(out / _ROAD_FILE))
    except (FileNotFoundError, ValueError):
        return None


def _answers_change(previous: "Road", road: "Road") -> bool:
    """Return True if the answers in `summary.json` are not those of this road."""
    from minimind.config.road import repeated_steps

    questions_differ = previous.evaluation.questions != road.evaluation.questions
    return questions_differ or bool(repeated_steps(previous, road))


def _check_changes(out: Path, previous: "Road", road: "Road") -> None:
    """Accept changes to steps that have not begun. Raises ConfigError if one of them has begun."""
    from minimind.config.road import repeated_steps, training_settings
    from minimind.training.run import has_begun

    before, now = training_settings(previous), training_settings(road)
    changes = [
        f"{key} was {before.get(key, 'not set')} and is now {now.get(key, 'not set')}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    description = "; ".join(changes) or "the stages have another order"
    steps = repeated_steps(previous, road)
    reasons = {
        "tokenizer": "the tokenizer is trained",
        "model": "the last stage is finished",
        "eval": "the evaluation has begun",
    }
    begun = [
        step
        for step in steps
        if ((out / step).is_dir() if step in reasons else has_begun(out / step))
    ]
    if not begun:
        if steps:
            console.say(f"changed since {out} began: {description}")
        return
    reason = reasons.get(begun[0], f"the stage {begun[0]} has begun")
    remedy = "choose another --out, or start over with --fresh"
    if begun[0] != "tokenizer":
        folders = ", ".join(str(out / step) for step in begun)
        remedy = f"{remedy}. To repeat only the steps that change, remove {folders}"
    raise ConfigError(
        f"{out} holds the results of another road: {description}, but {reason}. "
        f"Give the same road, {remedy}"
    )


def _check_inputs(road: "Road", recipes: "Mapping[str, Recipe]", yes: bool) -> None:
    """Download all data, and raise the errors of missing data and tasks before the long work."""
    from minimind.cli.train import data_paths
    from minimind.data.input_files import list_files
    from minimind.data.registry import is_name
    from minimind.data.textbook import is_textbook
    from minimind.evaluation.catalogue import make_task
    from minimind.evaluation.own_answers import check_conversations

    answered = [path for each in road.stages.values() for path in each.own_answers]
    paths = [
        *road.tokenizer.data,
        *(path for each in recipes.values() for path in data_paths(each)),
        *answered,
    ]
    tasks = road.evaluation.tasks
    for path in dict.fromkeys(paths):
        if not is_name(path) and (path in answered or not is_textbook(path)):
            list_files(path)
    ensure_downloaded([*paths, *task_datasets(tasks)], yes)
    for name, stage in road.stages.items():
        if stage.own_answers:
            check_conversations(stage.own_answers, recipes[name].data.variables)
    for task in tasks:
        if not task.startswith(HARNESS):
            make_task(task)


def _run(
    road: "Road", out: Path, recipes: "Mapping[str, Recipe]", total_seconds: Callable[[], float]
) -> tuple[bool, dict[str, Any]]:
    """Run the steps that are not finished; return (True if all tasks succeeded, summary)."""
    from minimind.cli.road_plan import all_stage_tokens

    tokens = all_stage_tokens(recipes, road.stages)
    results: dict[str, StageResult] = {}
    outcome: dict[str, Any] = {}

    def train(stage: str) -> None:
        recipe = _with_own_answers(road.stages[stage], stage, recipes[stage], out)
        results[stage] = train_stage(recipe, tokens)

    def finish() -> None:
        if not (out / "model").is_dir():
            copy_final_model([each.model for each in results.values() if each.model][-1], out)
        outcome["passed"] = _run_tasks(road, out, recipes)
        outcome["summary"] = finished_summary(out, "road")
        if outcome["summary"] is None:
            stages = {name: result.summary for name, result in results.items()}
            outcome["summary"] = answer_questions(
                out, road.evaluation.questions, recipes, stages, total_seconds
            )

    steps = [Step("the tokenizer", partial(_train_tokenizer, road, out / "tokenizer"))]
    for name, stage in road.stages.items():
        steps.append(Step(f"{name}, with the recipe {stage.recipe}", partial(train, name)))
    run_steps([*steps, Step("the evaluation and the report", finish)])
    return outcome["passed"], outcome["summary"]


def _with_own_answers(stage: "RoadStage", name: str, recipe: "Recipe", out: Path) -> "Recipe":
    """Add the pairs of a stage's own answers to its data; the model before it makes them."""
    from minimind.config.road import OWN_ANSWERS
    from minimind.config.settings import Source
    from minimind.training.run import finished_summary, has_begun

    if not stage.own_answers:
        return recipe
    pairs = out / OWN_ANSWERS / f"{name}.jsonl"
    if finished_summary(out / name, recipe) is None:
        if not has_begun(out / name):
            _write_pairs(stage, recipe, pairs)
        elif not pairs.is_file():
            raise ConfigError(
                f"{pairs}: there is no such file, but the stage {name} has begun to train on it. "
                f"Restore the file, or remove {out / name} to repeat the stage"
            )
    sources = [*recipe.data.sources, Source(path=str(pairs))]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})


def _write_pairs(stage: "RoadStage", recipe: "Recipe", pairs: Path) -> None:
    """Write the pairs of a stage, unless there are some of the same model and conversations."""
    from minimind.evaluation.own_answers import partial_file, read_conversations
    from minimind.files import read_json
    from minimind.model import resolve_model_directory
    from minimind.model.fingerprint import fingerprint

    assert recipe.model.init, "a stage before it has trained a model"
    variables = recipe.data.variables
    data = read_conversations(stage.own_answers, stage.num_own_answers, variables)
    model = fingerprint(resolve_model_directory(Path(recipe.model.init)))
    current = {"model": model, "conversations": data.sha256()}
    identity = pairs.with_suffix(".json")
    if pairs.is_file() and not partial_file(pairs).is_file():
        if not identity.is_file():
            raise ConfigError(
                f"{pairs} exists, but no step of this road has written it. Move it elsewhere; "
                "`data` of a stage takes pairs"
            )
        if read_json(identity) == current:
            return
        console.say(f"{pairs} is replaced: the model that answers or its questions have changed")
    write_own_pairs(
        recipe.model.init,
        stage.own_answers,
        pairs,
        limit=stage.num_own_answers,
        device=recipe.device,
        variables=variables,
        replace=True,
    )
    write_json(identity, current)


def _train_tokenizer(road: "Road", directory: Path) -> None:
    """Train the tokenizer unless it exists, and report its size."""
    from minimind.cli.tokenizer import announce_training, read_with_progress, report_invalid
    from minimind.data.invalid import FIX_OR_LEAVE_OUT, InvalidRecords

    invalid = InvalidRecords(advice=FIX_OR_LEAVE_OUT)
    texts = partial(read_with_progress, road.tokenizer.data, invalid)
    tokenizer = train_tokenizer_once(
        directory, lambda: announce_training(texts()), road.tokenizer.vocab_size
    )
    report_invalid(invalid)
    console.say(f"{tokenizer.vocab_size:,} tokens, in {directory}")


def _run_tasks(road: "Road", out: Path, recipes: "Mapping[str, Recipe]") -> bool:
    """Evaluate the final model, or resume that; return True if no task failed."""
    if not road.evaluation.tasks:
        return True
    try:
        evaluate(
            [str(out)],
            task=road.evaluation.tasks,
            data=None,
            style="chat",
            shots=5,
            limit=None,
            contamination=None,
            adapter=None,
            context=None,
            device=next(iter(recipes.values())).device,
            out=out / "eval",
            fresh=False,
            yes=False,
            json=None,
        )
    except typer.Exit:  # it has reported the failed tasks; the report shows the others
        return False
    return True
