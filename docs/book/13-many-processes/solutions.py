# --8<-- [start:count-messages]
def sent_by_one(size, numel=840):
    """Return how many numbers rank 0 sends in an all-reduce, and the largest message."""
    sent = []

    class Chunk(torch.Tensor):
        def clone(self):
            sent.append(self.numel())
            return super().clone()

    buffers = [list(torch.ones(numel).tensor_split(size)) for _ in range(size)]
    buffers[0] = [chunk.as_subclass(Chunk) for chunk in buffers[0]]
    reduce_scatter(buffers)
    all_gather(buffers)
    return sum(sent), max(sent)


for size in (2, 3, 7):
    assert sent_by_one(size) == (2 * (size - 1) * 840 // size, 840 // size)
# --8<-- [end:count-messages]


# --8<-- [start:clip]
def clipped(vector, limit):
    return vector * min(1.0, limit / vector.norm().item())


means = [flat / n for flat, n in parts]  # one mean gradient per rank
limit = sum(means).norm().item() / 8  # half of the norm of the mean
right = clipped(sum(means) / 4, limit)
wrong = sum(clipped(vector, limit) for vector in means) / 4
assert abs(right.norm().item() - limit) < 1e-4 * limit
assert wrong.norm() < 0.99 * limit  # shorter than allowed
direction = torch.cosine_similarity(right, wrong, dim=0)
assert 0.9 < direction < 0.9999  # and in another direction
# --8<-- [end:clip]


# --8<-- [start:largest]
def largest(memory, size, stage):
    """Return how many parameters fit into `memory` bytes per process."""
    return memory / sum(bytes_per_process(1, size, stage))


millions = [round(largest(24e9, 8, stage) / 1e6) for stage in range(4)]
assert millions == [1500, 2667, 4364, 12000]
# --8<-- [end:largest]

# --8<-- [start:batch-size]
exchange = all_reduce_seconds(
    4 * parameters["small"], 8, *LINKS["10 Gbit Ethernet"]
)
needed = 9 * exchange * 8  # seconds of computation on one GPU, for a share of 10 %
times_larger = needed / seconds
assert 80 < times_larger < 110
tokens = 128 * 512 * times_larger
assert 5e6 < tokens < 8e6
# --8<-- [end:batch-size]

# --8<-- [start:owners]
from minimind.training.optimizers import Muon, is_hidden_matrix

matrices = [p for name, p in model.named_parameters() if is_hidden_matrix(name, p)]
gradient(range(8))
for matrix in matrices:
    matrix.grad /= count
before = [matrix.detach().clone() for matrix in matrices]
load, owner = [0] * 4, {}
for i in sorted(range(len(matrices)), key=lambda i: -matrices[i].numel()):
    owner[i] = load.index(min(load))  # the largest first, each to the idlest rank
    load[owner[i]] += matrices[i].numel()
assert max(load) < 1.3 * min(load)

replicas = []
for rank in range(4):
    own = [torch.nn.Parameter(w.clone()) for w in before]
    for parameter, matrix in zip(own, matrices, strict=True):
        parameter.grad = matrix.grad.clone()
    Muon([own[i] for i in range(len(own)) if owner[i] == rank]).step()
    replicas.append(own)
gathered = [replicas[owner[i]][i] for i in range(len(matrices))]  # the all-gather

Muon(matrices).step()
for mine, all_in_one in zip(gathered, matrices, strict=True):
    assert torch.allclose(mine, all_in_one, atol=1e-6)
# --8<-- [end:owners]
