# --8<-- [start:embedding]
import torch

words = ["<s>", "the", "river", "is", "long", "and", "the", "river", "is"]
vocabulary = sorted(set(words))
tokens = torch.tensor([vocabulary.index(word) for word in words])

torch.manual_seed(1)
embedding = torch.randn(len(vocabulary), 4)  # one row per token of the vocabulary
x = embedding[tokens]
print(tokens.tolist())
print(tuple(x.shape), torch.equal(x[1], x[6]))  # "the" is the same vector twice
# --8<-- [end:embedding]

# --8<-- [start:norm]
from minimind.model.norm import RMSNorm

v = torch.tensor([3.0, -4.0])
rms = (v.square().mean() + 1e-5).sqrt()
print(f"RMS {rms:.2f}, divided by it: {[round(n, 2) for n in (v / rms).tolist()]}")
norm = RMSNorm(2, eps=1e-5)
print(torch.allclose(norm(v), v / rms), torch.allclose(norm(100 * v), norm(v)))
# --8<-- [end:norm]


def figure_norm(figure, say):
    import numpy as np

    axes = figure.subplots()
    points = np.random.default_rng(1).normal(size=(40, 2)) * [2.2, 1.2]
    after = points / np.sqrt((points**2).mean(1, keepdims=True))
    for (a, b), (c, d) in zip(points, after, strict=True):
        axes.plot([a, c], [b, d], color="0.5", lw=0.5, alpha=0.6)
    axes.plot(*points.T, "o", ms=4, label=say("before", "归一化前"))
    axes.plot(*after.T, "o", ms=4, label=say("after RMSNorm", "RMSNorm 之后"))
    axes.set_aspect("equal")
    axes.set_xlabel(say("first feature", "第一个特征"))
    axes.set_ylabel(say("second feature", "第二个特征"))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


# --8<-- [start:attention]
def attention(q, k, v):
    """Let each row of q [T, D] attend to the rows of k and v up to its own."""
    scores = q @ k.T / k.shape[1] ** 0.5  # [T, T]
    later = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return weights @ v, weights


one_hot = torch.eye(len(vocabulary))[tokens]  # [T, 6]: which word stands here
out, weights = attention(30 * one_hot, one_hot, one_hot)
for t in (2, 7):
    print(words[t], [round(weight, 2) for weight in weights[t].tolist()])
# --8<-- [end:attention]

# --8<-- [start:blockwise]
from minimind.model.attention import _blockwise_attention

q, k, v = torch.randn(3, 1, 1, 200, 32)  # [B, H, T, D] each: one sequence, one head
ours, _ = attention(q[0, 0], k[0, 0], v[0, 0])
package = _blockwise_attention(q, k, v, None, scale=32**-0.5)
print(torch.allclose(ours, package[0, 0], atol=1e-5))
# --8<-- [end:blockwise]

# --8<-- [start:rope]
from minimind.config.model import ModelConfig
from minimind.model.rope import apply_rotary, rope_table

config = ModelConfig(head_dim=32)


def rotate(x, positions):
    """Rotate the rows of x [T, 32] by the angles of their positions [T]."""
    cos, sin = rope_table(config, positions, length=len(positions))
    return apply_rotary(x[None, :, None], cos[:, None], sin[:, None])[0, :, 0]


torch.manual_seed(1)
query, key = torch.randn(2, 1, 32)
for m, n in ((5, 2), (105, 102), (5, 4)):
    score = rotate(query, torch.tensor([m])) @ rotate(key, torch.tensor([n])).T
    print(f"query at {m:3}, key at {n:3}: score {score.item():.2f}")
# --8<-- [end:rope]


