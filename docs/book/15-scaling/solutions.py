# --8<-- [start:long-sequences]
with torch.device("meta"):
    model = Transformer(ModelConfig(**PRESETS["small"]))
parameters, _ = cost("small")
per_position = flops_per_token(model, 2) - flops_per_token(model, 1)
assert round(6 * parameters / per_position, -2) == 6_600
assert flops_per_token(model, 1_000) < 1.16 * 6 * parameters
# --8<-- [end:long-sequences]

# --8<-- [start:best-size]
import numpy

tried = numpy.geomspace(1e3, 1e9, 12_001)
for budget in (1e12, 1e13):
    best, tokens = best_size(budget, values)
    losses = law.at(tried, budget / 6 / tried)
    assert abs(tried[losses.argmin()] / best - 1) < 0.01
    lowest = law.at(best, tokens)
    assert lowest <= losses.min()
    assert law.at(best / 2, tokens * 2) < 1.02 * lowest
    assert law.at(best * 2, tokens / 2) < 1.02 * lowest
# --8<-- [end:best-size]

# --8<-- [start:chinchilla]
names = ("E", "A", "B", "alpha", "beta")
published = dict(zip(names, (1.69, 406.4, 410.7, 0.34, 0.28), strict=True))
refitted = dict(zip(names, (1.8172, 482.01, 2085.43, 0.3478, 0.3658), strict=True))

parameters, tokens = best_size(5.76e23, published)
assert round(parameters / 1e9) == 32 and round(tokens / parameters) == 93
parameters, tokens = best_size(5.76e23, refitted)
assert round(parameters / 1e9) == 72 and round(tokens / parameters) == 18
# --8<-- [end:chinchilla]

# --8<-- [start:infinite-epochs]
limit = effective_tokens(1e12, 1.0)
assert round(limit, 2) == 16.39
epochs = next(n for n in range(1, 100) if effective_tokens(n, 1.0) >= limit / 2)
assert epochs == 11
# --8<-- [end:infinite-epochs]

# --8<-- [start:held-out-size]
worst = {}
for size in sizes:
    others = [sample for sample in samples if sample.parameters != size]
    partial, _ = fit_law(others, bootstraps=1)
    worst[size] = max(
        abs(float(sample.loss / partial.at(size, sample.tokens)) - 1)
        for sample in samples
        if sample.parameters == size
    )
assert worst[sizes[0]] > 0.02
assert all(worst[size] < 0.015 for size in sizes[1:])
# --8<-- [end:held-out-size]
