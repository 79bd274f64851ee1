# --8<-- [start:ratios]
logits = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64)
plain = logits.softmax(-1)
for temperature in (0.25, 0.5, 2.0, 5.0):
    p = (logits / temperature).softmax(-1)
    assert torch.allclose(p[0] / p[1], (plain[0] / plain[1]) ** (1 / temperature))
assert (logits / 0.01).softmax(-1)[0] > 0.999
assert ((logits / 1000).softmax(-1) - 1 / 3).abs().max() < 0.001
# --8<-- [end:ratios]


# --8<-- [start:cache-size]
def cache_bytes(c, num_tokens, bytes_per_number=2):
    """Return the size of the keys and values of `num_tokens` tokens."""
    numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return numbers * bytes_per_number * num_tokens


shape = ModelConfig(**PRESETS["small"])
assert cache_bytes(shape, 1) == 8192
full = cache_bytes(shape, 512)
assert round(full / 1e6, 1) == 4.2
assert 2 * parameters // full == 12
# --8<-- [end:cache-size]

# --8<-- [start:other-models]
gigabytes = 7e9 * 4.5 / 8 / 1e9  # a model of 7 billion, 4.5 bits per parameter
assert round(gigabytes, 1) == 3.9
assert round(bandwidth / gigabytes) == 13  # tokens per second
even = (
    peak / bandwidth
)  # streams at which arithmetic takes as long as reading in bf16
assert even == 7.5
# --8<-- [end:other-models]

# --8<-- [start:own-machine]
import time

weights = torch.ones(parameters, dtype=torch.bfloat16)  # as many as `small` has
seconds = []
for _ in range(5):
    start = time.perf_counter()
    weights.view(torch.int64).max()  # has to read every byte
    seconds.append(time.perf_counter() - start)
rate = 2 * parameters / min(seconds)
print(f"{rate / 1e9:.0f} GB/s: at most {1 / min(seconds):,.0f} tokens per second")
assert rate > 1e8
# --8<-- [end:own-machine]


# --8<-- [start:speculation]
def tokens_per_pass(guesses, probability):
    """Return the expected tokens of one pass of the large model over the guesses."""
    return sum(probability**n for n in range(guesses + 1))


chance = random.Random(1)
counts = []
for _ in range(20_000):
    right = 0
    while right < 4 and chance.random() < 0.8:
        right += 1
    counts.append(
        right + 1
    )  # the pass itself gives the token after the last right one
assert abs(sum(counts) / len(counts) - tokens_per_pass(4, 0.8)) < 0.03
assert round(tokens_per_pass(4, 0.8), 2) == 3.36
# --8<-- [end:speculation]
