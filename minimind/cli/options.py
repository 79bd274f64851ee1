"""Command-line options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

DEVICE_HELP = "auto, cpu, cuda, cuda:1 or mps."

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Model or run directory.")]
Adapter = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="LoRA adapter, or the run directory that holds one."),
]
# Sampling options that are left out come from generation_config.json, then from OpenAI's defaults.
Temperature = Annotated[
    float | None,
    typer.Option(help="Sampling temperature; 0 is greedy decoding. [default: the model's, or 1]"),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Nucleus (top-p) sampling threshold. [default: the model's, or 1]"),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="Keep only the k most likely tokens; 0 disables. [default: the model's, or 0]"
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Min-p sampling: drop tokens below this fraction of the top token's probability. "
        "[default: the model's, or 0]"
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help="Penalize tokens that already appeared; 1 disables. [default: the model's, or 1]"
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**32 - 1, help="Random seed; the same seed gives the same text."),
]
# Of commands that answer many questions, greedily by default.
AnswerTemperature = Annotated[
    float, typer.Option(min=0, max=2, help="Sampling temperature; 0 is greedy decoding.")
]
AnswerSeed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same answers.")
]
Int8 = Annotated[
    bool,
    typer.Option(
        "--int8",
        help="8-bit integer weights on a CPU: half the memory, faster for one answer at a time, "
        "less exact.",
    ),
]
Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Context length in tokens; beyond the model's own, RoPE scaling is used. "
        "[default: the model's own, as far as free memory allows]",
    ),
]
RopeScaling = Annotated[
    Literal["linear", "dynamic", "yarn"] | None,
    typer.Option(help="RoPE scaling method beyond the trained context length; default: yarn."),
]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer directory.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", dir_okay=False, help="Also write the metrics to this JSON file."),
]
