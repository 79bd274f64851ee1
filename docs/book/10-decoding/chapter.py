"""Chapter 10: decoding. See docs/en/book/contributing.md."""

# --8<-- [start:words]
import re
import textwrap
from itertools import islice

import torch
import torch.nn.functional as F

from minimind.data.textbook import load_subjects, prose
from minimind.model import PRESETS, ModelConfig, Transformer

torch.set_num_threads(1)
english = [subject for subject in load_subjects() if subject.title == "English"]
drawn = islice(prose(seed=1, subjects=english), 2000)
texts = [text for text in drawn if "Question" not in text]
tokens = [
    word for text in texts for word in ["<s>", *re.findall(r"\w+|[^\w\s]", text)]
]
vocabulary = sorted(set(tokens))
ids = torch.tensor([vocabulary.index(word) for word in tokens])
print(texts[1], texts[3])
print(f"{len(ids):,} words, {len(vocabulary)} different ones")
# --8<-- [end:words]

# --8<-- [start:model]
torch.manual_seed(1)
config = ModelConfig(**PRESETS["nano"] | {"vocab_size": len(vocabulary)})
model = Transformer(config).double()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.95))
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / 300)
)
for step in range(300):
    starts = (step * 8 + torch.arange(8)) * 3571 % (len(ids) - 1089 - 33)
    batch = ids[starts[:, None] + torch.arange(33)]  # [8, 33]
    logits = model.logits(model(batch[:, :-1]))
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
print(f"loss {loss:.1f} nats per word")
# --8<-- [end:model]


# --8<-- [start:distribution]
def next_logits(text):
    """Return the logits [vocabulary] of the word after a text."""
    prompt = [vocabulary.index(word) for word in ["<s>", *text.split()]]
    with torch.no_grad():
        return model.logits(model(torch.tensor([prompt])))[0, -1]


for text in ("The capital of Japan", "The capital of Japan is", "The capital of"):
    top = next_logits(text).softmax(-1).topk(4)
    best = [f"{vocabulary[i]} {p:.2f}" for p, i in zip(*top, strict=True)]
    print(f"{text} …   {'   '.join(best)}")
# --8<-- [end:distribution]

# --8<-- [start:temperature]
logits = next_logits("The capital of")
for temperature in (0.5, 1.0, 2.0):
    p = (logits / temperature).softmax(-1)
    top = " ".join(f"{share:.2f}" for share in p.topk(5).values)
    print(f"temperature {temperature}: {top}, perplexity", end=" ")
    print(f"{(-(p * p.log()).sum()).exp():.1f}")
# --8<-- [end:temperature]

# --8<-- [start:truncation]
from minimind.inference.sampling import Sampling, candidates


def kept(text, **settings):
    """Return how many words can be drawn, and the probability that they had."""
    logits = next_logits(text)[None]
    words, weights = candidates(logits, [Sampling(**settings)])
    allowed = words[weights > 0]
    return len(allowed), logits[0].softmax(-1)[allowed].sum().item()


for text in ("The capital of Japan", "The capital of"):
    for rule in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        count, share = kept(text, **rule)
        print(f"{text:20} {rule!s:14} keeps {count:2} with {share:.2f}")
# --8<-- [end:truncation]


def figure_truncation(figure, say):
    panels = figure.subplots(1, 2)
    texts = ("The capital of Japan", "The capital of")
    rules = (
        ({"top_k": 5}, "top-k 5", ":"),
        ({"top_p": 0.9}, "top-p 0.9", "--"),
        ({"min_p": 0.1}, "min-p 0.1", "-"),
    )
    for axes, text in zip(panels, texts, strict=True):
        p = next_logits(text).softmax(-1)
        shares = p.sort(descending=True).values[:40].tolist()
        axes.bar(range(1, 41), shares, width=0.8)
        for number, (rule, label, style) in enumerate(rules):
            axes.axvline(
                kept(text, **rule)[0] + 0.5, ls=style, lw=1.4, color=f"C{number + 1}",
                label=label,
            )  # fmt: skip
        axes.set_title(f"{text} …", fontsize=9)
        axes.set_xlabel(say("rank of the word", "词的名次"))
    panels[0].set_ylabel(say("probability", "概率"))
    panels[1].legend(frameon=False, fontsize=8, loc="center right")


# --8<-- [start:draw]
from minimind.inference.sampling import sample

