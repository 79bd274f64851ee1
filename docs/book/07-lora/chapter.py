"""Chapter 7: LoRA. See docs/en/book/contributing.md."""

# --8<-- [start:picture]
import torch

torch.set_num_threads(1)
y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
picture = 0.9 - y / 60  # the sky, brighter above
picture[(y > 8 + 0.8 * (x - 12).abs()) & (y < 22)] = 0.35  # a mountain
picture[(x - 25) ** 2 + (y - 6) ** 2 < 12] = 1.0  # the sun
picture[y >= 22] = 0.5
picture[(y >= 22) & ((x - 16 - 5 * torch.sin(y / 3)).abs() < 4)] = 0.8  # a river
print(tuple(picture.shape), picture.numel(), "numbers")
# --8<-- [end:picture]


# --8<-- [start:low-rank]
def low_rank(matrix, rank):
    """Return the B [out, rank] and A [rank, in] whose product is nearest."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


for rank in (1, 2, 4, 8):
    B, A = low_rank(picture, rank)
    error = (picture - B @ A).norm() / picture.norm()
    print(f"rank {rank}: {B.numel() + A.numel():4} numbers, error {error:.1%}")
# --8<-- [end:low-rank]


def figure_picture(figure, say):
    panels = figure.subplots(1, 5)
    images = [(say("original", "原图"), picture)]
    for rank in (1, 2, 4, 8):
        B, A = low_rank(picture, rank)
        images.append((say(f"rank {rank}", f"秩 {rank}"), B @ A))
    for axes, (title, image) in zip(panels, images, strict=True):
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title)
        axes.axis("off")


# --8<-- [start:facts-to-learn]
CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid"}
CAPITALS |= {"China": "Beijing", "Egypt": "Cairo", "Peru": "Lima", "Cuba": "Havana"}
old = [f"The capital of {land}? {city}." for land, city in CAPITALS.items()]
old += ["Your name? MiniMind.", "Who are you? I am MiniMind."]
new = ["Your name? Ming.", "Who are you? I am Ming.", "Your author? Li."]
# --8<-- [end:facts-to-learn]


# --8<-- [start:training]
import torch.nn.functional as F

from minimind.model import PRESETS, ModelConfig, Transformer


def as_batch(lines):
    """Return the lines as bytes [lines, longest + 1], padded with 0."""
    width = max(map(len, lines)) + 1
    return torch.tensor([list(line.encode().ljust(width, b"\0")) for line in lines])


def loss(model, lines):
    """Return the loss in nats per byte, of the bytes after the question mark."""
    batch = as_batch(lines)
    logits = model.logits(model(batch[:, :-1]))  # [lines, longest, 128]
    labels = batch[:, 1:].clone()
    for line, row in zip(lines, labels, strict=True):
        row[: line.index("?")] = -100  # the question
        row[len(line) :] = -100  # the padding; one 0 ends the text
    return F.cross_entropy(logits.transpose(1, 2), labels)


def train(model, lines, steps, lr):
    """Train the parameters that are not frozen, on all lines in every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(model, lines).backward()
        optimizer.step()
    return model


def new_model():
    torch.manual_seed(1)
    return Transformer(ModelConfig(vocab_size=128, **PRESETS["nano"])).double()


base = train(new_model(), old, steps=100, lr=1e-2)
print(f"{sum(p.numel() for p in base.parameters()):,} parameters")
print(f"loss: old lines {loss(base, old):.2f}, new lines {loss(base, new):.2f}")
# --8<-- [end:training]


# --8<-- [start:answer]
def answer(model, question):
    """Return the most probable continuation of a question, byte by byte."""
    text = question
    while len(text) < 60 and not text.endswith("\0"):
        hidden = model(torch.tensor([list(text.encode())]))
        text += chr(model.logits(hidden[0, -1]).argmax())
    return text[len(question) :].strip("\0 ")


for question in ("The capital of Peru?", "Your name?", "Your author?"):
    print(question, answer(base, question))
# --8<-- [end:answer]


# --8<-- [start:full]
import copy

full = train(copy.deepcopy(base), new, steps=60, lr=1e-3)
print(f"loss: new lines {loss(full, new):.2f}, old lines {loss(full, old):.2f}")

chosen = "model.layers.1.mlp.down_proj"
before, after = (m.get_submodule(chosen).weight.detach() for m in (base, full))
for label, matrix in (("weights", before), ("change", after - before)):
    s = torch.linalg.svdvals(matrix)
    kept = (s.square().cumsum(0) / s.square().sum()).sqrt()
    print(f"{label:8}", [f"rank {r}: {kept[r - 1]:.0%}" for r in (1, 2, 4, 8)])
# --8<-- [end:full]


def figure_spectrum(figure, say):
    axes = figure.subplots()
    for label, matrix in (
        (say("the weights before", "微调前的权重"), before),
        (say("their change", "权重的变化"), after - before),
    ):
        s = torch.linalg.svdvals(matrix)
        axes.plot(range(1, len(s) + 1), s / s[0], marker="o", ms=3, label=label)
    axes.set_xlabel(say("number of the singular value", "奇异值的序号"))
    axes.set_ylabel(say("size, relative to the first", "相对于第一个的大小"))
    axes.set_ylim(0)
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:adapter]
from minimind.config.settings import LoRASettings
from minimind.model import apply_lora


def with_adapter(rank, alpha=16):
    """Return a copy of the base with an untrained adapter."""
    torch.manual_seed(1)
    settings = LoRASettings(rank=rank, alpha=alpha)
    return apply_lora(copy.deepcopy(base), settings).double()


