"""`echo` with `logprobs` on /v1/completions, as used by lm-eval."""

import json
from collections.abc import Iterator
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


@pytest.fixture
def client(process: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: OpenAI, **settings: Any) -> Any:
    given = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": 2}
    return client.completions.create(**given | settings)


def test_echo_returns_the_prompt_first(client: OpenAI, tokenizer: Tokenizer) -> None:
    alone = complete(client).choices[0]
    choice = complete(client, echo=True).choices[0]
    ids = tokenizer.encode(PROMPT)
    found = choice.logprobs
    assert choice.text == PROMPT + alone.text
    assert found.tokens[: len(ids)] == [tokenizer.decode([token]) for token in ids]
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert logprob <= max(top.values()) <= 0
        assert len(top) in (2, 3)  # two, and the token itself where it is none of them
    assert found.tokens[len(ids) :] == alone.logprobs.tokens
    assert found.token_logprobs[len(ids) :] == alone.logprobs.token_logprobs
    begins = [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
    assert found.text_offset[: len(ids) + 1] == begins
    assert len(found.text_offset) == len(found.tokens)


def test_streams_equal_complete_responses(client: OpenAI) -> None:
    settings: dict[str, Any] = dict(echo=True, prompt=[PROMPT, "黄河"], n=2)
    whole = complete(client, **settings).choices
    texts = [""] * 4
    logprobs: list[dict[str, list[Any]]] = [{} for _ in whole]
    for chunk in complete(client, stream=True, **settings):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs:
            for name, values in choice.logprobs.model_dump().items():
                logprobs[choice.index].setdefault(name, []).extend(values)
    assert texts == [choice.text for choice in whole]
    assert logprobs == [choice.logprobs.model_dump() for choice in whole]


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
    found = choice["logprobs"]
    assert choice["text"] == prompt
    assert len(found["tokens"]) == len(tokenizer.text_start + tokenizer.encode(prompt))
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, at in zip(found["tokens"], found["text_offset"], strict=True):
        if token not in ("<s>", "<|begin_of_text|>"):
            assert prompt[at:].startswith(token if at else token.lstrip())


def make_exam(tmp_path: Path, number: int) -> Path:
    """Write a C-Eval file with this number of questions, by permuting the options of a few."""
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
def exam_model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exam") / "tiny"
    save_model(folder / "model", make_varied(tokenizer, context=2048), tokenizer)
    return folder


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve in float32, the dtype of evaluations, also on processors with bfloat16."""
    monkeypatch.setattr(load, "multiplies_bf16", lambda device: False)


@pytest.mark.usefixtures("in_float32")
def test_requests_of_lm_eval_give_the_same_scores(
    exam_model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Use the requests and the scoring of lm-eval's backend `local-completions`."""
    task = make_task("ceval", data=[str(make_exam(tmp_path, 8))], style="letter", shots=2)
    assert isinstance(task, MultipleChoice)
    ours = {result["id"]: result for result in task.run(LocalModel(exam_model, "cpu"), ())}
    builder = PromptBuilder(MinimindEncoder(tokenizer), task.benchmark, "letter", 2, 2048)
    assert len(task.questions) == 8
    with InProcess(exam_model, 4, Limits(), ()) as service:
        for question in task.questions:
            rows = builder.build(question, task.examples[question.subject]).rows
            sent = {
                "model": "tiny",
                "prompt": [list(row.tokens) for row in rows],
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 1,
                "seed": 1234,
                "echo": True,
            }
            answer = httpx.post(f"{service.url}/v1/completions", json=sent).json()
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
@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it brings
def test_lm_eval_runs_against_the_service(exam_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from benchmarks.against_lm_eval import by_lm_eval

    task = make_task("ceval", data=[str(make_exam(tmp_path, 100))], style="letter", shots=2)
    assert isinstance(task, MultipleChoice)
    ours = {result["id"]: result for result in task.run(LocalModel(exam_model, "cpu"), ())}
    with InProcess(exam_model, 8, Limits(), ()) as service:
        found = by_lm_eval(task, exam_model / "model", 2, tmp_path, service.url)
    assert ours.keys() == found.keys()
    assert len(ours) == 100
    for name, result in ours.items():
        assert result["scores"] == pytest.approx(found[name].scores, abs=1e-4)
        assert result["right"] == found[name].right
