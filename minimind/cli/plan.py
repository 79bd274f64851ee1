"""`minimind plan RECIPE`: what a stage will take, before it starts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind.cli import console
from minimind.cli.train import Arguments, Data, Device, resolve
from minimind.errors import UsageError
from minimind.training.reporter import pluralize

if TYPE_CHECKING:
    from minimind.planning.plan import Plan

_UNITS = {"": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


def plan(
    arguments: Arguments = None,
    data: Data = None,
    model: Annotated[str | None, typer.Option(help="Model or run directory to start from.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer directory.")] = None,
    device: Device = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to plan for, such as 2GB.")
    ] = None,
    trial: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Length of the trial; 0 = none.")
    ] = 10.0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Say what a stage will take: parameters, tokens, memory, time. Nothing is written."""
    given = None if memory is None else parse_size(memory)
    flags = {"data.sources": data, "model.init": model, "tokenizer": tokenizer, "device": device}
    recipe = resolve(arguments or [], "pretrain-small", flags).recipe
    from minimind.planning.plan import make_plan

    made = make_plan(recipe, memory=given, seconds=trial)
    _show(made)
    if json:
        console.write_json(json, made.metrics())


def parse_size(text: str) -> int:
    """Bytes of "2GB", "1.5 GB", "800MB"; units go by 1,024. Raises UsageError for anything else."""
    number = text.strip().upper().replace("IB", "B")
    unit = next((u for u in ("KB", "MB", "GB", "TB") if number.endswith(u)), "")
    try:
        size = float(number.removesuffix(unit)) * _UNITS[unit]
        if 0 < size < float("inf"):
            return int(size)
    except ValueError:
        pass
    raise UsageError(f"--memory {text}: give a size such as 2GB or 800MB")


def _show(made: "Plan") -> None:
    total = sum(made.memory.values())
    rows: list[tuple[str, object]] = [("parameters", made.parameters)]
    if made.active_parameters != made.parameters:
        rows.append(("active per token", made.active_parameters))
    if made.trained_parameters != made.parameters:
        rows.append(("of them trained", made.trained_parameters))
    rows += [
        ("device", f"{made.device}, {made.precision}".removesuffix(", ?")),
        ("tokens of the data, about", made.data_tokens),
        ("steps", made.steps),
        ("windows a step", f"{made.global_batch_size} of {made.seq_len} tokens"),
        ("tokens in all", made.tokens),
        ("operations a token", f"{made.flops_per_token / 1e6:,.0f} million"),
    ]
    if made.tokens:
        rows.append(("operations in all", f"{made.flops_per_token * made.tokens:.2e}"))
    if made.tokens_per_second:
        rows.append(("tokens a second, of a trial", made.tokens_per_second))
    if made.seconds:
        rows.append(("time in all", duration(made.seconds)))
    console.show(console.table("Plan", ["figure", "value"], rows, numbers=1))
    parts = [(name, size(part)) for name, part in made.memory.items()]
    title = f"Memory with {pluralize(made.micro_batch_size or 1, 'window')} at once"
    console.show(console.table(title, ["part", "size"], [*parts, ("in all", size(total))], 1))
    by_windows: dict[object, list[str]] = {}
    for choice in made.choices:
        fits = made.memory_limit is None or choice["bytes"] <= made.memory_limit
        cell = size(choice["bytes"]) + ("" if fits else " (too much)")
        by_windows.setdefault(choice["micro_batch_size"], []).append(cell)
    given = "any memory" if made.memory_limit is None else size(made.memory_limit)
    console.show(
        console.table(
            f"What fits into {given}",
            ["training.micro_batch_size", "activations kept", "activations computed again"],
            [(sequences, *cells) for sequences, cells in by_windows.items()],
            numbers=2,
        )
    )
    console.say(_verdict(made))


def _verdict(made: "Plan") -> str:
    if made.micro_batch_size:
        need = sum(made.memory.values())
        if made.memory_limit is not None and need > made.memory_limit:
            return (
                f"It does not fit with training.micro_batch_size={made.micro_batch_size}, as the "
                "recipe says; take a number of the table that does"
            )
        again = " training.activation_checkpointing=true" * made.activation_checkpointing
        return f"It fits with training.micro_batch_size={made.micro_batch_size}{again}"
    fitting = [c for c in made.choices if c["bytes"] <= (made.memory_limit or 0)]
    if fitting:
        return (
            "It fits with training.activation_checkpointing=true "
            f"training.micro_batch_size={fitting[-1]['micro_batch_size']}"
        )
    return "It does not fit: take a smaller model (model.preset) or a shorter data.seq_len"


def size(num_bytes: int) -> str:
    """1.25 GB, 800 MB; units go by 1,024."""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):.2f} GB"
    return f"{num_bytes / (1 << 20):,.0f} MB"


def duration(seconds: float) -> str:
    """3 h 05 min, 12 min, 40 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours / 24:.1f} days"