logits = next_logits("The capital of")[None]
for number in (0.01, 0.3, 0.6, 0.99):
    [word] = sample(logits, [Sampling()], [number])
    [cut] = sample(logits, [Sampling(top_p=0.9)], [number])
    print(f"{number:4}: {vocabulary[word]:8} with top_p {vocabulary[cut]}")
# --8<-- [end:draw]

# --8<-- [start:penalty]
from minimind.inference.sampling import Penalties


def write(text, count, sampling, seed=1):
    """Continue a text by `count` words."""
    prompt = [vocabulary.index(word) for word in text.split()]
    penalties = Penalties(sampling, prompt, len(vocabulary), torch.device("cpu"))
    torch.manual_seed(seed)
    for _ in range(count):
        logits = penalties.apply(next_logits(text).float())
        [token] = sample(logits[None], [sampling], [torch.rand(()).item()])
        penalties.add(int(token))
        text += " " + vocabulary[token]
    return text


for settings in (
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1},
    {"temperature": 0.7, "top_p": 0.9},
):
    print(settings)
    text = write("The", 24, Sampling(**settings))
    print(textwrap.indent(textwrap.fill(text, 76), "    "))
# --8<-- [end:penalty]


# --8<-- [start:cache]
from minimind.model.kv_cache import KVCache


def decode(prompt, count, cache=None):
    """Return the greedy continuation and the number of tokens of each pass."""
    ids, passes = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            new = ids[cache.length :] if cache else ids
            hidden = model(torch.tensor([new]), cache=cache)
            passes.append(len(new))
            ids.append(int(model.logits(hidden[0, -1]).argmax()))
    return ids, passes


beginning = "<s> The capital of Japan is"
prompt = [vocabulary.index(word) for word in beginning.split()]
cache = KVCache(config, 1, 64, device=torch.device("cpu"), dtype=torch.float64)
plain, passes = decode(prompt, 40)
fast, cached_passes = decode(prompt, 40, cache)
print("same text:", plain == fast)
print("without cache:", passes[:4], "…", passes[-1], "in all", sum(passes))
print(
    "with cache:   ", cached_passes[:4], "…", cached_passes[-1], "in all", end=" "
)
print(sum(cached_passes))
# --8<-- [end:cache]

# --8<-- [start:bytes]
with torch.device("meta"):  # shapes without memory
    small = Transformer(ModelConfig(**PRESETS["small"]))
parameters = sum(parameter.numel() for parameter in small.parameters())
megabytes = 2 * parameters / 1e6  # bf16: 2 bytes per parameter
print(f"{parameters:,} parameters, {megabytes:.1f} MB in bf16")
bandwidth = 2 * 8 * 3200 / 1e3  # GB/s: 2 channels of 8 bytes, 3,200 MT/s
print(f"{bandwidth} GB/s: {1e3 * bandwidth / megabytes:.0f} tokens per second")
peak = 4 * 3.0 * 32  # GFLOP/s: 4 cores, 3 GHz, 32 operations per cycle
operations = 2 * parameters / 1e6  # million per token
print(f"{peak:.0f} GFLOP/s: {1e3 * peak / operations:,.0f} tokens per second")
# --8<-- [end:bytes]

MEMORIES = [
    ("LPDDR4X-4266, 64 bit", 8 * 4.266),
    ("DDR4-3200, 2 × 64 bit", 16 * 3.2),
    ("DDR5-5600, 2 × 64 bit", 16 * 5.6),
    ("LPDDR5X-7500, 128 bit", 16 * 7.5),
]


def table_limits(say):
    rows = [
        [
            say("memory", "内存"),
            "GB/s",
            say("`small`, bf16", "`small`，bf16"),
            say("`small`, int8", "`small`，int8"),
            say("7 billion parameters, bf16", "70 亿参数，bf16"),
        ]
    ]
    for name, speed in MEMORIES:
        limits = [speed * 1e9 / size for size in (2 * parameters, parameters, 14e9)]
        rows.append(
            [
                name,
                f"{speed:.1f}",
                *(f"{n:,.0f}" for n in limits[:2]),
                f"{limits[2]:.1f}",
            ]
        )
    return rows


# --8<-- [start:record]
import json
import statistics
from pathlib import Path

import minimind

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
rounds = json.loads((records / "decoding-speed.json").read_text("utf-8"))["rounds"]


def speed(name, metric):
    """Return the recorded tokens per second, the median of the rounds."""
    return statistics.median(measured[metric] for measured in rounds[name])


