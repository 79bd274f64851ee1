"""Our models compared with transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimind.inference.generate import generate_all
from minimind.model import Transformer, load_model, save_model
from minimind.tokenizer import Tokenizer
from tests.support.rounding import largest_difference, logits_rounding

transformers = pytest.importorskip("transformers")

LAYOUTS = {
    "nano-llama": ("nano", dict(seed=12)),
    "nano-qwen3": ("nano", dict(seed=23, qk_norm=True)),
    "nano-untied": ("nano", dict(seed=4, tie_word_embeddings=False)),
    "nano-all-heads": ("nano", dict(seed=36, num_key_value_heads=4)),
    "nano-moe": ("nano-moe", dict(seed=5)),
    "nano-routed-moe": (  # no shared experts, and the multipliers of Granite
        "nano-moe",
        dict(
            seed=5,
            num_local_experts=5,
            num_experts_per_tok=3,
            shared_intermediate_size=0,
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
            logits_scaling=1.7,
            attention_multiplier=0.2,
        ),
    ),
    "demo-moe": ("demo-moe", dict(seed=1)),
    "small-llama": ("small", dict(seed=2)),
    "small-qwen3": ("small", dict(seed=0, qk_norm=True)),
}


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def _load_theirs(directory: Path) -> torch.nn.Module:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    if theirs.config.model_type == "granitemoeshared":
        theirs.set_experts_implementation("eager")  # grouped products differ by 7e-6
    return theirs


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(
    request: pytest.FixtureRequest,
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Transformer, torch.nn.Module]:
    """Return (name of the layout, our model, the model of transformers), of one directory."""
    preset, changes = LAYOUTS[request.param]
    directory = tmp_path_factory.mktemp("model") / "model"
    save_model(directory, random_model(preset, **changes), tokenizer)
    return request.param, load_model(directory).eval(), _load_theirs(directory)


@pytest.mark.numeric
def test_the_architecture_is_one_that_transformers_ships(
    pair: tuple[str, Transformer, torch.nn.Module],
) -> None:
    name, ours, theirs = pair
    by_layout = {"qwen3": "Qwen3ForCausalLM", "moe": "GraniteMoeSharedForCausalLM"}
    assert type(theirs).__name__ == by_layout.get(name.split("-")[-1], "LlamaForCausalLM")
    assert type(theirs).__module__.startswith("transformers.models.")
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == sum(parameter.numel() for parameter in ours.parameters())


@pytest.mark.numeric
@torch.inference_mode()
def test_logits_are_equal(
    pair: tuple[str, Transformer, torch.nn.Module], tokenizer: Tokenizer, prompts: list[str]
) -> None:
    _, ours, theirs = pair
    rows = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]
    # Padding at the end does not change the logits before it.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    all_ours, all_theirs = ours.logits(ours(ids)), theirs(ids).logits
    for row, tokens in enumerate(rows):
        actual, expected = all_ours[row, : len(tokens)], all_theirs[row, : len(tokens)]
        assert actual.std() > 0.1
        assert largest_difference(actual, expected) <= logits_rounding(ours.config, len(tokens))


@torch.inference_mode()
def test_greedy_tokens_are_equal(
    pair: tuple[str, Transformer, torch.nn.Module], tokenizer: Tokenizer, prompts: list[str]
) -> None:
    name, ours, theirs = pair
    number, length = (20, 256) if name.startswith("nano") else (3, 48)
    _check_greedy(ours, theirs, tokenizer, prompts[-number:], length, length_by_generate=16)


@pytest.mark.slow
@torch.inference_mode()
def test_greedy_tokens_of_larger_models_are_equal(
    pair: tuple[str, Transformer, torch.nn.Module], tokenizer: Tokenizer, prompts: list[str]
) -> None:
    name, ours, theirs = pair
    if name.startswith("nano"):
        pytest.skip("covered by the fast test")
    _check_greedy(ours, theirs, tokenizer, prompts, 256, length_by_generate=256)


@pytest.mark.numeric
@pytest.mark.slow
@torch.inference_mode()
def test_a_full_size_mixture_of_experts(
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    prompts: list[str],
    tmp_path: Path,
) -> None:
    save_model(tmp_path / "model", random_model("moe", seed=3), tokenizer)
    ours, theirs = load_model(tmp_path / "model").eval(), _load_theirs(tmp_path / "model")
    ids = torch.tensor([tokenizer.encode(prompt)[:12] for prompt in prompts])
    logits = ours.logits(ours(ids))
    bound = logits_rounding(ours.config, ids.shape[1])
    assert largest_difference(logits, theirs(ids).logits) <= bound
    _check_greedy(ours, theirs, tokenizer, prompts, 256, length_by_generate=256)


def _check_greedy(
    ours: Transformer,
    theirs: torch.nn.Module,
    tokenizer: Tokenizer,
    prompts: list[str],
    length: int,
    length_by_generate: int,
) -> None:
    """Compare `length` greedy tokens with their most probable ones, each after our tokens before.

    If all are equal, so is their greedy continuation. `generate` takes far longer; it must give the
    first `length_by_generate` tokens.
    """
    starts = [tokenizer.encode(prompt)[:12] for prompt in prompts]
    actual = generate_all(ours, tokenizer, starts, max_new_tokens=length, stop_ids=frozenset())
    ids, generated = torch.tensor(starts), torch.tensor(actual)
    assert generated.unique().numel() > 60  # diverse, or equality would prove little
    inputs = torch.cat([ids, generated], 1)[:, :-1]
    top = theirs(inputs).logits[:, ids.shape[1] - 1 :].topk(2)
    margin = (top.values[..., 0] - top.values[..., 1]).min().item()
    assert torch.equal(generated, top.indices[..., 0]), f"smallest margin of a choice: {margin}"
    theirs.generation_config.eos_token_id = None
    output = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length_by_generate
    )
    assert torch.equal(output[:, ids.shape[1] :], generated[:, :length_by_generate])


@pytest.mark.numeric
def test_bfloat16_weights_load_as_saved(
    random_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = random_model("nano")
    save_model(tmp_path / "model", model, tokenizer, dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    ours = load_model(tmp_path / "model")
    assert theirs.dtype == torch.bfloat16
    assert ours.head_weight.dtype == torch.float32
    assert torch.equal(theirs.lm_head.weight.float(), ours.head_weight)
    assert torch.equal(ours.head_weight, model.head_weight.bfloat16().float())


@pytest.mark.numeric
def test_the_saved_tokenizer_gives_the_same_ids(
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    prompts: list[str],
    tmp_path: Path,
) -> None:
    save_model(tmp_path / "model", random_model("nano"), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for prompt in prompts:
        assert theirs(prompt)["input_ids"] == tokenizer.encode(prompt)
        assert theirs.decode(tokenizer.encode(prompt)) == prompt
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert settings.eos_token_id == [tokenizer.im_end, tokenizer.end_of_text]
    assert (settings.temperature, settings.top_p) == (0.7, 0.9)


@pytest.mark.numeric
@pytest.mark.parametrize("layout", ["llama", "qwen3", "granitemoe", "granitemoeshared"])
def test_models_of_transformers_are_loaded_and_saved_bit_for_bit(
    layout: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shape = dict(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "granitemoe": (transformers.GraniteMoeConfig, transformers.GraniteMoeForCausalLM),
        "granitemoeshared": (
            transformers.GraniteMoeSharedConfig,
            transformers.GraniteMoeSharedForCausalLM,
        ),
    }
    if layout.startswith("granite"):  # as in IBM's models
        shape |= dict(num_local_experts=6, num_experts_per_tok=3, initializer_range=0.2)
        shape |= dict(embedding_multiplier=12, residual_multiplier=0.22)
        shape |= dict(attention_multiplier=0.0625, logits_scaling=6.0, rms_norm_eps=1e-5)
    if layout == "granitemoeshared":
        shape |= dict(shared_intermediate_size=48)
    config, kind = kinds[layout]
    theirs = kind(config(**shape)).eval()
    if layout.startswith("granite"):
        theirs.set_experts_implementation("eager")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs").eval()
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = theirs(ids).logits
        assert expected.std() > 0.01
        bound = logits_rounding(ours.config, ids.shape[1])
        assert largest_difference(ours.logits(ours(ids)), expected) <= bound
    save_model(tmp_path / "ours", ours, tokenizer)
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    reloaded = _load_theirs(tmp_path / "ours")
    with torch.inference_mode():
        assert torch.equal(reloaded(ids).logits, expected)
