"""`echo` with `logprobs` on /v1/completions, as used by lm-eval."""

import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI

from minimind.evaluation.benchmark_prompts import PromptBuilder
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.encoding import MinimindEncoder
from minimind.evaluation.models import LocalModel
from minimind.evaluation.multiple_choice import MultipleChoice
from minimind.inference import load
from minimind.model import save_model
from minimind.serving.limits import Limits
from minimind.tokenizer import Tokenizer
from tests.conftest import TEXTS
from tests.support.foreign import make_tokenizer
from tests.support.services import InProcess, make_model
from tests.support.small_benchmarks import CHINESE, EXAMPLES, make_ceval, make_varied, write_table

PROMPT = "长江是中国最长的河流。"


def complete(client: OpenAI, **settings: Any) -> Any:
    defaults = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": 2}
    return client.completions.create(**defaults | settings)


def test_echo_returns_the_prompt_first(client: OpenAI, tokenizer: Tokenizer) -> None:
    without_echo = complete(client).choices[0]
    choice = complete(client, echo=True).choices[0]
    ids = tokenizer.encode(PROMPT)
    logprobs = choice.logprobs
    assert choice.text == PROMPT + without_echo.text
    assert logprobs.tokens[: len(ids)] == [tokenizer.decode([token]) for token in ids]
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    for logprob, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
        assert logprob <= max(top.values()) <= 0
        assert len(top) in (2, 3)  # two, and the token itself if it is neither
    assert logprobs.tokens[len(ids) :] == without_echo.logprobs.tokens
    assert logprobs.token_logprobs[len(ids) :] == without_echo.logprobs.token_logprobs
    begins = [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
    assert logprobs.text_offset[: len(ids) + 1] == begins
    assert len(logprobs.text_offset) == len(logprobs.tokens)


def test_streams_equal_complete_responses(client: OpenAI) -> None:
    settings: dict[str, Any] = dict(echo=True, prompt=[PROMPT, "黄河"], n=2)
    complete_choices = complete(client, **settings).choices
    texts = [""] * 4
    logprobs: list[dict[str, list[Any]]] = [{} for _ in complete_choices]
    for chunk in complete(client, stream=True, **settings):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs:
            for name, values in choice.logprobs.model_dump().items():
                logprobs[choice.index].setdefault(name, []).extend(values)
    assert texts == [choice.text for choice in complete_choices]
    assert logprobs == [choice.logprobs.model_dump() for choice in complete_choices]


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_may_be_zero(client: OpenAI, stream: bool) -> None:
    done = complete(client, echo=True, max_tokens=0, stream=stream)
    choices = [chunk.choices[0] for chunk in done] if stream else done.choices
    assert "".join(choice.text for choice in choices) == PROMPT
    assert choices[-1].finish_reason == "length"
    written = complete(client, echo=True, max_tokens=3).choices[0].logprobs
    assert written.token_logprobs[:-3] == choices[0].logprobs.token_logprobs
    bare = complete(client, max_tokens=0, logprobs=None).choices[0]
    assert (bare.text, bare.finish_reason) == ("", "length")


@pytest.mark.parametrize("shape", ["tinyllama", "llama2", "llama3", "qwen3"])
def test_offsets_with_tokenizers_that_add_a_space_or_a_token(shape: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_tokenizer(shape, tmp_path / "tokenizer", TEXTS))
    save_model(tmp_path / "tiny" / "model", make_model(tokenizer, 1, 256), tokenizer)
    prompt = "The river ends"
    body = {"model": "tiny", "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    with InProcess(tmp_path / "tiny", 1, Limits(), ()) as service:
        [choice] = httpx.post(f"{service.url}/v1/completions", json=body).json()["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == prompt
    assert len(logprobs["tokens"]) == len(tokenizer.text_start + tokenizer.encode(prompt))
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, at in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token not in ("<s>", "<|begin_of_text|>"):
            assert prompt[at:].startswith(token if at else token.lstrip())


def make_questions(tmp_path: Path, number: int) -> Path:
    """Write a C-Eval file of `number` questions, which are a few with permuted options."""
    folder = make_ceval(tmp_path / "ceval")
    questions = []
    for n in range(number):
        question, options, answer = CHINESE[n % len(CHINESE)]
        at = n % 4
        letter = "ABCD"[("ABCD".index(answer) - at) % 4]
        questions.append((f"第{n + 1}题：{question}", options[at:] + options[:at], letter))
    header = ["id", "question", "A", "B", "C", "D", "answer"]
    write_table(folder / "val" / "logic_val.csv", questions, header)
    write_table(folder / "dev" / "logic_dev.csv", EXAMPLES, header)
    (folder / "val" / "accountant_val.csv").unlink()
    (folder / "dev" / "accountant_dev.csv").unlink()
    return folder


@pytest.fixture(scope="module")
def varied_model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("varied") / "tiny"
    save_model(folder / "model", make_varied(tokenizer, context=2048), tokenizer)
    return folder


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve in float32, the dtype of evaluations, also on processors with bfloat16."""
    monkeypatch.setattr(load, "multiplies_bf16", lambda device: False)


@pytest.mark.usefixtures("in_float32")
def test_requests_of_lm_eval_give_the_same_scores(
    varied_model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Use the requests and the scoring of lm-eval's backend `local-completions`."""
    task = make_task("ceval", data=[str(make_questions(tmp_path, 8))], style="letter", shots=2)
    assert isinstance(task, MultipleChoice)
    ours = {result["id"]: result for result in task.run(LocalModel(varied_model, "cpu"), ())}
    builder = PromptBuilder(MinimindEncoder(tokenizer), task.benchmark, "letter", 2, 2048)
    assert len(task.questions) == 8
    with InProcess(varied_model, 4, Limits(), ()) as service:
        for question in task.questions:
            rows = builder.build(question, task.examples[question.subject]).rows
            request = {
                "model": "tiny",
                "prompt": [list(row.tokens) for row in rows],
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 1,
                "seed": 1234,
                "echo": True,
            }
            answer = httpx.post(f"{service.url}/v1/completions", json=request).json()
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            scores = [
                sum(choice["logprobs"]["token_logprobs"][row.start : -1])
                for choice, row in zip(choices, rows, strict=True)
            ]
            assert scores == pytest.approx(ours[question.id]["scores"], abs=1e-4)
    assert len({tuple(result["scores"]) for result in ours.values()}) == 8
    json.dumps(answer, allow_nan=False)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.filterwarnings("ignore")  # of lm-eval and its dependencies
def test_lm_eval_runs_against_the_service(varied_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from benchmarks.against_lm_eval import by_lm_eval

    task = make_task("ceval", data=[str(make_questions(tmp_path, 100))], style="letter", shots=2)
    assert isinstance(task, MultipleChoice)
    ours = {result["id"]: result for result in task.run(LocalModel(varied_model, "cpu"), ())}
    with InProcess(varied_model, 8, Limits(), ()) as service:
        theirs = by_lm_eval(task, varied_model / "model", 2, tmp_path, service.url)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 100
    for name, result in ours.items():
        assert result["scores"] == pytest.approx(theirs[name].scores, abs=1e-4)
        assert result["right"] == theirs[name].right
