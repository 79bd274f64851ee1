# --8<-- [start:gradient]
import torch

words = ["river", "sea", "mountain"]
logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
label = 1  # the next word was "sea"
loss = -torch.log_softmax(logits, -1)[label]
loss.backward()
print("loss", round(loss.item(), 3))
print("gradient", [round(value, 3) for value in logits.grad.tolist()])
# --8<-- [end:gradient]

# --8<-- [start:slope]
nudged = torch.tensor([0, 0.001, 0], dtype=torch.float64)
difference = -torch.log_softmax(nudged, -1)[label] - loss.item()
print(f"slope: {difference.item() / 0.001:.3f}")
# --8<-- [end:slope]


# --8<-- [start:descent]
def descend(labels, lr, steps):
    """Return the probabilities after gradient descent from equal logits."""
    logits = torch.zeros(3, dtype=torch.float64)
    truth = torch.bincount(torch.tensor(labels), minlength=3) / len(labels)
    for _ in range(steps):
        gradient = torch.softmax(logits, -1) - truth  # the mean over all labels
        logits -= lr * gradient
    return torch.softmax(logits, -1)


seen = [0, 0, 0, 1, 1, 1, 2, 2]  # the eight words after "the"
for steps in (0, 1, 5, 50):
    probabilities = descend(seen, lr=1, steps=steps)
    print(f"{steps:3} steps", [round(p, 3) for p in probabilities.tolist()])
# --8<-- [end:descent]

# --8<-- [start:letters]
import re
from pathlib import Path

import minimind

licence = (Path(minimind.__file__).parents[1] / "LICENSE").read_text("utf-8")
letters = re.sub("[^a-z]+", " ", licence.lower())
alphabet = " abcdefghijklmnopqrstuvwxyz"
ids = torch.tensor([alphabet.index(letter) for letter in letters])
context, target = ids[:-1], ids[1:]
counts = torch.zeros(27, 27, dtype=torch.float64)
counts.index_put_((context, target), torch.tensor(1.0).double(), accumulate=True)


def loss_of(table):
    """Return the mean loss of a table of logits [27, 27] over all pairs."""
    return -(counts * torch.log_softmax(table, -1)).sum().item() / len(target)


floor = loss_of(torch.log(counts + 1e-12))
print(f"{len(target)} pairs; zeros: {loss_of(torch.zeros(27, 27)):.3f}")
print(f"counted: {floor:.3f}")
# --8<-- [end:letters]


# --8<-- [start:sgd]
def batch_at(step, size=32):
    """Return the positions of the pairs of a step: an order without memory."""
    return (step * size + torch.arange(size)) * 3571 % len(target)


def train_table(lr, fraction=lambda step: 1.0, steps=400):
    """Return the loss over all pairs before each step of SGD and after the last."""
    table, losses = torch.zeros(27, 27, dtype=torch.float64), []
    for step in range(steps):
        losses.append(loss_of(table))
        pairs = batch_at(step)
        gradient = torch.softmax(table[context[pairs]], -1)  # [32, 27]
        gradient[torch.arange(len(pairs)), target[pairs]] -= 1
        factor = -lr * fraction(step) / len(pairs)
        table.index_add_(0, context[pairs], gradient, alpha=factor)
    return [*losses, loss_of(table)]


# --8<-- [end:sgd]

# --8<-- [start:rates]
curves = {lr: train_table(lr) for lr in (0.3, 3, 30, 300)}
for lr, losses in curves.items():
    shown = [round(losses[step], 2) for step in (0, 10, 100, 400)]
    print(f"lr {lr:5}: loss after 0, 10, 100, 400 steps: {shown}")
# --8<-- [end:rates]


