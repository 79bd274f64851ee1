# --8<-- [start:counts]
from collections import Counter, defaultdict
from itertools import pairwise

corpus = [
    "the river is long",
    "the river flows into the sea",
    "the sea is deep",
    "the sea is salty",
    "the mountain is high",
    "the river begins on the mountain",
]
followers = defaultdict(Counter)
for sentence in corpus:
    words = ["<s>", *sentence.split(), "</s>"]
    for word, next_word in pairwise(words):
        followers[word][next_word] += 1

print(dict(followers["the"]))
print(dict(followers["is"]))
# --8<-- [end:counts]


# --8<-- [start:probability]
def probability(next_word, word):
    """Return the share of the occurrences of `word` that `next_word` follows."""
    return followers[word][next_word] / followers[word].total()


for word in followers["the"]:
    print(f"P({word} | the) = {probability(word, 'the'):.3f}")
# --8<-- [end:probability]

# --8<-- [start:chain]
import math


def steps(sentence):
    """Return (next word, its probability) for each step of a sentence."""
    words = ["<s>", *sentence.split(), "</s>"]
    return [(b, probability(b, a)) for a, b in pairwise(words)]


for sentence in ["the sea is long", "the mountain flows into the sea"]:
    print(sentence, [round(p, 3) for _, p in steps(sentence)])
    print(f"  product: {math.prod(p for _, p in steps(sentence)):.5f}")
# --8<-- [end:chain]


# --8<-- [start:loss]
def loss(sentence):
    """Return the mean of -ln p over the words of a sentence, in nats per word."""
    return -sum(math.log(p) for _, p in steps(sentence)) / len(steps(sentence))


print(f"loss: {loss('the sea is long'):.3f} nats per word")
print(f"perplexity: {math.exp(loss('the sea is long')):.2f}")
# --8<-- [end:loss]


# --8<-- [start:ngram]
class NGram:
    """Predict the next byte from the `order` bytes before it, by counting."""

    def __init__(self, text, order):
        self.order = order
        self.followers = defaultdict(Counter)
        for i, byte in enumerate(text):
            for n in range(min(order, i) + 1):
                self.followers[text[i - n : i]][byte] += 1

    def probability(self, byte, context):
        """Return P(byte | context): 1/256, refined with ever longer contexts."""
        p = 1 / 256
        for n in range(min(self.order, len(context)) + 1):
            seen = self.followers.get(context[len(context) - n :], Counter())
            p = (seen[byte] + p) / (seen.total() + 1)
        return p


def losses(model, text):
    """Return -ln p of each byte of a text, in nats."""
    return [
        -math.log(model.probability(b, text[max(0, i - model.order) : i]))
        for i, b in enumerate(text)
    ]


# --8<-- [end:ngram]

# --8<-- [start:held-out]
from pathlib import Path

import minimind

licence = (Path(minimind.__file__).parents[1] / "LICENSE").read_bytes()
licence = b" ".join(licence.split())
training, held_out = licence[:8000], licence[8000:]
print(f"{len(training)} bytes to count, {len(held_out)} held out")

curves = {"training": [], "held out": []}
for order in range(8):
    model = NGram(training, order)
    for name, text in (("training", training), ("held out", held_out)):
        curves[name].append(sum(losses(model, text)) / math.log(2) / len(text))
for name, values in curves.items():
    print(f"{name:9}", [round(value, 2) for value in values])
# --8<-- [end:held-out]


def figure_orders(figure, say):
    axes = figure.subplots()
    names = {"training": ("text that was counted", "统计过的文本")}
    names |= {"held out": ("held-out text", "留出的文本")}
    for name, values in curves.items():
        axes.plot(range(8), values, marker="o", label=say(*names[name]))
    axes.set_xlabel(say("order: bytes of context", "阶数：上文的字节数"))
    axes.set_ylabel(say("bits per byte", "每字节比特数"))
    axes.set_ylim(0)
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:generate]
import random


def generate(model, prompt, length, seed):
    """Append `length` bytes, drawn with the probabilities that the model gives."""
    text, chance = prompt, random.Random(seed)
    for _ in range(length):
        weights = [model.probability(byte, text) for byte in range(256)]
        text += bytes(chance.choices(range(256), weights))
    return text.decode("ascii", errors="replace")


for order in (0, 1, 3, 6):
    print(order, generate(NGram(training, order), b"the ", 60, seed=1))
# --8<-- [end:generate]

# --8<-- [start:units]
text = b"Licensor grants You the right to use the Work."
nats = sum(losses(NGram(training, 3), text))
for unit, count in (("byte", len(text)), ("word", len(text.split()))):
    each = nats / count
    print(f"{each:6.2f} nats per {unit}, perplexity {math.exp(each):,.1f}")
