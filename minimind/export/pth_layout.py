"""Weights of the public MiniMind project: tensor names and default settings of its generations.

    names   v1, and v2 until April 2025       v2 from April 2025, and v3
            tok_embeddings, output            model.embed_tokens, lm_head
            layers.0.attention.wq             model.layers.0.self_attn.q_proj
            layers.0.feed_forward.w1, w2, w3  model.layers.0.mlp.gate_proj, down_proj, up_proj
    RoPE    pairs (2i, 2i + 1), as a complex  pairs (i, i + D/2), as in Hugging Face's classes
            number (Su et al. 2021)
    MoE     a router `gate`, `experts.E` and shared experts that process every token (v1, v2)
    v3      RMSNorm of queries and keys, no shared experts

The newer names are those of Hugging Face's Llama and Qwen3, except for experts: MiniMind stores
one SwiGLU layer per expert, and the GraniteMoeShared class, which `minimind/model/experts.py`
follows, one matrix for all experts. All generations are pre-norm decoders with a tied head.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.config.model import ModelConfig

# Old name -> new name, of each part of a dotted name.
_NEW_PARTS = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "shared_experts": "shared_experts.0",
}


@dataclass(frozen=True)
class Generation:
    """A generation of MiniMind and the settings that its code has by default."""

    name: str
    has_old_names: bool
    num_attention_heads: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    num_experts_per_tok: int


V1 = Generation("MiniMind v1", True, 16, 512, 1e4, 1e-5, 2)
EARLY_V2 = Generation("MiniMind v2 (until April 2025)", True, 8, 8192, 1e6, 1e-5, 2)
V2 = Generation("MiniMind v2", False, 8, 32768, 1e6, 1e-5, 2)
V3 = Generation("MiniMind v3", False, 8, 32768, 1e6, 1e-6, 1)


def identify(state: Mapping[str, Tensor]) -> Generation | None:
    """Return the generation that a state dict belongs to, None if it is not MiniMind's.

    v1 and early v2 have the same names. They differ in the queries per key: 2 in every model of
    v1, 4 in every model of v2.
    """
    if "tok_embeddings.weight" in state:
        query = state.get("layers.0.attention.wq.weight")
        key = state.get("layers.0.attention.wk.weight")
        if query is None or key is None:
            return None
        return EARLY_V2 if len(query) == 4 * len(key) else V1
    if "model.embed_tokens.weight" in state:
        return V3 if "model.layers.0.self_attn.q_norm.weight" in state else V2
    return None


def new_name(name: str) -> str:
    """Return the newer name of a tensor with an older name."""
    return ".".join(_NEW_PARTS.get(part, part) for part in name.split("."))


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from neighbouring pairs to first and second halves.

    weight: [H * D, in]. Rows 2i and 2i + 1 of a head become rows i and i + D/2.
    """
    rows, inputs = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, inputs)  # [H, D/2, 2, in]
    return pairs.transpose(1, 2).reshape(rows, inputs)


def join_experts(state: dict[str, Tensor], layer: int, routed: int, shared: int) -> None:
    """Replace the experts of a layer by the matrices of `RoutedExperts` and `SharedExperts`.

    routed, shared: the number of experts. Raises KeyError for a tensor that is missing.
    """
    old, new = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"

    def take(kind: str, expert: int, matrix: str) -> Tensor:
        return state.pop(f"{old}.{kind}.{expert}.{matrix}_proj.weight")

    state[f"{new}.router.layer.weight"] = state.pop(f"{old}.gate.weight")
    gate, up, down = (
        torch.stack([take("experts", expert, matrix) for expert in range(routed)])
        for matrix in ("gate", "up", "down")
    )
    state[f"{new}.input_linear.weight"] = torch.cat((gate, up), dim=1)  # [E, 2 * inner, hidden]
    state[f"{new}.output_linear.weight"] = down  # [E, hidden, inner]
    if shared:
        # The sum of several SwiGLU layers is one layer as wide as all of them.
        new = f"model.layers.{layer}.shared_mlp"
        gates, ups, downs = (
            [take("shared_experts", expert, matrix) for expert in range(shared)]
            for matrix in ("gate", "up", "down")
        )
        state[f"{new}.input_linear.weight"] = torch.cat((*gates, *ups))
        state[f"{new}.output_linear.weight"] = torch.cat(downs, dim=1)


def split_experts(state: dict[str, Tensor], layer: int, config: ModelConfig) -> None:
    """Undo `join_experts`; shared experts become layers as wide as a routed expert."""
    new, old = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"

    def put(kind: str, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        for matrix, tensor in (("gate", gate), ("down", down), ("up", up)):
            state[f"{new}.{kind}.{expert}.{matrix}_proj.weight"] = tensor.contiguous()

    state[f"{new}.gate.weight"] = state.pop(f"{old}.router.layer.weight")
    inputs = state.pop(f"{old}.input_linear.weight")  # [E, 2 * inner, hidden]
    outputs = state.pop(f"{old}.output_linear.weight")  # [E, hidden, inner]
    for expert, (both, down) in enumerate(zip(inputs, outputs, strict=True)):
        gate, up = both.chunk(2)
        put("experts", expert, gate, up, down)
    if config.shared_intermediate_size:
        old, inner = f"model.layers.{layer}.shared_mlp", config.intermediate_size
        gate, up = state.pop(f"{old}.input_linear.weight").chunk(2)
        down = state.pop(f"{old}.output_linear.weight")
        parts = (gate.split(inner), up.split(inner), down.split(inner, dim=1))
        for expert, matrices in enumerate(zip(*parts, strict=True)):
            put("shared_experts", expert, *matrices)
