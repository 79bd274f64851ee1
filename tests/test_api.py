"""The public Python API."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minimind
from minimind.config import load_recipe
from minimind.errors import ConfigError, UsageError
from minimind.evaluation.bits_per_byte import BitsPerByte
from minimind.evaluation.models import LocalModel
from minimind.inference.generate import generate_all
from minimind.inference.load import load_for_inference
from minimind.model import load_model, save_model
from minimind.tokenizer import Tokenizer, encode_chat
from tests.support.small_benchmarks import make_varied
from tests.support.stages import write_corpus


@pytest.fixture(scope="module")
def model_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "model"
    save_model(directory, make_varied(tokenizer), tokenizer)
    return directory


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Iterator[minimind.Model]:
    with minimind.load(model_dir, device="cpu") as loaded:
        yield loaded


def test_the_surface_is_frozen() -> None:
    """Changing this test changes the API of every user."""
    public = ["Model", "Recipe", "RunResult", "Tokenizer", "evaluate", "load", "train"]
    assert minimind.__all__ == public
    methods = [name for name in vars(minimind.Model) if not name.startswith("_")]
    assert methods == ["context", "close", "chat", "generate", "score", "bits_per_byte"]
    assert [*minimind.RunResult.__dataclass_fields__] == ["run", "model", "summary"]
    assert set(public) <= set(dir(minimind))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        minimind.lode  # noqa: B018


def test_importing_minimind_imports_nothing_heavy() -> None:
    code = "import minimind, sys; "
    code += "print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_chat_answers_a_question_or_a_conversation(model: minimind.Model, model_dir: Path) -> None:
    question = "长江有多长？"
    answer = model.chat(question, temperature=0, max_new_tokens=12)
    turns = [{"role": "user", "content": question}]
    assert model.chat(turns, temperature=0, max_new_tokens=12) == answer
    streamed = model.chat(turns, temperature=0, max_new_tokens=12, stream=True)
    assert "".join(streamed).strip() == answer
    assert model.chat(turns, max_new_tokens=0) == ""
    turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "为什么？"}]
    loaded, tokenizer = load_for_inference(model_dir, "cpu")
    prompt, _ = encode_chat(tokenizer, turns, add_generation_prompt=True)
    [tokens] = generate_all(loaded, tokenizer, [prompt], max_new_tokens=12)
    expected = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert model.chat(turns, temperature=0, max_new_tokens=12) == expected


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "there are no messages"),
        ([{"role": "system", "content": "你是向导"}], "no message of the user"),
        ([{"role": "author", "content": "你好"}], "message 1 has the unknown role 'author'"),
        ([{"content": "你好"}], "message 1 has the unknown role None"),
        (["你好"], "message 1 is not an object"),
    ],
)
def test_invalid_conversations_are_refused(
    model: minimind.Model, messages: list[Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        model.chat(messages)


def test_prompts_of_a_batch_are_continued_as_single_ones(model: minimind.Model) -> None:
    prompts = ["长江是", "The capital of", "泰山"]
    together = model.generate(prompts, temperature=0, max_new_tokens=10)
    assert together == [model.generate(p, temperature=0, max_new_tokens=10) for p in prompts]
    assert model.generate([], temperature=0) == []
    prompt, text = next((p, t) for p, t in zip(prompts, together, strict=True) if t.strip("\ufffd"))
    stop = text.strip("\ufffd")[0]
    cut = model.generate(prompt, temperature=0, max_new_tokens=10, stop=[stop])
    assert cut == text.partition(stop)[0]
    both = model.generate(prompt, temperature=0, max_new_tokens=10, stop=text[:2])
    assert both == text.partition(text[:2])[0], "one string, not its characters"
    sampled = {model.generate("长江是", seed=7, temperature=2.0, max_new_tokens=8) for _ in "ab"}
    assert len(sampled) == 1


def test_scores_are_those_of_the_model_itself(model: minimind.Model, model_dir: Path) -> None:
    """Compared with a plain forward pass of the complete text."""
    prompt, continuations = "长江是", ["中国", " a river", "海"]
    plain = load_model(model_dir, device=torch.device("cpu"))
    tokenizer = model.tokenizer
    for text, score in zip(continuations, model.score(prompt, continuations), strict=True):
        prefix, ids = [*tokenizer.text_start, *tokenizer.encode(prompt)], tokenizer.encode(text)
        tokens = torch.tensor([[*prefix, *ids]])
        with torch.no_grad():
            logits = plain.logits(plain(tokens))[0, len(prefix) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
        assert math.isclose(score, expected, rel_tol=1e-5)
    with pytest.raises(UsageError, match="a continuation is empty"):
        model.score(prompt, [""])
    with pytest.raises(UsageError, match="shorten them"):
        model.score(prompt, ["海" * 5000])
    with pytest.raises(UsageError, match="give a list of strings"):
        model.score(prompt, "海")


def test_bits_per_byte_are_those_of_minimind_eval(
    model: minimind.Model, model_dir: Path, tmp_path: Path
) -> None:
    texts = ["长江是中国最长的河流。", "A giant panda eats bamboo.", ""]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts[:2]), encoding="utf-8")
    task = BitsPerByte([str(file)], None)
    summary = task.summary(list(task.run(LocalModel(model_dir, "cpu"), ())))
    assert model.bits_per_byte(texts) == summary["bits_per_byte"]
    evaluated = minimind.evaluate(model_dir, f"bpb:{file}", device="cpu")
    assert evaluated[f"bpb:{file}"] == summary | {"failed": 0}
    with pytest.raises(UsageError, match="at least one text"):
        model.bits_per_byte([""])
    assert model.bits_per_byte(texts[0]) == model.bits_per_byte([texts[0]])
    assert (
        minimind.evaluate(model_dir, "bpb", data=str(file), device="cpu")["bpb"]["documents"] == 2
    )
    with pytest.raises(UsageError, match="minimind eval MODEL --task lm-eval:arc_easy"):
        minimind.evaluate(model_dir, "lm-eval:arc_easy", device="cpu")


def test_scores_beyond_the_trained_context_use_the_given_scaling(model_dir: Path) -> None:
    text = "长江是中国最长的河流。" * 60
    values = []
    for kind in ("linear", "yarn"):
        with minimind.load(model_dir, device="cpu", context=2048, rope_scaling=kind) as extended:
            values.append(extended.bits_per_byte([text]))
    assert values[0] != values[1]


def test_settings_that_do_not_exist_are_named(model: minimind.Model) -> None:
    with pytest.raises(UsageError, match="temprature"):
        model.chat("你好", temprature=1.0)
    with pytest.raises(UsageError, match=r"top-p is 3\.0"):
        model.chat("你好", top_p=3.0)


def interrupt_once_training(run: Path) -> None:
    """Send Ctrl-C to this process when the run has logged its first steps."""
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_stage_is_trained_stopped_and_resumed(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Ctrl-C saves and returns; the same call resumes; a finished stage is not repeated."""
    run = tmp_path / "run"
    settings = {
        "out": str(run),
        "tokenizer": str(tokenizer_dir),
        "device": "cpu",
        "data__sources": [str(write_corpus(tmp_path) / "text.jsonl")],
        "data__store": str(tmp_path / "stores"),
        "data__seq_len": 32,
        "model__preset": "nano",
        "training__steps": 120,
        "training__global_batch_size": 4,
        "training__log_every": 2,
    }
    watcher = threading.Thread(target=interrupt_once_training, args=(run,))
    watcher.start()
    stopped = minimind.train("pretrain-small", quiet=True, **settings)
    watcher.join()
    assert not stopped.finished and stopped.model is None and 0 < stopped.summary["steps"] < 120
    result = minimind.train("pretrain-small", quiet=True, **settings)
    assert result.finished and result.summary["steps"] == 120
    assert result.model == run / "model"
    assert minimind.train(run / "recipe.toml", quiet=True).summary == result.summary
    recipe = load_recipe(run / "recipe.toml").recipe
    assert minimind.train(recipe, quiet=True).summary == result.summary
    with minimind.load(run, device="cpu") as trained:
        assert isinstance(trained.generate("长江", max_new_tokens=4), str)
    with pytest.raises(ConfigError, match=r"training\.stepps is not a setting"):
        minimind.train("pretrain-small", training__stepps=3)
