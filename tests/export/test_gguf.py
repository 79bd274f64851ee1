"""Content of GGUF files, read back with the package `gguf`.

For llama.cpp itself see test_against_llama_cpp.py.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from minimind.errors import ModelError, ResourceError, UsageError
from minimind.export.gguf import architecture, export_gguf, gguf_tensors
from minimind.export.gguf_adapter import export_gguf_adapter
from minimind.tokenizer import Tokenizer
from tests.support.small_models import ARCHITECTURES, save_small_model, small_model


def field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_weight_is_in_the_file(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model", kind, tokenizer)
    report = export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    stored = read_tensors(report.path)
    assert sum(t.size for t in stored.values()) == sum(p.numel() for p in model.parameters())
    assert report.size == report.path.stat().st_size and report.other_types == {}
    embedding = model.state_dict()["model.embed_tokens.weight"].numpy()
    assert np.array_equal(stored["token_embd.weight"], embedding)


def test_query_rows_of_neighbouring_pairs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Rows i and i + D/2 of each head come to stand side by side."""
    model = save_small_model(tmp_path, "llama", tokenizer)
    tensors = dict(gguf_tensors(model))
    ours = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    theirs = tensors["blk.0.attn_q.weight"]
    for head in range(4):
        for pair in range(16):
            row = head * 32
            assert torch.equal(theirs[row + 2 * pair], ours[row + pair])
            assert torch.equal(theirs[row + 2 * pair + 1], ours[row + pair + 16])
    value = model.state_dict()["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(tensors["blk.0.attn_v.weight"], value)


def test_metadata_of_model_and_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", "granite", tokenizer)
    export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    expected = {
        "general.architecture": "granitemoe",
        "granitemoe.context_length": 64,
        "granitemoe.attention.head_count_kv": 2,
        "granitemoe.expert_used_count": 2,
        "granitemoe.logit_scale": 2.0,
        "granitemoe.residual_scale": 0.5,
        "granitemoe.embedding_scale": 3.0,
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": tokenizer.im_end,
        "tokenizer.ggml.eot_token_id": tokenizer.end_of_text,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: field(reader, key) for key in expected} == expected
    assert field(reader, "granitemoe.attention.scale") == pytest.approx(0.3)
    assert len(field(reader, "tokenizer.ggml.tokens")) == tokenizer.vocab_size
    assert field(reader, "tokenizer.ggml.token_type")[:17] == [3] * 16 + [1]
    assert "<|im_start|>" in field(reader, "tokenizer.chat_template")


@pytest.mark.parametrize(
    ("type", "bits", "step"),
    [("f16", 16, 2.0**-10), ("bf16", 16, 2.0**-7), ("q8_0", 8.5, 1 / 127), ("q4_0", 4.5, 1 / 7)],
)
def test_types(type: str, bits: float, step: float, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", "llama", tokenizer)
    export_gguf(tmp_path / "model", tmp_path / "f32.gguf", type="f32")
    export_gguf(tmp_path / "model", tmp_path / "out.gguf", type=type)
    exact, stored = read_tensors(tmp_path / "f32.gguf"), read_tensors(tmp_path / "out.gguf")
    kinds = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    matrix = kinds["blk.0.ffn_up.weight"]
    assert matrix.n_bytes * 8 / matrix.n_elements == bits
    assert kinds["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    for name, values in exact.items():
        assert np.abs(stored[name] - values).max() <= step * np.abs(values).max(), name


def test_rows_that_do_not_fill_blocks_stay_wider(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from minimind.model import ModelConfig, Transformer, save_model

    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=48, intermediate_size=64)
    save_model(tmp_path / "model", Transformer(config), tokenizer)
    report = export_gguf(tmp_path / "model", tmp_path / "out.gguf", type="q8_0")
    assert report.other_types["token_embd.weight"] == "f16"
    assert "blk.0.ffn_down.weight" not in report.other_types and report.block == 32


def test_what_llama_cpp_cannot_represent_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", "dynamic", tokenizer)
    with pytest.raises(ModelError, match="no dynamic RoPE scaling"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    with pytest.raises(UsageError, match="unknown GGUF type 'q9'; known: f32, f16"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf", type="q9")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["yarn", "yarn-factor", "yarn-mscale"])
def test_settings_of_yarn(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """llama.cpp multiplies YaRN's default factor, 1 + 0.1 ln(factor), by `attn_factor`."""
    save_small_model(tmp_path / "model", kind, tokenizer)
    export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    prefix = "llama.rope.scaling."
    written = {
        name.removeprefix(prefix): field(reader, name)
        for name in reader.fields
        if name.startswith(prefix)
    }
    factor = {
        "yarn": None,
        "yarn-factor": 1.5,
        "yarn-mscale": (1 + 0.2 * math.log(2.5)) / (1 + 0.05 * math.log(2.5)),
    }[kind]
    expected: dict[str, Any] = {"type": "yarn", "factor": 2.5, "original_context_length": 64}
    if factor:
        expected["attn_factor"] = pytest.approx(factor / (1 + 0.1 * math.log(2.5)))
    assert written == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"beta_fast": 4.0}, "computes YaRN with beta_fast = 32; the model has 4.0"),
        ({"beta_slow": 0.5}, "computes YaRN with beta_slow = 1; the model has 0.5"),
        ({"truncate": False}, "computes YaRN with truncate = true; the model has false"),
    ],
)
def test_settings_of_yarn_that_llama_cpp_does_not_read_are_refused(
    changes: dict[str, Any], reason: str, tokenizer: Tokenizer
) -> None:
    config = small_model("yarn", tokenizer.vocab_size).config
    assert architecture(config) == "llama" and config.rope_scaling
    scaling = config.rope_scaling.model_copy(update=changes)
    with pytest.raises(ModelError, match=reason):
        architecture(config.model_copy(update={"rope_scaling": scaling}))


def test_scaling_of_llama_3_with_qk_norm_is_refused(tokenizer: Tokenizer) -> None:
    """llama.cpp's qwen3 has no tensor of frequencies, and does not load a file that has one."""
    config = small_model("llama3", tokenizer.vocab_size, qk_norm=True).config
    with pytest.raises(ModelError, match="no Llama 3 RoPE scaling for models with QK-norm"):
        architecture(config)


def test_only_new_files_with_the_usual_suffix(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", "llama", tokenizer)
    file = tmp_path / "out.gguf"
    export_gguf(tmp_path / "model", file, type="Q8_0")
    before = file.read_bytes()
    for out, message in (
        (file, "out.gguf already exists; delete it or choose another --out"),
        (tmp_path / "v1.5", "v1.5: the name of a GGUF file ends in .gguf, such as .*/v1.5.gguf"),
        (tmp_path, "is a directory; give a file name, such as .*/model.gguf"),
    ):
        with pytest.raises(UsageError, match=message):
            export_gguf(tmp_path / "model", out)
        with pytest.raises(UsageError, match=message):
            export_gguf_adapter(tmp_path / "model", tmp_path, out)
    assert file.read_bytes() == before


def test_a_file_that_cannot_be_written_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", "llama", tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ResourceError, match=r"out.gguf: cannot be written: .*file is a file, not a folder; choose"
    ):
        export_gguf(tmp_path / "model", tmp_path / "file" / "out.gguf")
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(ResourceError, match=r"cannot be written: .*; free some disk"):
            export_gguf(tmp_path / "model", tmp_path / "out.gguf", type="f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_tokenizers_of_other_projects(
    foreign_dir: Callable[[str], Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Byte-level ones with a known split pattern are written with their template and ids."""
    for kind in ("llama3", "qwen3"):
        own = Tokenizer.load(foreign_dir(kind))
        save_small_model(tmp_path / kind, "llama", own)
        export_gguf(tmp_path / kind, tmp_path / f"{kind}.gguf")
        reader = gguf.GGUFReader(tmp_path / f"{kind}.gguf")
        assert field(reader, "tokenizer.ggml.pre") == "llama-bpe"
        assert field(reader, "tokenizer.ggml.eos_token_id") == own.stop_ids[0]
        assert field(reader, "tokenizer.ggml.add_bos_token") == (kind == "llama3")
        template = (foreign_dir("qwen3") / "chat_template.jinja").read_text("utf-8")
        assert (field(reader, "tokenizer.chat_template") == template) == (kind == "qwen3")
    own = Tokenizer.load(foreign_dir("tinyllama"))
    save_small_model(tmp_path / "tinyllama", "llama", own)
    with pytest.raises(ModelError, match=r"not a byte-level BPE.*convert_hf_to_gguf.py"):
        export_gguf(tmp_path / "tinyllama", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("normalizer", {"type": "Lowercase"}, "it has the normalizer Lowercase"),
        (
            "pre_tokenizer",
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            "it sets add_prefix_space",
        ),
        (
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                ],
            },
            "its split pattern is not that of qwen2, llama-bpe, gpt-2",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_lacks(
    key: str, value: object, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_small_model(tmp_path / "model", "llama", tokenizer)
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: value}), "utf-8")
    with pytest.raises(ModelError, match=message):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")
