"""`minimind generate MODEL PROMPT`: go on with a text."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from minimind.errors import UsageError

if TYPE_CHECKING:
    from minimind.inference.engine import Engine
    from minimind.model import Transformer

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Model or run directory.")]
Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="LoRA adapter, or the run that made it.")
]
Temperature = Annotated[
    float, typer.Option(help="0 always takes the likeliest word; higher is more varied.")
]
TopP = Annotated[float, typer.Option(help="Choose among words that make up this probability.")]
TopK = Annotated[int, typer.Option(help="Choose among this many words; 0 = all.")]
MinP = Annotated[
    float, typer.Option(help="Leave out words below this share of the likeliest one's probability.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: words that were used become less likely.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest text, in tokens.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same text.")
]
Int8 = Annotated[
    bool, typer.Option("--int8", help="Weights as 8-bit integers on a CPU: faster, less exact.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Context length in tokens, shorter or longer than the model's own; beyond it RoPE "
        "scaling is used. Default: the model's own, as far as free memory allows.",
    ),
]
RopeScaling = Annotated[
    Literal["linear", "dynamic", "yarn"] | None,
    typer.Option(help="How --context stretches the model; default: yarn."),
]

# A terminal obeys these; text has no use for them, line breaks and tabs apart.
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to go on with; - reads it from stdin.")
    ],
    adapter: Adapter = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    max_new_tokens: MaxNewTokens = 200,
    seed: Seed = None,
    device: Device = "auto",
    int8: Int8 = False,
    context: Context = None,
    rope_scaling: RopeScaling = None,
) -> None:
    """Go on with a text, as a pretrained model does."""
    text = plain("".join(stdin_lines()).rstrip("\n") if prompt == "-" else prompt)
    if not text:
        raise UsageError('the prompt is empty; give a text to go on with, such as "秦始皇是"')

    from minimind.inference.engine import Engine
    from minimind.inference.load import load_for_inference
    from minimind.inference.sampling import Sampling

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, min_p)
    loaded, tokenizer = load_for_inference(
        model,
        device,
        adapter=adapter,
        context=stretched(context, rope_scaling),
        rope_scaling=rope_scaling,
    )
    with Engine(loaded, tokenizer, slots=1, context=context, int8=int8) as engine:
        report_short_context(engine, loaded, context)
        del loaded  # the engine has its own
        pieces = engine.stream_text(
            tokenizer.text_start + tokenizer.encode(text),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
        )
        print(text, end="", flush=True)
        for piece in pieces:
            print(plain(piece), end="", flush=True)
        print()


def stretched(context: int | None, rope_scaling: str | None) -> int | None:
    """`context`. Raises UsageError for a kind of scaling without a context to reach."""
    if rope_scaling and context is None:
        raise UsageError("--rope-scaling says how to reach a context; give --context N too")
    return context


def report_short_context(engine: "Engine", model: "Transformer", context: int | None) -> None:
    """Say on stderr that free memory has made the context shorter than the model's own."""
    own = model.config.max_position_embeddings
    if context is None and engine.context < own:
        print(
            f"free memory allows a context of {engine.context:,} tokens; "
            f"the model's own is {own:,}",
            file=sys.stderr,
        )


def plain(text: str) -> str:
    """`text` without the characters that would steer a terminal."""
    return text.translate(_CONTROLS)


def stdin_lines() -> Iterator[str]:
    """The lines of standard input as they come. Raises UsageError when they are not text."""
    assert isinstance(sys.stdin, io.TextIOWrapper)
    sys.stdin.reconfigure(errors="strict")
    try:
        yield from sys.stdin
    except UnicodeDecodeError:
        raise UsageError(
            f"standard input is not {sys.stdin.encoding} text; convert it first, "
            "for example with: iconv -f gb18030 -t utf-8"
        ) from None
