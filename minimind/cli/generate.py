"""`minimind generate MODEL PROMPT`: go on with a text."""

import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
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
# Where they are not given, the model's generation_config.json decides, then OpenAI's default.
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
    typer.Option(help="Keep only the k most likely tokens; 0 = all. [default: the model's, or 0]"),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Drop tokens below this fraction of the top token's probability. "
        "[default: the model's, or 0]"
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help="Above 1: penalize tokens that already appeared. [default: the model's, or 1]"
    ),
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
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
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

    from minimind.inference.defaults import read_generation_defaults
    from minimind.inference.engine import Engine
    from minimind.inference.load import load_for_inference

    sampling = read_generation_defaults(model).sampling_with(
        dict(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            min_p=min_p,
        )
    )
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
    """Lines of standard input as they come. Raises UsageError for bytes that are not text."""
    encoding = sys.stdin.encoding
    # Decoded line by line: a text stream decodes ahead, and its errors name no line.
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError:
            likely = "utf-16" if line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "gb18030"
            raise UsageError(
                f"standard input, line {number}: not {encoding} text; convert it first, "
                f"for example with: iconv -f {likely} -t utf-8"
            ) from None
        yield text.removeprefix("\ufeff" if number == 1 else "")