def figure_rope(figure, say):
    import numpy as np

    axes = figure.subplots()
    distance = np.arange(65)
    for pair in (0, 4, 8):
        frequency = 10_000 ** (-2 * pair / 32)
        axes.plot(distance, np.cos(frequency * distance), lw=1.2,
                  label=say(f"pair {pair}", f"第 {pair} 对"))  # fmt: skip
    frequencies = 10_000.0 ** (-2 * np.arange(16) / 32)
    total = np.cos(frequencies * distance[:, None]).mean(1)
    axes.plot(
        distance,
        total,
        lw=2.5,
        color="0.5",
        label=say("mean of all 16", "16 对的平均"),
    )
    axes.set_xlabel(say("distance between query and key", "查询与键的距离"))
    axes.set_ylabel(say("cosine of the angle", "夹角的余弦"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


# --8<-- [start:previous]
positions = torch.arange(len(words))
ones = torch.ones(len(words), 32)
keys = rotate(ones, positions)
queries = rotate(ones, positions - 1)  # looks for the position before its own
previous, previous_weights = attention(30 * queries, keys, one_hot)
print([words[t] for t in previous_weights.argmax(-1).tolist()])
# --8<-- [end:previous]

# --8<-- [start:induction]
out, induction_weights = attention(30 * one_hot, previous, one_hot)
for t in (6, 7, 8):
    share, word = out[t].max(), vocabulary[int(out[t].argmax())]
    print(f"after {' '.join(words[1 : t + 1])!r}: {word!r} with {share:.2f}")
# --8<-- [end:induction]


def figure_attention(figure, say):
    panels = figure.subplots(1, 2)
    titles = [
        say("previous token", "前一个词元"),
        say("what followed last time", "上次后面是什么"),
    ]
    heads = [previous_weights, induction_weights]
    for axes, title, head in zip(panels, titles, heads, strict=True):
        axes.pcolormesh(
            head.numpy().round(2), cmap="Blues", vmin=0, vmax=1, ec="0.7", lw=0.3
        )
        axes.invert_yaxis()
        axes.set_aspect("equal")
        ticks = [t + 0.5 for t in range(len(words))]
        axes.set_xticks(ticks, words, rotation=90, fontsize=8)
        axes.set_yticks(ticks, words, fontsize=8)
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel(say("query", "查询"))
    for axes in panels:
        axes.set_xlabel(say("key", "键"))


def cache_numbers(kv_heads):
    """Return the numbers that a token leaves in the KV cache of the model small."""
    return 2 * 8 * kv_heads * 32


def table_cache(say):
    rows = [
        [say("key/value heads", "键值头"), say("query heads per group", "每组查询头"),
         say("attention parameters", "注意力参数"),
         say("cache for 512 tokens, 2 bytes per number", "512 个词元的缓存（每个数 2 字节）")]
    ]  # fmt: skip
    for kv_heads in (16, 8, 4, 1):
        parameters = 8 * 512 * 32 * (2 * 16 + 2 * kv_heads)
        mib = cache_numbers(kv_heads) * 2 * 512 / 2**20
        rows.append([kv_heads, 16 // kv_heads, f"{parameters:,}", f"{mib:g} MiB"])
    return rows


def figure_heads(figure, say):
    axes = figure.subplots()
    for head in range(16):
        axes.plot([head, 2 * (head // 2) + 0.5], [1, 0], color="0.5", lw=1)
        axes.plot(head, 1, "o", ms=11, color="C0")
        axes.text(head, 1.22, head, ha="center", fontsize=8)
    for head in range(8):
        axes.plot(2 * head + 0.5, 0, "s", ms=13, color="C1")
        axes.text(2 * head + 0.5, -0.38, head, ha="center", fontsize=8)
    axes.text(-1, 1, say("query heads", "查询头"), ha="right", va="center")
    axes.text(-1, 0, say("key/value heads", "键值头"), ha="right", va="center")
    axes.set_xlim(-6, 16)
    axes.set_ylim(-0.7, 1.6)
    axes.axis("off")


# --8<-- [start:swiglu]
from minimind.model.feed_forward import swiglu

gate = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])
print([round(value, 2) for value in swiglu(gate, up=torch.ones(5)).tolist()])
# --8<-- [end:swiglu]


def figure_silu(figure, say):
    import numpy as np

    axes = figure.subplots()
    z = np.linspace(-6, 6, 200)
    axes.plot(z, z / (1 + np.exp(-z)), label="SiLU")
    axes.plot(z, np.maximum(z, 0), ls="--", color="0.5", label="ReLU")
    axes.set_xlabel("z")
    axes.set_ylabel("SiLU(z), ReLU(z)")
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:model]
from minimind.config.model import PRESETS
from minimind.model.transformer import Transformer

torch.manual_seed(1)
model = Transformer(ModelConfig(**PRESETS["nano"]))
for name, parameter in model.named_parameters():
    if "layers.1." not in name:  # the second layer is like the first one
        print(f"{name:46} {tuple(parameter.shape)}")
print(sum(parameter.numel() for parameter in model.parameters()), "parameters")
# --8<-- [end:model]

# --8<-- [start:causal]
import torch.nn.functional as F

text = torch.randint(6400, (1, 10))
changed = text.clone()
changed[0, 7] = (changed[0, 7] + 1) % 6400
with torch.inference_mode():
    before, after = (model.logits(model(ids)) for ids in (text, changed))
print(tuple(before.shape))
print(((before - after).abs().amax(-1) > 1e-6).int().tolist())
print(f"loss {F.cross_entropy(before[0, :-1], text[0, 1:]):.1f}")
# --8<-- [end:causal]


def figure_blocks(figure, say):
    axes = figure.subplots()
    box = dict(boxstyle="round,pad=0.35", fc="C0", ec="0.5", alpha=0.3)
    thick = dict(arrowstyle="-", lw=2.5, color="0.5", shrinkA=0, shrinkB=0)
    # Between the boxes, whose widths depend on the language.
    for start, stop in say(
        ((0.1, 0.5), (2.0, 8.95), (10.45, 11.05)),
        ((0.1, 0.9), (1.6, 8.85), (10.55, 11.05)),
    ):
        if stop > 11:
            thick["arrowstyle"] = "->"
        axes.annotate("", (stop, 0), (start, 0), arrowprops=thick)
    labels = [
        (-0.35, 0, say("tokens", "词元")),
        (1.25, 0, say("embedding", "嵌入")),
        (9.7, 0, say("RMSNorm,\nhead", "RMSNorm、\n输出层")),
        (11.5, 0, say("logits", "logits")),
        (2.9, 1.5, "RMSNorm"),
        (4.5, 1.5, say("attention", "注意力")),
        (6, -1.5, "RMSNorm"),
        (7.6, -1.5, "SwiGLU"),
    ]
    for x, y, label in labels:
        plain = y == 0 and x in (-0.35, 11.5)
        axes.text(x, y, label, ha="center", va="center", fontsize=8,
                  bbox=None if plain else box)  # fmt: skip
    arrow = dict(arrowstyle="->", color="0.5")
    axes.annotate("", (3.85, 1.5), (3.53, 1.5), arrowprops=arrow)
    axes.annotate("", (7.02, -1.5), (6.65, -1.5), arrowprops=arrow)
    for start, stop, y in ((2.5, 5.2, 1.5), (5.6, 8.2, -1.5)):
        sign = 1 if y > 0 else -1
        axes.annotate(
            "", (start + 0.3, y - 0.35 * sign), (start, 0), arrowprops=arrow
        )
        axes.annotate(
            "", (stop, 0.1 * sign), (stop - 0.4, y - 0.35 * sign), arrowprops=arrow
        )
        axes.text(stop + 0.05, 0.25 * sign, "+", ha="left", va="center")
    axes.text(
        5.2,
        2.3,
        say("one layer; small has 8", "一层；small 有 8 层"),
        ha="center",
        fontsize=8,
    )
    axes.plot(
        [2.2, 8.75, 8.75, 2.2, 2.2],
        [2.1, 2.1, -2.1, -2.1, 2.1],
        ls="--",
        lw=0.8,
        color="0.5",
    )
    axes.set_xlim(-0.9, 12.1)
    axes.set_ylim(-2.3, 2.6)
    axes.axis("off")


with torch.device("meta"):
    small = Transformer(ModelConfig(**PRESETS["small"]))
counts = dict.fromkeys(("embed", "self_attn", "mlp", "norm"), 0)
for name, parameter in small.named_parameters():
    counts[next(kind for kind in counts if kind in name)] += parameter.numel()


def table_parameters(say):
    names = {
        "embed": say("embedding, also the head", "嵌入，兼作输出层"),
        "self_attn": say("attention", "注意力"),
        "mlp": say("feed-forward", "前馈层"),
        "norm": "RMSNorm",
    }
    total = sum(counts.values())
    head = [say("part", "部分"), say("parameters", "参数"), say("share", "占比")]
    return [
        head,
        *([names[k], f"{n:,}", f"{n / total:.1%}"] for k, n in counts.items()),
    ]


total = sum(counts.values())
with torch.inference_mode():
    untrained_loss = F.cross_entropy(before[0, :-1], text[0, 1:]).item()
facts = {
    "untrained_loss": f"{untrained_loss:.1f}",
    "small_parameters": f"{total:,}",
    "share_feed_forward": f"{counts['mlp'] / total:.0%}".replace("%", " %"),
    "nano_parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    "cache_numbers": f"{cache_numbers(8):,}",
}
piece = {
    "words": " ".join(words[1:]),
    "previous": [[round(w, 3) for w in row] for row in previous_weights.tolist()],
}
