"""Chapter 15: scaling. See docs/en/book/contributing.md."""

# --8<-- [start:flops]
import torch

from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.planning.plan import flops_per_token


def cost(preset):
    """Return (parameters, FLOPs of training on one token) of a preset."""
    with torch.device("meta"):  # shapes only: the weights take no memory
        model = Transformer(ModelConfig(**PRESETS[preset]))
    return sum(p.numel() for p in model.parameters()), flops_per_token(model, 512)


for preset in ("small", "base"):
    parameters, flops = cost(preset)
    print(
        f"{preset:5} {parameters / 1e6:5.1f}M parameters, "
        f"6N = {6 * parameters / 1e6:3.0f}M, counted {flops / 1e6:3.0f}M"
    )
# --8<-- [end:flops]

# --8<-- [start:time]
import json
from pathlib import Path

import minimind

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
measured = json.loads((records / "training-speed-small.json").read_text("utf-8"))
measured = measured["over_rounds"]["small-16x512"]["minimind"]
rate = measured["real_tokens_per_second"]["median"]
_, flops = cost("small")
print(f"{rate:,.0f} tokens/s are {rate * flops / 1e12:.2f} TFLOP/s")
print(f"utilisation {measured['utilisation']['median']:.0%}")
print(f"8 hours: {rate * 8 * 3600 / 1e6:.0f} million tokens")
# --8<-- [end:time]

# --8<-- [start:growth]
growth = json.loads((records / "scaling.json").read_text("utf-8"))
for point in growth["training"]:
    if point["axis"] == "parameters":
        print(
            f"{point['model']:5} {point['parameters'] / 1e6:5.1f}M parameters:",
            f"{point['tokens_per_second']:6,.0f} tokens/s,",
            f"{point['peak_mb']:5,.0f} MB, utilisation {point['utilisation']:.1%}",
        )
# --8<-- [end:growth]

# --8<-- [start:runs]
from benchmarks.scaling_law import Sample, effective_tokens, fit_law

record = json.loads((records / "small-law.json").read_text("utf-8"))
keys = ("name", "parameters", "tokens", "loss", "speed")
samples = [Sample(*(run[key] for key in keys)) for run in record["runs"]]
sizes = sorted({sample.parameters for sample in samples})
for size in sizes:
    runs = [s for s in samples if s.parameters == size]
    print(
        f"{size / 1e6:.2f}M:",
        ", ".join(f"{s.loss:.3f} ({s.tokens / 1e6:.2f}M)" for s in runs),
    )
# --8<-- [end:runs]

# --8<-- [start:fit]
law, _ = fit_law(samples, bootstraps=1)
values = {name: float(value) for name, value in law.values().items()}
for name, value in values.items():
    low, high = record["law"][name]["interval"]
    print(f"{name:5} {value:8.2f}   90 %: {low:.2f} to {high:.2f}")
# --8<-- [end:fit]

# --8<-- [start:check]
final = record["final"]
predicted = float(law.at(final["parameters"], final["tokens"]))
low, high = final["interval"]
print(f"{final['parameters'] / 1e6:.1f}M, {final['tokens'] / 1e6:.1f}M tokens:")
print(f"predicted {predicted:.3f} ({low:.3f} to {high:.3f})")
print(f"measured  {final['bits_per_byte']:.3f}, {final['error']:+.1%}")
# --8<-- [end:check]


