"""Model directory to GGUF: one file that llama.cpp, Ollama, LM Studio and the browser page run.

A GGUF file holds metadata (hyperparameters, vocabulary, chat template) and tensors under
llama.cpp's names. Two layouts differ from Hugging Face's. llama.cpp rotates neighbouring pairs
(2i, 2i + 1) where `model/rope.py` rotates (i, i + D/2), so the rows of the query and key matrices
of `llama` and `granitemoe` are permuted; `qwen3` is read as it is. And the matrices of experts are
stored as gate and up apart, where ours are one.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind.config.model import ModelConfig
from minimind.errors import ModelError, ResourceError, UsageError, install_line
from minimind.export.gguf_vocabulary import GGUFVocabulary, read_vocabulary
from minimind.model import Transformer, load_model, merge_adapter
from minimind.model.rope import rope_frequencies

# Types that the package `gguf` writes itself; the others go through llama.cpp's own quantizer.
PLAIN_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
K_TYPES = ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "GraniteMoeSharedForCausalLM": "granitemoe",
}
_BLOCK = 32  # numbers of a row that share a scale in q8_0, q4_0, …
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.output_linear": "ffn_down_exps",
    "shared_mlp.output_linear": "ffn_down_shexp",
}
_GATE_AND_UP = {
    "block_sparse_moe.input_linear": ("ffn_gate_exps", "ffn_up_exps"),
    "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp"),
}
Progress = Callable[[int, int], None]


@dataclass
class GGUFReport:
    """What was written. `wider`: tensors stored as f16, since their rows do not fill blocks."""

    path: Path
    size: int = 0  # bytes
    type: str = "f16"
    wider: list[str] = field(default_factory=list)


def export_gguf(
    directory: Path,
    out: Path,
    *,
    type: str = "f16",
    adapter: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> GGUFReport:
    """Write a model directory as one GGUF file, replacing `out` only when all of it is written.

    adapter: a LoRA adapter directory to merge first. progress(done, total) counts tensors.
    Raises ModelError for a model that llama.cpp cannot represent, UsageError when the package
    that writes `type` is not installed, ResourceError when the file cannot be written.
    """
    if type in K_TYPES:
        return _export_k_quantized(directory, out, type, adapter, progress)
    if type not in PLAIN_TYPES:
        raise UsageError(f"no GGUF type {type!r}; known are {', '.join(PLAIN_TYPES + K_TYPES)}")
    model = load_model(directory)
    if adapter:
        merge_adapter(model, adapter)
    vocabulary = read_vocabulary(directory, model.config.vocab_size)
    report = GGUFReport(out, type=type)
    writer = new_writer(out, architecture(model.config))
    _write_metadata(writer, directory, model.config, vocabulary, type)
    tensors = dict(gguf_tensors(model))
    for done, (name, tensor) in enumerate(tensors.items(), 1):
        _add_tensor(writer, name, tensor, type, report.wider)
        progress(done, len(tensors))
    finish(writer, out)
    report.size = out.stat().st_size
    return report


def architecture(config: ModelConfig) -> str:
    """Return llama.cpp's name of the architecture; raise ModelError where RoPE has no match."""
    if config.rope_scaling and config.rope_scaling.rope_type == "dynamic":
        raise ModelError(
            "llama.cpp has no dynamic RoPE scaling; extend the context with "
            "model.rope_scaling=yarn instead, or export without an extended context"
        )
    return _ARCHITECTURES[config.architecture]


def gguf_package() -> Any:
    """Import the package `gguf`; raise UsageError with the line that installs it."""
    try:
        import gguf
    except ImportError:
        raise UsageError(f"gguf is not installed; {install_line('gguf')}") from None
    return gguf


def new_writer(out: Path, architecture: str) -> Any:
    """Open a GGUFWriter on a temporary file beside `out`; `finish` gives it the name."""
    return gguf_package().GGUFWriter(temporary(out), architecture)


def temporary(out: Path) -> Path:
    """Path of the file that becomes `out`."""
    return out.with_name(f".{out.name}.tmp")


