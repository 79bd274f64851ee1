"""GGUF files loaded in llama.cpp itself: `make test-llama-cpp`, which builds it."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minimind.config.settings import LoRASettings
from minimind.export.gguf import export_gguf
from minimind.export.gguf_adapter import export_gguf_adapter
from minimind.model import Transformer, apply_lora, load_model, merge_adapter, save_adapter
from minimind.tokenizer import Tokenizer, encode_chat, train_tokenizer
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


def test_token_ids(rich: Tokenizer, tmp_path: Path) -> None:
    """Row 16: the ids of 2,000 mixed strings are equal; control tokens are not made from text."""
    save_small_model(tmp_path / "model", "llama", rich)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    llama = open_llama(tmp_path / "model.gguf")
    strings = mixed_strings(2000)
    assert len(set(strings)) > 1900
    for text in strings:
        ids = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == rich.encode(text), text


def test_the_chat_template(rich: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", "llama", rich)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    llama = open_llama(tmp_path / "model.gguf")
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        llama.metadata["tokenizer.chat_template"], eos_token="<|im_end|>", bos_token=""
    )
    messages = [
        {"role": "system", "content": "请用中文回答。"},
        {"role": "user", "content": "泰山在哪里？"},
        {"role": "assistant", "content": "在山东。"},
        {"role": "user", "content": "谢谢"},
    ]
    prompt = formatter(messages=messages).prompt
    ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
    assert ids == encode_chat(rich, messages, add_generation_prompt=True)[0]
    assert llama.token_eos() == rich.im_end


@pytest.fixture
def adapted(rich: Tokenizer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    kind = request.param
    save_small_model(tmp_path / "model", kind, rich)
    settings = LoRASettings(rank=4, alpha=16.0)
    model = apply_lora(load_model(tmp_path / "model"), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(tmp_path / "adapter", model, settings, tmp_path / "model")
    yield tmp_path


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


@pytest.mark.parametrize("type", ["q8_0", "q4_0", "q4_k_m"])
def test_quantized_files_load(type: str, rich: Tokenizer, tmp_path: Path) -> None:
    """Quantization keeps the direction of the logits; K-quants are written by llama.cpp."""
    model = save_small_model(tmp_path / "model", "llama", rich)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", type=type)
    ids = random.Random(0).choices(range(16, rich.vocab_size), k=48)
    theirs = their_logits(open_llama(tmp_path / "model.gguf"), ids)
    ours = our_logits(model, ids)
    cosine = (theirs * ours).sum() / np.linalg.norm(theirs) / np.linalg.norm(ours)
    assert cosine > (0.99 if type == "q8_0" else 0.8)
