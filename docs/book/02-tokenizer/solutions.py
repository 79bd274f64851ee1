# --8<-- [start:parts]
cut = "长江"[0].encode()[:2]
assert cut.decode("utf-8", errors="replace") == "\ufffd"
tokens = encode("长城", merges)
assert [len(token) for token in tokens] == [
    3,
    1,
    1,
    1,
]  # 长 was merged, 城 never occurred
assert b"".join(tokens).decode() == "长城"
# --8<-- [end:parts]

# --8<-- [start:count]
from minimind.tokenizer import SPECIAL_TOKENS

assert len(SPECIAL_TOKENS) == 16
assert 6400 - 256 - len(SPECIAL_TOKENS) == 6128
assert len(set(merges)) == len(merges)  # each merge makes one token
# --8<-- [end:count]

# --8<-- [start:against-package]
from minimind.tokenizer import train_tokenizer

counts = {"abc": 9, "abd": 7, "bcd": 5, "ca": 3, "dab": 2, "bc": 1}  # without ties
words = [word for word, count in counts.items() for _ in range(count)]
ours = train(words, 4)
trained = train_tokenizer(["\n".join(words)], vocab_size=16 + 256 + 4)
theirs = [
    token for token in trained.bytes_of if len(token) > 1 and b"<" not in token
]
assert [a + b for a, b in ours] == theirs
# --8<-- [end:against-package]

# --8<-- [start:greedy]
words = ["ab"] * 3 + ["bc"] * 2 + ["abc"]
assert train(words, 2) == [(b"a", b"b"), (b"b", b"c")]
assert encode("abc", train(words, 2)) == [
    b"ab",
    b"c",
]  # the merge made first is applied first
assert encode("bca", train(words, 2)) == [b"bc", b"a"]
# --8<-- [end:greedy]

# --8<-- [start:larger-model]
base = layer_parameters(768, 2048, 16, 48, 16, 8)


def best_size(layers, hidden):
    return min(
        sizes, key=lambda name: cost_per_byte(name, "Chinese web", layers, hidden)
    )


assert (
    record["vocab_size"][best_size(base, 768)]
    >= record["vocab_size"][best_size(small, 512)]
)
assert record["vocab_size"][best_size(100 * base, 768)] == 51200
# --8<-- [end:larger-model]
