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

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import repeat

from minimind.errors import TokenizerError
from minimind.tokenizer.bpe import IM_END, IM_START, Tokenizer
from minimind.tokenizer.template import Run

Message = dict[str, str]  # {"role": ..., "content": ...}
EncodedChat = tuple[list[int], list[int]]  # ids, and 1 for each that the model is to produce

ROLES = ("system", "user", "assistant", "tool")
_ANSWERS = "assistant"

_NO_FORMAT = (
    f"the model's tokenizer has no chat template, nor {IM_START} and {IM_END} for ours, so it "
    "cannot chat or be fine-tuned on conversations; `minimind pretrain` and `generate` need none. "
    "Put its chat_template.jinja into its directory if there is one"
)

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

    In a format made elsewhere not on answers that stand after another opening than a prompt's.
    Raises ValueError for bad messages, and TokenizerError for what the model's own chat format
    has no place for.
    """
    if tokenizer.template:
        validate_messages(messages)
        return _encode_by_template(
            tokenizer, [messages], add_generation_prompt=add_generation_prompt
        )[0]
    [(ids, mask)] = encode_chats(tokenizer, [messages])
    if add_generation_prompt:
        opening = _head(tokenizer, _ANSWERS)
        return ids + opening, mask + [0] * len(opening)
    return ids, mask


def encode_chats(
    tokenizer: Tokenizer,
    conversations: Iterable[Sequence[Message]],
    *,
    unsupervised: Iterable[Container[int]] | None = None,
) -> list[EncodedChat]:
    """`encode_chat` for many conversations, on all cores, with the same errors.

    `unsupervised`: the messages of each conversation (numbers from 0) that are no answers to
    learn from: the mask is 0 on them.
    """
    conversations = list(conversations)
    for messages in conversations:
        validate_messages(messages)
    if tokenizer.template:
        return _encode_by_template(tokenizer, conversations, unsupervised=unsupervised)
    if not conversations:
        return []
    if not tokenizer.has_chat_tokens:
        raise TokenizerError(_NO_FORMAT)
    texts = iter(tokenizer.encode_batch([_text(m) for messages in conversations for m in messages]))
    answer_head, line_end = _head(tokenizer, _ANSWERS), tokenizer.encode("\n")
    return [
        _join(tokenizer, messages, texts, answer_head, line_end, excluded)
        for messages, excluded in zip(conversations, unsupervised or repeat(()), strict=False)
    ]


def unsupported_reason(tokenizer: Tokenizer, messages: Sequence[Message]) -> str | None:
    """Why a conversation is none to learn from in the model's own chat format; in ours all are."""
    if not tokenizer.template:
        return None
    roles = _roles(messages)
    try:
        skeleton = tokenizer.template.skeleton(roles)
    except TokenizerError as error:
        return str(error)
    if _ANSWERS in roles and not any(part.learned for part in skeleton):
        return (
            "the model's chat template opens no answer in it as it opens the answer that it asks "
            "for (add_generation_prompt), so what is learned from it would be of no use"
        )
    return None


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def _encode_by_template(
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    add_generation_prompt: bool = False,
    unsupervised: Iterable[Container[int]] | None = None,
) -> list[EncodedChat]:
    """Conversations in the format of a model made elsewhere.

    Only answers after what a prompt ends with are the model's to produce.
    """
    assert tokenizer.template is not None
    skeletons = [
        tokenizer.template.skeleton(_roles(messages), add_generation_prompt)
        for messages in conversations
    ]
    sections = []
    for messages, skeleton in zip(conversations, skeletons, strict=True):
        contents = [message["content"] for message in messages]
        sections += [(p.fill(contents), p.place) for p in skeleton if isinstance(p, Run)]
    texts = iter(tokenizer.encode_sections(sections))
    encoded = []
    for skeleton, excluded in zip(skeletons, unsupervised or repeat(()), strict=False):
        ids: list[int] = []
        mask: list[int] = []
        for part in skeleton:
            some = next(texts) if isinstance(part, Run) else [part.id]
            ids += some
            learned = part.answer is not None and part.learned and part.answer not in excluded
            mask += [int(learned)] * len(some)
        encoded.append((ids, mask))
    return encoded


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
    excluded: Container[int],
) -> EncodedChat:
    ids: list[int] = []
    mask: list[int] = []
    for number, message in enumerate(messages):
        answers = message["role"] == _ANSWERS
        head, text = answer_head if answers else [tokenizer.im_start], next(texts)
        ids += [*head, *text, tokenizer.im_end, *line_end]
        learned = int(answers and number not in excluded)
        mask += [0] * len(head) + [learned] * (len(text) + 1) + [0] * len(line_end)
    return ids, mask
