"""GGUF files loaded in llama.cpp itself: `make test-llama-cpp`, which builds it."""

import ctypes
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from minimind.config.settings import LoRASettings
from minimind.export.gguf import K_TYPES, PLAIN_TYPES, export_gguf, gguf_tensors
from minimind.export.gguf_adapter import export_gguf_adapter
from minimind.model import Transformer, apply_lora, load_model, merge_adapter, save_adapter
from minimind.tokenizer import Tokenizer, encode_chat, train_tokenizer
from minimind.tokenizer.chat import Message
from tests.support.small_models import ARCHITECTURES, EXTENDED, save_small_model
from tests.support.texts import mixed_strings, prose

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rich() -> Tokenizer:
    """A tokenizer of many merges: a wrong split pattern shows in most strings."""
    return train_tokenizer(prose(), vocab_size=6400)


def open_llama(path: Path, **settings: Any) -> Any:
    """The file in llama.cpp, with a float32 KV cache."""
    defaults = {"n_ctx": 0, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}
    return llama_cpp.Llama(str(path), **defaults | settings)


@torch.no_grad()
def our_logits(model: Transformer, ids: list[int]) -> np.ndarray:
    return model.logits(model(torch.tensor([ids])))[0].numpy()


def their_logits(llama: Any, ids: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *EXTENDED])
def test_logits_and_greedy_tokens(kind: str, rich: Tokenizer, tmp_path: Path) -> None:
    """Row 16: logits within 1e-3 over the whole context, greedy tokens equal."""
    model = save_small_model(tmp_path / "model", kind, rich)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    llama = open_llama(tmp_path / "model.gguf")
    context = model.config.max_position_embeddings
    assert llama.n_ctx() >= context
    ids = random.Random(0).choices(range(16, rich.vocab_size), k=context - 1)
    ours = our_logits(model, ids)
    assert np.abs(their_logits(llama, ids) - ours).max() < 1e-3
    written = ids[:8]
    for _ in range(32):
        written.append(int(our_logits(model, written)[-1].argmax()))
    stream = llama.generate(ids[:8], temp=0.0, top_k=1)
    assert [next(stream) for _ in range(32)] == written[8:]


@pytest.mark.parametrize("kind", ["ours", "llama3", "qwen3"])
def test_token_ids(
    kind: str, rich: Tokenizer, foreign_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """Row 16: the ids of 2,000 mixed strings are equal; control tokens are not made from text."""
    own = rich if kind == "ours" else Tokenizer.load(foreign_dir(kind))
    save_small_model(tmp_path / "model", "llama", own)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    llama = open_llama(tmp_path / "model.gguf")
    strings = mixed_strings(2000)
    if kind == "qwen3":  # llama.cpp reads its tags, which are not marked special, as tokens
        strings = [text for text in strings if "<think>" not in text]
    assert len(set(strings)) > 1500
    for text in strings:
        ids = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == own.encode(text), text


def render(template: str, messages: list[Message]) -> str:
    """Render a conversation by llama.cpp's own implementation of a chat template."""
    chat = (llama_cpp.llama_chat_message * len(messages))(
        *((message["role"].encode(), message["content"].encode()) for message in messages)
    )
    buffer = ctypes.create_string_buffer(10_000)
    size = llama_cpp.llama_chat_apply_template(
        template.encode(), chat, len(messages), True, buffer, len(buffer)
    )
    return buffer.raw[:size].decode()


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_the_chat_template(turns: int, rich: Tokenizer, tmp_path: Path) -> None:
    """The template of the file, in llama.cpp and in Jinja, gives the ids of our chat format."""
    save_small_model(tmp_path / "model", "llama", rich)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    llama = open_llama(tmp_path / "model.gguf")
    template = llama.metadata["tokenizer.chat_template"]
    messages: list[Message] = [
        {"role": "system", "content": "请用中文回答。"},
        {"role": "user", "content": "泰山在哪里？"},
        {"role": "assistant", "content": "在山东。\n\n高 1545 米。"},
        {"role": "user", "content": "Thanks! "},
    ][:turns]
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        template, eos_token="<|im_end|>", bos_token=""
    )
    expected = encode_chat(rich, messages, add_generation_prompt=True)[0]
    for prompt in (render(template, messages), formatter(messages=messages).prompt):
        assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == expected
    assert llama.token_eos() == rich.im_end


@pytest.fixture
def adapted(rich: Tokenizer, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a model and an adapter of it."""
    save_small_model(tmp_path / "model", request.param, rich)
    settings = LoRASettings(rank=4, alpha=16.0)
    model = apply_lora(load_model(tmp_path / "model"), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(tmp_path / "adapter", model, settings, tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("adapted", ["llama", "qwen3", "experts"], indirect=True)
def test_an_adapter_as_gguf_and_merged(adapted: Path, rich: Tokenizer) -> None:
    model = load_model(adapted / "model").eval()
    ids = random.Random(0).choices(range(16, rich.vocab_size), k=48)
    before = our_logits(model, ids)
    merge_adapter(model, adapted / "adapter")
    expected = our_logits(model, ids)
    assert np.abs(expected - before).max() > 0.1
    export_gguf(adapted / "model", adapted / "base.gguf", type="f32")
    export_gguf_adapter(adapted / "model", adapted / "adapter", adapted / "lora.gguf", type="f32")
    llama = open_llama(adapted / "base.gguf", lora_path=str(adapted / "lora.gguf"))
    assert np.abs(their_logits(llama, ids) - expected).max() < 1e-3
    export_gguf(adapted / "model", adapted / "merged.gguf", type="f32", adapter=adapted / "adapter")
    merged = open_llama(adapted / "merged.gguf")
    assert np.abs(their_logits(merged, ids) - expected).max() < 1e-3


@pytest.mark.parametrize("type", [*PLAIN_TYPES, *K_TYPES])
def test_every_type(type: str, rich: Tokenizer, tmp_path: Path) -> None:
    """Logits are those of the dequantized weights, but for the rounding of activations."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = save_small_model(tmp_path / "model", "qwen3", rich, **shape)
    report = export_gguf(tmp_path / "model", tmp_path / "model.gguf", type=type)
    assert report.other_types == {} and report.size == report.path.stat().st_size
    stored = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(report.path).tensors
    }
    # The tensors of qwen3 are ours under other names, in the same order.
    names = zip(model.state_dict(), dict(gguf_tensors(model)), strict=True)
    model.load_state_dict({ours: torch.tensor(stored[theirs]) for ours, theirs in names})
    ids = random.Random(0).choices(range(16, rich.vocab_size), k=48)
    theirs, ours = their_logits(open_llama(report.path), ids), our_logits(model, ids)
    cosine = (theirs * ours).sum() / np.linalg.norm(theirs) / np.linalg.norm(ours)
    assert cosine > 0.999


@pytest.mark.parametrize("width", [64, 48])
def test_rows_that_do_not_fill_the_blocks_of_k_quants(
    width: int, rich: Tokenizer, tmp_path: Path
) -> None:
    """llama.cpp chooses a type with smaller blocks, and the report names it."""
    save_small_model(tmp_path / "model", "llama", rich, hidden_size=width)
    report = export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="q4_k_m")
    assert report.block == 256
    assert report.other_types["blk.0.attn_q.weight"] == ("q5_0" if width == 64 else "f16")
    ids = random.Random(0).choices(range(16, rich.vocab_size), k=8)
    assert np.isfinite(their_logits(open_llama(report.path), ids)).all()
