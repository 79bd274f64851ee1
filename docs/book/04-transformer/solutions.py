# --8<-- [start:scale]
vectors = torch.randn(5, 8)
normed = RMSNorm(8, eps=1e-5)(vectors)
assert torch.allclose(normed.square().mean(-1), torch.ones(5), atol=1e-3)
assert torch.allclose(normed, RMSNorm(8, eps=1e-5)(7 * vectors), atol=1e-3)
assert torch.allclose(F.cosine_similarity(normed, vectors), torch.ones(5))
# --8<-- [end:scale]

# --8<-- [start:order-blind]
vectors = torch.randn(6, 32) / 2  # long vectors would attend to themselves only
shuffled = vectors[[3, 0, 4, 1, 2, 5]]  # the last one stays the last
(out_a, _), (out_b, _) = (attention(x, x, x) for x in (vectors, shuffled))
assert torch.allclose(out_a[-1], out_b[-1], atol=1e-5)
rotated, rotated_b = (rotate(x, torch.arange(6)) for x in (vectors, shuffled))
out_a, out_b = (
    attention(rotated, rotated, vectors)[0],
    attention(rotated_b, rotated_b, shuffled)[0],
)
assert not torch.allclose(out_a[-1], out_b[-1], atol=1e-3)
# --8<-- [end:order-blind]

# --8<-- [start:three-back]
queries = rotate(ones, positions - 3)
_, three_back = attention(30 * queries, keys, one_hot)
assert three_back.argmax(-1).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]
# --8<-- [end:three-back]

# --8<-- [start:scaling]
torch.manual_seed(1)
q, k = torch.randn(2, 64, 512)
unscaled = (q @ k.T).softmax(-1).amax(-1).mean()
scaled = (q @ k.T / 512**0.5).softmax(-1).amax(-1).mean()
assert unscaled > 0.8  # nearly all weight on one key, by accident
assert scaled < 0.2
# --8<-- [end:scaling]


# --8<-- [start:count]
def count(c):
    projections = (
        c.hidden_size
        * c.head_dim
        * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    )
    layer = (
        projections + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    )
    return (
        c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size
    )


base = ModelConfig(**PRESETS["base"])
with torch.device("meta"):  # shapes without memory
    parameters = Transformer(base).parameters()
    assert count(base) == sum(parameter.numel() for parameter in parameters)
# --8<-- [end:count]