def figure_rates(figure, say):
    axes = figure.subplots()
    for lr, losses in curves.items():
        axes.plot(losses, lw=1.2, label=say(f"learning rate {lr}", f"学习率 {lr}"))
    axes.axhline(
        floor,
        label=say("counted table", "统计得到的表"),
        ls="--",
        lw=1.2,
        color="0.5",
    )
    axes.set_ylim(2, 7)
    axes.set_xlabel(say("step", "步数"))
    axes.set_ylabel(say("loss, nats per letter", "损失（奈特／字母）"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False, ncols=2)


# --8<-- [start:adamw]
def adamw_step(weight, gradient, state, lr, decay=0.1):
    """Update a weight in place, as AdamW does with betas 0.9 and 0.95."""
    state["step"] += 1
    state["m"] = 0.9 * state["m"] + 0.1 * gradient
    state["v"] = 0.95 * state["v"] + 0.05 * gradient**2
    m = state["m"] / (1 - 0.9 ** state["step"])
    v = state["v"] / (1 - 0.95 ** state["step"])
    weight *= 1 - lr * decay
    weight -= lr * m / (v.sqrt() + 1e-8)


state = {"step": 0, "m": 0.0, "v": 0.0}
weight = torch.tensor([1.0, 1.0], dtype=torch.float64)
for gradient in ([0.5, 0.001], [0.5, -0.001], [0.5, 0.001]):
    before = weight.clone()
    adamw_step(weight, torch.tensor(gradient).double(), state, lr=0.01, decay=0)
    print(gradient, [round(x, 4) for x in (weight - before).tolist()])
# --8<-- [end:adamw]

# --8<-- [start:model]
from minimind.config.model import ModelConfig
from minimind.config.settings import OptimSettings, ScheduleSettings
from minimind.model import Transformer
from minimind.training.optimizers import Optimizers, orthogonalize
from minimind.training.schedule import lr_fraction

torch.set_num_threads(1)
config = ModelConfig(
    vocab_size=27,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)


def new_model():
    """Return a model with the same random weights at every call, in float64."""
    torch.manual_seed(1)
    return Transformer(config).double()


def sequences(step, size=8):
    """Return the sequences of a step [size, 49]: 48 inputs, each with its label."""
    starts = (step * size + torch.arange(size)) * 3571 % (len(ids) - 49)
    return ids[starts[:, None] + torch.arange(49)]


def loss_sum(model, tokens):
    """Return the sum of the cross-entropy over all labels of `tokens`."""
    logits = model(tokens[:, :-1]) @ model.head_weight.T  # [size, 48, 27]
    logprobs = torch.log_softmax(logits, -1)
    return -logprobs.gather(-1, tokens[:, 1:, None]).sum()


def train(model, optimizers, schedule, steps, num_steps):
    """Train for the `steps` of a run of `num_steps`; return the loss of each."""
    losses = []
    for step in steps:
        optimizers.set_lr(lr_fraction(step, num_steps, schedule))
        tokens = sequences(step)
        loss = loss_sum(model, tokens) / tokens[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


# --8<-- [end:model]

# --8<-- [start:optimizers]
runs = {}
for name, lr in (("adamw", 0.01), ("muon", 0.03)):
    model = new_model()
    optimizers = Optimizers(model, OptimSettings(name=name, lr=lr))
    runs[name] = train(model, optimizers, ScheduleSettings(), range(100), 100)
for name, losses in runs.items():
    means = [sum(losses[i : i + 10]) / 10 for i in (0, 20, 40, 90)]
    print(f"{name:5}", [round(mean, 1) for mean in means])
# --8<-- [end:optimizers]


def figure_optimizers(figure, say):
    axes = figure.subplots()
    for name, losses in runs.items():
        smooth = [
            sum(losses[max(0, i - 4) : i + 1]) / min(5, i + 1) for i in range(100)
        ]
        axes.plot(smooth, label={"adamw": "AdamW", "muon": "Muon + AdamW"}[name])
    axes.axhline(
        floor,
        label=say("counted table", "统计得到的表"),
        ls="--",
        lw=1.2,
        color="0.5",
    )
    axes.set_xlabel(say("step", "步数"))
    axes.set_ylabel(say("loss, mean of 5 steps", "损失（5 步平均）"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:spectrum]
model = new_model()
loss_sum(model, sequences(0)).backward()
name, matrix = next(
    (name, parameter.grad.float())
    for name, parameter in model.named_parameters()
    if name.endswith("down_proj.weight")
)
before = torch.linalg.svdvals(matrix)
after = torch.linalg.svdvals(orthogonalize(matrix[None])[0])
print(list(matrix.shape), "of", name)
picked = [0, 1, 3, 7, 15, 31]
print(
    "before", [round(value, 2) for value in (before / before[0])[picked].tolist()]
)
print("after ", [round(value, 1) for value in after[picked].tolist()])
# --8<-- [end:spectrum]


def figure_spectrum(figure, say):
    axes = figure.subplots()
    name = say("gradient, divided by its largest", "梯度（除以最大值）")
    numbers = range(1, len(before) + 1)
    axes.plot(numbers, (before / before[0]).tolist(), marker=".", label=name)
    name = say("orthogonalized", "正交化之后")
    axes.plot(numbers, after.tolist(), marker=".", label=name)
    axes.set_xlabel(say("number of the direction", "方向的序号"))
    axes.set_ylabel(say("singular value", "奇异值"))
    axes.set_ylim(0)
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:schedules]
schedules = {
    "constant": ScheduleSettings(warmup=0, final=1),
    "cosine": ScheduleSettings(warmup=0.05, final=0),
    "wsd": ScheduleSettings(name="wsd", warmup=0.05, decay=0.3, final=0),
}
ends = {}
for name, settings in schedules.items():
    ends[name] = train_table(30, lambda step, s=settings: lr_fraction(step, 400, s))
    print(f"{name:8} {ends[name][-1] - floor:.3f} above the counted table")
# --8<-- [end:schedules]


def figure_schedules(figure, say):
    above, below = figure.subplots(2, 1, sharex=True)
    names = {
        "constant": say("constant", "恒定"),
        "cosine": say("cosine", "余弦"),
        "wsd": "WSD",
    }
    for name, settings in schedules.items():
        above.plot([30 * lr_fraction(step, 400, settings) for step in range(400)])
        below.plot(ends[name], lw=1.2, label=names[name])
    below.axhline(
        floor,
        label=say("counted table", "统计得到的表"),
        ls="--",
        lw=1.2,
        color="0.5",
    )
    below.set_ylim(2.15, 2.9)
    above.set_ylabel(say("learning rate", "学习率"), fontsize=8)
    below.set_ylabel(say("loss, nats per letter", "损失（奈特／字母）"), fontsize=8)
    below.set_xlabel(say("step", "步数"))
    below.legend(frameon=False, ncols=4, fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.15)


# --8<-- [start:accumulation]
def gradient_of(model, groups):
    """Return the gradient of the mean loss over groups of sequences."""
    model.zero_grad()
    count = 0
    for tokens in groups:
        loss_sum(model, tokens).backward()  # adds to .grad
        count += tokens[:, 1:].numel()
    return torch.cat([p.grad.flatten() / count for p in model.parameters()])


tokens = sequences(0)
whole = gradient_of(model, [tokens])
halves = gradient_of(model, tokens.split(4))
print("same gradient:", torch.allclose(whole, halves, atol=1e-6))
# --8<-- [end:accumulation]

# --8<-- [start:formats]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    limits = torch.finfo(dtype)
    print(
        f"{str(dtype)[6:]:9} next after 1: 1 + {limits.eps:.0e}",
        f" smallest {limits.smallest_normal:.0e}  largest {limits.max:.0e}",
    )
weight = torch.tensor(1.0, dtype=torch.bfloat16)
for _ in range(100):
    weight += 0.001
print("1 + 100 times 0.001 in bfloat16:", weight.item())
print("a gradient of 1e-8 in float16:", torch.tensor(1e-8).half().item())
# --8<-- [end:formats]

# --8<-- [start:checkpoint]
import copy


def resumed(save_optimizer):
    """Train 4 of 8 steps, save, load into new objects, and train the other 4."""
    settings, schedule = OptimSettings(), ScheduleSettings()
    model = new_model()
    optimizers = Optimizers(model, settings)
    train(model, optimizers, schedule, range(4), 8)
    saved = copy.deepcopy((model.state_dict(), optimizers.state_tensors()))

    model = new_model()
    model.load_state_dict(saved[0])
    optimizers = Optimizers(model, settings)
    if save_optimizer:
        optimizers.load_state_tensors(saved[1])
    return train(model, optimizers, schedule, range(4, 8), 8)


model = new_model()
optimizers = Optimizers(model, OptimSettings())
straight = train(model, optimizers, ScheduleSettings(), range(8), 8)[4:]
print("same losses after a resume:", resumed(True) == straight)
print("without optimizer state:", resumed(False) == straight)
# --8<-- [end:checkpoint]

# --8<-- [start:record]
import json

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
metrics = (records / "real-small" / "pretrain-metrics.jsonl").read_text("utf-8")
rows = [json.loads(line) for line in metrics.splitlines()]
steps = [row for row in rows if row["kind"] == "train"]
for row in [steps[0], steps[9], steps[32], steps[-1]]:
    print(
        {
            key: round(row[key], 3)
            for key in ("step", "loss", "grad_norm", "lr/muon")
        }
    )
# --8<-- [end:record]


def figure_record(figure, say):
    names = (
        ("loss", say("loss, nats", "损失（奈特）")),
        ("grad_norm", say("gradient norm", "梯度范数")),
        ("lr/muon", say("learning rate", "学习率")),
    )
    for axes, (key, name) in zip(
        figure.subplots(3, 1, sharex=True), names, strict=True
    ):
        axes.plot([row["step"] for row in steps], [row[key] for row in steps])
        axes.set_ylabel(name, fontsize=8)
        axes.set_ylim(0 if key != "loss" else None)
        axes.grid(alpha=0.15)
    axes.set_xlabel(say("step", "步数"))


facts = {
    "floor": f"{floor:.3f}",
    "lr_low": f"{curves[0.3][-1]:.2f}",
    "lr_mid": f"{curves[30][-1]:.2f}",
    "lr_high": f"{max(curves[300][100:]):.1f}",
    "adamw_end": f"{sum(runs['adamw'][-10:]) / 10:.1f}",
    "muon_end": f"{sum(runs['muon'][-10:]) / 10:.1f}",
    "constant": f"{ends['constant'][-1] - floor:.3f}",
    "cosine": f"{ends['cosine'][-1] - floor:.3f}",
    "wsd": f"{ends['wsd'][-1] - floor:.3f}",
    "second_value": f"{(before[1] / before[0]).item():.2f}",
    "record_first": f"{steps[0]['loss']:.2f}",
    "record_last": f"{steps[-1]['loss']:.2f}",
}
piece = {"letters": letters, "floor": round(floor, 6)}
