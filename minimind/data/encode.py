"""Records as token documents: the one place that decides what of them training sees."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal

from minimind.data.schemas import Record
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import EncodedChat, encode_chats, unsupported_reason

Kind = Literal["text", "chat", "pairs"]
WANTED: dict[Kind, str] = {
    "text": "text",
    "chat": "conversations",
    "pairs": "preference pairs",
}
_RECORDS = {"text": ("text", "messages"), "chat": ("messages",), "pairs": ("pair",)}
_PIECE = 1 << 18  # characters
_AT_ONCE = 1 << 20  # characters


def reason_to_skip(record: Record, tokenizer: Tokenizer, kind: Kind | None) -> str | None:
    """Return why a record is left out of a token store of this kind, or None if it is in.

    Without a kind each record is taken as what it is.
    """
    if kind and record.kind not in _RECORDS[kind]:
        return f"no {WANTED[kind]}"
    if kind == "text" and record.unsupervised:
        return "excludes an answer from the loss, which pretraining cannot do"
    if any(unsupported_reason(tokenizer, messages) for messages, _ in record.conversations):
        return "does not fit the model's own chat template"
    return None


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, kind: Kind | None
) -> Iterator[list[EncodedChat]]:
    """Yield the documents of each record, one or of a pair two, as (ids, loss mask).

    Running text has an empty mask: all of it is supervised. In a store of text, conversations are
    running text too, and end as it does.
    """
    talks = [talk for record in records for talk in record.conversations]
    messages, unsupervised = [talk[0] for talk in talks], [talk[1] for talk in talks]
    chats = iter(encode_chats(tokenizer, messages, unsupervised=unsupervised))
    texts = (record.text for record in records if record.text is not None)
    pieces = encode_pieces(chain.from_iterable(map(split_long, texts)), tokenizer)
    for record in records:
        if record.text is not None:
            ids = [*tokenizer.text_start]
            for _ in split_long(record.text):
                ids += next(pieces)
            yield [([*ids, tokenizer.end_of_text], [])]
        else:
            documents = [next(chats) for _ in record.conversations]
            yield (
                documents
                if kind != "text"
                else [([*ids, tokenizer.end_of_text], []) for ids, _ in documents]
            )


def split_long(text: str) -> Iterator[str]:
    """A long text in parts, cut after a line where there is one; nothing of an empty one.

    The tokenizer takes a hundred bytes of memory for each of text, so a book is not encoded at
    once. At a cut the tokens may be others than without it, of the same text.
    """
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start + _PIECE // 2, end) + 1 or end
        yield text[start:end]
        start = end


def encode_pieces(pieces: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of each piece, a bounded number at once."""
    group: list[str] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= _AT_ONCE:
            yield from tokenizer.encode_batch(group)
            group, size = [], 0
    yield from tokenizer.encode_batch(group)
