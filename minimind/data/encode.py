"""Encode records to documents of token ids; skip records that a token store cannot contain."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal

from minimind.data.schemas import Record
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import EncodedChat, encode_chats, unsupported_reason

Kind = Literal["text", "chat", "pairs"]
KIND_NAMES: dict[Kind, str] = {
    "text": "text",
    "chat": "conversations",
    "pairs": "preference pairs",
}
_RECORD_KINDS = {"text": ("text", "messages"), "chat": ("messages",), "pairs": ("pair",)}
_PIECE_CHARACTERS = 1 << 18
_BATCH_CHARACTERS = 1 << 20


def reason_to_skip(record: Record, tokenizer: Tokenizer, kind: Kind | None) -> str | None:
    """Return the reason why a token store of this kind skips a record, or None.

    Without `kind`, records of every kind are accepted.
    """
    if kind and record.kind not in _RECORD_KINDS[kind]:
        return f"no {KIND_NAMES[kind]}"
    if kind == "text" and record.unsupervised:
        return "excludes an answer from the loss, which pretraining cannot do"
    if any(unsupported_reason(tokenizer, messages) for messages, _ in record.conversations):
        return "does not fit the model's own chat template"
    return None


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, kind: Kind | None
) -> Iterator[list[EncodedChat]]:
    """Yield the documents of each record as (ids, loss mask): one, or two for a preference pair.

    The mask of running text is empty: all of its tokens are supervised. A store of kind "text"
    treats conversations as running text and appends the end-of-text token.
    """
    chats = [chat for record in records for chat in record.conversations]
    messages, unsupervised = [chat[0] for chat in chats], [chat[1] for chat in chats]
    encoded_chats = iter(encode_chats(tokenizer, messages, unsupervised=unsupervised))
    texts = (record.text for record in records if record.text is not None)
    encoded_pieces = encode_pieces(chain.from_iterable(map(split_long, texts)), tokenizer)
    for record in records:
        if record.text is not None:
            ids = [*tokenizer.text_start]
            for _ in split_long(record.text):
                ids += next(encoded_pieces)
            yield [([*ids, tokenizer.end_of_text], [])]
        else:
            documents = [next(encoded_chats) for _ in record.conversations]
            yield (
                documents
                if kind != "text"
                else [([*ids, tokenizer.end_of_text], []) for ids, _ in documents]
            )


def split_long(text: str) -> Iterator[str]:
    """Split a long text into pieces, after a line break where possible.

    Encoding takes about a hundred bytes of memory per byte of text, so a book is encoded piece by
    piece. Tokens next to a split may differ from those of the unsplit text; the decoded text is
    the same. An empty text has no pieces.
    """
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start + _PIECE_CHARACTERS // 2, end) + 1 or end
        yield text[start:end]
        start = end


def encode_pieces(pieces: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the ids of each piece, encoding in batches of bounded size."""
    batch: list[str] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= _BATCH_CHARACTERS:
            yield from tokenizer.encode_batch(batch)
            batch, size = [], 0
    yield from tokenizer.encode_batch(batch)
