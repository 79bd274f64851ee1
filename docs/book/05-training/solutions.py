# --8<-- [start:sum-of-gradient]
for label in range(3):
    logits = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    loss = -torch.log_softmax(logits, -1)[label]
    loss.backward()
    assert abs(logits.grad.sum().item()) < 1e-6
    assert logits.grad[label] < 0  # the only negative one
    assert (logits.grad > 0).sum() == 2
# --8<-- [end:sum-of-gradient]

# --8<-- [start:scale-invariance]
weights = []
for factor in (1, 1000):
    state = {"step": 0, "m": 0.0, "v": 0.0}
    weight = torch.zeros(2, dtype=torch.float64)
    for gradient in ([0.5, -0.2], [0.1, 0.3]):
        adamw_step(weight, factor * torch.tensor(gradient).double(), state, lr=0.01)
    weights.append(weight)
assert torch.allclose(*weights, rtol=1e-4)
# --8<-- [end:scale-invariance]

# --8<-- [start:distance]
schedules = {
    "constant": ScheduleSettings(warmup=0, final=1),
    "cosine": ScheduleSettings(warmup=0, final=0),
    "wsd": ScheduleSettings(name="wsd", warmup=0, decay=0.2, final=0),
}
mean = {
    name: sum(lr_fraction(step, 1000, settings) for step in range(1000)) / 1000
    for name, settings in schedules.items()
}
assert round(mean["constant"], 2) == 1
assert round(mean["cosine"], 2) == 0.5
assert round(mean["wsd"], 2) == 0.9
# --8<-- [end:distance]

# --8<-- [start:mean-of-means]
losses = [[4.0] * 10, [2.0] * 90]  # of two micro-batches with 10 and 90 labels
count = sum(len(losses_of_one) for losses_of_one in losses)
right = sum(sum(losses_of_one) for losses_of_one in losses) / count
wrong = sum(sum(one) / len(one) for one in losses) / len(losses)
assert right == 2.2
assert wrong == 3.0
# --8<-- [end:mean-of-means]

# --8<-- [start:nearest-orthogonal]
torch.manual_seed(0)
matrix = torch.randn(16, 64)
u, s, v = torch.linalg.svd(matrix, full_matrices=False)
nearest = u @ v
error = orthogonalize(matrix[None])[0] - nearest
assert torch.linalg.matrix_norm(error, 2) < 0.15  # its largest singular value
assert torch.allclose(nearest @ nearest.T, torch.eye(16), atol=1e-5)
# --8<-- [end:nearest-orthogonal]
