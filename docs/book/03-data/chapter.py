# --8<-- [start:pages]
RIVER = """The Yangtze is the longest river in Asia. It rises on the Tibetan
Plateau, runs east for about 6,300 kilometres and reaches the sea near Shanghai.
A third of the people of China live in its basin, and for two thousand years the
river has been the main road between the west and the coast."""

pages = {
    "article": "\ufeff" + RIVER.replace("\n", "\r\n") + "\u200b  \r\n\r\n\r\n\r\n",
    "copy": RIVER.replace(". ", ".\n").replace("The Yangtze", "THE YANGTZE"),
    "reprint": RIVER.replace("about 6,300", "some 6,300") + " (updated in May)",
    "menu": "Home\nRivers\nLog in",
    "footer": "Ten Rivers to See\nAll Rights Reserved. Contact the editors of this "
    "magazine by post.\nThis page sets a Cookie whenever you read it.",
    "advertisement": "Buy cheap river cruises now! " * 6,
    "tides": "Tides: "
    + ", ".join(f"{day}.{3 * day + 7}.{day * day}" for day in range(30)),
    "damaged": RIVER.replace("e", "\ufffd"),
    "lake": "A lake is fed by rivers and rain, and most lakes lose water through "
    "one outlet. Where there is none, only evaporation takes water away and the "
    "salt stays behind. That is why the Dead Sea and the Caspian Sea are salty.",
}
for name, text in pages.items():
    print(f"{name:13} {len(text):3} characters: {text[:40]!r}")
# --8<-- [end:pages]

# --8<-- [start:normalized]
from minimind.data.prepare.normalize import normalize

clean = {name: normalize(text) for name, text in pages.items()}
print(repr(pages["article"][-22:]))
print(repr(clean["article"][-22:]))
# --8<-- [end:normalized]

# --8<-- [start:filtered]
from minimind.data.prepare.characters import code_points
from minimind.data.prepare.filters import drop_reasons
from minimind.data.prepare.settings import load_prepare_settings

settings = load_prepare_settings("zh", ["language.min_chinese=0"])
points = code_points(list(clean.values()))
reasons = drop_reasons([*clean.values()], points, settings)
for name, reason in zip(clean, reasons, strict=True):
    print(f"{name:13} {reason or 'kept'}")
# --8<-- [end:filtered]

# --8<-- [start:record]
import json
from pathlib import Path

import minimind

records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
record = json.loads((records / "data-preparation.json").read_text("utf-8"))
run = record["runs"]["text and tokens"]
print(run["input_documents"], "documents read,", run["documents"], "kept")
print(run["tokens"])
# --8<-- [end:record]


def table_dropped(say):
    names = {
        "too short": "过短",
        "near-duplicate": "近似重复",
        "boilerplate": "页面套话",
        "exact duplicate": "完全重复",
        "repeated phrases": "短语重复",
        "repeated lines": "行重复",
        "unreadable characters": "无法辨认的字符",
        "too many symbols": "符号过多",
        "too much punctuation": "标点过多",
        "too many digits": "数字过多",
    }
    rows = [
        [
            say(name, names[name]),
            f"{count:,}",
            f"{count / run['input_documents']:.2%}",
        ]
        for name, count in run["dropped"].items()
    ]
    head = [say("reason", "原因"), say("documents", "文档数")]
    return [[*head, say("share", "占比")], *rows]


# --8<-- [start:exact]
from minimind.data.prepare.minhash import exact_keys

kept = ["article", "copy", "reprint", "lake"]
points = code_points([clean[name] for name in kept])
for name, key in zip(kept, exact_keys(points), strict=True):
    print(f"{name:8} {key:016x}")
# --8<-- [end:exact]


# --8<-- [start:similarity]
def shingles(text, length=5):
    """Return the set of all runs of `length` letters and digits of a text."""
    letters = "".join(filter(str.isalnum, text.lower()))
    return {letters[i : i + length] for i in range(len(letters) - length + 1)}


def similarity(a, b):
    """Return the Jaccard similarity of two texts: common / all shingles."""
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


print(sorted(shingles("The river"))[:4])
for name in ("copy", "reprint", "lake"):
    print(f"article and {name:8} {similarity(clean['article'], clean[name]):.3f}")
# --8<-- [end:similarity]

# --8<-- [start:signature]
from hashlib import blake2b


def signature(text, count=112):
    """Return the minimum of each of `count` hash functions over the shingles."""
    parts = [shingle.encode() for shingle in shingles(text)]
    return [
        min(blake2b(p, digest_size=8, salt=bytes([k])).digest() for p in parts)
        for k in range(count)
    ]


signatures = {name: signature(clean[name]) for name in kept}
for name in kept[1:]:
    pairs = zip(signatures["article"], signatures[name], strict=True)
    equal = sum(a == b for a, b in pairs)
    print(f"article and {name:8} {equal:3} of 112 minima are equal")
