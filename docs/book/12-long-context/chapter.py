"""Chapter 12: longer contexts. See docs/en/book/contributing.md."""

# --8<-- [start:turns]
import math

import torch

from minimind.config.model import ModelConfig
from minimind.model.rope import extend_context, rope_frequencies

torch.set_num_threads(1)
TRAINED, LONG = 512, 2048
config = ModelConfig(head_dim=64, max_position_embeddings=TRAINED)
frequencies, _ = rope_frequencies(config, length=1)  # [32], radians per position
for pair in (0, 8, 15, 16, 24, 31):
    turns = frequencies[pair].item() * TRAINED / (2 * math.pi)
    print(f"pair {pair:2}: {turns:8.4f} turns in {TRAINED} positions")
# --8<-- [end:turns]


# --8<-- [start:head]
def waves(distances, frequencies):
    """Return cosine and sine of each pair's angle at the distances: [N, 64]."""
    angles = distances[:, None].double() * frequencies.double()
    return torch.cat((angles.cos(), angles.sin()), dim=1)


seen = torch.arange(TRAINED)
# The farther away, the lower the score.
wanted = -2 * torch.log1p(seen / 16).double()
X = waves(seen, frequencies)
ridge = 1e-2 * torch.eye(64, dtype=torch.float64)
weights = torch.linalg.solve(X.T @ X + ridge, X.T @ wanted)


def scores(distances, frequencies):
    """Return the scores of the head at the given distances."""
    return waves(distances, frequencies) @ weights


print(f"largest error: {(scores(seen, frequencies) - wanted).abs().max():.2f}")
for distance in (100, 511, 600, 800, 1500):
    score = scores(torch.tensor([distance]), frequencies).item()
    print(f"distance {distance:4}: score {score:6.1f}")
# --8<-- [end:head]


# --8<-- [start:attention]
def share_within(distances, frequencies, factor=1.0):
    """Return the attention on the nearest 512 tokens, if all keys are equal."""
    attention = (scores(distances, frequencies) * factor**2).softmax(0)
    return attention[:TRAINED].sum().item()


far = torch.arange(LONG)
wish = (-2 * torch.log1p(far / 16)).softmax(0)[:TRAINED].sum()
print(f"as wanted {wish:.3f}, with the head {share_within(far, frequencies):.3f}")
# --8<-- [end:attention]

# --8<-- [start:methods]
extended = {}
for kind in ("linear", "dynamic", "yarn"):
    longer = extend_context(config, LONG, kind)
    extended[kind] = rope_frequencies(longer, length=LONG)
    ratio = extended[kind][0] / frequencies
    print(f"{kind:8}", [round(ratio[pair].item(), 2) for pair in (0, 4, 8, 16, 31)])
# --8<-- [end:methods]


