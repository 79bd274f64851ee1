"""Tiny random models of every architecture with varied greedy output, and token ids for them."""

import random

import torch

from minimind.inference.batched_model import CHUNK, Part
from minimind.model import PRESETS, ModelConfig, Transformer

SHAPES = {
    "llama": {},
    "qwen3": dict(qk_norm=True),
    "untied, all heads": dict(tie_word_embeddings=False, num_key_value_heads=4),
    "experts": dict(
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        attention_multiplier=0.3,
    ),
    "routed experts only": dict(num_local_experts=3, num_experts_per_tok=1),
}
VOCAB = 600


def make_tiny(dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**PRESETS["nano"] | {"vocab_size": VOCAB} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim > 1 else parameter.add_(torch.rand_like(parameter))
    return model.to(dtype).eval()


def random_tokens(number: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=number)


def chunks_of(slot: int, ids: list[int]) -> list[Part]:
    return [Part(slot, at, ids[at : at + CHUNK]) for at in range(0, len(ids), CHUNK)]