# --8<-- [end:signature]

# --8<-- [start:bands]
import numpy as np

from minimind.data.prepare.duplicates import connect
from minimind.data.prepare.minhash import band_keys

keys = band_keys(points, exact_keys(points), settings.near_duplicates)
print(f"{keys.shape[0]} bands, {keys.shape[1]} documents")
edges = []
for i in range(len(kept)):
    for j in range(i + 1, len(kept)):
        common = int((keys[:, i] == keys[:, j]).sum())
        print(f"{kept[i]:8} {kept[j]:8} {common:2} equal keys")
        if common:
            edges.append((i, j))
print(connect(len(kept), [np.array(edges).T]))
# --8<-- [end:bands]


def figure_bands(figure, say):
    import random

    import numpy as np

    from minimind.data.prepare.minhash import band_keys
    from minimind.data.textbook import prose

    def found(s, rows=8, bands=14):
        return 1 - (1 - s**rows) ** bands

    def keys_of(texts):
        points = code_points(texts)
        return band_keys(points, exact_keys(points), settings.near_duplicates)

    axes = figure.subplots()
    s = np.linspace(0, 1, 200)
    axes.plot(s, found(s), label=say("14 bands of 8", "14 组，每组 8 个"))
    axes.plot(s, found(s, 112, 1), ls=":", color="0.5",
              label=say("1 band of 112", "1 组，112 个"))  # fmt: skip
    axes.plot(s, found(s, 1, 112), ls="--", color="0.5",
              label=say("112 bands of 1", "112 组，每组 1 个"))  # fmt: skip

    chance, source, texts, copies = random.Random(1), prose(seed=1), [], []
    for _ in range(900):
        letters = filter(str.isalnum, "".join(next(source) for _ in range(6)))
        text = "".join(letters)[:300]
        copy = list(text)
        for _ in range(chance.randrange(1, 30)):
            copy[chance.randrange(len(copy))] = chance.choice(
                "天地玄黄宇宙洪荒日月"
            )
        texts.append(text)
        copies.append("".join(copy))
    shared = (keys_of(texts) == keys_of(copies)).any(0)
    similarities = np.array(list(map(similarity, texts, copies)))
    middle = np.arange(0.35, 1, 0.1)
    rates = [shared[abs(similarities - m) < 0.05].mean() for m in middle]
    axes.plot(middle, rates, "o", label=say("measured", "实测"))
    axes.set_xlabel(say("similarity s of two documents", "两篇文档的相似度 s"))
    axes.set_ylabel(say("probability of a common key", "至少一组相同的概率"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0.07, 0.55))


# --8<-- [start:split]
from minimind.data.schemas import Record


def split(text, validation_fraction=0.1):
    """Return the split of a document: its hash decides."""
    limit = validation_fraction * 2**64
    return "validation" if Record(text=text).split_key() < limit else "train"


texts = [f"Fact {number}: a river flows downhill." for number in range(1000)]
once = [split(text) for text in texts]
print(once.count("validation"), "of 1000")
print([split(text) for text in reversed(texts)] == once[::-1])
# --8<-- [end:split]

# --8<-- [start:stream]
from minimind.data.packing import TextSequences
from minimind.data.store import Shard

lengths = [5, 9, 2, 7, 4]
end = 0  # <|endoftext|>
tokens = np.concatenate([[n] * size + [end] for n, size in enumerate(lengths, 1)])
shard = Shard(tokens, mask=None, ends=np.flatnonzero(tokens == end) + 1)
sequences = TextSequences([shard], seq_len=8)
print("stream", tokens)
for index in range(len(sequences)):
    inputs, labels, _ = sequences.sequence(index)
    print("inputs", inputs, "labels", labels)
# --8<-- [end:stream]


# --8<-- [start:pack]
def pack(sizes, seq_len, strategy):
    """Return the sequences, each a list of sizes."""
    sequences = []
    for size in sizes:
        fitting = [s for s in sequences if sum(s) + size <= seq_len]
        if strategy == "one each":
            fitting = []
        elif strategy == "next fit":
            fitting = [s for s in sequences[-1:] if s in fitting]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            sequences.append([size])
    return sequences


sizes = [11, 4, 9, 3, 12, 6, 5, 7, 2, 10, 8, 3]
for strategy in ("one each", "next fit", "best fit"):
    packed = pack(sizes, 16, strategy)
    print(
        f"{strategy}: {len(packed)} sequences, {sum(sizes) / len(packed) / 16:.0%}"
    )
    print("  ", packed)
# --8<-- [end:pack]


