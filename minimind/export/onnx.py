"""Model directory to ONNX, for onnxruntime (C#, Java, mobile) and transformers.js.

    OUT/config.json, generation_config.json, tokenizer.json, …   as in a model directory
        onnx/model.onnx                                          graph and float32 weights

The graph has the inputs and outputs that transformers.js expects of a decoder: `input_ids` [B, T],
`attention_mask` [B, P + T], `position_ids` [B, T], `past_key_values.N.key` and `.value`
[B, K, P, D]; `logits` [B, T, vocab], `present.N.key` and `.value` [B, K, P + T, D]. B sequences,
T new tokens, P past ones, K key/value heads, D head_dim. The cache of the first call is empty
(P = 0), and each call's `present` is the next one's `past_key_values`.
"""

import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.errors import ModelError, UsageError, install_line
from minimind.model import KVCache, Transformer, load_model, merge_adapter, read_config
from minimind.model.experts import RoutedExperts, moe_reference
from minimind.model.rope import rope_table
from minimind.model.saving import atomic_directory
from minimind.tokenizer import Tokenizer

GRAPH = "onnx/model.onnx"
_MAX_BYTES = 2 * 10**9  # a protobuf message has less than 2 GiB
_WEIGHTS = (".safetensors", ".index.json")
# transformers.js reads these names to give the first cache its shape.
_BATCH, _NEW, _PAST, _TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)


class DecoderGraph(nn.Module):
    """A model as a function of tokens and cache, without state, so that it can be traced.

    Routed experts of `model` are replaced in place.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        for layer in model.model.layers:
            if isinstance(layer.block_sparse_moe, RoutedExperts):
                layer.block_sparse_moe = _AllExperts(layer.block_sparse_moe)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the logits, then keys and values of each layer; shapes as in the module.

        attention_mask: int64, 0 for padding. past: keys and values in the order of layers.
        """
        decoder, cache = self.model.model, _TracedCache(past)
        mask = _attention_mask(attention_mask, input_ids.shape[1])  # [B, 1, T, P + T]
        # Only dynamic RoPE scaling depends on the length.
        lengths = position_ids.amax(dim=-1, keepdim=True) + 1  # [B, 1]
        cos, sin = rope_table(self.config, position_ids, lengths).unsqueeze(-2)  # [B, T, 1, D] each
        x = decoder.embed_tokens(input_ids) * self.config.embedding_multiplier
        for layer in decoder.layers:
            x = layer(x, cos, sin, mask, cache, None)
        x = decoder.norm(x) * (1 / self.config.logits_scaling)
        return self.model.logits(x), *cache.present


class _TracedCache(KVCache):
    """A KV cache that joins past and new tokens instead of writing into allocated memory."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self.past = past
        self.present: list[Tensor] = []

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        both = (
            torch.cat((self.past[2 * layer], keys), dim=2),
            torch.cat((self.past[2 * layer + 1], values), dim=2),
        )
        self.present += both
        return both


class _AllExperts(nn.Module):
    """Routed experts without sorting: every expert computes every token.

    The number of rows per expert would be data-dependent, which a static graph cannot have.
    """

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, routing: None) -> Tensor:
        logits = F.linear(x, self.experts.router.layer.weight)  # [B, T, E]
        top, chosen = logits.topk(self.experts.num_chosen, dim=-1)  # [B, T, K] each
        out = moe_reference(
            x.flatten(0, 1),  # [N, hidden]
            chosen.flatten(0, 1),  # [N, K]
            top.softmax(-1).flatten(0, 1),  # [N, K]
            self.experts.input_linear.weight,
            self.experts.output_linear.weight,
        )
        return out.view_as(x)


def _attention_mask(attention_mask: Tensor, length: int) -> Tensor:
    """Return [B, 1, T, P + T], True where a query may attend: to earlier tokens, not to padding.

    Every query may attend to itself. Otherwise padding would attend to nothing, and its NaN would
    spread through the values of the next layer.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total)
    queries = torch.arange(total - length, total)[:, None]  # [T, 1]
    is_token = attention_mask[:, None, None, :] != 0  # [B, 1, 1, P + T]
    return ((keys <= queries) & is_token) | (keys == queries)


def export_onnx(directory: Path, out: Path, *, adapter: Path | None = None) -> Path:
    """Write a model directory as the new folder `out`.

    adapter: a LoRA adapter directory to merge first. Returns the path of the graph. Raises
    UsageError when the packages of the extra `onnx` are missing or `out` exists, ModelError for a
    model that is too large for one file, ResourceError when it cannot be written.
    """
    _check_installed()
    if out.exists():
        raise UsageError(f"{out} already exists; delete it or choose another --out")
    tokenizer, config = Tokenizer.load(directory), read_config(directory)
    tokenizer.check_model(directory, config.vocab_size)
    model = load_model(directory)
    if adapter:
        merge_adapter(model, adapter)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size > _MAX_BYTES:
        raise ModelError(
            f"{directory}: its weights have {size / 1e9:.1f} GB in float32, but one ONNX file "
            "holds at most 2 GB; export GGUF instead: minimind export gguf"
        )
    program = trace(model.eval())
    with atomic_directory(out, "model in ONNX format", GRAPH, size) as work:
        for file in directory.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, work / file.name)
        (work / GRAPH).parent.mkdir()
        program.save(work / GRAPH, external_data=False)
    return out / GRAPH


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UsageError(f"onnx and onnxscript are not installed; {install_line('onnx')}") from None


@torch.no_grad()
def trace(model: Transformer) -> Any:
    """Return the `torch.onnx.ONNXProgram` of a model."""
    config = model.config
    # A dimension of 1 in the example would become a constant.
    batch, past, new = 2, 3, 2
    cache_shape = (batch, config.num_key_value_heads, past, config.head_dim)
    layers = range(config.num_hidden_layers)
    example: dict[str, Any] = {
        "input_ids": torch.zeros(batch, new, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.int64),
        "position_ids": torch.arange(past, past + new).expand(batch, new).contiguous(),
        "past": [torch.zeros(cache_shape) for _ in layers for _ in range(2)],
    }
    automatic = torch.export.Dim.AUTO
    dims = {"input_ids": (0, 1), "attention_mask": (0, 1), "position_ids": (0, 1)}
    shapes: dict[str, Any] = {name: dict.fromkeys(axes, automatic) for name, axes in dims.items()}
    shapes["past"] = [{0: automatic, 2: automatic} for _ in example["past"]]
    names = [f"{n}.{part}" for n in layers for part in ("key", "value")]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # "torchvision is not installed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            DecoderGraph(model).eval(),
            kwargs=example,
            dynamic_shapes=shapes,
            input_names=[*dims, *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    _name_dimensions(program)
    _drop_traces(program)
    return program


def _name_dimensions(program: Any) -> None:
    """Give the dimensions of inputs and outputs the names that transformers.js reads."""
    graph = program.model.graph
    tokens, *_ = graph.inputs
    names = {tokens.shape[0].value: _BATCH, tokens.shape[1].value: _NEW}
    # The exporter does not see that all caches have the same length.
    names |= {v.shape[2].value: _PAST for v in graph.inputs if v.name.startswith("past")}
    program.rename_axes(names)
    for value in (*graph.inputs, *graph.outputs):
        if value.name == "attention_mask":
            value.shape[1] = _TOTAL
        elif value.name.startswith("present."):
            value.shape[2] = _TOTAL


def _drop_traces(program: Any) -> None:
    """Remove the stack traces of the exporter: they hold paths of this machine."""
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    program.model.metadata_props.clear()
