from minimind.serving.logprobs import TextOffsets
from minimind.tokenizer import Tokenizer


def test_text_offsets_count_decoded_characters(tokenizer: Tokenizer) -> None:
    byte = {piece: i for i, piece in enumerate(tokenizer.bytes_of) if len(piece) == 1}
    river = "江".encode()
    ids = [
        *tokenizer.encode("a"),
        tokenizer.im_end,  # skipped
        *(byte[river[i : i + 1]] for i in range(3)),
        byte[river[:1]],  # an incomplete character
        byte[b"b"],
        byte[river[1:2]],  # a continuation byte without a start
        byte[b"c"],
    ]
    offsets = TextOffsets(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a江\ufffdb\ufffdc"
    assert [offsets.push(token) for token in ids] == [0, 1, 1, 1, 1, 2, 3, 4, 5]