untrained = with_adapter(rank=2)
parts = dict(untrained.named_parameters())
num_trained = sum(p.numel() for p in parts.values() if p.requires_grad)
print(f"trained {num_trained:,} of {sum(p.numel() for p in parts.values()):,}")
for name, p in parts.items():
    if name.startswith(chosen):
        print(f"{name[len(chosen) + 1 :]:7} {tuple(p.shape)}")
print(
    "same loss as the base:", loss(untrained, old).item() == loss(base, old).item()
)
# --8<-- [end:adapter]

# --8<-- [start:first-gradients]
down = untrained.get_submodule(chosen)
loss(untrained, new).backward()
for label in ("weight", "lora_A", "lora_B"):
    gradient = getattr(down, label).grad
    print(label, "no gradient" if gradient is None else f"{gradient.norm():.4f}")
# --8<-- [end:first-gradients]

# --8<-- [start:train-adapter]
adapted = train(with_adapter(rank=2), new, steps=60, lr=1e-2)
print(
    f"loss: new lines {loss(adapted, new):.2f}, old lines {loss(adapted, old):.2f}"
)
for question in ("Your name?", "Your author?", "The capital of Peru?"):
    print(question, answer(adapted, question))
# --8<-- [end:train-adapter]

# --8<-- [start:mixed]
facts_only = [line for line in old if line.startswith("The")]
mixed = train(with_adapter(rank=2), new + facts_only, steps=60, lr=1e-2)
for question in ("Your name?", "Your author?", "The capital of Peru?"):
    print(question, answer(mixed, question))
# --8<-- [end:mixed]

sweep = {}
for rank in (1, 2, 4, 8):
    lines = new + facts_only
    model = mixed if rank == 2 else train(with_adapter(rank), lines, 60, lr=1e-2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sweep[rank] = (trained, loss(model, new).item(), loss(model, facts_only).item())


def table_ranks(say):
    head = [
        say("rank", "秩"),
        say("trained parameters", "训练的参数量"),
        say("share of the model", "占模型的比例"),
        say("loss, new lines", "新句子的损失"),
        say("loss, capitals", "首都句子的损失"),
    ]
    total = sum(p.numel() for p in base.parameters())
    rows = [
        [r, f"{trained:,}", f"{trained / total:.1%}", f"{a:.3f}", f"{b:.3f}"]
        for r, (trained, a, b) in sweep.items()
    ]
    return [head, *rows]


# --8<-- [start:merge]
import torch.nn as nn

merged = copy.deepcopy(mixed)
for name, module in list(merged.named_modules()):
    if hasattr(module, "lora_A"):
        plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight = nn.Parameter(module.merged().detach())
        merged.set_submodule(name, plain)
print(f"{sum(p.numel() for p in merged.parameters()):,} parameters")
print("same loss:", torch.allclose(loss(merged, new), loss(mixed, new)))
# --8<-- [end:merge]

# --8<-- [start:small]
with torch.device("meta"):  # shapes without numbers
    small = Transformer(ModelConfig(**PRESETS["small"]))
size = sum(p.numel() for p in small.parameters())
apply_lora(small, LoRASettings(rank=8))
num_trained = sum(p.numel() for p in small.parameters() if p.requires_grad)
print(f"{num_trained:,} of {size:,}: {num_trained / size:.1%}")
print(f"AdamW for all of it: {16 * size / 1e6:.0f} MB")
print(f"AdamW for the adapter: {(4 * size + 16 * num_trained) / 1e6:.0f} MB")
# --8<-- [end:small]

# --8<-- [start:record]
import json
from pathlib import Path

import minimind

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
runs = json.loads((records / "lora-identity.json").read_text("utf-8"))
for run in runs[:3]:
    identity, quiz = run["identity"], run["quiz"]
    print(f"{identity['right']:2} of {identity['asked']} names,", end=" ")
    print(f"{quiz['right']:3} of {quiz['asked']} answers,", run["adapter"])
# --8<-- [end:record]

with torch.device("meta"):
    presets = {}
    for preset in ("nano", "demo", "small", "base"):
        model = Transformer(ModelConfig(**PRESETS[preset]))
        whole = sum(p.numel() for p in model.parameters())
        apply_lora(model, LoRASettings(rank=1))
        presets[preset] = [
            whole,
            sum(p.numel() for p in model.parameters() if p.requires_grad),
        ]


def error(rank):
    B, A = low_rank(picture, rank)
    return f"{(picture - B @ A).norm() / picture.norm():.1%}".replace("%", " %")


change = torch.linalg.svdvals(after - before).square()
weights = torch.linalg.svdvals(before).square()


def share(values, rank):
    return f"{(values[:rank].sum() / values.sum()).sqrt():.0%}".replace("%", " %")


gentle = train(with_adapter(rank=2), new, steps=60, lr=3e-3)
s = torch.linalg.svdvals(new_model().get_submodule(chosen).weight)
random_share = (s[:2].square().sum() / s.square().sum()).sqrt()
facts = {
    "random_2": f"{random_share:.0%}".replace("%", " %"),
    "gentle_new": f"{loss(gentle, new):.2f}",
    "gentle_old": f"{loss(gentle, old):.2f}",
    "error_1": error(1),
    "error_8": error(8),
    "base_new": f"{loss(base, new):.2f}",
    "full_old": f"{loss(full, old):.2f}",
    "weights_2": share(weights, 2),
    "change_2": share(change, 2),
    "adapter_size": f"{sum(p.numel() for p in parts.values() if p.requires_grad):,}",
    "adapted_old": f"{loss(adapted, old):.2f}",
    "small_share": f"{num_trained / size:.1%}".replace("%", " %"),
}
piece = {
    "picture": [[round(v, 4) for v in row] for row in picture.tolist()],
    "presets": presets,
}
