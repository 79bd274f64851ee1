"""`minimind plan RECIPE`: estimate memory, steps and time of a training stage."""

from typing import TYPE_CHECKING, Annotated

import typer

from minimind.cli import console
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.options import Json, Tokenizer
from minimind.cli.train import Arguments, Data, Device, data_paths, resolve
from minimind.errors import UsageError
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.config.settings import Recipe
    from minimind.planning.plan import Plan

_UNITS = {"": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


def plan(
    arguments: Arguments = None,
    data: Data = None,
    model: Annotated[str | None, typer.Option(help="Model or run directory to start from.")] = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory limit, such as 2GB; default: what is free."),
    ] = None,
    trial: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="Duration of a speed measurement; 0 skips it."),
    ] = 10.0,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Estimate parameters, tokens, memory and time of a stage. Trains nothing."""
    limit = None if memory is None else parse_size(memory)
    flags = {"data.sources": data, "model.init": model, "tokenizer": tokenizer, "device": device}
    recipe = resolve(arguments or [], "pretrain-small", flags).recipe
    ensure_downloaded(data_paths(recipe), yes)
    from minimind.planning.plan import make_plan

    estimate = make_plan(recipe, memory=limit, seconds=trial)
    _show(estimate, recipe, measures_speed=trial > 0)
    if json:
        write_json(json, estimate.metrics())


def parse_size(text: str) -> int:
    """Parse "2GB", "1.5 GB" or "800MB" to bytes (1 KB = 1,024). Raises UsageError otherwise."""
    number = text.strip().upper().replace("IB", "B")
    unit = next((u for u in ("KB", "MB", "GB", "TB") if number.endswith(u)), "")
    try:
        size = float(number.removesuffix(unit)) * _UNITS[unit]
        if 0 < size < float("inf"):
            return int(size)
    except ValueError:
        pass
    raise UsageError(f"--memory {text}: give a size such as 2GB or 800MB")


def _show(estimate: "Plan", recipe: "Recipe", *, measures_speed: bool) -> None:
    missing = "--tokenizer" if recipe.data.sources else "--data"
    unknown = f"unknown without {missing}"
    device = f"{estimate.device}, {estimate.precision}"
    if not estimate.device_is_present:
        device = f"{estimate.device} (not in this machine), {estimate.precision} assumed"
    total = sum(estimate.memory.values())
    rows: list[tuple[str, object]] = [("parameters", estimate.parameters)]
    if estimate.active_parameters != estimate.parameters:
        rows.append(("active parameters per token", estimate.active_parameters))
    if estimate.trained_parameters != estimate.parameters:
        rows.append(("trained parameters", estimate.trained_parameters))
    rows += [
        ("device", device),
        ("tokens in the data, approximately", estimate.data_tokens or unknown),
        ("steps", estimate.steps or unknown),
        ("global batch size, sequences", estimate.global_batch_size),
        ("sequence length, tokens", estimate.seq_len),
        ("training tokens", estimate.tokens or unknown),
        ("FLOPs per token", f"{estimate.flops_per_token / 1e6:,.0f} million"),
    ]
    if estimate.tokens:
        rows.append(("total FLOPs", f"{estimate.flops_per_token * estimate.tokens:.2e}"))
    if estimate.tokens_per_second:
        rows.append(("tokens per second, measured", estimate.tokens_per_second))
    elif measures_speed:
        why = "no device"
        if estimate.device_is_present:
            free = "the free memory" if estimate.micro_batch_size else "the memory"
            why = f"it does not fit into {free}"
        rows.append(("tokens per second", f"not measured: {why}"))
    if estimate.seconds:
        rows.append(("total time", duration(estimate.seconds)))
    console.show(console.table("Plan", ["metric", "value"], rows, numbers=1))
    parts = [(name, console.format_memory(part)) for name, part in estimate.memory.items()]
    micro_batch = console.pluralize(estimate.micro_batch_size or 1, "sequence")
    title = f"Memory with a micro-batch of {micro_batch}"
    parts.append(("total", console.format_memory(total)))
    console.show(console.table(title, ["part", "size"], parts, numbers=1))
    by_micro_batch: dict[object, list[str]] = {}
    for choice in estimate.choices:
        fits = estimate.memory_limit is None or choice["bytes"] <= estimate.memory_limit
        cell = console.format_memory(choice["bytes"]) + ("" if fits else " (too much)")
        by_micro_batch.setdefault(choice["micro_batch_size"], []).append(cell)
    limit = "any memory"
    if estimate.memory_limit is not None:
        limit = console.format_memory(estimate.memory_limit)
    console.show(
        console.table(
            f"Micro-batch sizes that fit into {limit}",
            ["training.micro_batch_size", "activations stored", "activations recomputed"],
            [(sequences, *cells) for sequences, cells in by_micro_batch.items()],
            numbers=2,
        )
    )
    console.say(_verdict(estimate))


def _verdict(estimate: "Plan") -> str:
    if estimate.micro_batch_size:
        need = sum(estimate.memory.values())
        if estimate.memory_limit is not None and need > estimate.memory_limit:
            return (
                f"The recipe's training.micro_batch_size={estimate.micro_batch_size} does not fit; "
                "choose a size from the table that fits"
            )
        recompute = " training.activation_checkpointing=true" * estimate.activation_checkpointing
        return f"It fits with training.micro_batch_size={estimate.micro_batch_size}{recompute}"
    fitting = [c for c in estimate.choices if c["bytes"] <= (estimate.memory_limit or 0)]
    if fitting:
        return (
            "It fits with training.activation_checkpointing=true "
            f"training.micro_batch_size={fitting[-1]['micro_batch_size']}"
        )
    return "It does not fit: use a smaller model (model.preset) or a shorter data.seq_len"


def duration(seconds: float) -> str:
    """Format seconds as 3 h 05 min, 12 min or 40 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours / 24:.1f} days"
