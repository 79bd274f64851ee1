"""Chapter 13: many processes. See docs/en/book/contributing.md."""

# --8<-- [start:batch]
from pathlib import Path

import torch

import minimind
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.training.batch import TensorBatch, label_indices
from minimind.training.objectives.next_token import NextToken

torch.set_num_threads(1)
licence = (Path(minimind.__file__).parents[1] / "LICENSE").read_bytes()


def batch_of(samples):
    """Return sequences of 48 bytes of the licence, as the package's batch."""
    rows = [list(licence[48 * i : 48 * i + 49]) for i in samples]
    tokens, labels = (torch.tensor([r[a:][:48] for r in rows]) for a in (0, 1))
    return TensorBatch(tokens, labels, None, label_indices(labels))


torch.manual_seed(1)
model = Transformer(ModelConfig(vocab_size=256, **PRESETS["nano"]))
objective = NextToken([1] * 256, torch.device("cpu"))
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
# --8<-- [end:batch]

# --8<-- [start:shards]
from minimind.training.distributed import ProcessGroup


def gradient(samples):
    """Return the gradient of the summed loss as one vector, and the token count."""
    model.zero_grad()
    output = objective.loss(model, batch_of(samples))
    output.loss_sum.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    return flat, int(output.count)


whole, count = gradient(range(8))
shards = [ProcessGroup(rank, size=4).shard(0, 8) for rank in range(4)]
parts = [gradient(shard) for shard in shards]
print([list(shard) for shard in shards], [n for _, n in parts], count)
difference = sum(flat for flat, _ in parts) - whole
print(
    "sum of the parts = the whole:", bool(difference.norm() < 1e-5 * whole.norm())
)
# --8<-- [end:shards]


# --8<-- [start:ring]
def pass_on(buffers, chunks, combine):
    """Let each rank send its chunk chunks[rank] to the next one, all together."""
    sent = [buffers[rank][chunk].clone() for rank, chunk in enumerate(chunks)]
    for rank, chunk in enumerate(chunks):
        theirs = buffers[(rank + 1) % len(buffers)][chunk]
        theirs.copy_(combine(theirs, sent[rank]))


def reduce_scatter(buffers, report=lambda: None):
    """Leave the sum of all chunks r on rank r. buffers[rank][chunk]: tensors."""
    size = len(buffers)
    for step in range(1, size):
        pass_on(buffers, [(rank - step) % size for rank in range(size)], torch.add)
        report()


def all_gather(buffers, report=lambda: None):
    """Copy chunk r of rank r to all ranks."""
    size = len(buffers)
    for step in range(size - 1):
        chunks = [(rank - step) % size for rank in range(size)]
        pass_on(buffers, chunks, lambda theirs, received: received)
        report()


# --8<-- [end:ring]


# --8<-- [start:trace]
def show():
    rows = [[f"{int(chunk):4}" for chunk in row] for row in buffers]
    print(" | ".join("".join(row) for row in rows))


buffers = [list(torch.full((3, 1), 10**rank)) for rank in range(3)]
show()
reduce_scatter(buffers, show)
print("reduce-scatter done")
all_gather(buffers, show)
# --8<-- [end:trace]


def figure_ring(figure, say):
    import math

    panels = figure.subplots(1, 2)
    titles = [
        say("all to rank 0", "都发给 rank 0"),
        say("ring", "环"),
    ]
    for axes, title in zip(panels, titles, strict=True):
        places = [
            (math.cos(math.pi / 2 - a), math.sin(math.pi / 2 - a))
            for a in (2 * math.pi * r / 6 for r in range(6))
        ]
        pairs = (
            [(r, 0) for r in range(1, 6)]
            if axes is panels[0]
            else [(r, (r + 1) % 6) for r in range(6)]
        )
        for a, b in pairs:
            axes.annotate(
                "",
                places[b],
                places[a],
                arrowprops={
                    "arrowstyle": "->",
                    "color": "C1" if axes is panels[0] else "C0",
                    "lw": 1.4,
                    "shrinkA": 13,
                    "shrinkB": 13,
                },
            )
        for rank, (x, y) in enumerate(places):
            axes.plot(x, y, "o", ms=20, mfc="none", mec="0.5")
            axes.text(x, y, rank, ha="center", va="center")
        axes.set_title(title, fontsize=10)
        axes.set_xlim(-1.4, 1.4)
        axes.set_ylim(-1.3, 1.3)
        axes.set_aspect("equal")
        axes.axis("off")


