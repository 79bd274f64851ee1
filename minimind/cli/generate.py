"""`minimind generate MODEL PROMPT`: continue a text."""

from typing import Annotated

import typer

from minimind.cli.options import (
    Adapter,
    Context,
    Device,
    Int8,
    MaxNewTokens,
    MinP,
    Model,
    RepetitionPenalty,
    RopeScaling,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from minimind.cli.terminal import report_short_context, stdin_lines, strip_controls
from minimind.errors import UsageError


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")
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
    """Generate a continuation of a prompt."""
    text = strip_controls("".join(stdin_lines()).rstrip("\n") if prompt == "-" else prompt)
    if not text:
        raise UsageError('the prompt is empty; give a text to continue, such as "秦始皇是"')

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
        context=context,
        rope_scaling=rope_scaling,
    )
    with Engine(loaded, tokenizer, slots=1, context=context, int8=int8) as engine:
        report_short_context(engine, loaded, context)
        del loaded  # the engine keeps its own copy of the weights
        pieces = engine.stream_text(
            tokenizer.text_start + tokenizer.encode(text),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
        )
        print(text, end="", flush=True)
        for piece in pieces:
            print(strip_controls(piece), end="", flush=True)
        print()
