"""Many short prompts at once, greedily: what evaluations and samples need."""

from collections.abc import Callable, Sequence

from minimind.inference.generate import generate
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
    return _complete(model, tokenizer, prompts, max_new_tokens, progress)


def continue_all(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, max_new_tokens: int = 64
) -> list[str]:
    """A greedy continuation of each text."""
    prompts = [tokenizer.text_start + tokenizer.encode(text) for text in texts]
    return _complete(model, tokenizer, prompts, max_new_tokens, lambda done, total: None)


def _complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    progress: Callable[[int, int], None],
) -> list[str]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together
    texts = [""] * len(prompts)
    model.eval()
    for at in range(0, len(order), _AT_ONCE):
        chosen = order[at : at + _AT_ONCE]
        outputs = generate(
            model,
            [prompts[i] for i in chosen],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=0),
            stop_ids=set(tokenizer.stop_ids),
        )
        for i, output in zip(chosen, outputs, strict=True):
            texts[i] = tokenizer.decode(output, skip_special_tokens=True).strip()
        progress(at + len(chosen), len(order))
    return texts