# --8<-- [start:cost]
def all_reduce_seconds(num_bytes, size, bandwidth, latency):
    """Return the time of a ring all-reduce, with bandwidth in bytes per second."""
    messages = 2 * (size - 1)
    return messages * latency + messages / size * num_bytes / bandwidth


with torch.device("meta"):  # shapes without memory
    models = {
        name: Transformer(ModelConfig(**PRESETS[name]))
        for name in ("small", "base")
    }
parameters = {
    name: sum(p.numel() for p in model.parameters())
    for name, model in models.items()
}
LINKS = {
    "NVLink": (300e9, 5e-6),
    "PCIe 4.0 x16": (20e9, 10e-6),
    "10 Gbit Ethernet": (1.2e9, 50e-6),
    "1 Gbit Ethernet": (0.12e9, 100e-6),
}
print(f"gradient of small: {4 * parameters['small'] / 1e6:.1f} MB")
for link, (bandwidth, latency) in LINKS.items():
    s = all_reduce_seconds(4 * parameters["small"], 8, bandwidth, latency)
    print(f"{link:17} {1000 * s:7.1f} ms")
# --8<-- [end:cost]

# --8<-- [start:speedup]
from minimind.planning.plan import flops_per_token

flops = flops_per_token(models["small"], seq_len=512) * 128 * 512
print(f"one step of small: {flops / 1e12:.1f} TFLOP")


def speedup(size, seconds, link):
    """Return how many times as fast `size` processes are as one."""
    exchange = all_reduce_seconds(4 * parameters["small"], size, *LINKS[link])
    return seconds / (seconds / size + exchange)


seconds = flops / 100e12  # on one GPU that computes 100 TFLOP/s
for link in LINKS:
    print(
        f"{link:17}", [f"{n}: {speedup(n, seconds, link):.1f}" for n in (2, 8, 64)]
    )
# --8<-- [end:speedup]


