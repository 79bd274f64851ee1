import pytest

from minimind.errors import UsageError
from minimind.inference.engine import Engine
from minimind.inference.generate import answer_all, continue_all
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer, encode_chat

QUESTIONS = ["泰山在哪里？", "长江？", "Why?", "黄河？", "你好"] * 20


def test_each_question_is_a_separate_conversation(model: Transformer, tokenizer: Tokenizer) -> None:
    reported: list[tuple[int, int]] = []
    answers = answer_all(
        model,
        tokenizer,
        QUESTIONS,
        max_new_tokens=20,
        progress=lambda done, total: reported.append((done, total)),
    )
    assert reported == [(done, 100) for done in range(1, 101)]
    with Engine(model, tokenizer, slots=1) as engine:
        for question, answer in list(zip(QUESTIONS, answers, strict=True))[:5]:
            messages = [{"role": "user", "content": question}]
            prompt, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
            pieces = engine.stream_text(prompt, max_new_tokens=20, sampling=Sampling(temperature=0))
            assert answer == "".join(pieces).strip()
    assert answers[:5] == answers[-5:]
    assert len(set(answers)) > 1


def test_texts_are_continued(model: Transformer, tokenizer: Tokenizer) -> None:
    [long] = continue_all(model, tokenizer, ["长江是"], max_new_tokens=20)
    [short] = continue_all(model, tokenizer, ["长江是"], max_new_tokens=5)
    assert short
    assert long.startswith(short.rstrip("\ufffd"))
    assert answer_all(model, tokenizer, []) == continue_all(model, tokenizer, []) == []
    with pytest.raises(UsageError, match="the prompt is empty"):
        continue_all(model, tokenizer, [""])
