"""The chat format, in the one place that knows it.

    <|im_start|>role
    content<|im_end|>

Messages are encoded piece by piece: control tokens by their ids, all else as plain text, so that
nobody can write a control token. The template that is stored for other programs renders to the
same ids, with two exceptions. Control tokens spelt in a message are text here and control tokens
there. And an answer that begins with a blank line is kept apart from the "assistant\\n" before it
(where a string would join their line breaks into one token), because a model that is prompted
with "assistant\\n" must have been trained on exactly that.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat

from minimind.tokenizer.bpe import IM_END, IM_START, Tokenizer

Message = dict[str, str]  # {"role": ..., "content": ...}
EncodedChat = tuple[list[int], list[int]]  # ids, and 1 for each that the model is to produce

ROLES = ("system", "user", "assistant", "tool")
_ANSWERS = "assistant"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    f"{{{{- '{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}\\n' -}}}}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{IM_START}{_ANSWERS}\\n' -}}}}{{%- endif -%}}"
)


def validate_messages(messages: Sequence[Message]) -> None:
    """Raise ValueError with the reason why `messages` are not a conversation."""
    if not messages:
        raise ValueError("there are no messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(
                f"message {number} has the role {role!r}; known are {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise ValueError(f"message {number} ({role}) has no text as its content")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> EncodedChat:
    """(ids, mask): the mask is 1 on what the model is to produce, each answer and its end.

    Raises ValueError for bad messages.
    """
    [(ids, mask)] = encode_chats(tokenizer, [messages])
    if add_generation_prompt:
        opening = _head(tokenizer, _ANSWERS)
        return ids + opening, mask + [0] * len(opening)
    return ids, mask


def encode_chats(
    tokenizer: Tokenizer,
    conversations: Iterable[Sequence[Message]],
    *,
    given: Iterable[int] | None = None,
) -> list[EncodedChat]:
    """`encode_chat` for many conversations, on all cores. Raises ValueError for bad messages.

    `given`: how many messages of each conversation are given, so that no answer among them is
    the model's to produce.
    """
    conversations = list(conversations)
    for messages in conversations:
        validate_messages(messages)
    texts = iter(tokenizer.encode_batch([_text(m) for messages in conversations for m in messages]))
    answer_head, line_end = _head(tokenizer, _ANSWERS), tokenizer.encode("\n")
    return [
        _join(tokenizer, messages, texts, answer_head, line_end, number)
        for messages, number in zip(conversations, given or repeat(0), strict=False)
    ]


def _head(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.im_start, *tokenizer.encode(f"{role}\n")]


def _text(message: Message) -> str:
    """What is encoded in one go. An answer stands alone: its head is what prompts the model."""
    role, content = message["role"], message["content"]
    return content if role == _ANSWERS else f"{role}\n{content}"


def _join(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    texts: Iterator[list[int]],
    answer_head: list[int],
    line_end: list[int],
    given: int,
) -> EncodedChat:
    ids: list[int] = []
    mask: list[int] = []
    for number, message in enumerate(messages):
        answers = message["role"] == _ANSWERS
        head, text = answer_head if answers else [tokenizer.im_start], next(texts)
        ids += [*head, *text, tokenizer.im_end, *line_end]
        learned = int(answers and number >= given)
        mask += [0] * len(head) + [learned] * (len(text) + 1) + [0] * len(line_end)
    return ids, mask
