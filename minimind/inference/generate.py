"""Many short prompts at once: what evaluations and samples need."""

from collections.abc import Callable, Sequence

from minimind.inference.engine import Engine, Request
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import encode_chat

_AT_ONCE = 64


def answer_all(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 96,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """A greedy answer to each question, each in a conversation of its own."""
    prompts = [
        encode_chat(tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True)[0]
        for q in questions
    ]
    outputs = write_all(model, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=progress)
    return [tokenizer.decode(output, skip_special_tokens=True).strip() for output in outputs]


def continue_all(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, max_new_tokens: int = 64
) -> list[str]:
    """A greedy continuation of each text."""
    prompts = [tokenizer.text_start + tokenizer.encode(text) for text in texts]
    outputs = write_all(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    return [tokenizer.decode(output, skip_special_tokens=True).strip() for output in outputs]


def write_all(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stops: frozenset[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the one that stopped it.

    sampling: None = greedy. stops: None = the ends of messages and documents. Raises UsageError
    when a prompt is empty or does not fit into the context.
    """
    if not prompts:
        return []
    stops = frozenset(tokenizer.stop_ids) if stops is None else stops
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    with Engine(model, tokenizer, max_slots=min(_AT_ONCE, len(prompts)), context=longest) as engine:
        chosen = sampling or Sampling(temperature=0)
        requests = [Request(prompt, chosen, max_new_tokens, stop_ids=stops) for prompt in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        for done, (index, generated) in enumerate(engine.generate(requests), 1):
            if generated.error is not None:
                raise generated.error
            outputs[index] = list(generated.token_ids)
            progress(done, len(prompts))
    return outputs
