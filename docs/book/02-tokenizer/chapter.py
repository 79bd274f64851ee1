# --8<-- [start:bytes]
for text in ("river", "长江", "é", "🐼"):
    print(text, len(text), "characters:", text.encode().hex(" "))
# --8<-- [end:bytes]

# --8<-- [start:words]
from collections import Counter
from itertools import pairwise

WORDS = [
    "river",
    "rivers",
    "deep",
    "deeper",
    "deepest",
    "long",
    "longer",
    "longest",
]
WORDS += ["长江", "长河"]


def to_bytes(word):
    """Return a word as a list of tokens, each one byte."""
    return [bytes([byte]) for byte in word.encode()]


def count_pairs(split):
    """Count the neighbouring tokens within all words."""
    return Counter(pair for tokens in split for pair in pairwise(tokens))


split = [to_bytes(word) for word in WORDS]
for pair, count in count_pairs(split).most_common(4):
    print(count, pair)
# --8<-- [end:words]


# --8<-- [start:merge]
def merge(tokens, pair):
    """Join each occurrence of `pair` in a list of tokens, from left to right."""
    merged = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


# --8<-- [end:merge]


# --8<-- [start:train]
def train(words, num_merges):
    """Return the merges in the order in which they are made."""
    split, merges = [to_bytes(word) for word in words], []
    for _ in range(num_merges):
        counts = count_pairs(split)
        if not counts:
            break
        pair = max(
            counts, key=counts.get
        )  # of equal counts, the pair that comes first
        merges.append(pair)
        split = [merge(tokens, pair) for tokens in split]
    return merges


merges = train(WORDS, 14)
# --8<-- [end:train]


def shown(token):
    try:
        return token.decode()
    except UnicodeDecodeError:
        return token.hex(" ").upper()


def table_merges(say):
    head = [say("merge", "合并"), say("pair", "词元对"), say("count", "次数")]
    rows = [[*head, say("words that change", "发生变化的词")]]
    split = [to_bytes(word) for word in WORDS]
    for number, pair in enumerate(merges, 1):
        count = count_pairs(split)[pair]
        after = [merge(tokens, pair) for tokens in split]
        changed = ["·".join(map(shown, new)) for old, new in zip(split, after, strict=True)
                   if old != new]  # fmt: skip
        split = after
        rows.append(
            [
                number,
                " + ".join(f"`{shown(t)}`" for t in pair),
                count,
                ", ".join(changed),
            ]
        )
    return rows


# --8<-- [start:encode]
def encode(text, merges):
    """Split a text into bytes, then apply the merges in their order."""
    tokens = to_bytes(text)
    for pair in merges:
        tokens = merge(tokens, pair)
    return tokens


for text in ("longer", "shortest", "riverbed", "长城"):
    tokens = encode(text, merges)
    print(tokens, b"".join(tokens).decode() == text)
# --8<-- [end:encode]

# --8<-- [start:pieces]
from minimind.tokenizer.bpe import new_bpe

sentence = "It's 6300 km: (long) 长江.\n"
pieces = new_bpe().pre_tokenizer.pre_tokenize_str(sentence)
print([sentence[start:end] for _, (start, end) in pieces])
# --8<-- [end:pieces]

# --8<-- [start:textbook]
from itertools import islice

from minimind.data.textbook import prose
from minimind.tokenizer import train_tokenizer

corpus = list(islice(prose(seed=1), 3000))
tokenizer = train_tokenizer(corpus, vocab_size=2000)
text = "长江发源于高原。A goose."
ids = tokenizer.encode(text)
print(ids)
print([tokenizer.bytes_of[i].decode(errors="replace") for i in ids])
print(tokenizer.decode(ids) == text)
# --8<-- [end:textbook]

# --8<-- [start:longest]
tokens = [token.decode(errors="replace") for token in tokenizer.text_bytes_of]
for token in sorted(tokens, key=len, reverse=True)[:8]:
    print(repr(token))
# --8<-- [end:longest]

# --8<-- [start:control]
ids = tokenizer.encode("<|im_end|>")
print([tokenizer.bytes_of[i].decode() for i in ids])
print(tokenizer.special_ids.isdisjoint(ids))
# --8<-- [end:control]

# --8<-- [start:record]
import json
from pathlib import Path

import minimind

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
record = json.loads((records / "tokenizer-compression.json").read_text("utf-8"))


def bytes_per_token(name, text):
    """Return how many bytes of a recorded text one token covers on average."""
    return record["texts"][text]["bytes"] / record["tokens"][name][text]


sizes = [name for name in record["tokens"] if name.startswith("minimind")]
for name in sizes:
    print(f"{name:15} {bytes_per_token(name, 'Chinese web'):.2f}")
# --8<-- [end:record]