def figure_packing(figure, say):
    names = {
        "one each": say("one per sequence", "每段一条"),
        "next fit": say("next fit", "下次适应"),
        "best fit": say("best fit", "最佳适应"),
    }
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, (strategy, name) in zip(panels, names.items(), strict=True):
        packed = pack(sizes, 16, strategy)
        for row, sequence in enumerate(packed):
            axes.barh(row, 16, color="0.5", alpha=0.25)
            left = 0
            for size in sequence:
                axes.barh(row, size, left=left, color="C0", ec="white", lw=1.2)
                left += size
        colon, share = say(": ", "："), sum(sizes) / len(packed) / 16
        axes.set_title(f"{name}{colon}{share:.0%}", fontsize=9)
        axes.set_xticks([0, 8, 16])
        axes.set_yticks([])
    panels[0].invert_yaxis()
    panels[0].set_ylabel(say("sequences", "序列"))
    panels[1].set_xlabel(say("positions", "位置"))


# --8<-- [start:chats]
from itertools import islice

from minimind.data.packing import ChatSequences
from minimind.data.textbook import dialogues

chats = [
    sum(len(message["content"]) + 5 for message in chat)
    for chat in islice(dialogues(1, "multi"), 2000)
]
total = sum(chats)
shard = Shard(np.ones(total), np.ones(total, np.uint8), np.cumsum(chats))
for seq_len in (128, 256, 512):
    report = ChatSequences([shard], seq_len, pad_id=0, seed=1).report
    alone = np.minimum(np.array(chats) - 1, seq_len).mean() / seq_len
    print(f"{seq_len}: {report.sequences} sequences, {report.truncated} truncated,")
    print(f"     {report.packing_efficiency:.1%} used; {alone:.1%} without packing")
# --8<-- [end:chats]

# --8<-- [start:segments]
small = Shard(
    np.arange(1, 10), np.array([0, 0, 1, 1, 0, 0, 0, 1, 1]), np.array([4, 9])
)
inputs, labels, segments = ChatSequences([small], 10, pad_id=0, seed=1).sequence(0)
print("inputs  ", inputs)
print("labels  ", labels)
print("segments", segments)
# --8<-- [end:segments]

# --8<-- [start:permuted]
from minimind.data.order import Order, permute

print(permute(np.arange(10), 10, 1))
print(permute(np.arange(10), 10, 2))
print(permute(np.array([10**12 - 1]), 10**12, 1))  # one of a trillion, no list
# --8<-- [end:permuted]

# --8<-- [start:resumed]
order = Order(sizes=(6, 4), weights=(1.0, 0.5), seed=1)
print("epoch size:", order.epoch_size)
whole = order.locate(0, 16)
print(whole[:8])
print(whole[8:])
resumed = order.locate(0, 5) + order.locate(5, 11)
halves = [
    order.locate(start + 2 * rank, 2)
    for start in range(0, 16, 4)
    for rank in (0, 1)
]
print(resumed == whole, [sample for half in halves for sample in half] == whole)
# --8<-- [end:resumed]


def figure_order(figure, say):
    axes = figure.subplots()
    for epoch in range(2):
        positions = np.arange(300 * epoch, 300 * (epoch + 1))
        indices = [
            index for _, index in Order((300,), (1.0,), 1).locate(300 * epoch, 300)
        ]
        axes.plot(positions, indices, ".", ms=4,
                  label=say(f"epoch {epoch + 1}", f"第 {epoch + 1} 轮"))  # fmt: skip
    axes.set_xlabel(say("position in the run", "在训练中的位置"))
    axes.set_ylabel(say("sequence", "序列编号"))
    axes.legend(
        frameon=False, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.15)
    )


dropped = run["dropped"]
report_256 = ChatSequences([shard], 256, pad_id=0, seed=1).report
equal_minima = sum(map(bytes.__eq__, signatures["article"], signatures["reprint"]))
facts = {
    "reprint_similarity": f"{similarity(clean['article'], clean['reprint']):.3f}",
    "lake_similarity": f"{similarity(clean['article'], clean['lake']):.3f}",
    "equal_minima": equal_minima,
    "alone": f"{sum(sizes) / len(sizes) / 16:.0%}".replace("%", " %"),
    "minima_share": f"{equal_minima / 112:.2f}",
    "common_bands": int((keys[:, 0] == keys[:, 2]).sum()),
    "found_half": f"{1 - (1 - 0.5**8) ** 14:.1%}".replace("%", " %"),
    "found_high": f"{1 - (1 - 0.8**8) ** 14:.1%}".replace("%", " %"),
    "input_documents": f"{run['input_documents']:,}",
    "kept_documents": f"{run['documents']:,}",
    "too_short": f"{dropped['too short']:,}",
    "near": dropped["near-duplicate"],
    "held_out": once.count("validation"),
    "efficiency": f"{report_256.packing_efficiency:.1%}".replace("%", " %"),
}
piece = {"sizes": sizes, "seq_len": 16}
