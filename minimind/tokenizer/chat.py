"""Conversations to token ids and loss masks.

Control tokens are inserted as ids; the text of messages is encoded as plain text, so it cannot
contain a control token. `CHAT_TEMPLATE`, which is saved for other programs, gives the same ids
with two exceptions:

- A control token spelled out in a message is encoded as text here, as a control token there.
- An answer that begins with a blank line is encoded separately from the "assistant\\n" before it.
  A rendered string would merge their line breaks into one token, but a model that is prompted with
  "assistant\\n" must be trained on exactly these ids.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import repeat

from minimind.errors import TokenizerError
from minimind.tokenizer.format import ASSISTANT, IM_END, IM_START, ROLES
from minimind.tokenizer.template import TextSegment
from minimind.tokenizer.tokenizer import Tokenizer

Message = dict[str, str]  # {"role": ..., "content": ...}
EncodedChat = tuple[list[int], list[int]]  # ids, and the loss mask: 1 on supervised tokens

_NO_FORMAT = (
    f"the model's tokenizer has no chat template and no tokens {IM_START} and {IM_END}, so the "
    "model cannot chat or be fine-tuned on conversations. `minimind pretrain` and "
    "`minimind generate` work without one. If the model has a chat_template.jinja, put it into its "
    "directory"
)


def validate_messages(messages: Sequence[Message]) -> None:
    """Raise ValueError, with the reason, if `messages` are not a valid conversation."""
    if not messages:
        raise ValueError("there are no messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(
                f"message {number} has the unknown role {role!r}; supported are {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise ValueError(f"message {number} ({role}): content is not text")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> EncodedChat:
    """Encode a conversation; the loss mask is 1 on each answer and the token that ends it.

    In a third-party chat format, answers that do not follow the generation prompt are masked out,
    and all answers if `add_generation_prompt` is set. Raises ValueError for invalid messages,
    TokenizerError for a conversation that the model's chat template does not accept.
    """
    if tokenizer.template:
        validate_messages(messages)
        return _encode_by_template(
            tokenizer, [messages], add_generation_prompt=add_generation_prompt
        )[0]
    [(ids, mask)] = encode_chats(tokenizer, [messages])
    if add_generation_prompt:
        header = _header(tokenizer, ASSISTANT)
        return ids + header, mask + [0] * len(header)
    return ids, mask


def encode_chats(
    tokenizer: Tokenizer,
    conversations: Iterable[Sequence[Message]],
    *,
    unsupervised: Iterable[Container[int]] | None = None,
) -> list[EncodedChat]:
    """Encode many conversations on all cores. Raises the errors of `encode_chat`.

    unsupervised: for each conversation, the indices of messages whose loss mask is 0.
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
    header, line_end = _header(tokenizer, ASSISTANT), tokenizer.encode("\n")
    return [
        _add_control_tokens(tokenizer, messages, texts, header, line_end, excluded)
        for messages, excluded in zip(conversations, unsupervised or repeat(()), strict=False)
    ]


def unsupported_reason(tokenizer: Tokenizer, messages: Sequence[Message]) -> str | None:
    """Return why a conversation cannot be trained on in a third-party chat format, or None.

    Our own format supports every conversation.
    """
    if not tokenizer.template:
        return None
    roles = _roles(messages)
    try:
        layout = tokenizer.template.layout(roles)
    except TokenizerError as error:
        return str(error)
    if ASSISTANT in roles and not any(part.is_supervised for part in layout):
        return (
            "the model's chat template writes none of its answers after the generation prompt "
            "(add_generation_prompt), so training on it would not improve generation"
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
    """Encode conversations in a third-party chat format.

    Only answers that follow the generation prompt are supervised.
    """
    assert tokenizer.template is not None
    layouts = [
        tokenizer.template.layout(_roles(messages), add_generation_prompt)
        for messages in conversations
    ]
    segments = []
    for messages, layout in zip(conversations, layouts, strict=True):
        contents = [message["content"] for message in messages]
        segments += [
            (part.render(contents), part.position)
            for part in layout
            if isinstance(part, TextSegment)
        ]
    texts = iter(tokenizer.encode_segments(segments))
    encoded = []
    for layout, excluded in zip(layouts, unsupervised or repeat(()), strict=False):
        ids: list[int] = []
        mask: list[int] = []
        for part in layout:
            part_ids = next(texts) if isinstance(part, TextSegment) else [part.id]
            is_label = (
                part.answer is not None and part.is_supervised and part.answer not in excluded
            )
            ids += part_ids
            mask += [int(is_label)] * len(part_ids)
        encoded.append((ids, mask))
    return encoded


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.im_start, *tokenizer.encode(f"{role}\n")]


def _text(message: Message) -> str:
    """Return the text of a message that is encoded in one piece, with its role.

    An answer is encoded without its role, because a prompt ends with the role.
    """
    role, content = message["role"], message["content"]
    return content if role == ASSISTANT else f"{role}\n{content}"


def _add_control_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    texts: Iterator[list[int]],
    answer_header: list[int],
    line_end: list[int],
    excluded: Container[int],
) -> EncodedChat:
    """Add control tokens around the encoded `texts` of a conversation, and make its loss mask."""
    ids: list[int] = []
    mask: list[int] = []
    # --8<-- [start:loss-mask]
    for index, message in enumerate(messages):
        is_answer = message["role"] == ASSISTANT
        header, text = answer_header if is_answer else [tokenizer.im_start], next(texts)
        ids += [*header, *text, tokenizer.im_end, *line_end]
        label = int(is_answer and index not in excluded)
        mask += [0] * len(header) + [label] * (len(text) + 1) + [0] * len(line_end)
    # --8<-- [end:loss-mask]
    return ids, mask
