# --8<-- [start:compare]
def bits_per_byte(perplexity, bytes_per_token):
    return math.log2(perplexity) / bytes_per_token


assert round(bits_per_byte(40, 3.62), 2) == 1.47
assert round(bits_per_byte(60, 4.35), 2) == 1.36
# --8<-- [end:compare]

# --8<-- [start:how-many]
needed = next(
    n for n in range(10, 10_000, 10) if wilson_interval(3 * n // 10, n)[0] > 0.25
)
assert needed == 290
needed = next(
    n for n in range(50, 99_950, 50) if wilson_interval(13 * n // 50, n)[0] > 0.25
)
assert needed == 7250
# --8<-- [end:how-many]

# --8<-- [start:best-of-52]
lucky = [right for right in range(27) if wilson_interval(right, 26)[0] > 1 / 4]
one = sum(math.comb(26, r) * 0.25**r * 0.75 ** (26 - r) for r in lucky)
assert lucky[0] == 11
assert round(one, 2) == 0.04
assert round(1 - (1 - one) ** 52, 1) == 0.9
# --8<-- [end:best-of-52]


# --8<-- [start:paired]
def sign_test(only_a, only_b):
    """Return how often a fair coin would divide the differences as unevenly."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n, 1)


assert 538 - 511 == 40 - 13 == 240 - 213
assert sign_test(40, 13) < 0.001
assert sign_test(240, 213) > 0.2
low_a, high_b = wilson_interval(538, 1346)[0], wilson_interval(511, 1346)[1]
assert low_a < high_b  # the two intervals overlap in both cases
# --8<-- [end:paired]

# --8<-- [start:first]
with tempfile.TemporaryDirectory() as folder:
    replies = judge(
        invented_judge(first=45), trials, Path(folder) / "judge.jsonl", identity={}
    )
report = verdicts(trials, replies, list(answers))
assert [row["wins"] for row in report["ranking"]] == [0.5, 0.5]
assert report["position_consistency"] == 0
assert report["first_preferred"] == 1
# --8<-- [end:first]
