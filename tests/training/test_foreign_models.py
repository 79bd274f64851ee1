"""Models saved by transformers, with their own tokenizers: load, fine-tune, chat and save."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.errors import DataError, TokenizerError
from minimind.inference.load import load_for_inference
from minimind.model import load_model, save_model
from minimind.tokenizer import Tokenizer, encode_chat
from minimind.training.stage import run_stage
from tests.support.rounding import largest_difference, logits_rounding
from tests.support.small_runs import RecordingReporter, nano_recipe

transformers = pytest.importorskip("transformers")

SHAPE = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
# Tokenizer, architecture, settings besides SHAPE, dtype.
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "smollm2": ("smollm2", "Llama", dict(tie_word_embeddings=True, rope_theta=1e5), "bfloat16"),
    "minimind2": ("minimind2", "Llama", dict(tie_word_embeddings=True, rope_theta=1e6), "float16"),
    "minimind3": ("qwen3", "Qwen3", dict(head_dim=16, tie_word_embeddings=True), "bfloat16"),
    "qwen3": ("qwen3", "Qwen3", dict(head_dim=24, tie_word_embeddings=False), "float32"),
    "llama3": (
        "llama3",
        "Llama",
        dict(
            head_dim=8,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=5e5,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        "bfloat16",
    ),
    "tinyllama": ("tinyllama", "Llama", dict(tie_word_embeddings=False), "bfloat16"),
    "granite": (
        "smollm2",
        "GraniteMoeShared",
        dict(
            tie_word_embeddings=True,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=64,
            attention_multiplier=0.2,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            logits_scaling=2.0,
        ),
        "bfloat16",
    ),
    "base": ("base with our tokens", "Llama", dict(tie_word_embeddings=False), "float32"),
}
WriteModel = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture
def make(foreign_dir: Callable[[str], Path], tmp_path: Path) -> WriteModel:
    """Return a function that saves a model with transformers, with padded embeddings."""

    def write(name: str, **saving: Any) -> Path:
        tokenizer_name, architecture, config_settings, dtype = MODELS[name]
        tokenizer = transformers.AutoTokenizer.from_pretrained(foreign_dir(tokenizer_name))
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config_settings = config_settings | {"vocab_size": -(-len(tokenizer) // 64) * 64}
        config = getattr(transformers, f"{architecture}Config")(**SHAPE | config_settings | ids)
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
        directory = tmp_path / name
        model.to(getattr(torch, dtype)).save_pretrained(directory, **saving)
        for file in foreign_dir(tokenizer_name).iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        return directory

    return write


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_config_survive_a_round_trip(
    name: str, make: WriteModel, tmp_path: Path
) -> None:
    directory = make(name, max_shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    model, tokenizer = load_for_inference(directory, "cpu", dtype=torch.float32)
    assert model.head_weight.dtype == torch.float32
    save_model(tmp_path / "again", model, tokenizer, dtype=MODELS[name][3])
    before, after = tensors_of(directory), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key])
    kept = json.loads((tmp_path / "again" / "config.json").read_text("utf-8"))
    theirs = json.loads((directory / "config.json").read_text("utf-8"))
    for key in ("bos_token_id", "eos_token_id", "rope_parameters", "head_dim", "vocab_size"):
        assert kept[key] == theirs.get(key, kept[key]), key


@pytest.mark.numeric
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, make: WriteModel) -> None:
    directory = make(name)
    model, _ = load_for_inference(directory, "cpu", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    ids = torch.randint(0, 500, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        close = logits_rounding(model.config, ids.shape[1])
        assert largest_difference(model.logits(model(ids)), theirs(ids).logits) <= close


@pytest.mark.parametrize("name", MODELS)
def test_a_fine_tuned_model_loads_in_transformers_and_can_chat(
    name: str, make: WriteModel, corpus: Path, tmp_path: Path
) -> None:
    directory = make(name, max_shard_size="40KB")
    recipe = nano_recipe(
        "sft",
        tmp_path / "run",
        model__init=str(directory),
        data__sources=[str(corpus / "chat.jsonl")],
        data__store=str(tmp_path / "stores"),
        data__seq_len=128,
        data__validation_fraction=0.1,
        training__steps=2,
        optim__lr=1e-2,
    )
    result = run_stage(recipe, reporter=RecordingReporter())
    assert result.model is not None
    tuned, tokenizer = load_for_inference(result.model, "cpu", dtype=torch.float32)
    assert tuned.head_weight.shape[0] > tokenizer.vocab_size
    assert not torch.equal(tuned.head_weight, load_model(directory).head_weight)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.model).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(result.model)
    messages = [{"role": "user", "content": "长江的第3段有多长？"}]
    ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert ids == their_tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits
        logits = tuned.logits(tuned(torch.tensor([ids])))
        assert largest_difference(logits, expected) <= logits_rounding(tuned.config, len(ids))
    stops = transformers.GenerationConfig.from_pretrained(result.model).eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    assert set(stops) <= set(tokenizer.stop_ids)
    assert tokenizer.im_end in stops

    answer = CliRunner().invoke(
        app,
        ["chat", str(result.run), "--temperature", "0", "--max-new-tokens", "8"],
        input="你好\n",
    )
    assert answer.exit_code == 0, answer.output
    generated = CliRunner().invoke(app, ["generate", str(result.run), "长江", "--seed", "1"])
    assert generated.exit_code == 0, generated.output


def test_a_model_without_a_chat_template_can_be_pretrained_but_not_fine_tuned(
    make: WriteModel, foreign_dir: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    directory = make("llama3")
    for path in foreign_dir("base").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    settings = dict(
        model__init=str(directory),
        data__store=str(tmp_path / "stores"),
        data__validation_fraction=0.1,
        training__steps=2,
    )
    text = nano_recipe(
        "pretrain", tmp_path / "run", data__sources=[str(corpus / "text.jsonl")], **settings
    )
    assert run_stage(text, reporter=RecordingReporter()).model is not None
    chat = nano_recipe(
        "sft", tmp_path / "tuned", data__sources=[str(corpus / "chat.jsonl")], **settings
    )
    with pytest.raises(TokenizerError, match="has no chat template"):
        run_stage(chat, reporter=RecordingReporter())
    answer = CliRunner().invoke(app, ["chat", str(tmp_path / "run")], input="你好\n")
    assert answer.exit_code == 1
    assert "has no chat template" in answer.output


def test_texts_begin_with_bos_if_the_tokenizer_adds_it(
    foreign_dir: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    from minimind.data.store import open_store

    tokenizer = Tokenizer.load(foreign_dir("llama3"))
    store = open_store(str(corpus / "text.jsonl"), tokenizer, kind="text", folder=tmp_path)
    [shard] = store.shards("train")
    starts = [0, *shard.ends[:-1]]
    assert {int(shard.tokens[start]) for start in starts} == set(tokenizer.text_start)
    assert {int(shard.tokens[end - 1]) for end in shard.ends} == {tokenizer.end_of_text}


def test_conversations_that_the_chat_template_refuses_are_skipped(
    foreign_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    from minimind.data.store import open_store

    tokenizer = Tokenizer.load(foreign_dir("llama2"))
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    system = {"role": "system", "content": "你是助手"}
    lines = [json.dumps({"conversations": chat}) for chat in (turns, [system, *turns], turns)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    reported: list[str] = []
    store = open_store(
        str(tmp_path / "chat.jsonl"), tokenizer, kind="chat", folder=tmp_path, say=reported.append
    )
    assert store.manifest["train"]["documents"] == 2
    assert reported[0].endswith(
        "skipped 1 of 3 records: does not fit the model's own chat template"
    )
    (tmp_path / "none.jsonl").write_text(lines[1])
    with pytest.raises(DataError, match=r"no conversations found .*roles must alternate"):
        open_store(str(tmp_path / "none.jsonl"), tokenizer, kind="chat", folder=tmp_path)
