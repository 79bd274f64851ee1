"""Offline batch generation: short-lived engines for lists of prompts."""

from collections.abc import Callable, Sequence

from minimind.config.settings import Recipe
from minimind.inference.engine import Engine
from minimind.inference.requests import Request
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import encode_chat

_MAX_SLOTS = 64


def sampler(
    recipe: Recipe, say: Callable[[str], None]
) -> Callable[[Transformer, Tokenizer], list[dict[str, str]]]:
    """Return a callback that generates from the validation prompts and reports the samples."""

    def generate_samples(model: Transformer, tokenizer: Tokenizer) -> list[dict[str, str]]:
        prompts = recipe.validation.prompts
        chat = recipe.objective != "pretrain"
        texts = (answer_all if chat else continue_all)(model, tokenizer, prompts)
        for prompt, text in zip(prompts, texts, strict=True):
            say(f"  {prompt} → {text}")
        return [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]

    return generate_samples


def answer_all(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 96,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Answer each question greedily, in a conversation without further messages."""
    prompts = [
        encode_chat(tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True)[0]
        for q in questions
    ]
    outputs = generate_all(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=progress
    )
    return [tokenizer.decode(output, skip_special_tokens=True).strip() for output in outputs]


def continue_all(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, max_new_tokens: int = 64
) -> list[str]:
    """Continue each text greedily."""
    prompts = [tokenizer.text_start + tokenizer.encode(text) for text in texts]
    outputs = generate_all(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    return [tokenizer.decode(output, skip_special_tokens=True).strip() for output in outputs]


def generate_all(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: frozenset[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """Return the generated tokens of each prompt, without the stop token.

    sampling: None = greedy. stop_ids: None = the tokenizer's. Raises UsageError when a prompt is
    empty or does not fit into the context.
    """
    if not prompts:
        return []
    sampling = sampling or Sampling(temperature=0)
    stop_ids = frozenset(tokenizer.stop_ids) if stop_ids is None else stop_ids
    slots = min(_MAX_SLOTS, len(prompts))
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    with Engine(model, tokenizer, max_slots=slots, context=longest) as engine:
        requests = [
            Request(prompt, sampling, max_new_tokens, stop_ids=stop_ids) for prompt in prompts
        ]
        outputs: list[list[int]] = [[] for _ in prompts]
        for done, (index, result) in enumerate(engine.generate(requests), 1):
            if result.error is not None:
                raise result.error
            outputs[index] = list(result.token_ids)
            progress(done, len(prompts))
    return outputs
