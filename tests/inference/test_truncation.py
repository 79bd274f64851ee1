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


@pytest.mark.parametrize("opening", [[], [SYSTEM]])
def test_the_oldest_turns_go_first_and_the_system_message_never(
    tokenizer: Tokenizer, opening: list[dict[str, str]]
) -> None:
    for dropped in (0, 2, 4):
        seen = [*opening, *TURNS[dropped:]]
        wanted, _ = encode_chat(tokenizer, seen, add_generation_prompt=True)
        assert truncate_chat(tokenizer, [*opening, *TURNS], len(wanted)) == (wanted, dropped)
        if dropped < 4:
            prompt, more = truncate_chat(tokenizer, [*opening, *TURNS], len(wanted) - 1)
            assert more == dropped + 2
            assert len(prompt) < len(wanted)


@pytest.mark.parametrize("opening", [[], [SYSTEM]])
def test_a_message_that_does_not_fit_alone_is_refused_with_figures(
    tokenizer: Tokenizer, opening: list[dict[str, str]]
) -> None:
    alone = length(tokenizer, [*opening, TURNS[-1]])
    own = len(tokenizer.encode(TURNS[-1]["content"]))
    with pytest.raises(UsageError) as error:
        truncate_chat(tokenizer, [*opening, *TURNS], alone - 1)
    assert f"the message has {own} tokens and at most {own - 1} fit" in str(error.value)
    assert ("system message" in str(error.value)) == bool(opening)
    with pytest.raises(UsageError, match="the prompt may have 3: no message fits"):
        truncate_chat(tokenizer, [*opening, *TURNS], 3)