print(f"{nats / math.log(2) / len(text):6.2f} bits per byte either way")
# --8<-- [end:units]


def figure_surprise(figure, say):
    axes = figure.subplots()
    bits = [nats / math.log(2) for nats in losses(NGram(training, 3), text)]
    axes.bar(range(len(text)), bits, width=0.8)
    axes.set_xticks(
        range(len(text)), [chr(b).replace(" ", "␣") for b in text], fontsize=8
    )
    axes.set_ylabel(say("surprise in bits", "意外程度（比特）"))
    axes.margins(x=0.01)


# --8<-- [start:compress]
import bz2
import json
import lzma
import tempfile
import zlib

from minimind.data.textbook import write_corpus

NONE = dict.fromkeys(
    ("single_turn", "multi_turn", "preference_pairs", "multiple_choice_questions"),
    0,
)
with tempfile.TemporaryDirectory() as folder:  # the corpus of `minimind demo`
    files = write_corpus(
        Path(folder),
        seed=1,
        prose_characters=3_000_000,
        held_out_characters=60_000,
        **NONE,
    )
    lines = files["held-out"].read_text("utf-8").splitlines()
unseen = "\n".join(json.loads(line)["text"] for line in lines).encode()
coders = {
    "zlib": lambda data: zlib.compress(data, 9),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}
compressed = {
    name: 8 * len(coder(unseen)) / len(unseen) for name, coder in coders.items()
}
print({name: round(value, 2) for name, value in compressed.items()})
# --8<-- [end:compress]

# --8<-- [start:record]
records = Path(minimind.__file__).parents[1] / "benchmarks" / "records"
demo = json.loads((records / "demo-summary.json").read_text("utf-8"))
print(f"unigram model {demo['unigram_bits_per_byte']:.2f}")
print(f"demo model    {demo['stages']['pretrain']['bits_per_byte']:.2f}")

metrics = (records / "real-small" / "pretrain-metrics.jsonl").read_text("utf-8")
rows = [json.loads(line) for line in metrics.splitlines()]
validations = [row for row in rows if row["kind"] == "validation"]
print(
    {
        key: round(value, 2)
        for key, value in validations[-1].items()
        if key != "kind"
    }
)
# --8<-- [end:record]
last = validations[-1]
trained = {
    row["step"]: row["bits_per_byte"] for row in rows if row["kind"] == "train"
}
gaps = [row["bits_per_byte"] - trained[row["step"]] for row in validations]


def figure_training(figure, say):
    axes = figure.subplots()
    train = [
        (row["tokens"] / 1e6, row["bits_per_byte"])
        for row in rows
        if row["kind"] == "train"
    ]
    tokens_of = {
        row["step"]: row["tokens"] / 1e6 for row in rows if row["kind"] == "train"
    }
    axes.plot(*zip(*train, strict=True), alpha=0.5, label=say("training", "训练"))
    points = [(tokens_of[row["step"]], row["bits_per_byte"]) for row in validations]
    axes.plot(
        *zip(*points, strict=True),
        marker="o",
        label=say("held-out text", "留出的文本"),
    )
    axes.axhline(
        3.312, ls="--", lw=1.2, color="0.5", label=say("unigram model", "一元模型")
    )
    axes.set_xlabel(say("tokens seen, millions", "已训练的词元数（百万）"))
    axes.set_ylabel(say("bits per byte", "每字节比特数"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


facts = {
    "p_river": f"{probability('river', 'the'):.3f}",
    "loss_sea": f"{loss('the sea is long'):.3f}",
    "perplexity_sea": f"{math.exp(loss('the sea is long')):.2f}",
    "held_out_0": f"{curves['held out'][0]:.2f}",
    "held_out_best": f"{min(curves['held out']):.2f}",
    "best_order": curves["held out"].index(min(curves["held out"])),
    "held_out_7": f"{curves['held out'][7]:.2f}",
    "training_7": f"{curves['training'][7]:.2f}",
    "demo_unigram": f"{demo['unigram_bits_per_byte']:.2f}",
    "demo_tokens": (  # million, 万
        f"{demo['stages']['pretrain']['tokens'] / 1e6:.1f}",
        f"{round(demo['stages']['pretrain']['tokens'] / 1e5) * 10}",
    ),
    "demo_bits": f"{demo['stages']['pretrain']['bits_per_byte']:.2f}",
    "bzip2": f"{compressed['bzip2']:.2f}",
    "gap_first": f"{gaps[0]:.2f}",
    "gap_last": f"{gaps[-1]:.2f}",
    "small_loss": f"{last['loss']:.2f}",
    "small_perplexity": f"{math.exp(last['loss']):.0f}",
    "small_bits": f"{last['bits_per_byte']:.2f}",
}
piece = {"training": training.decode("ascii")}