def figure_runs(figure, say):
    axes = figure.subplots()
    for size in sizes:
        runs = [s for s in samples if s.parameters == size]
        last = final["tokens"] if size == final["parameters"] else runs[-1].tokens
        tokens = torch.logspace(5.3, torch.tensor(last).log10().item(), 40).numpy()
        [line] = axes.plot(tokens, law.at(size, tokens), lw=1.2)
        axes.plot(
            [s.tokens for s in runs],
            [s.loss for s in runs],
            "o",
            color=line.get_color(),
            label=f"{size / 1e6:.2f}M",
        )
    axes.plot(
        final["tokens"],
        final["bits_per_byte"],
        "*",
        ms=13,
        color=line.get_color(),
        label=say("not used for the fit", "未用于拟合"),
    )
    axes.set_xscale("log")
    ticks = [0.25e6, 0.5e6, 1e6, 2e6, 4e6]
    axes.set_xticks(ticks, [f"{tick / 1e6:g}M" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(say("training tokens", "训练词元数"))
    axes.set_ylabel(say("bits per byte, held-out", "留出文本的每字节比特数"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:best-size]
def best_size(flops, values):
    """Return the N and D of the lowest loss among those with 6 N D = flops."""
    alpha, beta = values["alpha"], values["beta"]
    balance = (alpha * values["A"] / (beta * values["B"])) ** (1 / (alpha + beta))
    parameters = balance * (flops / 6) ** (beta / (alpha + beta))
    return parameters, flops / 6 / parameters


# --8<-- [end:best-size]

# --8<-- [start:budget]
for budget in (1e12, 3e12, 1e13):
    parameters, tokens = best_size(budget, values)
    print(
        f"{budget:.0e} FLOPs: {parameters / 1e6:.2f}M parameters,",
        f"{tokens / 1e6:4.1f}M tokens,",
        f"{float(law.at(parameters, tokens)):.2f} bits",
    )
# --8<-- [end:budget]


def figure_budget(figure, say):
    axes = figure.subplots()
    parameters = torch.logspace(4.3, 6.8, 120).double().numpy()
    for budget in (1e12, 3e12, 1e13):
        loss = law.at(parameters, budget / 6 / parameters)
        [line] = axes.plot(parameters, loss, label=f"{budget:.0e} FLOPs")
        best, tokens = best_size(budget, values)
        axes.plot(best, law.at(best, tokens), "o", color=line.get_color())
    axes.set_xscale("log")
    ticks = [1e5, 1e6]
    axes.set_xticks(ticks, ["0.1M", "1M"])
    axes.set_xlabel(say("parameters", "参数量"))
    axes.set_ylabel(say("bits per byte by the law", "定律给出的每字节比特数"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:exponent]
import numpy

_, resampled = fit_law(samples, bootstraps=200)
each = resampled.values()
exponents = each["beta"] / (each["alpha"] + each["beta"])
low, high = numpy.percentile(exponents, (5, 95))
print(f"exponent of C: 90 % of the fits between {low:.1f} and {high:.1f}")
# --8<-- [end:exponent]

# --8<-- [start:repeated]
for run in record["repeated"]:
    tokens, unique = run["tokens"], run["unique"]
    worth = effective_tokens(tokens, unique)
    expected = float(law.at(run["parameters"], worth))
    print(
        f"{run['epochs']:2} epochs of {unique / 1e6:.3f}M",
        f"worth {worth / 1e6:.2f}M: predicted {expected:.3f},",
        f"measured {run['bits_per_byte']:.3f}",
    )
# --8<-- [end:repeated]

# --8<-- [start:shapes]
study = json.loads((records / "shape-study.json").read_text("utf-8"))
for shape in study["shapes"]:
    seeds = " ".join(f"{loss:.3f}" for loss in shape["loss_by_seed"].values())
    print(
        f"{shape['layers']:2} layers of width {shape['width']:3}:",
        f"{shape['parameters_without_embeddings'] / 1e6:.2f}M +",
        f"{2048 * shape['width'] / 1e6:.2f}M,",
        f"{shape['bits_per_byte']:.2f} bits, {seeds}",
    )
# --8<-- [end:shapes]


def figure_shapes(figure, say):
    axes = figure.subplots()
    layers = [shape["layers"] for shape in study["shapes"]]
    axes.plot(layers, [shape["loss"] for shape in study["shapes"]])
    for shape in study["shapes"]:
        losses = list(shape["loss_by_seed"].values())
        axes.plot([shape["layers"]] * len(losses), losses, "o", color="C0", ms=5)
        axes.annotate(
            f"{shape['layers']} × {shape['width']}",
            (shape["layers"], shape["loss"]),
            xytext=(6, -12),
            textcoords="offset points",
        )
    axes.set_xscale("log")
    axes.set_xticks(layers, [str(n) for n in layers])
    axes.minorticks_off()
    axes.set_xlim(1.8, 24)
    axes.set_ylim(5.35, None)
    axes.set_xlabel(say("layers × width", "层数 × 宽度"))
    axes.set_ylabel(
        say("held-out loss, nats per token", "留出文本的损失（奈特／词元）")
    )
    axes.grid(alpha=0.15)


# --8<-- [start:night]
from benchmarks.night_sweep import LAW, SHAPES

UNIQUE = 52e6  # tokens in one epoch of the mix of texts
for name, (_, estimate) in SHAPES.items():
    tokens = estimate * 8 * 3600
    worth = effective_tokens(tokens, UNIQUE)
    runs = ", ".join(f"{count / 1e6:g}M" for count in LAW.get(name, ())) or "none"
    print(
        f"{name:>3}: {tokens / 1e6:3.0f}M tokens, {tokens / UNIQUE:.1f} epochs, "
        f"worth {worth / 1e6:3.0f}M; short runs: {runs}"
    )
# --8<-- [end:night]

# --8<-- [start:gpu]
PEAK = 989e12  # bf16 FLOP/s of an H100, from its data sheet
for preset in ("small", "base"):
    parameters, flops = cost(preset)
    for share in (0.1, 0.4):
        tokens = PEAK * share * 3600 / flops
        print(
            f"{preset:5} at {share:.0%}: {tokens / 1e9:4.2f}G tokens in an hour,",
            f"{tokens / parameters:4.0f} per parameter",
        )
# --8<-- [end:gpu]

# The runs that had finished while the longer run was still training.
before = [
    sample
    for sample in samples
    if sample.parameters > sizes[0]
    and (sample.parameters, round(sample.tokens / 1e6))
    not in {(sizes[1], 4), (sizes[3], 1)}
]
early_law, _ = fit_law(before, bootstraps=1)
assert len(before) == 12
largest = max(samples, key=lambda sample: sample.parameters * sample.tokens)
first, second, last = record["repeated"]
[fresh] = [
    sample
    for sample in samples
    if (sample.parameters, sample.tokens) == (first["parameters"], first["tokens"])
]
shapes = {shape["layers"]: shape for shape in study["shapes"]}
losses = {s["layers"]: list(s["loss_by_seed"].values()) for s in study["shapes"]}


def millions(number: float) -> tuple[str, str]:
    """Return a number in millions, and in 亿."""
    return f"{number / 1e6:.0f}", f"{number / 1e8:.2f}"


facts = {
    "small_six_n": millions(6 * cost("small")[0]),
    "small_flops": millions(cost("small")[1]),
    "rate": f"{rate:,.0f}",
    "night_tokens": (
        f"{rate * 8 * 3600 / 1e6:.0f}",
        f"{round(rate * 8 * 3600 / 1e6) * 100:,}",
    ),
    "small_wanted": millions(20 * cost("small")[0]),
    "night_short": f"{20 * cost('small')[0] / (rate * 8 * 3600):.0f}",
    "gpu_nights": f"{PEAK * 0.1 / cost('small')[1] / (rate * 8):.0f}",
    "num_runs": len(samples),
    "unigram": f"{record['unigram_bits_per_byte']:.2f}",
    "worst_fit": f"{100 * max(abs(r['loss'] / r['law'] - 1) for r in record['runs']):.1f} %",
    "floor": f"{values['E']:.2f}",
    "alpha": f"{values['alpha']:.2f}",
    "beta": f"{values['beta']:.2f}",
    "final_over_largest": (
        f"{final['parameters'] * final['tokens'] / largest.parameters / largest.tokens:.0f}"
    ),
    "predicted": f"{predicted:.3f}",
    "early": f"{float(early_law.at(final['parameters'], final['tokens'])):.3f}",
    "measured": f"{final['bits_per_byte']:.3f}",
    "error": f"{abs(final['error']):.1%}".replace("%", " %"),
    "fresh": f"{fresh.loss:.3f}",
    "few_epochs": f"{first['bits_per_byte']:.3f}",
    "sixteen_epochs": f"{second['bits_per_byte']:.3f}",
    "many_epochs": f"{last['bits_per_byte']:.3f}",
    "many_predicted": f"{last['predicted']:.3f}",
    "size_effect": f"{float(law.at(0.487e6, 0.512e6) - law.at(0.658e6, 0.512e6)):.2f}",
    "wide": f"{shapes[2]['bits_per_byte']:.2f}",
    "deep": f"{shapes[16]['bits_per_byte']:.2f}",
    "shape_gap": f"{shapes[16]['loss'] - shapes[2]['loss']:.2f}",
    "seed_gap": f"{max(max(pair) - min(pair) for pair in losses.values()):.2f}",
}
piece = {
    "law": values,
    "largest": {"parameters": sizes[-1], "tokens": max(s.tokens for s in samples)},
    "smallest": sizes[0],
}
