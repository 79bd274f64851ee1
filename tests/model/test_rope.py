"""RoPE and RoPE scaling, compared with transformers."""

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
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    module.utils.logging.set_verbosity_error()
    return module


def scaled(
    random_model: Callable[..., Transformer], scaling: dict[str, Any], **changes: Any
) -> Transformer:
    """Make a random model whose context is scaled from 64 to 256 tokens."""
    shape = dict(num_key_value_heads=4, head_dim=16, max_position_embeddings=256)
    full = {"original_max_position_embeddings": ORIGINAL} | scaling
    return random_model("nano", **shape | changes, rope_scaling=full)


@pytest.mark.numeric
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_beyond_the_original_context_equal_transformers(
    name: str,
    layout: str,
    transformers: Any,
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    ours = scaled(random_model, SCALINGS[name], **LAYOUTS[layout])
    save_model(tmp_path / "model", ours, tokenizer)
    reloaded = load_model(tmp_path / "model").eval()
    if "dynamic" in name or "linear" in name:
        assert reloaded.config == ours.config
    ids = torch.randint(0, 600, (2, 256), generator=torch.Generator().manual_seed(0))
    theirs = None
    for length in (20, ORIGINAL, ORIGINAL + 1, 128, 256):
        if theirs is None or name == "dynamic":  # it remembers the longest sequence
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        with torch.inference_mode():
            expected = theirs(ids[:, :length]).logits
            for model in (ours, reloaded):
                logits = model.logits(model(ids[:, :length]))
                assert largest_difference(logits, expected) <= logits_rounding(model.config, length)


@pytest.mark.parametrize("name", SCALINGS)
@torch.inference_mode()
def test_greedy_tokens_across_the_original_context_equal_transformers(
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
    unscaled.load_state_dict(ours.state_dict())
    starts = [tokenizer.encode(prompt) for prompt in prompts[:4]]
    options: dict[str, Any] = dict(max_new_tokens=150, stop_ids=frozenset())
    plain = generate_all(unscaled, tokenizer, starts, **options)
    theirs = None
    for number, ids in enumerate(starts):
        [generated] = generate_all(ours, tokenizer, [ids], **options)
        assert len(ids) < ORIGINAL < len(ids) + len(generated)
        assert generated != plain[number]  # the scaling has an effect
        if theirs is None or name == "dynamic":  # it remembers the longest sequence
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        if name == "dynamic":  # the angles depend on the length when a token is generated
            output = theirs.generate(
                torch.tensor([ids]),
                max_new_tokens=150,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(ids) :]
        else:  # the most probable token after each of ours: the same, and far faster
            inputs = torch.tensor([ids + generated[:-1]])
            output = theirs(inputs).logits[0, len(ids) - 1 :].argmax(-1)
        assert generated == output.tolist()


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_an_extended_model_survives_saving_and_loading(
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
def test_a_context_that_needs_no_extension_changes_nothing() -> None:
    config = ModelConfig(max_position_embeddings=512)
    assert extend_context(config, 512) is config
    assert extend_context(config, 100, "linear") is config
    longer = extend_context(config, 2048)
    assert longer.rope_scaling is not None
    assert longer.rope_scaling.factor == 4
    assert extend_context(longer, 2048) is longer
    with pytest.raises(
        ModelError, match=r"already extended by yarn .* to 4,096; give a context of at most 2"
    ):
        extend_context(longer, 4096)


@pytest.mark.numeric
def test_dynamic_scaling_does_not_change_short_sequences() -> None:
    plain = ModelConfig(max_position_embeddings=64)
    dynamic = extend_context(plain, 256, "dynamic")
    short, longer = rope_frequencies(dynamic, 64)[0], rope_frequencies(dynamic, 65)[0]
    assert torch.equal(short, rope_frequencies(plain, 64)[0])
    assert longer[0] == short[0]
    assert (longer[1:] < short[1:]).all()


@pytest.mark.numeric
def test_yarn_keeps_high_frequencies_and_divides_low_ones() -> None:
    plain = ModelConfig(head_dim=64, max_position_embeddings=512)
    before, factor = rope_frequencies(plain, 512)
    after, yarn_factor = rope_frequencies(extend_context(plain, 2048, "yarn"), 512)
    rotations = 512 * before / (2 * math.pi)
    assert torch.allclose(after[rotations > 40], before[rotations > 40])
    assert torch.allclose(after[rotations < 0.7], before[rotations < 0.7] / 4)
    assert (factor, yarn_factor) == (1.0, 0.1 * math.log(4) + 1)


@pytest.mark.numeric
def test_a_context_out_of_range_is_refused() -> None:
    for config, context in [
        (ModelConfig(max_position_embeddings=512), 2_000_000_000),
        (ModelConfig(max_position_embeddings=512, rope_theta=1.0), 1024),
    ]:
        with pytest.raises(ModelError, match=r"cannot be extended from 512 tokens to [\d,]+: "):
            extend_context(config, context)


@pytest.mark.numeric
@pytest.mark.parametrize("name", SCALINGS)
def test_a_packed_conversation_gives_the_same_logits_as_a_single_one(
    name: str, random_model: Callable[..., Transformer]
) -> None:
    """Also under dynamic scaling, where angles depend on the length of each conversation."""
    model = scaled(random_model, SCALINGS[name])
    lengths = (20, ORIGINAL, 100, 30)
    ids = torch.randint(0, 600, (2, 256), generator=torch.Generator().manual_seed(0))
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    segments = torch.tensor([numbers + [9] * (256 - len(numbers)), [0] * 256])
    with torch.inference_mode():
        packed = model.logits(model(ids, segments=segments))
        start = 0
        for length in lengths:
            single = model.logits(model(ids[:1, start : start + length]))
            ours = packed[:1, start : start + length]
            assert largest_difference(ours, single) <= logits_rounding(model.config, length)
            start += length
        expected = model.logits(model(ids[1:]))
        assert largest_difference(packed[1:], expected) <= logits_rounding(
            model.config, ids.shape[1]
        )


@pytest.mark.numeric
def test_training_works_after_inference_has_enlarged_the_rope_table(
    random_model: Callable[..., Transformer],
) -> None:
    model = random_model("nano", max_position_embeddings=2048)
    with torch.inference_mode():
        model(torch.arange(600)[None] % 600)
    model(torch.arange(16)[None]).sum().backward()
    assert model.head_weight.grad is not None
