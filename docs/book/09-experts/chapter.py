"""Chapter 9: mixture of experts. See docs/en/book/contributing.md."""

# --8<-- [start:parts]
import torch
import torch.nn.functional as F

from minimind.model.feed_forward import swiglu

torch.set_num_threads(1)
torch.manual_seed(1)
gate, up = torch.randn(2, 64, 32, dtype=torch.float64) / 6  # 64 features
down = torch.randn(32, 64, dtype=torch.float64) / 8


def feed_forward(x, features):
    """Compute SwiGLU of x [32] with only some of the 64 features."""
    return down[:, features] @ swiglu(gate[features] @ x, up[features] @ x)


x = torch.randn(32, dtype=torch.float64)
whole = feed_forward(x, slice(0, 64))
parts = [feed_forward(x, slice(start, start + 16)) for start in (0, 16, 32, 48)]
print("sum of the four parts is the whole:", torch.allclose(sum(parts), whole))
# --8<-- [end:parts]

# --8<-- [start:router]
sentence = "the river is long and the river is cold"
words = sentence.split()
vocabulary = sorted(set(words))
embedding = torch.randn(len(vocabulary), 32, dtype=torch.float64)
router = torch.randn(4, 32, dtype=torch.float64) / 32**0.5
x = embedding[[vocabulary.index(word) for word in words]]  # [9, 32]
logits = x @ router.T  # [9, 4]: one number per word and expert
top_logits, chosen = logits.topk(2)
weights = top_logits.softmax(-1)
for t in (0, 1, 2, 3, 5):
    row = " ".join(f"{logit:5.2f}" for logit in logits[t])
    shares = " and ".join(f"{weight:.2f}" for weight in weights[t])
    print(f"{words[t]:5} {row}   experts {chosen[t].tolist()} with {shares}")
# --8<-- [end:router]

# --8<-- [start:grouped]
from minimind.model.experts import moe, moe_reference

for expert in range(4):
    here = [words[t] for t in range(9) if expert in chosen[t].tolist()]
    print(f"expert {expert}: {len(here)} rows: {' '.join(here)}")
w_in = torch.cat([gate.view(4, 16, 32), up.view(4, 16, 32)], dim=1)  # [4, 32, 32]
w_out = down.view(32, 4, 16).transpose(0, 1)  # [4, 32, 16]
out = moe(x, chosen, weights, w_in, w_out)
same = torch.allclose(out, moe_reference(x, chosen, weights, w_in, w_out))
print("sorted rows and reference agree:", same)
# now all four experts for each word, each with weight 1
everyone = torch.arange(4).expand(9, 4)
out = moe(x, everyone, torch.ones(9, 4, dtype=torch.float64), w_in, w_out)
dense = torch.stack([feed_forward(row, slice(0, 64)) for row in x])
print("all experts together are the dense layer:", torch.allclose(out, dense))
# --8<-- [end:grouped]


def figure_sorting(figure, say):
    axes = figure.subplots()
    pairs = [(t, int(e)) for t in range(9) for e in chosen[t].sort().values]
    after = sorted(pairs, key=lambda pair: pair[1])
    for place, (t, expert) in enumerate(after):
        axes.plot([2 * t + 0.5, place], [2.75, 1.25], color=f"C{expert}", lw=1)
        axes.plot(place, 1, "s", ms=13, color=f"C{expert}", alpha=0.5)
        axes.text(place, 1, words[t], ha="center", va="center", fontsize=6.5)
    for t, word in enumerate(words):
        axes.text(2 * t + 0.5, 3, word, ha="center", va="center", fontsize=9)
    for expert in range(4):
        places = [place for place, (_, e) in enumerate(after) if e == expert]
        axes.plot(
            [places[0] - 0.35, places[-1] + 0.35],
            [0.45, 0.45],
            color=f"C{expert}",
            lw=2,
        )
        axes.text(
            (places[0] + places[-1]) / 2,
            -0.05,
            say(f"expert {expert}", f"专家 {expert}"),
            ha="center",
            va="center",
            fontsize=8,
        )
    axes.set_xlim(-0.8, 17.8)
    axes.set_ylim(-0.4, 3.4)
    axes.axis("off")


from minimind.model import PRESETS, ModelConfig, Transformer

with torch.device("meta"):  # shapes without memory
    reference = Transformer(ModelConfig(**PRESETS["moe"]))
    dense_model = Transformer(
        ModelConfig(**PRESETS["small"] | {"intermediate_size": 5632})
    )
