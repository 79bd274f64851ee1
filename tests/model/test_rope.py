"""Scaled positions, held against transformers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.errors import ModelError
from minimind.inference.generate import generate_all
from minimind.model import ModelConfig, Transformer, extend_context, load_model, save_model
from minimind.model.rope import rope_frequencies
from minimind.tokenizer import Tokenizer
from tests.support.rounding import largest_difference, logits_rounding

ORIGINAL = 64
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "yarn": dict(rope_type="yarn", factor=4.0),
    "yarn, all set": dict(
        rope_type="yarn",
        factor=3.5,
        beta_fast=8.0,
        beta_slow=0.5,
        mscale=0.7,
        mscale_all_dim=1.3,
        truncate=False,
    ),
    "yarn, attention_factor": dict(rope_type="yarn", factor=4.0, attention_factor=1.2),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
}


LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": dict(qk_norm=True),
    "granite": dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32),
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    found = pytest.importorskip("transformers")
    found.utils.logging.disable_progress_bar()
    found.utils.logging.set_verbosity_error()
    return found


def scaled(
    random_model: Callable[..., Transformer], scaling: dict[str, Any], **changes: Any
) -> Transformer:
    """A random model of the context 64 that is scaled to 256."""
    shape = dict(num_key_value_heads=4, head_dim=16, max_position_embeddings=256)
    full = {"original_max_position_embeddings": ORIGINAL} | scaling
    return random_model("nano", **shape | changes, rope_scaling=full)


@pytest.mark.numeric
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_beyond_the_original_context_are_those_of_transformers(
    name: str,
    layout: str,
    transformers: Any,
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    ours = scaled(random_model, SCALINGS[name], **LAYOUTS[layout])
    save_model(tmp_path / "model", ours, tokenizer)
    again = load_model(tmp_path / "model").eval()
    if "dynamic" in name or "linear" in name:
        assert again.config == ours.config
    ids = torch.randint(0, 600, (2, 256), generator=torch.Generator().manual_seed(0))
    for length in (20, ORIGINAL, ORIGINAL + 1, 128, 256):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        with torch.inference_mode():
            expected = theirs(ids[:, :length]).logits
            for model in (ours, again):
                found = model.logits(model(ids[:, :length]))
                assert largest_difference(found, expected) <= logits_rounding(model.config, length)


@pytest.mark.parametrize("name", SCALINGS)
def test_greedy_tokens_across_the_border_are_those_of_transformers(
    name: str,
    transformers: Any,
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    prompts: list[str],
    tmp_path: Path,
) -> None:
    ours = scaled(random_model, SCALINGS[name], seed=3)
    unscaled = Transformer(ours.config.model_copy(update={"rope_scaling": None})).eval()
    save_model(tmp_path / "model", ours, tokenizer)
    for prompt in prompts[:4]:
        ids = tokenizer.encode(prompt)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        expected = theirs.generate(
            torch.tensor([ids]),
            max_new_tokens=150,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        [found] = generate_all(ours, tokenizer, [ids], max_new_tokens=150, stop_ids=frozenset())
        assert len(ids) < ORIGINAL < len(ids) + len(found)
        assert found == expected[0, len(ids) :].tolist()
        unscaled.load_state_dict(ours.state_dict())
        [plain] = generate_all(unscaled, tokenizer, [ids], max_new_tokens=150, stop_ids=frozenset())
        assert found != plain  # the test sees a difference


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_stretched_model_is_written_so_that_it_is_read_again(
    kind: Any,
    transformers: Any,
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    model = random_model("nano", max_position_embeddings=100)
    model.extend_context(333, kind)
    save_model(tmp_path / "model", model, tokenizer)
    config = load_model(tmp_path / "model").config
    assert config == model.config
    assert config.max_position_embeddings == 333
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert theirs.rope_parameters["rope_type"] == kind
    assert theirs.rope_parameters["factor"] == 3.33


@pytest.mark.numeric
def test_what_needs_no_stretching_is_left_alone() -> None:
    config = ModelConfig(max_position_embeddings=512)
    assert extend_context(config, 512) is config
    assert extend_context(config, 100, "linear") is config
    longer = extend_context(config, 2048)
    assert longer.rope_scaling is not None
    assert longer.rope_scaling.factor == 4
    assert extend_context(longer, 2048) is longer
    with pytest.raises(
        ModelError, match=r"stretched already, by yarn, .* to 4,096; give a context of at most 2"
    ):
        extend_context(longer, 4096)


@pytest.mark.numeric
def test_dynamic_scaling_leaves_short_texts_as_they_were() -> None:
    plain = ModelConfig(max_position_embeddings=64)
    dynamic = extend_context(plain, 256, "dynamic")
    short, longer = rope_frequencies(dynamic, 64)[0], rope_frequencies(dynamic, 65)[0]
    assert torch.equal(short, rope_frequencies(plain, 64)[0])
    assert longer[0] == short[0]
    assert (longer[1:] < short[1:]).all()


@pytest.mark.numeric
def test_yarn_keeps_fast_pairs_and_slows_the_slow_ones() -> None:
    plain = ModelConfig(head_dim=64, max_position_embeddings=512)
    before, factor = rope_frequencies(plain, 512)
    after, sharper = rope_frequencies(extend_context(plain, 2048, "yarn"), 512)
    turns = 512 * before / (2 * math.pi)
    assert torch.allclose(after[turns > 40], before[turns > 40])
    assert torch.allclose(after[turns < 0.7], before[turns < 0.7] / 4)
    assert (factor, sharper) == (1.0, 0.1 * math.log(4) + 1)


@pytest.mark.numeric
def test_a_context_out_of_reach_is_told() -> None:
    for config, context in [
        (ModelConfig(max_position_embeddings=512), 2_000_000_000),
        (ModelConfig(max_position_embeddings=512, rope_theta=1.0), 1024),
    ]:
        with pytest.raises(ModelError, match=r"cannot be stretched from 512 tokens to [\d,]+: "):
            extend_context(config, context)


@pytest.mark.numeric
@pytest.mark.parametrize("name", SCALINGS)
def test_a_packed_conversation_is_read_as_it_is_alone(
    name: str, random_model: Callable[..., Transformer]
) -> None:
    """Under dynamic scaling too, whose angles go by the length of each conversation."""
    model = scaled(random_model, SCALINGS[name])
    lengths = (20, ORIGINAL, 100, 30)
    ids = torch.randint(0, 600, (2, 256), generator=torch.Generator().manual_seed(0))
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    segments = torch.tensor([numbers + [9] * (256 - len(numbers)), [0] * 256])
    with torch.inference_mode():
        packed = model.logits(model(ids, segments=segments))
        start = 0
        for length in lengths:
            alone = model.logits(model(ids[:1, start : start + length]))
            found = packed[:1, start : start + length]
            assert largest_difference(found, alone) <= logits_rounding(model.config, length)
            start += length
        wanted = model.logits(model(ids[1:]))
        assert largest_difference(packed[1:], wanted) <= logits_rounding(model.config, ids.shape[1])


@pytest.mark.numeric
def test_training_goes_on_after_a_longer_text_was_written(
    random_model: Callable[..., Transformer],
) -> None:
    model = random_model("nano", max_position_embeddings=2048)
    with torch.inference_mode():
        model(torch.arange(600)[None] % 600)
    model(torch.arange(16)[None]).sum().backward()
    assert model.head_weight.grad is not None
