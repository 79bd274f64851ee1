import pytest

from minimind.errors import UsageError
from minimind.inference.truncation import truncate_chat
from minimind.tokenizer import Tokenizer, encode_chat

SYSTEM = {"role": "system", "content": "你是一个很有礼貌的向导。"}
TURNS = [
    {"role": "user", "content": "长江有多长？"},
    {"role": "assistant", "content": "长江全长约六千三百公里。"},
    {"role": "user", "content": "它流入哪里？"},
    {"role": "assistant", "content": "它流入东海。"},
    {"role": "user", "content": "谢谢！那黄河呢？"},
]


def length(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> int:
    return len(encode_chat(tokenizer, messages, add_generation_prompt=True)[0])


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_the_oldest_turns_are_dropped_first_and_the_system_message_is_kept(
    tokenizer: Tokenizer, system: list[dict[str, str]]
) -> None:
    for dropped in (0, 2, 4):
        kept = [*system, *TURNS[dropped:]]
        expected, _ = encode_chat(tokenizer, kept, add_generation_prompt=True)
        assert truncate_chat(tokenizer, [*system, *TURNS], len(expected)) == (expected, dropped)
        if dropped < 4:
            prompt, dropped_more = truncate_chat(tokenizer, [*system, *TURNS], len(expected) - 1)
            assert dropped_more == dropped + 2
            assert len(prompt) < len(expected)


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_a_single_message_that_does_not_fit_is_refused(
    tokenizer: Tokenizer, system: list[dict[str, str]]
) -> None:
    required = length(tokenizer, [*system, TURNS[-1]])
    own = len(tokenizer.encode(TURNS[-1]["content"]))
    with pytest.raises(UsageError) as error:
        truncate_chat(tokenizer, [*system, *TURNS], required - 1)
    assert f"the message has {own} tokens and at most {own - 1} fit" in str(error.value)
    assert ("system message" in str(error.value)) == bool(system)
    with pytest.raises(UsageError, match="the prompt may have 3: no message fits"):
        truncate_chat(tokenizer, [*system, *TURNS], 3)


GREETING = {"role": "assistant", "content": "你好，我是向导。"}


@pytest.mark.parametrize(
    "messages",
    [
        [GREETING, TURNS[0]],
        [SYSTEM, GREETING, *TURNS],
        [SYSTEM, {"role": "system", "content": "只用中文回答。"}, TURNS[0]],
    ],
)
def test_a_conversation_that_fits_is_complete(
    tokenizer: Tokenizer, messages: list[dict[str, str]]
) -> None:
    complete, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert truncate_chat(tokenizer, messages, len(complete)) == (complete, 0)


def test_a_greeting_is_dropped_before_the_first_turn(tokenizer: Tokenizer) -> None:
    systems = [SYSTEM, {"role": "system", "content": "只用中文回答。"}]
    kept = [*systems, *TURNS]
    expected, _ = encode_chat(tokenizer, kept, add_generation_prompt=True)
    messages = [*systems, GREETING, *TURNS]
    assert truncate_chat(tokenizer, messages, len(expected)) == (expected, 1)
    last, _ = encode_chat(tokenizer, [*systems, TURNS[-1]], add_generation_prompt=True)
    assert truncate_chat(tokenizer, messages, len(last)) == (last, 5)


@pytest.mark.parametrize("messages", [[], [SYSTEM], [SYSTEM, GREETING]])
def test_a_conversation_without_a_user_message_is_refused(
    tokenizer: Tokenizer, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(UsageError, match="the conversation has no message of the user"):
        truncate_chat(tokenizer, messages, 1000)
