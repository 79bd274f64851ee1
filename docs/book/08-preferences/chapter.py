"""Chapter 8: preferences. See docs/en/book/contributing.md."""

# --8<-- [start:answers]
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
ANSWERS = [
    "The capital of Peru is Lima.",
    "Lima, Lima, Lima, Lima, Lima.",
    "That is a good question.",
    "The capital of Peru is Rome.",
]
true_scores = torch.tensor([2.0, 0.5, 0.0, -1.0], dtype=torch.float64)


def preferred(i, j):
    """Return the probability that answer i is preferred to answer j."""
    return torch.sigmoid(true_scores[i] - true_scores[j])


for i, j in ((0, 1), (0, 3), (1, 2)):
    print(f"{ANSWERS[i]:29} {preferred(i, j):.2f}   {ANSWERS[j]}")
# --8<-- [end:answers]

# --8<-- [start:judgements]
import itertools
import random

chance = random.Random(1)
wins = torch.zeros(4, 4, dtype=torch.float64)  # [preferred, other]
for i, j in itertools.combinations(range(4), 2):
    for _ in range(100):
        first_wins = chance.random() < preferred(i, j)
        wins[(i, j) if first_wins else (j, i)] += 1
print(wins.int())
# --8<-- [end:judgements]


# --8<-- [start:fit]
def bradley_terry_loss(scores):
    """Return the mean of -log sigmoid(difference of the scores), per judgement."""
    differences = scores[:, None] - scores[None, :]  # [preferred, other]
    return -(wins * F.logsigmoid(differences)).sum() / wins.sum()


scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
print(f"{bradley_terry_loss(scores):.3f}")
for _ in range(300):
    [gradient] = torch.autograd.grad(bradley_terry_loss(scores), scores)
    scores.data -= 4 * gradient
fitted = scores.detach() - scores.detach().mean()
print(f"{bradley_terry_loss(fitted):.3f}")
print([f"{s:.2f}" for s in fitted], [f"{s:.2f}" for s in true_scores - 0.375])
# --8<-- [end:fit]


# --8<-- [start:optimum]
reference = torch.tensor([0.30, 0.20, 0.40, 0.10], dtype=torch.float64)


def optimum(rewards, beta):
    """Return the policy with the highest reward - beta * KL(policy, reference)."""
    weights = reference * (rewards / beta).exp()
    return weights / weights.sum()


for beta in (10, 1, 0.3):
    policy = optimum(true_scores, beta)
    kl = (policy * (policy / reference).log()).sum()
    reward = (policy * true_scores).sum()
    shares = " ".join(f"{p:.2f}" for p in policy)
    print(f"beta {beta:4}: {shares}   reward {reward:5.2f}, KL {kl:.2f}")
# --8<-- [end:optimum]


