# --8<-- [start:elo]
import math


def elo_probability(difference):
    """Return the probability to win with `difference` more Elo points."""
    return 1 / (1 + 10 ** (-difference / 400))


points = 400 / math.log(10)  # Elo points per unit of our scores
assert round(points) == 174
assert math.isclose(
    elo_probability(points * 1.5), torch.sigmoid(torch.tensor(1.5)), rel_tol=1e-6
)
assert round(elo_probability(200), 2) == 0.76
# --8<-- [end:elo]

# --8<-- [start:constant]
assert torch.isclose(
    bradley_terry_loss(true_scores), bradley_terry_loss(true_scores + 5)
)
assert torch.allclose(
    optimum(true_scores, beta=1), optimum(true_scores + 5, beta=1)
)
assert not torch.isclose(
    bradley_terry_loss(true_scores), bradley_terry_loss(2 * true_scores)
)
assert torch.allclose(
    optimum(2 * true_scores, beta=1), optimum(true_scores, beta=0.5)
)
# --8<-- [end:constant]


# --8<-- [start:best-policy]
def objective(policy, beta):
    kl = (policy * (policy / reference).log()).sum()
    return (policy * true_scores).sum() - beta * kl


torch.manual_seed(1)
for beta in (0.3, 1, 10):
    best = objective(optimum(true_scores, beta), beta)
    others = torch.softmax(3 * torch.randn(1000, 4, dtype=torch.float64), dim=1)
    assert all(objective(policy, beta) < best for policy in others)
    constant = beta * (reference * (true_scores / beta).exp()).sum().log()
    assert torch.isclose(best, constant)
# --8<-- [end:best-policy]

# --8<-- [start:weight]
beta = 0.5
d = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
[gradient] = torch.autograd.grad(-F.logsigmoid(beta * d).sum(), d)
assert torch.allclose(gradient, -beta * torch.sigmoid(-beta * d))
# --8<-- [end:weight]

# --8<-- [start:targets]
import math

beta, smoothing = 0.5, 0.1
d = torch.linspace(-20, 20, 40001, dtype=torch.float64)
dpo = -F.logsigmoid(beta * d)
cdpo = (
    -F.logsigmoid(beta * d) * (1 - smoothing) - F.logsigmoid(-beta * d) * smoothing
)
ipo = (d - 1 / (2 * beta)).square()
assert dpo.argmin() == len(d) - 1  # the larger the better, without end
assert math.isclose(
    d[cdpo.argmin()], math.log((1 - smoothing) / smoothing) / beta, abs_tol=1e-3
)
assert math.isclose(d[ipo.argmin()], 1 / (2 * beta), abs_tol=1e-3)
# --8<-- [end:targets]
