"""Model directory to `.pth`: a state dict with the tensor names of the public MiniMind project.

Llama models become weights of MiniMind v2, Qwen3 models (QK-norm) of v3, mixtures of experts of v2.
A `.pth` file holds tensors only, so MiniMind's configuration is written beside it as JSON.
"""

from pathlib import Path
from typing import Any

import torch

from minimind.config.model import MOE_FIELDS, ModelConfig
from minimind.errors import ModelError, UsageError, unwritable
from minimind.export.pth_layout import V2, V3, Generation, split_experts
from minimind.files import atomic_file, write_json
from minimind.model import load_model, read_config
from minimind.model.directory import stored_dtype

_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def export_pth(directory: Path, out: Path) -> dict[str, Any]:
    """Write the weights of a model directory to `out`, and its configuration beside it.

    The configuration has the name of `out` with the suffix `.json`. Tensors keep their dtype.
    Returns the configuration. Raises ModelError for a model that MiniMind's code cannot compute,
    UsageError when one of the files exists or both have one name, ResourceError when they cannot
    be written.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a directory; give a file name, such as {out / 'model.pth'}")
    if out.suffix.lower() == ".json":  # on macOS and Windows, NAME.JSON is the same file
        raise UsageError(
            f"{out} is the name of the configuration beside the weights; give "
            f"{out.with_suffix('.pth')}"
        )
    config_file = out.with_suffix(".json")
    for file in (out, config_file):
        if file.exists():
            raise UsageError(f"{file} already exists; delete it or choose another --out")
    config = read_config(directory)
    if reason := unsupported_reason(config):
        raise ModelError(f"{directory}: MiniMind's code cannot run this model: {reason}")
    generation = V3 if config.qk_norm else V2
    state = load_model(directory, dtype=getattr(torch, stored_dtype(directory))).state_dict()
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    if config.num_local_experts:
        for layer in range(config.num_hidden_layers):
            split_experts(state, layer, config)
    content = minimind_config(config, generation)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as temporary:
            torch.save(dict(state), temporary)
        write_json(config_file, content)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise unwritable(out, error) from error
    return content


def unsupported_reason(config: ModelConfig) -> str | None:
    """Return the first feature of a model that MiniMind's code lacks, None if it has all."""
    if config.rope_scaling is not None:
        return (
            f"its context is extended by {config.rope_scaling.rope_type} scaling; "
            "export the model before the extension"
        )
    if not config.qk_norm:  # MiniMind v2
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            return (
                f"head_dim ({config.head_dim}) is not hidden_size / num_attention_heads "
                f"({config.hidden_size} / {config.num_attention_heads}), as in all models of v2"
            )
        if not config.tie_word_embeddings:
            return "its output head is not tied to the embedding, as in all models of v2"
    if not config.num_local_experts:
        return None
    for name in _MULTIPLIERS:
        if getattr(config, name) != ModelConfig.model_fields[name].default:
            return f"{name} = {getattr(config, name)}"
    if config.attention_multiplier is not None:
        return f"attention_multiplier = {config.attention_multiplier}"
    if config.num_experts_per_tok == 1:
        return (
            "one expert per token: the expert's output is multiplied by 1 here, but by its "
            "probability in MiniMind v2"
        )
    if config.shared_intermediate_size % config.intermediate_size:
        return (
            f"shared_intermediate_size ({config.shared_intermediate_size}) is not a multiple of "
            f"intermediate_size ({config.intermediate_size}), the width of its experts"
        )
    return None


def minimind_config(config: ModelConfig, generation: Generation) -> dict[str, Any]:
    """Return the arguments of MiniMind's `MiniMindConfig`, and its model type."""
    excluded = {"qk_norm", "rope_scaling", *MOE_FIELDS}
    if generation is V2:
        excluded |= {"head_dim", "tie_word_embeddings"}
    content = {"model_type": "minimind"} | config.model_dump(exclude=excluded)
    content |= {"hidden_act": "silu", "use_moe": bool(config.num_local_experts)}
    if config.num_local_experts:
        content |= {
            "num_experts_per_tok": config.num_experts_per_tok,
            "n_routed_experts": config.num_local_experts,
            "n_shared_experts": config.shared_intermediate_size // config.intermediate_size,
            "scoring_func": "softmax",
            "norm_topk_prob": True,
        }
    return content
