"""Forward passes in compiled code: packs the weights of a model for `decode.cpp` and calls it."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.inference.kv_cache import KVCache
from minimind.inference.matmul import quantize_int8
from minimind.inference.native_library import (
    KINDS,
    FeedForward,
    Layer,
    Matrix,
    Model,
    load_library,
)
from minimind.inference.packed_layers import merged_weight, norm_weight
from minimind.model import Transformer
from minimind.model.norm import RMSNorm
from minimind.model.transformer import Layer as TransformerLayer

_INPUTS_MULTIPLE = 4  # int8 weights of a vector lane
_HEAD_MULTIPLE = 8  # dimensions of a head that attention processes together


class NativeDecoder:
    """The packed weights of a model, and forward passes in its KV cache.

    A row gets the same bits in any batch and with any number of threads.
    """

    def __init__(self, model: Transformer, cache: KVCache, *, int8: bool, threads: int) -> None:
        """Pack the weights of a model for which `is_supported` returns True."""
        library = load_library()
        assert library is not None
        self._library, self._int8, self._threads = library, int8, threads
        self._panel = library.minimind_panel()
        self._tensors: list[Tensor] = [cache.data]  # that the structs point into
        config = model.config
        self._vocab_size = config.vocab_size
        self._layers = (Layer * config.num_hidden_layers)(*map(self._layer, model.model.layers))
        self._model = Model(
            layers=self._layers,
            final_norm=self._norm(model.model.norm),
            head=self._matrix(model.head_weight.detach()),
            cache=cache.data.data_ptr(),
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            slots=cache.data.shape[2],
            positions=cache.positions,
            num_experts=config.num_local_experts,
            num_chosen=config.num_experts_per_tok if config.num_local_experts else 0,
            cache_kind=KINDS[cache.dtype],
            eps=config.rms_norm_eps,
            attention_scale=config.attention_multiplier or config.head_dim**-0.5,
            residual_scale=config.residual_multiplier,
            logits_scale=1 / config.logits_scaling,
        )

    def forward(
        self, x: Tensor, slots: Tensor, positions: Tensor, rope: Tensor, kept: Tensor
    ) -> Tensor:
        """Return logits [len(kept), vocab] float32 of some of N rows, each a token of a sequence.

        x: embeddings [N, hidden] float32, overwritten; slots, positions: [N] int64; rope: cosines
        and sines [2, N, D], the first half of the sines negated; kept: ascending rows, int64.
        """
        logits = torch.empty(len(kept), self._vocab_size)
        rope = rope.contiguous()
        self._library.minimind_forward(
            ctypes.addressof(self._model),
            len(x),
            slots.data_ptr(),
            positions.data_ptr(),
            rope.data_ptr(),
            x.data_ptr(),
            len(kept),
            kept.data_ptr(),
            logits.data_ptr(),
            self._threads,
        )
        return logits

    def _layer(self, layer: nn.Module) -> Layer:
        assert isinstance(layer, TransformerLayer)
        attention, moe = layer.self_attn, layer.block_sparse_moe
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        packed = Layer(
            input_norm=self._norm(layer.input_layernorm),
            q_norm=self._norm(attention.q_norm),
            k_norm=self._norm(attention.k_norm),
            feed_forward_norm=self._norm(layer.post_attention_layernorm),
            qkv=self._matrix(torch.cat([merged_weight(projection) for projection in projections])),
            out=self._matrix(merged_weight(attention.o_proj)),
        )
        if layer.mlp is not None:
            gate, up = merged_weight(layer.mlp.gate_proj), merged_weight(layer.mlp.up_proj)
            packed.dense = self._feed_forward(gate, up, merged_weight(layer.mlp.down_proj))
        if layer.shared_mlp is not None:
            gate, up = merged_weight(layer.shared_mlp.input_linear).chunk(2)
            packed.dense = self._feed_forward(
                gate, up, merged_weight(layer.shared_mlp.output_linear)
            )
        if moe is not None:
            router = moe.router.layer.weight.detach().float()
            packed.router = self._matrix(router, exact=True)
            experts = []
            for gate_up, down in zip(
                moe.input_linear.weight.detach(), moe.output_linear.weight.detach(), strict=True
            ):
                gate, up = gate_up.chunk(2)
                experts.append(self._feed_forward(gate, up, down))
            packed.experts = (FeedForward * len(experts))(*experts)
        return packed

    def _feed_forward(self, gate: Tensor, up: Tensor, down: Tensor) -> FeedForward:
        """Pack a SwiGLU layer: gate and up [inner, hidden], down [hidden, inner]."""
        half = self._panel // 2
        padding = (0, 0, 0, -len(gate) % half)
        blocks = [F.pad(weight, padding).unflatten(0, (-1, half)) for weight in (gate, up)]
        gate_up = torch.cat(blocks, dim=1).flatten(0, 1)  # panels of `half` gates and `half` ups
        return FeedForward(self._matrix(gate_up), self._matrix(down))

    def _norm(self, norm: RMSNorm | None) -> int | None:
        return None if norm is None else self._keep(norm_weight(norm))

    def _matrix(self, weight: Tensor, *, exact: bool = False) -> Matrix:
        """Pack a weight [out, in], quantized if `int8` is set and `exact` is not."""
        outputs, inputs = weight.shape
        weight = F.pad(weight, (0, 0, 0, -outputs % self._panel))
        scale = None
        if self._int8 and not exact:
            weight, scales = quantize_int8(weight)
            scale = self._keep(scales.float())
        per_lane = 4 // weight.itemsize
        panels = weight.view(-1, self._panel, inputs // per_lane, per_lane).transpose(1, 2)
        data = self._keep(panels.contiguous())
        return Matrix(data, scale, KINDS[weight.dtype], outputs, inputs, len(panels))

    def _keep(self, tensor: Tensor) -> int:
        """Keep a tensor alive and return its address."""
        self._tensors.append(tensor)
        return tensor.data_ptr()


def is_supported(model: Transformer) -> bool:
    """Return True when the forward pass of a model can run in compiled code here."""
    weight, config = model.head_weight, model.config
    widths = [
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.intermediate_size,
        config.shared_intermediate_size,
    ]
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and all(width % _INPUTS_MULTIPLE == 0 for width in widths)
        and config.head_dim % _HEAD_MULTIPLE == 0
        and load_library() is not None
    )


def cache_dtype(model: Transformer) -> torch.dtype:
    """Return the dtype of the KV cache.

    Torch's attention on a CPU is fastest in float32.
    """
    weight = model.head_weight
    on_torch = weight.device.type == "cpu" and not is_supported(model)
    return torch.float32 if on_torch else weight.dtype
