"""Model directory to GGUF: one file that llama.cpp, Ollama, LM Studio and the browser page run.

A GGUF file holds metadata (hyperparameters, vocabulary, chat template) and tensors under
llama.cpp's names. Two layouts differ from Hugging Face's:

- llama.cpp rotates neighbouring pairs (2i, 2i + 1) where `model/rope.py` rotates (i, i + D/2), so
  the rows of the query and key matrices of `llama` and `granitemoe` are permuted; those of `qwen3`
  are not.
- Gate and up projections of experts are two tensors, where ours are one.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from minimind.config.model import ModelConfig
from minimind.errors import ModelError, ResourceError, UsageError, install_line, unwritable
from minimind.export.gguf_vocabulary import GGUFVocabulary, read_vocabulary
from minimind.files import atomic_file
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
# YaRN in llama.cpp, which ignores the keys yarn_beta_fast and yarn_beta_slow for these models.
_FIXED_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_BLOCK = 32  # numbers of a row that share a scale in q8_0, q4_0, …
_K_BLOCK = 256  # the same in K-quants
_LOG_ERROR = 4  # ggml_log_level of errors
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
    """Summary of a written file."""

    path: Path
    type: str
    size: int  # bytes
    # Tensors in another type, by name, because their rows do not fill whole blocks of `type`.
    other_types: dict[str, str] = field(default_factory=dict)
    block: int = _BLOCK  # numbers per block


def model_name(path: Path) -> str:
    """Return a name for a model: that of its run directory, else of its model directory."""
    resolved = path.resolve()
    return (resolved.parent if resolved.name in ("model", "adapter") else resolved).name


def normalized_type(type: str) -> str:
    """Return the name of a GGUF type in lower case. Raises UsageError for an unknown type."""
    if type.lower() not in PLAIN_TYPES + K_TYPES:
        raise UsageError(f"unknown GGUF type {type!r}; known: {', '.join(PLAIN_TYPES + K_TYPES)}")
    return type.lower()


def check_new_file(out: Path) -> None:
    """Raise UsageError unless `out` is the name of a new file that ends in .gguf."""
    if out.is_dir():
        raise UsageError(f"{out} is a directory; give a file name, such as {out / 'model.gguf'}")
    if out.suffix != ".gguf":
        raise UsageError(f"{out}: the name of a GGUF file ends in .gguf, such as {out}.gguf")
    if out.exists():
        raise UsageError(f"{out} already exists; delete it or choose another --out")


def export_gguf(
    directory: Path,
    out: Path,
    *,
    type: str = "f16",
    adapter: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> GGUFReport:
    """Write a model directory as one new GGUF file.

    adapter: a LoRA adapter directory to merge first. progress(done, total) counts tensors.
    Raises UsageError for an unknown `type`, one that needs a missing package, and a name that is
    taken or does not end in .gguf; ModelError for a model that llama.cpp cannot represent;
    ResourceError when the file cannot be written.
    """
    type = normalized_type(type)
    check_new_file(out)
    if type in K_TYPES:
        return _export_k_quantized(directory, out, type, adapter, progress)
    other_types = _write(directory, out, type, adapter, progress)
    return GGUFReport(out, type, out.stat().st_size, other_types)


def _write(
    directory: Path, out: Path, type: str, adapter: Path | None, progress: Progress
) -> dict[str, str]:
    """Write a file of one of `PLAIN_TYPES`; return the tensors that have another type."""
    model = load_model(directory)
    if adapter:
        merge_adapter(model, adapter)
    vocabulary = read_vocabulary(directory, model.config.vocab_size)
    other_types = {}
    with gguf_file(out, architecture(model.config)) as writer:
        _write_metadata(writer, model_name(directory), model.config, type)
        _write_vocabulary(writer, vocabulary)
        tensors = dict(gguf_tensors(model))
        for done, (name, tensor) in enumerate(tensors.items(), 1):
            kind = _tensor_type(name, tensor, type)
            add_tensor(writer, name, tensor, kind)
            if kind == "f16" != type:
                other_types[name] = kind
            progress(done, len(tensors))
    return other_types


def architecture(config: ModelConfig) -> str:
    """Return llama.cpp's name of the architecture; raise ModelError where RoPE has no match."""
    scaling = config.rope_scaling
    if scaling is None:
        return _ARCHITECTURES[config.architecture]
    if scaling.rope_type == "dynamic":
        raise ModelError(
            "llama.cpp has no dynamic RoPE scaling; extend the context with "
            "model.rope_scaling=yarn instead, or export the model without an extended context"
        )
    if scaling.rope_type == "llama3" and config.qk_norm:
        raise ModelError(
            "llama.cpp has no Llama 3 RoPE scaling for models with QK-norm; export ONNX instead: "
            "minimind export onnx"
        )
    for name, default in _FIXED_YARN.items():
        if getattr(scaling, name) not in (None, default):
            raise ModelError(
                f"llama.cpp computes YaRN with {name} = {json.dumps(default)}; the model has "
                f"{json.dumps(getattr(scaling, name))} in its rope_scaling. Export ONNX instead: "
                "minimind export onnx"
            )
    return _ARCHITECTURES[config.architecture]


