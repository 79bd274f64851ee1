# --8<-- [start:equal-rewards]
generator = torch.Generator().manual_seed(0)
always_right = torch.tensor([30.0, 0, 0, 0], dtype=torch.float64)
assert torch.equal(group_step(always_right, generator), always_right)
never_right = torch.tensor([-30.0, 0, 0, 0], dtype=torch.float64)
assert torch.equal(group_step(never_right, generator), never_right)
# --8<-- [end:equal-rewards]

# --8<-- [start:wrong-majority]
assert vote(start, 1) > 0.25
assert vote(start, 125) < 0.1
# --8<-- [end:wrong-majority]

# --8<-- [start:soft-gradient]
torch.manual_seed(2)
logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
student = F.log_softmax(logits, 0)
loss = -(start * student).sum()  # cross-entropy with the teacher's probabilities
[gradient] = torch.autograd.grad(loss, logits)
assert torch.allclose(gradient, student.exp() - start)
# --8<-- [end:soft-gradient]

# --8<-- [start:selective]
inputs = torch.tensor([5.0, 1.0, 7.0, 2.0, 3.0], dtype=torch.float64)
keep = torch.tensor(
    [1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64
)  # token 2 resets
state, states = torch.tensor(0.0, dtype=torch.float64), []
for value, decay in zip(inputs, keep, strict=True):
    state = decay * state + value
    states.append(state)
assert torch.stack(states).tolist() == [5, 6, 7, 9, 12]

weights = torch.zeros(5, 5, dtype=torch.float64)
for i in range(5):
    for j in range(i + 1):
        weights[i, j] = keep[j + 1 : i + 1].prod()
assert torch.equal(weights @ inputs, torch.stack(states))
# --8<-- [end:selective]

# --8<-- [start:review]
import json
from itertools import pairwise
from pathlib import Path

import minimind

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
study = json.loads((records / "shape-study.json").read_text("utf-8"))
losses = [list(shape["loss_by_seed"].values()) for shape in study["shapes"]]
spread = max(max(pair) - min(pair) for pair in losses)
assert all(min(after) - max(before) > spread for before, after in pairwise(losses))
assert {len(pair) for pair in losses} == {2}
rates = {line for line in study["recipe"].splitlines() if "lr" in line}
assert rates == {"muon_lr = 0.02", "lr = 3e-3"}
# --8<-- [end:review]