bytes_per_weight = {"minimind fp32": 4, "minimind bf16": 2, "minimind int8": 1}
bytes_per_weight |= {"transformers bf16": 2, "llama.cpp F16": 2}
for name, size in bytes_per_weight.items():
    one, many = speed(name, "streams_1"), speed(name, "streams_16")
    rate = one * size * parameters / 1e9
    print(f"{name:18} {one:3.0f} tokens/s {rate:4.1f} GB/s 16 streams {many:5,.0f}")
# --8<-- [end:record]


def figure_streams(figure, say):
    axes = figure.subplots()

    def step_seconds(number, weight_bytes, length=96):
        cache = number * length * 2 * 8 * 8 * 32 * 2
        moved = parameters * weight_bytes + cache
        arithmetic = number * 2 * parameters / (peak * 1e9)
        return max(moved / (bandwidth * 1e9), arithmetic)

    streams = [2 ** (n / 8) for n in range(0, 57)]
    for number, (size, kind) in enumerate(((2, "bf16"), (1, "int8"))):
        speeds = [n / step_seconds(n, size) for n in streams]
        axes.plot(
            streams, speeds, color=f"C{number}",
            label=say(f"limit of the laptop, {kind}", f"笔记本的上限，{kind}"),
        )  # fmt: skip
        recorded = [speed(f"minimind {kind}", f"streams_{n}") for n in (1, 16)]
        axes.plot(
            [1, 16], recorded, "o", color=f"C{number}",
            label=say(f"recorded, 2 cores, {kind}", f"实测，2 核，{kind}"),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 16, 32, 64, 128])
    axes.set_yticks([300, 1000, 3000, 10000], ["300", "1,000", "3,000", "10,000"])
    axes.set_ylim(200, 12000)
    axes.minorticks_off()
    axes.set_xlabel(say("streams decoded together", "同时解码的路数"))
    axes.set_ylabel(say("tokens per second", "每秒词元数"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False, fontsize=8)


# --8<-- [start:int8]
import copy

from minimind.inference.matmul import quantize_int8

row = torch.tensor([[0.31, -0.08, 0.02, -0.55]])
rounded, scale = quantize_int8(row)
print(rounded.tolist()[0], "times", f"{scale.item():.5f}")
quantized = copy.deepcopy(model)
matrices = {
    name: quantize_int8(weight.detach())
    for name, weight in model.named_parameters()
    if weight.ndim == 2
}
with torch.no_grad():
    for name, weight in quantized.named_parameters():
        if name in matrices:
            rounded, scale = matrices[name]
            weight.copy_(rounded * scale[:, None])
    held_out = ids[-1089:].view(33, 33)  # not trained on
    losses = [
        F.cross_entropy(
            m.logits(m(held_out[:, :-1])).flatten(0, 1), held_out[:, 1:].flatten()
        )
        for m in (model, quantized)
    ]
print(f"loss {losses[0]:.4f}, int8 {losses[1]:.4f}")
# --8<-- [end:int8]


# --8<-- [start:batching]
import random

chance = random.Random(4)
lengths = [chance.choice((10, 20, 40, 80, 160)) for _ in range(16)]
print(lengths)


def in_groups(lengths, slots=4):
    """Return (slot, start, length) when a batch must end before the next begins."""
    bars, start = [], 0
    for first in range(0, len(lengths), slots):
        group = lengths[first : first + slots]
        bars += [(slot, start, length) for slot, length in enumerate(group)]
        start += max(group)
    return bars


def continuously(lengths, slots=4):
    """Return (slot, start, length) when a free slot takes the next request."""
    free, bars = [0] * slots, []
    for length in lengths:
        slot = free.index(min(free))
        bars.append((slot, free[slot], length))
        free[slot] += length
    return bars


for schedule in (in_groups, continuously):
    steps = max(start + length for _, start, length in schedule(lengths))
    use = sum(lengths) / (4 * steps)
    print(f"{schedule.__name__:12} {steps} steps, {use:.0%} of the slots in use")
# --8<-- [end:batching]


def figure_batching(figure, say):
    panels = figure.subplots(2, 1, sharex=True)
    titles = (say("in groups", "成组"), say("continuously", "连续"))
    for axes, schedule, title in zip(
        panels, (in_groups, continuously), titles, strict=True
    ):
        for number, (slot, start, length) in enumerate(schedule(lengths)):
            axes.barh(
                slot,
                length,
                left=start,
                height=0.8,
                color=f"C{number % 4}",
                alpha=0.55,
                edgecolor="0.5",
            )
            axes.text(
                start + length / 2,
                slot,
                number + 1,
                ha="center",
                va="center",
                fontsize=7,
            )
        axes.invert_yaxis()
        axes.set_yticks(range(4), range(4))
        axes.set_ylabel(say("slot", "槽位"))
        axes.set_title(title, fontsize=9)
    panels[1].set_xlabel(say("step", "步数"))


# --8<-- [start:order]
numbers = torch.tensor([1e8, 1.0, -1e8])
print((numbers[0] + numbers[1] + numbers[2]).item(), end=" ")
print((numbers[0] + numbers[2] + numbers[1]).item())
# --8<-- [end:order]


def tokens_per_second(kind, metric="streams_1"):
    return f"{speed(f'minimind {kind}', metric):,.0f}"


def moved(kind, size):
    return f"{speed(f'minimind {kind}', 'streams_1') * size * parameters / 1e9:.1f}"


facts = {
    "recorded": tokens_per_second("bf16"),
    "recorded_16": tokens_per_second("bf16", "streams_16"),
    "recorded_int8": tokens_per_second("int8"),
    "recorded_int8_16": tokens_per_second("int8", "streams_16"),
    "prefill": tokens_per_second("bf16", "prefill"),
    "moved": moved("bf16", 2),
    "moved_fp32": moved("fp32", 4),
    "limit": f"{1e3 * bandwidth / megabytes:.0f}",
    "half": f"{500 * bandwidth / megabytes:.0f}",
    "peak_limit": f"{1e3 * peak / operations:,.0f}",
    "passes": f"{sum(passes):,}",
    "cached_passes": f"{sum(cached_passes)}",
}

import base64

piece_model = {
    name: {
        "columns": rounded.shape[1],
        "scales": [float(f"{s:.5g}") for s in scale.tolist()],
        "data": base64.b64encode(rounded.numpy().tobytes()).decode(),
    }
    for name, (rounded, scale) in matrices.items()
}
norms = {
    name: [round(v, 4) for v in weight.tolist()]
    for name, weight in model.named_parameters()
    if weight.ndim == 1
}
PROMPTS = [
    "The",
    "The capital of",
    "The capital of Japan",
    "The opposite of big is",
]
CASES = [(text, {}) for text in PROMPTS]
CASES += [("The capital of", {name: value}) for name, value in (
    ("top-k", "5"), ("top-p", "0.5"), ("min-p", "0.1"), ("temperature", "0.5"))]  # fmt: skip
CASES += [
    ("The capital of Japan", {"temperature": "2", "top-k": "20", "top-p": "0.9"}),
    ("The opposite of big is", {"penalty": "1.5", "min-p": "0.05"}),
]


def quantized_logits(words):
    prompt = [vocabulary.index(word) for word in words]
    with torch.no_grad():
        return quantized.logits(quantized(torch.tensor([prompt])))[0, -1], prompt


def expectation(text, settings):
    """Return what the package computes for a position of the knobs."""
    sampling = Sampling(
        temperature=float(settings.get("temperature", 1)),
        top_k=int(settings.get("top-k", 0)),
        top_p=float(settings.get("top-p", 1)),
        min_p=float(settings.get("min-p", 0)),
        repetition_penalty=float(settings.get("penalty", 1)),
    )
    logits, prompt = quantized_logits(["<s>", *text.split()])
    penalties = Penalties(sampling, prompt, len(vocabulary), torch.device("cpu"))
    _, weights = candidates(penalties.apply(logits.float())[None], [sampling])
    p = (weights / weights.sum())[0].sort(descending=True).values
    top = [round(share, 4) for share in p[:5].tolist()]
    count = int((weights > 0).sum())
    return {"prompt": text, "settings": settings, "count": count, "top": top}


greedy = ["<s>", "The"]
for _ in range(20):
    greedy.append(vocabulary[int(quantized_logits(greedy)[0].argmax())])
piece = {
    "vocabulary": vocabulary,
    "shape": {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "keyHeads": config.num_key_value_heads,
        "dim": config.head_dim,
        "theta": config.rope_theta,
        "eps": config.rms_norm_eps,
    },
    "matrices": piece_model,
    "norms": norms,
    "prompts": PROMPTS,
    "expected": [expectation(*case) for case in CASES],
    "greedy": " ".join(greedy),
}