@contextlib.contextmanager
def gguf_file(out: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """Yield a GGUFWriter; when the block succeeds, its content is written to `out`, atomically.

    Raises ResourceError when the file cannot be written; then nothing is left of it.
    """
    with _written_atomically(out) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            yield writer
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


@contextlib.contextmanager
def _written_atomically(out: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `out`. Raises ResourceError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as temporary:
            yield temporary
    except OSError as error:
        raise unwritable(out, error) from error


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield (llama.cpp's name, float32 tensor) of every weight, in llama.cpp's layout."""
    config = model.config
    yield from _rope_factors(config)
    for name, tensor in model.state_dict().items():
        for gguf_name, part in llama_cpp_tensors(
            name.removesuffix(".weight"), tensor.float(), config
        ):
            yield f"{gguf_name}.weight", part


def llama_cpp_tensors(
    module: str, weight: Tensor, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield (llama.cpp's name without suffix, matrix) of one module's weight.

    module: Hugging Face's name, such as "model.layers.0.self_attn.q_proj".
    weight: [out, in], [experts, out, in] or [width].
    """
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if module in outer:
        yield outer[module], weight
        return
    _, _, layer, leaf = module.split(".", 3)
    block = f"blk.{layer}"
    if leaf in _GATE_AND_UP:
        for name, half in zip(_GATE_AND_UP[leaf], weight.chunk(2, dim=-2), strict=True):
            yield f"{block}.{name}", half
        return
    if leaf in ("self_attn.q_proj", "self_attn.k_proj") and not config.qk_norm:
        is_query = leaf.endswith("q_proj")
        heads = config.num_attention_heads if is_query else config.num_key_value_heads
        weight = _pair_rows(weight, heads)
    yield f"{block}.{_NAMES[leaf]}", weight


def _pair_rows(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head so that row i + D/2 follows row i. weight: [H * D, in]."""
    # --8<-- [start:pair-rows]
    rows, inputs = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, inputs)  # [H, 2, D/2, in]
    return halves.transpose(1, 2).reshape(rows, inputs)
    # --8<-- [end:pair-rows]


def _rope_factors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield Llama 3's RoPE scaling as a tensor: [D/2], the divisor of each frequency."""
    scaling = config.rope_scaling
    if scaling and scaling.rope_type == "llama3":
        plain, _ = rope_frequencies(config.model_copy(update={"rope_scaling": None}), 1)
        scaled, _ = rope_frequencies(config, 1)
        yield "rope_freqs.weight", plain / scaled


def _tensor_type(name: str, tensor: Tensor, type: str) -> str:
    """Return the type that a tensor is stored in, in a file of this type."""
    if tensor.dim() == 1 or "ffn_gate_inp" in name:  # norms and routers are small and sensitive
        return "f32"
    if type.startswith("q") and tensor.shape[-1] % _BLOCK:
        return "f16"
    # The output head chooses the token; llama.cpp's quantizer also stores it with more bits.
    is_head = name in ("token_embd.weight", "output.weight")
    return "q8_0" if is_head and type.startswith(("q4", "q5")) else type


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, type: str) -> None:
    """Quantize a float32 tensor to `type` and add it to the file."""
    kind = gguf.GGMLQuantizationType[type.upper()]
    array = tensor.detach().contiguous().cpu().numpy()
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _write_metadata(writer: gguf.GGUFWriter, name: str, config: ModelConfig, type: str) -> None:
    writer.add_name(name)
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
    file_type = "ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if config.num_local_experts:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier or 1 / math.sqrt(config.head_dim))
    scaling = config.rope_scaling
    if scaling and scaling.rope_type != "llama3":  # llama3 is a tensor, see `_rope_factors`
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        _, attention_factor = rope_frequencies(config, 1)
        default = 1 + 0.1 * math.log(scaling.factor)  # of llama.cpp, which multiplies it
        if scaling.rope_type == "yarn" and attention_factor != default:
            writer.add_rope_scaling_attn_factors(attention_factor / default)


def _write_vocabulary(writer: gguf.GGUFWriter, vocabulary: GGUFVocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
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
    """Write a float32 file and let llama.cpp quantize it. Raises UsageError without llama.cpp."""
    llama_cpp = _import_llama_cpp(type)
    wide = out.with_name(f".{out.stem}.f32.gguf")
    try:
        _write(directory, wide, "f32", adapter, progress)
        with _written_atomically(out) as temporary:
            if errors := _quantize(llama_cpp, wide, temporary, type):
                raise ResourceError(f"{out}: llama.cpp could not write it as {type}: {errors}")
    finally:
        wide.unlink(missing_ok=True)
    return GGUFReport(out, type, out.stat().st_size, _types_other_than_k(out), _K_BLOCK)


def _quantize(llama_cpp: Any, source: Path, target: Path, type: str) -> str:
    """Quantize a GGUF file by llama.cpp; return its error messages, or "" if it succeeded."""
    errors = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: object) -> None:  # llama.cpp's own prints every tensor
        if level == _LOG_ERROR:
            errors.append(text.decode("utf-8", "replace").strip())

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type.upper()}")
    llama_cpp.llama_log_set(log, None)
    try:
        paths = (str(path).encode() for path in (source, target))
        failed = llama_cpp.llama_model_quantize(*paths, parameters)
    finally:
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)
    return ("; ".join(errors) or "no reason given") if failed else ""


def _import_llama_cpp(type: str) -> Any:
    try:
        import llama_cpp
    except ImportError:
        raise UsageError(
            f"the type {type} needs llama-cpp-python, which is not installed: "
            f"{install_line('llama-cpp')}. Without it: {', '.join(PLAIN_TYPES)}"
        ) from None
    return llama_cpp


def _types_other_than_k(path: Path) -> dict[str, str]:
    """Return the matrices of a K-quantized file whose rows did not fill blocks of 256."""
    return {
        tensor.name: tensor.tensor_type.name.lower()
        for tensor in gguf.GGUFReader(path).tensors
        if len(tensor.shape) > 1 and tensor.shape[0] % _K_BLOCK and tensor.tensor_type.name != "F32"
    }
