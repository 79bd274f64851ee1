"""Model directories in transformers, accelerate and peft, without remote code or conversion."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.inference.generate import generate_all
from minimind.model import load_model, merge_adapter
from minimind.tokenizer import Tokenizer, encode_chat
from tests.compatibility.conftest import ARCHITECTURES, STAGES, Runs
from tests.support.rounding import largest_difference, logits_rounding
from tests.support.texts import mixed_strings

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

MESSAGES = [
    {"role": "system", "content": "请用中文回答。"},
    {"role": "user", "content": "黄河流到哪里？"},
]
TEXT = "长江很长，最后流入东海。"
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def load_theirs(directory: Path) -> Any:
    """Load with AutoModelForCausalLM; every tensor of the file has its place, and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


@torch.no_grad()
def assert_same_logits(directory: Path, theirs: Any, adapter: Path | None = None) -> None:
    tokenizer, ours = Tokenizer.load(directory), load_model(directory).eval()
    if adapter:
        merge_adapter(ours, adapter)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    expected = ours.logits(ours(ids))
    bound = logits_rounding(ours.config, ids.shape[1])
    assert largest_difference(theirs.eval()(ids).logits, expected) <= bound


def check_auto_classes(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    strings = mixed_strings(200)
    ids = theirs(strings, split_special_tokens=True)["input_ids"]
    assert ids == tokenizer.encode_batch(strings)
    template = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    prompt, _ = encode_chat(tokenizer, MESSAGES, add_generation_prompt=True)
    assert template == prompt
    assert_same_logits(directory, load_theirs(directory))


def test_auto_classes(runs: Runs) -> None:
    check_auto_classes(runs.model("llama", "pretrain"))


@pytest.mark.slow
@every_architecture
@pytest.mark.parametrize("stage", STAGES)
def test_auto_classes_of_every_stage(architecture: str, stage: str, runs: Runs) -> None:
    check_auto_classes(runs.model(architecture, stage))


@pytest.mark.slow
@every_architecture
def test_pipeline(architecture: str, runs: Runs) -> None:
    directory = runs.model(architecture)
    tokenizer, model = Tokenizer.load(directory), load_model(directory).eval()
    pipeline = transformers.pipeline("text-generation", model=str(directory), dtype=torch.float32)
    output = pipeline(MESSAGES, max_new_tokens=12, do_sample=False, eos_token_id=None)
    prompt, _ = encode_chat(tokenizer, MESSAGES, add_generation_prompt=True)
    (expected,) = generate_all(model, tokenizer, [prompt], max_new_tokens=12, stop_ids=frozenset())
    answer = output[0]["generated_text"][-1]
    assert answer == {"role": "assistant", "content": tokenizer.decode(expected)}


def rows(directory: Path) -> list[dict[str, Any]]:
    ids = Tokenizer.load(directory).encode(TEXT)
    return [{"input_ids": ids, "labels": ids}] * 4


@pytest.mark.slow
@every_architecture
def test_one_step_of_the_trainer(architecture: str, runs: Runs, tmp_path: Path) -> None:
    """What the Trainer saves is a model directory for minimind."""
    directory = runs.model(architecture)
    trainer = transformers.Trainer(
        model=load_theirs(directory),
        args=transformers.TrainingArguments(
            str(tmp_path / "out"), max_steps=1, learning_rate=1e-2, use_cpu=True, report_to="none"
        ),
        train_dataset=rows(directory),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
    )
    assert trainer.train().training_loss > 0
    trainer.save_model(str(tmp_path / "saved"))
    assert_changed(directory, tmp_path / "saved")
    assert_same_logits(tmp_path / "saved", trainer.model)


def assert_changed(before: Path, after: Path) -> None:
    old, new = load_model(before).state_dict(), load_model(after).state_dict()
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)


@pytest.mark.slow
@every_architecture
def test_one_step_with_accelerate(architecture: str, runs: Runs) -> None:
    accelerate = pytest.importorskip("accelerate")
    directory = runs.model(architecture)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map="cpu"
    )
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.tensor([rows(directory)[0]["input_ids"]])
    losses = []
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.slow
@every_architecture
def test_an_adapter_of_peft_is_read_here(architecture: str, runs: Runs, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    directory = runs.model(architecture)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_theirs(directory), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = torch.tensor([rows(directory)[0]["input_ids"]])
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    assert_same_logits(directory, model, tmp_path / "adapter")


@pytest.mark.slow
@every_architecture
def test_an_adapter_of_minimind_is_read_by_peft(architecture: str, runs: Runs) -> None:
    peft = pytest.importorskip("peft")
    base, adapter = runs.model(architecture), runs.adapter(architecture)
    model = peft.PeftModel.from_pretrained(load_theirs(base), adapter)
    assert_same_logits(base, model, adapter)
