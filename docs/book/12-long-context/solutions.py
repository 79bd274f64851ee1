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
assert unfinished_pairs(500_000, 2048) == 18
assert unfinished_pairs(10_000, 65536) == 0
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


def mixed_score(query_position, key_position):
    """Return the score between equal vectors, the key rotated when 600 were read."""
    angles = query_position * at_2048.double() - key_position * at_600.double()
    return angles.cos().mean().item()


near, far_away = mixed_score(110, 100), mixed_score(510, 500)  # the same distance
assert abs(near - far_away) > 0.1
linear = extended["linear"][0].double()
assert torch.allclose((110 * linear - 100 * linear).cos(), (10 * linear).cos())
# --8<-- [end:stale-keys]
