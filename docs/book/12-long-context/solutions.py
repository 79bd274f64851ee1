# --8<-- [start:lowest]
for ratio in (2, 4, 8):
    base = 10_000 * ratio ** (64 / 62)
    new = base ** (-2 * torch.arange(32, dtype=torch.float64) / 64)
    old = 10_000.0 ** (-2 * torch.arange(32, dtype=torch.float64) / 64)
    assert new[0] == old[0] == 1
    assert math.isclose(old[-1] / new[-1], ratio)
# --8<-- [end:lowest]


# --8<-- [start:theta]
def unfinished_pairs(theta, length, head_dim=64):
    """Return how many pairs make less than one turn in `length` positions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return int((length * theta**-exponents < 2 * math.pi).sum())


assert unfinished_pairs(10_000, 512) == 16
assert unfinished_pairs(10_000, 2048) == 11
assert unfinished_pairs(500_000, 2048) == 17
longest = math.ceil(
    2 * math.pi * 10_000 ** (62 / 64)
)  # one turn of the slowest pair
assert longest == 47_118
assert unfinished_pairs(10_000, longest) == 0
# --8<-- [end:theta]

# --8<-- [start:memory]
assert cache_bytes(2048) == 16 * 2**20
assert math.isclose(2 * parameters / cache_bytes(1), 6562, abs_tol=1)
assert attention_products(6562) / parameters > 0.999
# --8<-- [end:memory]

# --8<-- [start:overhead]
for length, context in ((10_000, 512), (10_000, 2048)):
    rows = sliding_windows(range(length), start=[0], context=context)
    assert sum(len(row.tokens) - row.start for row in rows) == length  # each once
    assert all(row.start >= context // 2 for row in rows[1:])
    computed = sum(len(row.tokens) - 1 for row in rows)
    assert 1.8 < computed / length < 2
# --8<-- [end:overhead]

# --8<-- [start:stale-keys]
at_600 = rope_frequencies(extend_context(config, LONG, "dynamic"), 600)[0]
at_2048 = rope_frequencies(extend_context(config, LONG, "dynamic"), 2048)[0]


def score(query_position, key_position, query_frequencies, key_frequencies):
    """Return the mean cosine of the angles between two equal vectors."""
    angles = query_position * query_frequencies - key_position * key_frequencies
    return angles.double().cos().mean().item()


fresh = [score(n + 10, n, at_2048, at_2048) for n in (100, 500)]
stale = [score(n + 10, n, at_2048, at_600) for n in (100, 500)]
assert math.isclose(*fresh, abs_tol=1e-4)  # the same distance, the same score
assert abs(stale[0] - stale[1]) > 0.05
assert max(stale) < fresh[0] / 1.9
# --8<-- [end:stale-keys]
