"""Packed weights of a transformer's layers, for the batched forward pass."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.inference.matmul import Linear, Packer
from minimind.model.experts import RoutedExperts, moe_reference
from minimind.model.lora import LoRALinear
from minimind.model.norm import RMSNorm
from minimind.model.transformer import Layer


@dataclass(frozen=True)
class PackedLayer:
    """The weights of a layer. Norm weights are float32; q_norm and k_norm are per head."""

    input_norm: Tensor
    qkv: Linear  # [N, hidden] -> [N, (H + 2K) * D]
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear  # [N, H * D] -> [N, hidden]
    feed_forward_norm: Tensor
    feed_forward: Linear


def pack_layer(layer: nn.Module, pack: Packer, slots: int) -> PackedLayer:
    """Pack the weights of a layer for batches of up to `slots` decoded tokens."""
    assert isinstance(layer, Layer)
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return PackedLayer(
        input_norm=norm_weight(layer.input_layernorm),
        qkv=pack(torch.cat([merged_weight(projection) for projection in projections])),
        q_norm=None if attention.q_norm is None else norm_weight(attention.q_norm),
        k_norm=None if attention.k_norm is None else norm_weight(attention.k_norm),
        out=pack(merged_weight(attention.o_proj)),
        feed_forward_norm=norm_weight(layer.post_attention_layernorm),
        feed_forward=_pack_feed_forward(layer, pack, slots),
    )


def norm_weight(norm: RMSNorm) -> Tensor:
    """Return the weight of a norm in float32."""
    return norm.weight.detach().float()


def _pack_feed_forward(layer: Layer, pack: Packer, slots: int) -> Linear:
    if layer.mlp is not None:
        gate, up = merged_weight(layer.mlp.gate_proj), merged_weight(layer.mlp.up_proj)
        return _swiglu(pack(torch.cat([gate, up])), pack(merged_weight(layer.mlp.down_proj)))
    assert layer.block_sparse_moe is not None
    moe = _pack_experts(layer.block_sparse_moe, pack, slots)
    if layer.shared_mlp is None:
        return moe
    shared = _swiglu(
        pack(merged_weight(layer.shared_mlp.input_linear)),
        pack(merged_weight(layer.shared_mlp.output_linear)),
    )
    return lambda x: moe(x) + shared(x)


def _swiglu(gate_up: Linear, down: Linear) -> Linear:
    def forward(x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(F.silu(gate).mul_(up))

    return forward


def _pack_experts(module: RoutedExperts, pack: Packer, slots: int) -> Linear:
    """Pack routed experts; on a CPU the result is batch-invariant, unlike RoutedExperts itself."""
    if module.router.layer.weight.device.type != "cpu":
        return _experts_on_device(module, max(slots, pack.min_rows))
    router = pack.exact(module.router.layer.weight.detach().float())
    matrices = zip(
        module.input_linear.weight.detach(), module.output_linear.weight.detach(), strict=True
    )
    experts = [_swiglu(pack(gate_up), pack(down)) for gate_up, down in matrices]

    def forward(x: Tensor) -> Tensor:
        top_logits, chosen = router(x.float()).topk(module.num_chosen, dim=-1)  # [N, chosen] each
        weights = top_logits.softmax(-1).to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(experts):
            rows, ranks = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                out[rows] += expert(x[rows]) * weights[rows, ranks, None]
        return out

    return forward


def _experts_on_device(module: RoutedExperts, slots: int) -> Linear:
    """Run all experts for up to `slots` rows: as fast as routing, and without a device sync."""
    router = module.router.layer.weight.detach().float()
    gate_up, down = module.input_linear.weight.detach(), module.output_linear.weight.detach()

    def forward(x: Tensor) -> Tensor:
        if len(x) > slots:
            return module(x[None])[0]
        top_logits, chosen = F.linear(x.float(), router).topk(module.num_chosen, dim=-1)
        return moe_reference(x, chosen, top_logits.softmax(-1).to(x.dtype), gate_up, down)

    return forward


def merged_weight(module: nn.Linear) -> Tensor:
    """Return the weight [out, in], with that of an adapter in training added."""
    return (module.merged() if isinstance(module, LoRALinear) else module.weight).detach()