def finish(writer: Any, out: Path) -> None:
    """Write all that was added and rename the file to `out`. Raises ResourceError."""
    part = temporary(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(out)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield (llama.cpp's name, float32 tensor) of every weight, in its layout."""
    config = model.config
    yield from _rope_factors(config)
    for name, tensor in model.state_dict().items():
        for gguf_name, part in convert(name.removesuffix(".weight"), tensor.float(), config):
            yield f"{gguf_name}.weight", part


def convert(module: str, weight: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (llama.cpp's name without suffix, matrix) of one module's weight.

    module: Hugging Face's path, such as "model.layers.0.self_attn.q_proj".
    weight: [out, in], [experts, out, in] or [width].
    """
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if module in outer:
        yield outer[module], weight
        return
    _, _, layer, leaf = module.split(".", 3)
    block = f"blk.{layer}"
    if leaf in _GATE_AND_UP:
        gate, up = weight.chunk(2, dim=-2)
        for name, half in zip(_GATE_AND_UP[leaf], (gate, up), strict=True):
            yield f"{block}.{name}", half
        return
    if leaf in ("self_attn.q_proj", "self_attn.k_proj") and not config.qk_norm:
        is_query = leaf.endswith("q_proj")
        weight = _pair_rows(
            weight, config.num_attention_heads if is_query else config.num_key_value_heads
        )
    yield f"{block}.{_NAMES[leaf]}", weight


def _pair_rows(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from (all first, all second halves) to neighbouring pairs.

    weight: [H * D, in]; row i + D/2 of a head comes to stand after row i.
    """
    rows, inputs = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, inputs)  # [H, 2, D/2, in]
    return halves.transpose(1, 2).reshape(rows, inputs)


def _rope_factors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield Llama 3's scaling as llama.cpp has it: [D/2], by which each frequency is divided."""
    scaling = config.rope_scaling
    if scaling and scaling.rope_type == "llama3":
        plain, _ = rope_frequencies(config.model_copy(update={"rope_scaling": None}), 1)
        scaled, _ = rope_frequencies(config, 1)
        yield "rope_freqs.weight", plain / scaled


def _add_tensor(writer: Any, name: str, tensor: Tensor, type: str, wider: list[str]) -> None:
    """Add a tensor in the type asked for; vectors and routers are always float32."""
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[type.upper()]
    if tensor.dim() == 1 or "ffn_gate_inp" in name:
        kind = gguf.GGMLQuantizationType.F32
    elif type.startswith("q") and tensor.shape[-1] % _BLOCK:
        kind = gguf.GGMLQuantizationType.F16
        wider.append(name)
    elif type.startswith(("q4", "q5")) and name in ("token_embd.weight", "output.weight"):
        # The head decides between tokens: llama.cpp keeps it wider too.
        kind = gguf.GGMLQuantizationType.Q8_0
    array = tensor.detach().contiguous().cpu().numpy()
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _write_metadata(
    writer: Any, directory: Path, config: ModelConfig, vocabulary: GGUFVocabulary, type: str
) -> None:
    gguf = gguf_package()
    writer.add_name(directory.resolve().name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_file_type(gguf.LlamaFileType[_file_type(type)])
    if config.num_local_experts:
        scale = config.attention_multiplier or 1 / math.sqrt(config.head_dim)
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(scale)
    _write_rope_scaling(writer, config)
    _write_vocabulary(writer, vocabulary)


def _file_type(type: str) -> str:
    return "ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"


def _write_rope_scaling(writer: Any, config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if not scaling or scaling.rope_type == "llama3":  # llama3: a tensor, see `_rope_factors`
        return
    gguf = gguf_package()
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)


def _write_vocabulary(writer: Any, vocabulary: GGUFVocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_pad_token_id(vocabulary.pad_id)
    if vocabulary.eot_ids:
        writer.add_eot_token_id(vocabulary.eot_ids[0])
    if vocabulary.bos_id is not None:
        writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_add_bos_token(vocabulary.bos_id is not None)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _export_k_quantized(
    directory: Path, out: Path, type: str, adapter: Path | None, progress: Progress
) -> GGUFReport:
    """Write float32 first, then let llama.cpp quantize it. Raises UsageError without it."""
    try:
        import llama_cpp
    except ImportError:
        raise UsageError(
            f"{type} is written by llama.cpp, through llama-cpp-python: pip install "
            f"llama-cpp-python; without it, {', '.join(PLAIN_TYPES)} can be written"
        ) from None
    wide = out.with_name(f".{out.name}.f32")
    part = temporary(out)
    try:
        export_gguf(directory, wide, type="f32", adapter=adapter, progress=progress)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type.upper()}")
        status = llama_cpp.llama_model_quantize(str(wide).encode(), str(part).encode(), parameters)
        if status:
            raise ModelError(f"{directory}: llama.cpp could not quantize it to {type}")
        part.replace(out)
    finally:
        wide.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    return GGUFReport(out, out.stat().st_size, type)