kinds = {
    "embed": "embed_tokens",
    "attention": "self_attn",
    "shared": "shared_mlp",
    "router": "router",
    "routed": "linear",
    "norm": "norm",
}
sizes = dict.fromkeys(kinds, 0)
for name, parameter in reference.named_parameters():
    sizes[next(kind for kind, key in kinds.items() if key in name)] += (
        parameter.numel()
    )
total = sum(sizes.values())
active = reference.num_active_parameters
assert active == total - sizes["routed"] // 2


def table_parameters(say):
    names = {
        "embed": say("embedding, also the head", "嵌入，兼作输出层"),
        "attention": say("attention", "注意力"),
        "shared": say("two shared experts", "两个共享专家"),
        "routed": say("four routed experts", "四个路由专家"),
        "router": say("routers", "路由器"),
        "norm": "RMSNorm",
    }
    rows = [
        [
            say("part", "部分"),
            say("parameters", "参数"),
            say("used per token", "每个词元用到"),
        ]
    ]
    for kind, size in sizes.items():
        used = size // 2 if kind == "routed" else size
        rows.append([names[kind], f"{size:,}", f"{used:,}"])
    return [*rows, [say("together", "合计"), f"{total:,}", f"{active:,}"]]


# --8<-- [start:letters]
import re
from pathlib import Path

import minimind

licence = (Path(minimind.__file__).parents[1] / "LICENSE").read_text("utf-8")
letters = re.sub("[^a-z]+", " ", licence.lower())
alphabet = " abcdefghijklmnopqrstuvwxyz"
ids = torch.tensor([alphabet.index(letter) for letter in letters])
held_out = ids[-1536:].view(32, 48)  # the last part of the licence


def sequences(step, size=8):
    """Return the sequences of a step [size, 49]: 48 inputs, each with its label."""
    starts = (step * size + torch.arange(size)) * 3571 % (len(ids) - 1536 - 49)
    return ids[starts[:, None] + torch.arange(49)]


# --8<-- [end:letters]

# --8<-- [start:train]
from minimind.model import ModelConfig, Transformer
from minimind.model.experts import Routing
from minimind.training.objectives.balance import balance_sums

shape = dict(vocab_size=27, hidden_size=32, num_hidden_layers=2, head_dim=16)
shape |= dict(num_attention_heads=2, num_key_value_heads=2)
shape |= dict(num_local_experts=4, num_experts_per_tok=2)
shape |= dict(intermediate_size=16, shared_intermediate_size=32)


def evaluate(model, tokens):
    """Return the loss, the balance loss and the loads, [layers, 4]."""
    routing = Routing()
    logits = model.logits(model(tokens[:, :-1], routing=routing))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    sums = balance_sums(routing, torch.ones_like(tokens[:, 1:]).bool(), None)
    balance = sums["balance"][0] / sums["balance"][1]
    return loss, balance, sums["expert_tokens"] / sums["expert_tokens"].sum(1, True)


