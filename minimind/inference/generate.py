"""Decoding with a KV cache: one prompt as a stream, or many prompts at once."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from minimind.errors import UsageError
from minimind.inference.sampling import Sampling, choose
from minimind.model import KVCache, Transformer


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: set[int],
    seed: int | None = None,
) -> Iterator[int]:
    """Yield new tokens until a stop token (not yielded), the limit, or the end of the context.

    Raises UsageError when the prompt does not fit into the context.
    """
    for tokens in _decode(model, [prompt], max_new_tokens, sampling, stop_ids, seed):
        yield tokens[0]


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

    Prompts of equal length are decoded together, so that nothing needs padding.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in groupby(by_length, key=lambda i: len(prompts[i])):
        rows = list(group)
        chosen = [prompts[i] for i in rows]
        for tokens in _decode(model, chosen, max_new_tokens, sampling, stop_ids, seed):
            for row, token in tokens.items():
                outputs[rows[row]].append(token)
    return outputs


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
    context = model.config.max_position_embeddings
    length = len(prompts[0])
    if not length:
        raise UsageError("the prompt is empty")
    if length >= context:
        raise UsageError(
            f"the prompt has {length:,} tokens and the model's context is {context:,}; shorten it"
        )
    weight = model.head_weight
    random = torch.Generator()  # on the CPU, so that a seed gives the same text on any device
    random.seed() if seed is None else random.manual_seed(seed)
    total = min(length + max_new_tokens, context)
    cache = KVCache(
        model.config, len(prompts), total, device=weight.device, dtype=weight.dtype
    )
    seen = torch.tensor(prompts, device=weight.device)
    rows, tokens = list(range(len(prompts))), seen
    while seen.shape[1] < total:
        logits = model.logits(model(tokens, cache=cache)[:, -1]).float()
        tokens = choose(logits, seen, sampling, random)[:, None]
        chosen = tokens[:, 0].tolist()
        going = [i for i, token in enumerate(chosen) if token not in stop_ids]
        if going:
            yield {rows[i]: chosen[i] for i in going}
        else:
            return
        seen = torch.cat((seen, tokens), dim=1)
        if len(going) < len(rows):
            keep = torch.tensor(going, device=weight.device)
            rows, seen, tokens = [rows[i] for i in going], seen[keep], tokens[keep]
            cache.keep(keep)