def figure_optimum(figure, say):
    axes = figure.subplots()
    betas = torch.logspace(-1.3, 1.5, 80)
    shares = torch.stack([optimum(true_scores, beta.item()) for beta in betas])
    labels = [
        say("right answer", "正确的回答"),
        say("repetitive", "重复的回答"),
        say("evasive", "回避的回答"),
        say("wrong answer", "错误的回答"),
    ]
    for column, label in zip(shares.T, labels, strict=True):
        axes.plot(betas, column, label=label)
    axes.set_xscale("log")
    axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes.set_xlabel("beta")
    axes.set_ylabel(say("probability", "概率"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:implicit]
beta = 0.5
policy = optimum(true_scores, beta)
rewards = beta * (policy / reference).log()
print([f"{r:.3f}" for r in rewards - rewards[0]])
print([f"{r:.3f}" for r in true_scores - true_scores[0]])
# --8<-- [end:implicit]


# --8<-- [start:toy-dpo]
def dpo_loss(logits, beta):
    """Return the mean DPO loss of all judgements for a policy softmax(logits)."""
    log_ratios = F.log_softmax(logits, 0) - reference.log()
    margins = log_ratios[:, None] - log_ratios[None, :]
    return -(wins * F.logsigmoid(beta * margins)).sum() / wins.sum()


logits = reference.log().requires_grad_()
print(f"{dpo_loss(logits, beta):.3f}")
for _ in range(600):
    [gradient] = torch.autograd.grad(dpo_loss(logits, beta), logits)
    logits.data -= 8 * gradient
policy = F.softmax(logits.detach(), 0)
print(f"{dpo_loss(logits, beta):.3f}")
print(" ".join(f"{p:.2f}" for p in policy), "by DPO")
print(
    " ".join(f"{p:.2f}" for p in optimum(fitted, beta)), "by scores, then optimum"
)
# --8<-- [end:toy-dpo]


# --8<-- [start:gradient]
for margin in (-4.0, 0.0, 4.0):
    d = torch.tensor(margin, requires_grad=True)
    for beta in (0.1, 2.0):
        loss = -F.logsigmoid(beta * d)
        [gradient] = torch.autograd.grad(loss, d)
        print(
            f"d {margin:4}, beta {beta}: loss {loss:.3f}, gradient {gradient:.3f}"
        )
# --8<-- [end:gradient]


def figure_losses(figure, say):
    axes = figure.subplots()
    d = torch.linspace(-10, 10, 200)
    for beta in (0.1, 0.5, 2.0):
        axes.plot(d, -F.logsigmoid(beta * d), label=f"beta = {beta}")
    axes.axhline(torch.log(torch.tensor(2.0)), ls="--", lw=1.2, color="0.5")
    axes.set_ylim(0, 4)
    axes.set_xlabel(
        say("d: difference of the log-ratios, nats", "d：对数比之差（奈特）")
    )
    axes.set_ylabel(say("loss", "损失"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:model]
from minimind.model import PRESETS, ModelConfig, Transformer

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid"}
CAPITALS |= {"China": "Beijing", "Egypt": "Cairo", "Peru": "Lima", "Cuba": "Havana"}
questions = [f"The capital of {land}?" for land in CAPITALS]
short = [f" {city}." for city in CAPITALS.values()]
doubled = [f" {city}. {city}." for city in CAPITALS.values()]


def answer_logps(model, questions, answers):
    """Return the log-probability of each answer after its question, in nats."""
    lines = [
        (q + a).encode() + b"\0" for q, a in zip(questions, answers, strict=True)
    ]
    width = max(map(len, lines))
    batch = torch.tensor([list(line.ljust(width, b"\0")) for line in lines])
    logits = model.logits(model(batch[:, :-1]))  # [lines, width - 1, 128]
    logps = F.log_softmax(logits, -1).gather(-1, batch[:, 1:, None])[..., 0]
    mask = torch.zeros_like(logps)  # 1 for the answer and the 0 that ends it
    for row, line, question in zip(mask, lines, questions, strict=True):
        row[len(question) - 1 : len(line) - 1] = 1
    return (logps * mask).sum(1)


def new_base(seed):
    """Return a model that answers in both ways, and its log-probabilities."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size=128, **PRESETS["nano"])).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        both = answer_logps(model, questions * 2, short + doubled)
        (-both.mean()).backward()
        optimizer.step()
    with torch.no_grad():
        start = [answer_logps(model, questions, side) for side in (short, doubled)]
    return model, start


model, start = new_base(seed=1)
print([f"{logps.exp().mean():.2f}" for logps in start])
# --8<-- [end:model]


# --8<-- [start:train]
import copy


def train(beta, pairs=slice(0, 6), steps=60, lr=1e-4):
    """Train a copy of the model with DPO; return it and its metrics per step."""
    policy, rows = copy.deepcopy(model), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0)
    for _ in range(steps):
        chosen = (
            answer_logps(policy, questions[pairs], short[pairs]) - start[0][pairs]
        )
        rejected = (
            answer_logps(policy, questions[pairs], doubled[pairs]) - start[1][pairs]
        )
        loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
        rows.append(
            [
                loss.item(),
                beta * chosen.mean().item(),
                beta * rejected.mean().item(),
            ]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy, rows


policy, rows = train(beta=2.0)
for step in (0, 20, 40, 59):
    loss, chosen, rejected = rows[step]
    print(f"{step:2} loss {loss:.2f} chosen {chosen:5.2f} rejected {rejected:5.2f}")
# --8<-- [end:train]


# --8<-- [start:held-out]
def probabilities(policy):
    """Return the probability of each short and of each doubled answer, [2, 8]."""
    with torch.no_grad():
        sides = [answer_logps(policy, questions, side) for side in (short, doubled)]
    return torch.stack(sides).exp()


for label, checked in (("before", model), ("after", policy)):
    chosen, rejected = probabilities(checked)
    print(
        label,
        f"trained pairs {chosen[:6].mean():.2f} {rejected[:6].mean():.2f},",
        end=" ",
    )
    print(f"held-out pairs {chosen[6:].mean():.2f} {rejected[6:].mean():.2f}")
# --8<-- [end:held-out]

# --8<-- [start:runs]
runs = {0.1: train(0.1), 0.5: train(0.5), 2.0: (policy, rows), 5.0: train(5.0)}
for beta, (_, metrics) in runs.items():
    loss, chosen, rejected = metrics[-1]
    print(f"beta {beta}: loss {loss:.2f}, rewards {chosen:5.2f} {rejected:5.2f}")
# --8<-- [end:runs]

first_base, fallen = (model, start), []
for seed in (2, 3):  # does the failure depend on the random start?
    model, start = new_base(seed)
    fallen.append(probabilities(train(0.1)[0])[0, :6].mean())
model, start = first_base


def figure_rewards(figure, say):
    panels = figure.subplots(1, 2)
    for axes, beta in zip(panels, (0.1, 2.0), strict=True):
        _, chosen, rejected = zip(*runs[beta][1], strict=True)
        axes.plot(chosen, label=say("chosen", "选中的回答"))
        axes.plot(rejected, label=say("rejected", "落选的回答"))
        axes.axhline(0, ls="--", lw=1.2, color="0.5")
        axes.set_title(f"beta = {beta}")
        axes.set_xlabel(say("step", "步数"))
        axes.grid(alpha=0.15)
    panels[0].set_ylabel(say("reward, beta times r", "奖励（beta × r）"))
    panels[0].legend(frameon=False)


def table_betas(say):
    head = [
        "beta",
        say("margin of the rewards", "奖励之差"),
        say("short, trained", "简短，训练过"),
        say("short, held-out", "简短，留出"),
        say("doubled, trained", "重复，训练过"),
        say("doubled, held-out", "重复，留出"),
    ]
    rows = []
    for beta, (checked, metrics) in runs.items():
        chosen, rejected = probabilities(checked)
        _, first, second = metrics[-1]
        means = (chosen[:6], chosen[6:], rejected[:6], rejected[6:])
        rows.append(
            [beta, f"{first - second:.2f}", *(f"{p.mean():.2f}" for p in means)]
        )
    return [head, *rows]


# --8<-- [start:record]
import json
from pathlib import Path

import minimind

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
record = json.loads((records / "dpo.json").read_text("utf-8"))["demo"]
for number in (0, 1, 3, 10):
    run = record["runs"][number]
    summary, quiz = run["summary"], run["quiz"]
    logp = summary["logps/chosen"]
    settings = dict(part.split("=") for part in run["settings"].split(","))
    print(
        f"beta {float(settings.get('dpo.beta', 0.1))}, {summary['steps']:3} steps:",
        f"accuracy {summary['accuracy']:.0%}, log p chosen {logp:.2f},",
        f"quiz {quiz['right']} of {quiz['n']}",
    )
# --8<-- [end:record]


def value(tensor):
    return f"{tensor:.2f}"


chosen_before, rejected_before = probabilities(model)
good, bad = (probabilities(runs[beta][0]) for beta in (2.0, 0.1))
facts = {
    "fallen_2": value(fallen[0]),
    "fallen_3": value(fallen[1]),
    "p_right_wrong": value(preferred(0, 3)),
    "bt_loss": f"{bradley_terry_loss(fitted):.3f}",
    "start_chosen": value(chosen_before.mean()),
    "start_rejected": value(rejected_before.mean()),
    "good_held_out": value(good[0, 6:].mean()),
    "good_held_out_rejected": value(good[1, 6:].mean()),
    "bad_trained": value(bad[0, :6].mean()),
    "bad_held_out": value(bad[0, 6:].mean()),
}
piece = {
    "answers": ANSWERS,
    "reference": reference.tolist(),
    "scores": true_scores.tolist(),
}
