"""The public MiniMind's models, computed from their description on a state dict.

Independent of `minimind`: plain functions, float64, no cache. Each generation is a pre-norm
decoder with RMSNorm, grouped-query attention, RoPE, SwiGLU and a tied head; they differ in the
names of tensors, the pairs that RoPE rotates, QK-norm (v3), and experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a random model. shared, routed: the number of experts; routed 0 = dense."""

    vocab: int = 600
    hidden: int = 32
    inner: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    routed: int = 0
    shared: int = 0
    chosen: int = 2
    theta: float = 1e4
    eps: float = 1e-5
    interleaved: bool = False  # v1, and v2 until April 2025
    qk_norm: bool = False  # v3
    normalized: bool = True  # weights of the chosen experts sum to 1


def random_state(sizes: Sizes) -> State:
    """A state dict with the names of the generation, and large weights."""
    old = sizes.interleaved
    state: State = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns) * 2 / math.sqrt(columns)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.rand(width)

    def feed_forward(name: str) -> None:
        gate, down, up = ("w1", "w2", "w3") if old else ("gate_proj", "down_proj", "up_proj")
        matrix(f"{name}.{gate}", sizes.inner, sizes.hidden)
        matrix(f"{name}.{down}", sizes.hidden, sizes.inner)
        matrix(f"{name}.{up}", sizes.inner, sizes.hidden)

    embedding, head = ("tok_embeddings", "output") if old else ("model.embed_tokens", "lm_head")
    matrix(embedding, sizes.vocab, sizes.hidden)
    for layer in range(sizes.layers):
        names = _names(layer, old)
        for projection, heads in zip("qkv", (sizes.heads, *[sizes.kv_heads] * 2), strict=True):
            matrix(names[projection], heads * sizes.head_dim, sizes.hidden)
        matrix(names["o"], sizes.hidden, sizes.heads * sizes.head_dim)
        norm(names["attention_norm"], sizes.hidden)
        norm(names["mlp_norm"], sizes.hidden)
        if sizes.qk_norm:
            norm(f"model.layers.{layer}.self_attn.q_norm", sizes.head_dim)
            norm(f"model.layers.{layer}.self_attn.k_norm", sizes.head_dim)
        if not sizes.routed:
            feed_forward(names["mlp"])
            continue
        matrix(f"{names['mlp']}.gate", sizes.routed, sizes.hidden)
        for expert in range(sizes.routed):
            feed_forward(f"{names['mlp']}.experts.{expert}")
        for expert in range(sizes.shared):
            feed_forward(f"{names['mlp']}.shared_experts" + ("" if old else f".{expert}"))
    norm("norm" if old else "model.norm", sizes.hidden)
    state[f"{head}.weight"] = state[f"{embedding}.weight"]
    return state


def logits(state: Mapping[str, Tensor], sizes: Sizes, ids: Tensor) -> Tensor:
    """Logits [T, vocab] of the tokens `ids` [T]."""
    state = {name: tensor.double() for name, tensor in state.items()}
    old = sizes.interleaved
    x = state["tok_embeddings.weight" if old else "model.embed_tokens.weight"][ids]
    for layer in range(sizes.layers):
        names = _names(layer, old)
        normed = _rms_norm(x, state[f"{names['attention_norm']}.weight"], sizes.eps)
        x = x + _attention(state, names, layer, sizes, normed)
        normed = _rms_norm(x, state[f"{names['mlp_norm']}.weight"], sizes.eps)
        x = x + _mlp(state, names["mlp"], sizes, normed)
    x = _rms_norm(x, state["norm.weight" if old else "model.norm.weight"], sizes.eps)
    return x @ state["output.weight" if old else "lm_head.weight"].T


def _names(layer: int, old: bool) -> dict[str, str]:
    if old:
        base = f"layers.{layer}"
        names = {p: f"{base}.attention.w{p}" for p in "qkvo"}
        norms = {"attention_norm": f"{base}.attention_norm", "mlp_norm": f"{base}.ffn_norm"}
        return names | norms | {"mlp": f"{base}.feed_forward"}
    base = f"model.layers.{layer}"
    names = {p: f"{base}.self_attn.{p}_proj" for p in "qkvo"}
    norms = {
        "attention_norm": f"{base}.input_layernorm",
        "mlp_norm": f"{base}.post_attention_layernorm",
    }
    return names | norms | {"mlp": f"{base}.mlp"}


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: Tensor, sizes: Sizes) -> Tensor:
    """Rotate x [T, heads, D] by position times frequency: each pair is one complex number."""
    half = sizes.head_dim // 2
    frequencies = sizes.theta ** (-torch.arange(half).double() / half)
    angles = torch.arange(len(x)).double()[:, None, None] * frequencies  # [T, 1, D/2]
    if sizes.interleaved:
        pairs = x.unflatten(-1, (half, 2))
        pairs = torch.complex(pairs[..., 0], pairs[..., 1])
    else:
        pairs = torch.complex(x[..., :half], x[..., half:])
    turned = pairs * torch.exp(1j * angles)
    if sizes.interleaved:
        return torch.stack((turned.real, turned.imag), dim=-1).flatten(-2)
    return torch.cat((turned.real, turned.imag), dim=-1)


def _attention(
    state: Mapping[str, Tensor], names: Mapping[str, str], layer: int, sizes: Sizes, x: Tensor
) -> Tensor:
    q, k, v = (
        (x @ state[f"{names[p]}.weight"].T).unflatten(-1, (-1, sizes.head_dim)) for p in "qkv"
    )
    if sizes.qk_norm:
        base = f"model.layers.{layer}.self_attn"
        q = _rms_norm(q, state[f"{base}.q_norm.weight"], sizes.eps)
        k = _rms_norm(k, state[f"{base}.k_norm.weight"], sizes.eps)
    q, k = _rotate(q, sizes), _rotate(k, sizes)
    outputs = []
    for head in range(sizes.heads):
        shared_head = head * sizes.kv_heads // sizes.heads
        scores = q[:, head] @ k[:, shared_head].T / math.sqrt(sizes.head_dim)
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, shared_head])
    return torch.cat(outputs, dim=-1) @ state[f"{names['o']}.weight"].T


def _mlp(state: Mapping[str, Tensor], name: str, sizes: Sizes, x: Tensor) -> Tensor:
    gate, down, up = (
        ("w1", "w2", "w3") if sizes.interleaved else ("gate_proj", "down_proj", "up_proj")
    )

    def swiglu(name: str, x: Tensor) -> Tensor:
        a = x @ state[f"{name}.{gate}.weight"].T
        return (a * a.sigmoid() * (x @ state[f"{name}.{up}.weight"].T)) @ state[
            f"{name}.{down}.weight"
        ].T

    if not sizes.routed:
        return swiglu(name, x)
    probabilities = (x @ state[f"{name}.gate.weight"].T).softmax(-1)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        weights, chosen = probabilities[token].topk(sizes.chosen)
        if sizes.normalized and sizes.chosen > 1:
            weights = weights / weights.sum()
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            out[token] += weight * swiglu(f"{name}.experts.{expert}", x[token])
    for expert in range(sizes.shared):
        suffix = "" if sizes.interleaved else f".{expert}"
        out = out + swiglu(f"{name}.shared_experts{suffix}", x)
    return out
