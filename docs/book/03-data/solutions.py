# --8<-- [start:one-letter]
letters = [chr(ord("一") + i) for i in range(104)]  # 104 different characters
before = "".join(letters)
after = "".join([*letters[:50], "X", *letters[51:]])
assert len(shingles(before)) == 100
assert len(shingles(before) & shingles(after)) == 95
assert similarity(before, after) == 95 / 105
# --8<-- [end:one-letter]


# --8<-- [start:other-bands]
def found(s, rows, bands):
    """Return the probability that two documents of similarity s share a band."""
    return 1 - (1 - s**rows) ** bands


def middle(rows, bands):
    """Return the similarity at which half of the pairs are found."""
    return next(
        s / 1000 for s in range(1001) if found(s / 1000, rows, bands) >= 0.5
    )


assert middle(8, 14) == 0.685
assert middle(4, 28) == 0.396  # also finds texts that share half
assert middle(16, 7) == 0.863  # misses copies with a few edits
# --8<-- [end:other-bands]

# --8<-- [start:chain]
chain = np.array([[0, 1, 2], [1, 2, 3]])  # pairs (0, 1), (1, 2), (2, 3)
assert connect(5, [chain]).tolist() == [0, 0, 0, 0, 4]
# --8<-- [end:chain]

# --8<-- [start:decreasing]
longest_first = pack(sorted(sizes, reverse=True), 16, "best fit")
assert len(longest_first) == 5 == sum(sizes) / 16
assert [12, 4] in longest_first and [8, 3, 3, 2] in longest_first
# --8<-- [end:decreasing]

# --8<-- [start:epochs]
from collections import Counter

part = Order(sizes=(10,), weights=(0.3,), seed=1)
assert part.epoch_size == 3
seen = Counter(index for _, index in part.locate(0, 10 * part.epoch_size))
assert len(seen) == 10 and set(seen.values()) == {3}  # ten epochs, three passes
image = permute(np.arange(1000), 1000, 1)
assert sorted(image.tolist()) == list(range(1000))
# --8<-- [end:epochs]