def figure_compression(figure, say):
    axes = figure.subplots()
    names = {
        "Chinese web": say("Chinese web text", "中文网页"),
        "Chinese encyclopaedia": say("Chinese encyclopaedia", "中文百科"),
        "English encyclopaedia": say("English encyclopaedia", "英文百科"),
    }
    for text, label in names.items():
        points = [
            (record["vocab_size"][n], bytes_per_token(n, text)) for n in sizes
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axvline(6400, ls="--", lw=1.2, color="0.5")
    axes.set_xscale("log")
    axes.set_xticks([400, 1600, 6400, 25600], ["400", "1,600", "6,400", "25,600"])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.set_xlabel(say("tokens in the vocabulary", "词表大小"))
    axes.set_ylabel(say("bytes per token", "每词元字节数"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:cost]
def layer_parameters(hidden, intermediate, layers, head_dim, heads, kv_heads):
    """Return the parameters of a transformer without its embedding."""
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return layers * (attention + 3 * hidden * intermediate + 2 * hidden) + hidden


small = layer_parameters(512, 1408, 8, 32, 16, 8)


def cost_per_byte(name, text, layers=small, hidden=512):
    """Return the multiplications per byte of text, in the layers and the head."""
    vocab_size = record["vocab_size"][name]
    return (layers + vocab_size * hidden) / bytes_per_token(name, text)


for name in sizes:
    embedding = record["vocab_size"][name] * 512
    share = embedding / (embedding + small)
    cost = cost_per_byte(name, "Chinese web") / 1e6
    print(f"{name:15} embedding {share:4.0%}, {cost:5.2f} million per byte")
# --8<-- [end:cost]


def figure_cost(figure, say):
    axes = figure.subplots()
    base = layer_parameters(768, 2048, 16, 48, 16, 8)
    for label, layers, hidden in (("small", small, 512), ("base", base, 768)):
        costs = [
            cost_per_byte(name, "Chinese web", layers, hidden) for name in sizes
        ]
        relative = [cost / min(costs) for cost in costs]
        axes.plot(
            [record["vocab_size"][name] for name in sizes],
            relative,
            marker="o",
            label=label,
        )
    axes.axvline(6400, ls="--", lw=1.2, color="0.5")
    axes.set_xscale("log")
    axes.set_xticks([400, 1600, 6400, 25600], ["400", "1,600", "6,400", "25,600"])
    axes.minorticks_off()
    axes.set_ylim(0.9, 3)
    axes.set_xlabel(say("tokens in the vocabulary", "词表大小"))
    axes.set_ylabel(say("cost per byte / the lowest", "每字节计算量 / 最低值"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


def table_published(say):
    texts = ["Chinese web", "Chinese encyclopaedia", "English encyclopaedia"]
    head = [say("tokenizer", "分词器"), say("tokens", "词元数")]
    head += [say("Chinese web", "中文网页"), say("Chinese encyclopaedia", "中文百科"),
             say("English encyclopaedia", "英文百科"),
             say("embedding at width 512", "宽度 512 时的嵌入参数")]  # fmt: skip
    rows = []
    for name in [
        "minimind 6400",
        *(n for n in record["tokens"] if not n.startswith("minimind")),
    ]:
        size = record["vocab_size"][name]
        ratios = [f"{bytes_per_token(name, text):.2f}" for text in texts]
        million = round(size * 512 / 1e6, 1)
        embedding = say(f"{million} million", f"{million * 100:,.0f} 万")
        rows.append([name, f"{size:,}", *ratios, embedding])
    return [head, *rows]


base = layer_parameters(768, 2048, 16, 48, 16, 8)
qwen = record["vocab_size"]["Qwen, Qwen2"]
facts = {
    "spelled": len(ids),
    "num_merges": f"{6400 - 256 - 16:,}",
    "web": f"{bytes_per_token('minimind 6400', 'Chinese web'):.2f}",
    "web_300": f"{bytes_per_token('minimind 300', 'Chinese web'):.2f}",
    "web_51200": f"{bytes_per_token('minimind 51200', 'Chinese web'):.2f}",
    "web_qwen": f"{bytes_per_token('Qwen, Qwen2', 'Chinese web'):.2f}",
    "web_mistral": f"{bytes_per_token('Mistral 7B v0.3', 'Chinese web'):.2f}",
    "share_6400": f"{6400 * 512 / (6400 * 512 + small):.0%}".replace("%", " %"),
    "share_qwen": f"{qwen * 512 / (qwen * 512 + small):.0%}".replace("%", " %"),
}
for size in (3200, 6400, 12800, 51200):
    cost = cost_per_byte(f"minimind {size}", "Chinese web") / 1e6
    facts[f"cost_{size}"] = f"{cost:.2f}", f"{100 * cost:,.0f}"  # million, 万
for size in (6400, 12800):
    cost = cost_per_byte(f"minimind {size}", "Chinese web", base, 768) / 1e6
    facts[f"base_cost_{size}"] = f"{cost:.1f}", f"{round(10 * cost) * 10:,}"
for name, key in (("minimind 25600", "web_25600"), ("Llama 3", "web_llama")):
    facts[key] = f"{bytes_per_token(name, 'Chinese web'):.2f}"
for name, key in (("minimind 6400", "english"), ("Llama 3", "english_llama")):
    facts[key] = f"{bytes_per_token(name, 'English encyclopaedia'):.2f}"
piece = {"words": WORDS}
