# --8<-- [start:count]
from minimind.model import PRESETS, ModelConfig, Transformer


def count(c, experts):
    """Return the number of parameters with `experts` experts in each layer."""
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    layer = c.hidden_size * c.head_dim * heads  # attention
    layer += 3 * c.hidden_size * c.shared_intermediate_size
    layer += 3 * c.hidden_size * c.intermediate_size * experts
    layer += c.hidden_size * c.num_local_experts  # router
    layer += 2 * c.hidden_size  # two norms
    return (c.vocab_size + 1) * c.hidden_size + c.num_hidden_layers * layer


config = ModelConfig(**PRESETS["demo-moe"] | {"vocab_size": 3200})
with torch.device("meta"):
    model = Transformer(config)
assert count(config, 4) == sum(p.numel() for p in model.parameters()) == 4_856_064
assert count(config, 2) == model.num_active_parameters == 3_774_720
# --8<-- [end:count]


# --8<-- [start:single-expert]
def router_gradient(weigh):
    """Return the gradient of the router if one expert is chosen per word."""
    matrix = router.clone().requires_grad_()
    logits = x @ matrix.T
    chosen = logits.topk(1).indices
    out = moe(x, chosen, weigh(logits, chosen), w_in, w_out)
    return torch.autograd.grad(out.square().sum(), matrix)[0]


after = router_gradient(lambda logits, chosen: logits.gather(1, chosen).softmax(-1))
before = router_gradient(
    lambda logits, chosen: logits.softmax(-1).gather(1, chosen)
)
assert after.abs().max() == 0
assert before.abs().max() > 1e-4
# --8<-- [end:single-expert]


# --8<-- [start:extremes]
def balance_of(logits, number):
    """Return the balance loss of one sequence of router logits [tokens, experts]."""
    routing = Routing([logits[None]], [logits.topk(number).indices[None]])
    mask = torch.ones(1, len(logits), dtype=torch.bool)
    total, weight = balance_sums(routing, mask, None)["balance"].tolist()
    return total / weight


neighbours = 30 * (torch.eye(4) + torch.eye(4).roll(1, 1))  # a different pair each
assert abs(balance_of(neighbours, 2) - 1) < 1e-6
assert abs(balance_of(torch.tensor([[30.0, 30, 0, 0]] * 4), 2) - 2) < 1e-6
# Three tokens prefer expert 0 by a hair, the fourth wants expert 1 and nothing else.
lopsided = torch.tensor([[0.01, 0.0]] * 3 + [[0.0, 30.0]])
assert 0.87 < balance_of(lopsided, 1) < 0.89
# --8<-- [end:extremes]


# --8<-- [start:distinct]
def distinct(tokens, experts, number):
    """Return the expected number of experts that at least one token chooses."""
    return experts * (1 - (1 - number / experts) ** tokens)


torch.manual_seed(1)
batches = torch.rand(2000, 16, 4).topk(2).indices.flatten(1)  # 2,000 batches of 16
mean = sum(len(set(batch)) for batch in batches.tolist()) / 2000
assert distinct(1, 4, 2) == 2 and distinct(4, 4, 2) == 3.75
assert abs(distinct(16, 4, 2) - mean) < 0.01
assert round(distinct(16, 256, 8)) == 102
# --8<-- [end:distinct]

# --8<-- [start:capacity]
import math


def dropped(chosen, factor, experts=4):
    """Return the share of rows that do not fit into the capacity of their expert."""
    capacity = math.ceil(factor * chosen.numel() / experts)
    surplus = chosen.flatten().bincount(minlength=experts) - capacity
    return surplus.clamp(min=0).sum().item() / chosen.numel()


torch.manual_seed(1)
even = torch.randn(1000, 4).topk(2).indices
skewed = (torch.randn(1000, 4) + torch.tensor([2.0, 0, 0, 0])).topk(2).indices
assert dropped(even, 1.0) < 0.03 and dropped(even, 1.25) == 0
assert 0.1 < dropped(skewed, 1.25) < dropped(skewed, 1.0) < 0.25
assert dropped(skewed, 2.0) == 0  # no expert can be chosen more than once per token
# --8<-- [end:capacity]