def figure_speedup(figure, say):
    axes = figure.subplots()
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    axes.plot(sizes, sizes, ls="--", lw=1.2, color="0.5")
    axes.text(20, 26, say("ideal", "理想"), color="0.5", ha="right")
    labels = {
        "10 Gbit Ethernet": say("10 Gbit Ethernet", "10 Gbit 以太网"),
        "1 Gbit Ethernet": say("1 Gbit Ethernet", "1 Gbit 以太网"),
    }
    for link in LINKS:
        speeds = [1.0, *(speedup(n, seconds, link) for n in sizes[1:])]
        axes.plot(sizes, speeds, marker="o", ms=3, label=labels.get(link, link))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    axes.set_yticks([0.1, 1, 10, 64], [0.1, 1, 10, 64])
    axes.minorticks_off()
    axes.set_xlabel(say("processes", "进程数"))
    axes.set_ylabel(say("times as fast as one", "相对一个进程的倍数"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


# --8<-- [start:processes]
import threading


def run_ranks(size, work):
    """Call work(group) in `size` threads, one per rank."""
    buffers, barrier = [None] * size, threading.Barrier(size, timeout=60)

    class RingGroup(ProcessGroup):
        def all_reduce_(self, tensors):
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            buffers[self.rank] = flat.tensor_split(size)  # chunks that share memory
            if barrier.wait() == 0:  # all have arrived; one thread acts for them
                reduce_scatter(buffers)
                all_gather(buffers)
            barrier.wait()
            sums = flat.split([tensor.numel() for tensor in tensors])
            for tensor, total in zip(tensors, sums, strict=True):
                tensor.copy_(total.view_as(tensor))

    ranks = [
        threading.Thread(target=work, args=(RingGroup(rank, size),))
        for rank in range(size)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()


# --8<-- [end:processes]

# --8<-- [start:train]
import copy

from minimind.config.settings import OptimSettings
from minimind.training.backend import TorchBackend
from minimind.training.precision import Precision
from minimind.training.sums import LossSums


def train(size, steps=20):
    """Train with `size` ranks; return the loss of each step, and all replicas."""
    replicas, losses = [copy.deepcopy(model) for _ in range(size)], []

    def work(group):
        own, cpu = replicas[group.rank], torch.device("cpu")
        precision = Precision("fp32", "cpu")
        backend = TorchBackend(
            own, own, OptimSettings(), objective, precision, group
        )
        for step in range(steps):
            output = backend.loss(batch_of(group.shard(8 * step, 8)))
            backend.backward(output.loss_sum)
            sums = LossSums.of(output)
            sums.all_reduce_(group, cpu)
            backend.step(scale=1 / int(sums.count))
            if group.is_main:
                losses.append(float(sums.loss_sum) / int(sums.count))

    run_ranks(size, work)
    return losses, replicas


runs = {size: train(size) for size in (1, 2, 4)}
for size, (losses, _) in runs.items():
    print(f"{size} ranks: {losses[0]:.3f} {losses[9]:.3f} {losses[19]:.3f}")
# --8<-- [end:train]

# --8<-- [start:same]
one, four = torch.tensor(runs[1][0]), torch.tensor(runs[4][0])
print(
    "1 and 4 ranks differ by less than 1e-4:", torch.allclose(one, four, rtol=1e-4)
)
weights = [torch.cat([p.flatten() for p in r.parameters()]) for r in runs[4][1]]
print(
    "bit for bit the same on all ranks:",
    all(torch.equal(w, weights[0]) for w in weights),
)
a, b, c = torch.tensor([1.0, 1e8, -1e8])
print(
    "(a + b) + c =", ((a + b) + c).item(), "  a + (b + c) =", (a + (b + c)).item()
)
# --8<-- [end:same]

# --8<-- [start:record]
import json

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
recorded = json.loads((records / "process-count.json").read_text("utf-8"))
kinds = recorded["6 process counts"]["kinds"]
for kind in ("pretrain-adamw", "pretrain-muon-0.02", "sft", "lora", "dpo"):
    result = kinds[kind]
    print(
        f"{kind:18} {result['runs']} runs, {result['stops']} stops, "
        f"{result['other_samples']} other samples, loss {result['worst_loss']:.1e}"
    )
# --8<-- [end:record]

# --8<-- [start:zero]
from torch.optim import AdamW

flat = torch.cat([p.detach().flatten() for p in model.parameters()])
replicated, sharded = flat.clone(), [flat.clone() for _ in range(4)]

replicated.grad = sum(g for g, _ in parts) / count
AdamW([replicated], lr=1e-3).step()  # moments of the whole vector, on every rank

buffers = [list((g / count).tensor_split(4)) for g, _ in parts]
weights = [list(vector.tensor_split(4)) for vector in sharded]
reduce_scatter(buffers)
for rank in range(4):
    own = weights[rank][rank]
    own.grad = buffers[rank][rank]
    AdamW([own], lr=1e-3).step()  # moments of a quarter
all_gather(weights)
print([torch.allclose(vector, replicated, atol=1e-6) for vector in sharded])
# --8<-- [end:zero]


# --8<-- [start:memory]
def bytes_per_process(parameters, size, stage):
    """Return the bytes of weights, gradients and AdamW's moments in one process."""
    weights, gradients, moments = 4 * parameters, 4 * parameters, 8 * parameters
    return (
        weights / (size if stage >= 3 else 1),
        gradients / (size if stage >= 2 else 1),
        moments / (size if stage >= 1 else 1),
    )


for name, number in parameters.items():
    row = [sum(bytes_per_process(number, 8, stage)) / 1e6 for stage in range(4)]
    print(f"{name:5} on 8 processes, MB:", [f"{n:,.0f}" for n in row])
# --8<-- [end:memory]

from minimind.training.optimizers import count_moments

moments = {name: count_moments(m, OptimSettings()) for name, m in models.items()}


def table_stages(say):
    head = [
        say("stage", "阶段"),
        say("divided", "切分的内容"),
        say("small, 2 processes", "small，2 个进程"),
        say("small, 8", "small，8 个"),
        say("base, 2", "base，2 个"),
        say("base, 8", "base，8 个"),
    ]
    divided = [
        say("nothing", "无"),
        say("moments", "矩"),
        say("moments, gradients", "矩、梯度"),
        say("moments, gradients, weights", "矩、梯度、权重"),
    ]

    def megabytes(name, size, stage):
        total = sum(bytes_per_process(parameters[name], size, stage))
        return f"{total / 1e6:,.0f} MB"

    return [
        head,
        *(
            [
                f"ZeRO {stage}" if stage else "AdamW",
                what,
                *(megabytes(name, n, stage) for name in parameters for n in (2, 8)),
            ]
            for stage, what in enumerate(divided)
        ),
        [
            "Muon",
            say("nothing", "无"),
            *(
                f"{(8 * parameters[name] + 4 * moments[name]) / 1e6:,.0f} MB"
                for name in parameters
                for _ in (2, 8)
            ),
        ],
    ]


def figure_memory(figure, say):
    axes = figure.subplots()
    colors = ["C0", "C1", "C2"]
    labels = [
        say("weights", "权重"),
        say("gradients", "梯度"),
        say("moments", "矩"),
    ]
    stages = [say("none", "不切分"), "ZeRO 1", "ZeRO 2", "ZeRO 3"]
    for stage in range(4):
        left = 0.0
        parts = bytes_per_process(parameters["base"], 8, stage)
        for part, color, label in zip(parts, colors, labels, strict=True):
            axes.barh(stage, part / 1e6, left=left, height=0.6, color=color,
                      label=label if stage == 0 else None)  # fmt: skip
            left += part / 1e6
        axes.text(left + 15, stage, f"{left:,.0f} MB", va="center", fontsize=9)
    axes.set_yticks(range(4), stages)
    axes.invert_yaxis()
    axes.set_xlim(0, 2000)
    axes.set_xlabel(
        say("MB per process: base on 8 processes", "每个进程的 MB：base，8 个进程")
    )
    axes.legend(frameon=False, loc="lower right")


forward_backward, optimizer_seconds = 8 * 3.64, 1.13  # process-count.md, small
tokens_per_second = json.loads(
    (records / "training-speed-small.json").read_text("utf-8")
)["over_rounds"]["small-16x512"]["minimind"]["real_tokens_per_second"]["median"]
step_seconds = 128 * 512 / tokens_per_second
ethernet = all_reduce_seconds(
    4 * parameters["small"], 8, *LINKS["10 Gbit Ethernet"]
)
muon_seconds = forward_backward / 8 + optimizer_seconds  # on eight processes
gigabit = all_reduce_seconds(4 * parameters["small"], 2, *LINKS["1 Gbit Ethernet"])
facts = {
    "small_mb": f"{4 * parameters['small'] / 1e6:.0f}",
    "ethernet_ms": f"{1000 * ethernet:.0f}",
    "gpu_ms": f"{1000 * seconds:.0f}",
    "nvlink_64": f"{speedup(64, seconds, 'NVLink'):.0f}",
    "pcie_8": f"{speedup(8, seconds, 'PCIe 4.0 x16'):.1f}",
    "record_runs": sum(kind["runs"] for kind in kinds.values()),
    "record_stops": sum(kind["stops"] for kind in kinds.values()),
    "laptop_step": f"{step_seconds:.0f}",
    "laptop_exchange": f"{gigabit:.1f}",
    "passes": f"{forward_backward:.1f}",
    "optimizers": f"{optimizer_seconds}",
    "muon_8": f"{(forward_backward + optimizer_seconds) / muon_seconds:.1f}",
    "base_one": f"{16 * parameters['base'] / 1e6:,.0f}",
    "base_eight": f"{16 * parameters['base'] / 8 / 1e6:,.0f}",
    "moments_share": f"{8 / 16:.0%}".replace("%", " %"),
}
piece = {
    "links": LINKS,
    "models": {**parameters, "1B": 10**9},
    "flops": {
        name: flops_per_token(m, seq_len=512) * 128 * 512
        for name, m in models.items()
    }
    | {"1B": 6 * 10**9 * 128 * 512},
}