def figure_frequencies(figure, say):
    axes = figure.subplots()
    for kind, (changed, _) in extended.items():
        axes.plot(changed / frequencies, marker=".", label=kind)
    axes.axvline(15.3, ls="--", lw=1.2, color="0.5")
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel(say("pair, fast to slow", "对的编号，由快到慢"))
    axes.set_ylabel(say("frequency / trained", "频率／训练时"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:interpolation]
linear, _ = extended["linear"]
print(torch.allclose(scores(far, linear), scores(far / 4, frequencies)))
print(f"attention on the nearest 512: {share_within(far, linear):.2f}")
# --8<-- [end:interpolation]


# --8<-- [start:previous]
def look_back(changed, factor=1.0):
    """Return the attention by distance of a head that looks one token back."""
    # The weights rotate the query back by one position, at the trained frequencies.
    angles = far[:, None] * changed - frequencies
    return (2 * factor**2 * angles.cos().sum(1)).softmax(0)


for name, changed in (("trained", frequencies), ("linear", linear)):
    attention = look_back(changed)
    print(
        f"{name:8} looks {int(attention.argmax())} back,",
        f"attention on the previous token {attention[1]:.2f}",
    )
# --8<-- [end:previous]

# --8<-- [start:base]
longer = extend_context(config, LONG, "dynamic")
for length in (512, 768, 1024, 2048):
    s = 4 * length / TRAINED - 3
    base = config.rope_theta * s ** (64 / 62)
    by_hand = base ** (-torch.arange(32) / 32)
    package, _ = rope_frequencies(longer, length)
    divided = frequencies / package
    print(
        f"{length:4} tokens: s = {s:4.1f},",
        f"equal: {torch.allclose(by_hand, package)},",
        f"pair 16 / {divided[16]:.2f}, pair 31 / {divided[31]:.2f}",
    )
# --8<-- [end:base]


def figure_scores(figure, say):
    panels = figure.subplots(1, 2, sharey=True)
    titles = (say("without scaling", "不缩放"), say("with scaling", "缩放之后"))
    panels[0].plot(far, scores(far, frequencies), lw=1, color="C3")
    for kind in ("linear", "dynamic", "yarn"):
        changed, _ = rope_frequencies(extend_context(config, LONG, kind), LONG)
        panels[1].plot(far, scores(far, changed), lw=1, label=kind)
    for axes, title in zip(panels, titles, strict=True):
        axes.axvline(TRAINED, ls="--", lw=1.2, color="0.5")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(say("distance", "距离"))
        axes.grid(alpha=0.15)
    panels[0].set_ylabel(say("score", "得分"))
    panels[1].legend(frameon=False)


# --8<-- [start:dilution]
def effective_keys(scores):
    """Return exp(entropy): over how many keys the attention is spread."""
    p = scores.softmax(0)
    return (-(p * p.log()).sum()).exp().item()


torch.manual_seed(1)
random_scores = 2 * torch.randn(LONG, dtype=torch.float64)
for name, some in (
    ("512 keys", random_scores[:512]),
    ("2048 keys", random_scores),
    ("2048 keys, times 1.296", 1.296 * random_scores),
):
    print(f"{name:23} spread over {effective_keys(some):4.0f}")
# --8<-- [end:dilution]

# --8<-- [start:yarn]
for kind, (changed, factor) in extended.items():
    print(
        f"{kind:8} factor {factor:.3f},",
        f"on the nearest 512: {share_within(far, changed, factor):.2f},",
        f"on the previous token: {look_back(changed, factor)[1]:.2f}",
    )
# --8<-- [end:yarn]

# --8<-- [start:model]
from minimind.model import PRESETS, Transformer

torch.manual_seed(1)
tiny = Transformer(ModelConfig(vocab_size=128, **PRESETS["nano"]))
text = torch.randint(128, (1, 600))  # nano has a context of 256
with torch.inference_mode():
    plain = tiny.logits(tiny(text[:, :200]))
    for kind in ("linear", "dynamic", "yarn"):
        changed_model = Transformer(tiny.config)
        changed_model.load_state_dict(tiny.state_dict())
        changed_model.extend_context(1024, kind)
        same = torch.equal(
            changed_model.logits(changed_model(text[:, :200])), plain
        )
        context = changed_model.config.max_position_embeddings
        print(f"{kind:8} context {context}, short text unchanged: {same}")
# --8<-- [end:model]

# --8<-- [start:record]
import json
from pathlib import Path

import minimind

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
record = json.loads((records / "long-context.json").read_text("utf-8"))
by_context = record["bits_per_byte_by_window"]
for kind, row in by_context.items():
    print(f"{kind:8}", "  ".join(f"{n}: {bits:.3f}" for n, bits in row.items()))
# --8<-- [end:record]


def figure_record(figure, say):
    panels = figure.subplots(1, 2, sharey=True)
    names = {"none": say("no scaling", "不缩放")}
    by_position = record["bits_per_byte_by_position_at_4096"]
    for (kind, row), color in zip(by_context.items(), (3, 0, 1, 2), strict=True):
        style = dict(
            marker="o", ms=4, color=f"C{color}", label=names.get(kind, kind)
        )
        panels[0].plot(list(row), list(row.values()), **style)
        ends = [place.partition("-")[2] for place in by_position[kind]]
        panels[1].plot(ends, list(by_position[kind].values()), **style)
    panels[0].set_ylabel(say("bits per byte", "每字节比特数"))
    panels[0].set_xlabel(say("context, tokens", "上下文长度（词元）"))
    panels[1].set_xlabel(say("position up to", "位置，不超过"))
    panels[0].legend(frameon=False)
    for axes in panels:
        axes.grid(alpha=0.15)


# --8<-- [start:cost]
small = ModelConfig(**PRESETS["small"])
with torch.device("meta"):
    parameters = sum(p.numel() for p in Transformer(small).parameters())
heads, kv_heads = small.num_attention_heads, small.num_key_value_heads
layers, dim = small.num_hidden_layers, small.head_dim


def cache_bytes(tokens):
    """Return the bytes of keys and values in bfloat16."""
    return 2 * layers * kv_heads * dim * 2 * tokens


def attention_products(tokens):
    """Return multiplications per token of scores and mean, for a prompt."""
    return 2 * layers * heads * dim * tokens / 2  # on average, half of the others


for tokens in (512, 2048, 8192, 32768):
    products, mib = attention_products(tokens), cache_bytes(tokens) / 2**20
    share = products / (products + parameters)
    print(f"{tokens:6} tokens: cache {mib:4.0f} MiB, attention {share:.0%} of work")
print(f"as much as the weights: {2 * parameters // cache_bytes(1):,} tokens")
# --8<-- [end:cost]


def table_cost(say):
    head = [
        say("tokens", "词元数"),
        say("KV cache", "KV 缓存"),
        say(
            "multiplications of attention, whole prompt",
            "注意力的乘法次数（整段提示词）",
        ),
        say("of everything else", "其余部分的乘法次数"),
    ]
    table = [head]
    for tokens in (512, 2048, 8192, 32768):
        table.append(
            [
                f"{tokens:,}",
                f"{cache_bytes(tokens) / 2**20:.0f} MiB",
                f"{attention_products(tokens) * tokens / 1e9:,.0f} G",
                f"{parameters * tokens / 1e9:,.0f} G",
            ]
        )
    return table


# --8<-- [start:windows]
from minimind.evaluation.scoring import sliding_windows

for row in sliding_windows(range(1, 11), start=[0], context=4):
    read, scored = row.tokens[: row.start], row.tokens[row.start :]
    print(f"given {list(read)} score {list(scored)}")
# --8<-- [end:windows]


extended_table = record["bits_per_byte_stretched_to_4096_by_window"]
facts = {
    "ntk_16": f"{4 ** (32 / 62):.2f}",
    "share_none": f"{share_within(far, frequencies):.3f}",
    "back_trained": f"{look_back(frequencies)[1]:.2f}",
    "back_linear": f"{look_back(linear)[1]:.2f}",
    "loss_none": f"{by_context['none']['4096'] - by_context['none']['512']:.3f}",
    "yarn_wide": f"{extended_table['yarn']['512']:.3f}",
    "short": f"{by_context['none']['512']:.3f}",
    "crossing": f"{2 * parameters / cache_bytes(1):,.0f}",
}
piece = {"weights": [round(weight, 4) for weight in weights.tolist()]}