def train(coefficient, steps=100):
    """Train a new model; return it and the loads of its second layer."""
    torch.manual_seed(2)
    model = Transformer(ModelConfig(**shape)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loads = []
    for step in range(steps):
        loss, balance, load = evaluate(model, sequences(step))
        optimizer.zero_grad()
        (loss + coefficient * balance).backward()
        optimizer.step()
        loads.append(load[1].tolist())
    return model, loads


# --8<-- [end:train]

# --8<-- [start:collapse]
runs = {coefficient: train(coefficient) for coefficient in (0, 0.01)}
for coefficient, (model, _) in runs.items():
    with torch.no_grad():
        loss, balance, load = evaluate(model, held_out)
    shares = " ".join(f"{share:.2f}" for share in load[1])
    print(f"{coefficient:4}: loss {loss:.2f} balance {balance:.2f} loads {shares}")
# --8<-- [end:collapse]


def figure_loads(figure, say):
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (coefficient, (_, loads)) in zip(panels, runs.items(), strict=True):
        for expert, line in enumerate(zip(*loads, strict=True)):
            axes.plot(line, lw=1, label=say(f"expert {expert}", f"专家 {expert}"))
        axes.axhline(0.25, ls="--", lw=1.2, color="0.5")
        axes.set_title(
            say(f"coefficient {coefficient}", f"系数 {coefficient}"), fontsize=9
        )
        axes.set_xlabel(say("step", "步数"))
        axes.set_ylim(0, 0.52)
        axes.grid(alpha=0.15)
    panels[0].set_ylabel(say("share of the choices", "选中的份额"))
    panels[0].legend(frameon=False, fontsize=7)


# --8<-- [start:balance-gradient]
torch.manual_seed(1)
push = torch.zeros(4, dtype=torch.float64, requires_grad=True)
logits = torch.randn(1, 1000, 4).double() + torch.tensor([2.0, 0, 0, 0]) + push
routing = Routing([logits], [logits.topk(2).indices])
sums = balance_sums(routing, torch.ones(1, 1000, dtype=torch.bool), None)
(sums["balance"][0] / sums["balance"][1]).backward()
print("loads    ", [f"{n / 2000:.2f}" for n in sums["expert_tokens"][0].tolist()])
print("balance  ", f"{sums['balance'][0].item() / 1000:.2f}")
print("gradient ", [f"{g:.2f}" for g in push.grad.tolist()])
# --8<-- [end:balance-gradient]

# --8<-- [start:specialists]
routing = Routing()
with torch.no_grad():
    runs[0.01][0](held_out, routing=routing)
chosen_pairs = routing.chosen[0].flatten(0, 1)  # first layer, [1536, 2]
picks = torch.zeros(27, 4)
for letter, pair in zip(held_out.flatten().tolist(), chosen_pairs, strict=True):
    picks[letter, pair] += 1
for expert in range(4):
    often = picks[:, expert] > 0.9 * picks.sum(1) / 2  # nearly always chosen
    names = [name for name, keep in zip(alphabet, often, strict=True) if keep]
    print(f"expert {expert}: {' '.join(name.replace(' ', '_') for name in names)}")
# --8<-- [end:specialists]


def figure_letters(figure, say):
    axes = figure.subplots()
    share = picks / picks.sum(1, keepdim=True).clamp(min=1) * 2
    axes.pcolormesh(
        share.T.numpy().round(2), cmap="Blues", vmin=0, vmax=1, ec="0.7", lw=0.3
    )
    axes.invert_yaxis()
    axes.set_xticks([i + 0.5 for i in range(27)], ["_", *alphabet[1:]])
    axes.set_yticks([e + 0.5 for e in range(4)], [0, 1, 2, 3])
    axes.set_ylabel(say("expert", "专家"))
    axes.set_xlabel(say("letter; _ is a space", "字母，_ 表示空格"))


# --8<-- [start:record]
import json

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
record = json.loads((records / "moe-step-quiet.json").read_text("utf-8"))
seconds = record["seconds_of_the_clock"]
for what in ("micro_batch", "optimizer", "step"):
    ours, dense = seconds[what]["moe"], seconds[what]["dense"]
    print(f"{what:11} {ours:4.1f} s dense {dense:4.1f} s ratio {ours / dense:.2f}")
layer = seconds["routed_layer"]
print(
    f"one layer: sorted {layer['sorted']:.2f} s, reference {layer['plain']:.2f} s"
)
# --8<-- [end:record]


def value(number):
    return f"{number:.2f}"


with torch.no_grad():
    results = {c: evaluate(model, held_out) for c, (model, _) in runs.items()}
facts = {
    "total": f"{total:,}",
    "active": f"{active:,}",
    "router_size": f"{sizes['router']:,}",
    "dense_size": f"{sum(p.numel() for p in dense_model.parameters()):,}",
    "highest": value(results[0][2][1].max()),
    "lowest": value(results[0][2][1].min()),
    "highest_balanced": value(results[0.01][2][1].max()),
    "lowest_balanced": value(results[0.01][2][1].min()),
    "ratio": value(seconds["ratio_of_steps"]),
    "optimizer_ratio": value(
        seconds["optimizer"]["moe"] / seconds["optimizer"]["dense"]
    ),
}


def router_logits(model, tokens):
    """Return the logits of the second layer's router, rounded, [tokens, 4]."""
    routing = Routing()
    with torch.no_grad():
        model(tokens[None], routing=routing)
    return [[round(v, 3) for v in row] for row in routing.logits[1][0].tolist()]


excerpt = held_out[3]
piece = {
    "letters": [alphabet[i] for i in excerpt.tolist()],
    "runs": {
        str(c): router_logits(model, excerpt) for c, (model, _) in runs.items()
    },
}
