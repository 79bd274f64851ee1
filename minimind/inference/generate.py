"""Decoding with a KV cache: one prompt as a stream, or many prompts at once."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch

from minimind.errors import ModelError, UsageError
from minimind.inference.detokenizer import StreamingDetokenizer
from minimind.inference.sampling import Sampling, choose
from minimind.model import KVCache, Transformer
from minimind.tokenizer import Tokenizer


def stream_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None = None,
) -> Iterator[str]:
    """What the model writes after `prompt`, piece by piece, never half a character.

    Ends where the model ends a message or a document. Raises UsageError, at once, when the prompt
    does not fit into the context.
    """
    tokens = stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=set(tokenizer.stop_ids),
        seed=seed,
    )
    return _as_text(tokens, StreamingDetokenizer(tokenizer, skip_special_tokens=True))


def _as_text(tokens: Iterable[int], detokenizer: StreamingDetokenizer) -> Iterator[str]:
    for token in tokens:
        yield detokenizer.push(token)
    yield detokenizer.finish()


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: set[int],
    seed: int | None = None,
) -> Iterator[int]:
    """New tokens until a stop token (not yielded), the limit, or the end of the context.

    Raises UsageError, at once, when the prompt is empty or does not fit into the context.
    """
    _check(model, prompt)
    steps = _decode(model, [prompt], max_new_tokens, sampling, stop_ids, seed)
    return (tokens[0] for tokens in steps)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: set[int],
    seed: int | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the stop token.

    Prompts of equal length are decoded together, so that nothing needs padding. Raises UsageError
    when a prompt is empty or does not fit into the context.
    """
    for prompt in prompts:
        _check(model, prompt)
    outputs: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in groupby(by_length, key=lambda i: len(prompts[i])):
        rows = list(group)
        chosen = [prompts[i] for i in rows]
        for tokens in _decode(model, chosen, max_new_tokens, sampling, stop_ids, seed):
            for row, token in tokens.items():
                outputs[rows[row]].append(token)
    return outputs


def _check(model: Transformer, prompt: Sequence[int]) -> None:
    context = model.config.max_position_embeddings
    if not prompt:
        raise UsageError("the prompt is empty")
    if len(prompt) >= context:
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens and the model's context is {context:,}; "
            "shorten it"
        )


@torch.inference_mode()
def _decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: set[int],
    seed: int | None,
) -> Iterator[dict[int, int]]:
    """One step at a time: the new token of each prompt (all of equal length) that goes on."""
    weight = model.head_weight
    random = torch.Generator()  # on the CPU, so that a seed gives the same text on any device
    random.seed() if seed is None else random.manual_seed(seed)
    total = min(len(prompts[0]) + max_new_tokens, model.config.max_position_embeddings)
    cache = KVCache(model.config, len(prompts), total, device=weight.device, dtype=weight.dtype)
    seen = torch.tensor(prompts, device=weight.device)
    rows, tokens = list(range(len(prompts))), seen
    while seen.shape[1] < total:
        logits = model.logits(model(tokens, cache=cache)[:, -1]).float()
        if not logits.isfinite().all():
            raise ModelError(
                "the model gives scores that are not numbers: its weights are damaged, or its "
                "training went wrong. Take another checkpoint, or copy the model again"
            )
        tokens = choose(logits, seen, sampling, random)[:, None]
        chosen = tokens[:, 0].tolist()
        going = [i for i, token in enumerate(chosen) if token not in stop_ids]
        if not going:
            return
        yield {rows[i]: chosen[i] for i in going}
        seen = torch.cat((seen, tokens), dim=1)
        if len(going) < len(rows):
            keep = torch.tensor(going, device=weight.device)
            rows, seen, tokens = [rows[i] for i in going], seen[keep], tokens[keep]
            cache.keep(keep)
