"""Chapter 11: evaluation. See docs/en/book/contributing.md."""

# --8<-- [start:counts]
import math
from collections import Counter, defaultdict


class Counts:
    """Predict the next token from the `order` tokens before it, by counting."""

    def __init__(self, documents, order, num_tokens):
        self.order, self.num_tokens = order, num_tokens
        self.followers = defaultdict(Counter)
        for tokens in documents:
            for t, token in enumerate(tokens):
                for n in range(min(order, t) + 1):
                    self.followers[tuple(tokens[t - n : t])][token] += 1

    def probability(self, token, context):
        """Return P(token | context): 1/num_tokens, refined with longer contexts."""
        p = 1 / self.num_tokens
        for n in range(min(self.order, len(context)) + 1):
            seen = self.followers.get(tuple(context[len(context) - n :]))
            if seen is None:
                break
            p = (seen[token] + p) / (seen.total() + 1)
        return p

    def nats(self, tokens, start=0):
        """Return the sum of -ln P over the tokens from index `start` on."""
        return -sum(
            math.log(
                self.probability(tokens[t], tokens[max(0, t - self.order) : t])
            )
            for t in range(start, len(tokens))
        )


# --8<-- [end:counts]

# --8<-- [start:tokenizers]
from itertools import islice

from minimind.data.textbook import prose
from minimind.tokenizer import train_tokenizer

training = list(islice(prose(1), 1000))
known = set(training)
held_out = list(islice((text for text in prose(2) if text not in known), 60))
num_bytes = [len(text.encode()) for text in held_out]

rows, bits = [], {}
for vocab_size in (300, 600, 1200, 2400):
    tokenizer = train_tokenizer(training, vocab_size=vocab_size)
    model = Counts(map(tokenizer.encode, training), 2, tokenizer.vocab_size)
    ids = [tokenizer.encode(text) for text in held_out]
    bits[vocab_size] = [model.nats(tokens) / math.log(2) for tokens in ids]
    loss = sum(bits[vocab_size]) * math.log(2) / sum(map(len, ids))
    rows.append((math.exp(loss), sum(bits[vocab_size]) / sum(num_bytes)))
    perplexity, per_byte = rows[-1]
    print(
        f"{vocab_size:5} tokens: perplexity {perplexity:5.2f},",
        f"bits per byte {per_byte:.3f}",
    )
# --8<-- [end:tokenizers]


def figure_tokenizers(figure, say):
    panels = figure.subplots(1, 2)
    labels = (say("perplexity", "困惑度"), say("bits per byte", "每字节比特数"))
    for column, (axes, label) in enumerate(zip(panels, labels, strict=True)):
        axes.plot(list(bits), [row[column] for row in rows], marker="o")
        axes.set_xscale("log")
        axes.set_xticks(list(bits), [str(size) for size in bits])
        axes.minorticks_off()
        axes.set_ylim(0)
        axes.set_xlabel(say("vocabulary size", "词表大小"))
        axes.set_title(label, fontsize=9)
        axes.grid(alpha=0.15)


# --8<-- [start:intervals]
from minimind.evaluation.statistics import ratio_interval

for vocab_size in (600, 2400):
    low, high = ratio_interval(bits[vocab_size], num_bytes)
    print(f"{vocab_size:5} tokens: {low:.3f} to {high:.3f} bits per byte")
# --8<-- [end:intervals]

# --8<-- [start:exam]
import random

PAIRS = """France Paris, Japan Tokyo, Italy Rome, Spain Madrid, China Beijing,
Egypt Cairo, Peru Lima, Cuba Havana, Norway Oslo, Kenya Nairobi, Greece Athens,
Portugal Lisbon, Chile Santiago, Iran Tehran, Nepal Kathmandu, Vietnam Hanoi,
Thailand Bangkok, Poland Warsaw, Sweden Stockholm, Finland Helsinki, Ghana Accra,
Hungary Budapest, Ireland Dublin, Uruguay Montevideo, Sudan Khartoum, Iraq Baghdad,
Senegal Dakar, Morocco Rabat, Austria Vienna, Jamaica Kingston, Qatar Doha,
Venezuela Caracas, Argentina Buenos Aires, Mexico Mexico City, Jordan Amman,
Cambodia Phnom Penh, Ethiopia Addis Ababa, Mongolia Ulaanbaatar, Iceland Reykjavik,
Colombia Bogota"""
CAPITALS = dict(
    pair.split(maxsplit=1) for pair in PAIRS.replace("\n", " ").split(", ")
)
taught = list(CAPITALS)[:30]  # of the other ten, only the cities are mentioned
sentences = [f"The capital of {land} is {CAPITALS[land]}." for land in taught]
sentences += [f"{capital} is a large city." for capital in CAPITALS.values()]
model = Counts(sentences, order=14, num_tokens=128)  # a token is one character

chance = random.Random(1)
exam = {}  # land: its four options
for land, capital in CAPITALS.items():
    wrong = [city for city in CAPITALS.values() if city != capital]
    exam[land] = [capital, *chance.sample(wrong, 3)]
    chance.shuffle(exam[land])
print(exam["Peru"])
# --8<-- [end:exam]


# --8<-- [start:score]
def log_likelihood(model, prompt, continuation):
    """Return ln P(continuation | prompt)."""
    return -model.nats(prompt + continuation, start=len(prompt))


prompt = "The capital of Peru is"
for city in exam["Peru"]:
    score = log_likelihood(model, prompt, f" {city}.")
    per_byte = score / len(f" {city}.")
    print(f"{city:10} {score:6.1f} nats, {per_byte:5.2f} per byte")
# --8<-- [end:score]


# --8<-- [start:styles]
def letter_scores(model, land):
    """Score the letters A to D after the question and its options."""
    lines = [
        f"{letter}. {city}" for letter, city in zip("ABCD", exam[land], strict=True)
    ]
    prompt = "\n".join([f"Which city is the capital of {land}?", *lines, "Answer:"])
    return [log_likelihood(model, prompt, f" {letter}") for letter in "ABCD"]


def text_scores(model, land, prompt, per_byte):
    """Score the complete answers after a prompt."""
    answers = [f" {city}." for city in exam[land]]
    return [
        log_likelihood(model, prompt.format(land), answer)
        / (len(answer) if per_byte else 1)
        for answer in answers
    ]


QUESTION = "Which city is the capital of {}? Answer:"
SENTENCE = "The capital of {} is"
STYLES = {
    "letter": letter_scores,
    "question, sum": lambda m, land: text_scores(m, land, QUESTION, False),
    "question, per byte": lambda m, land: text_scores(m, land, QUESTION, True),
    "sentence, per byte": lambda m, land: text_scores(m, land, SENTENCE, True),
}


def sit(model, style):
    """Return the options that the model chooses, by land."""
    chosen = {}
    for land, options in exam.items():
        scores = STYLES[style](model, land)
        chosen[land] = options[scores.index(max(scores))]
    return chosen


def count_right(chosen):
    return sum(city == CAPITALS[land] for land, city in chosen.items())


for style in STYLES:
    chosen = sit(model, style)
    length = sum(map(len, chosen.values())) / len(chosen)
    print(f"{style:18} {count_right(chosen):2} of 40 right, {length:.1f} bytes")
# --8<-- [end:styles]

# --8<-- [start:wilson]
from minimind.evaluation.statistics import wilson_interval

RESULTS = {
    "our exam, by letter": (count_right(sit(model, "letter")), len(exam)),
    "random weights, C-Eval": (319, 1346),
    "random weights, CMMLU": (2901, 11582),
    "demo model, C-Eval": (335, 1342),
}
for name, (right, questions) in RESULTS.items():
    low, high = wilson_interval(right, questions)
    print(f"{name:23} {right / questions:.1%}, interval {low:.1%} to {high:.1%}")
# --8<-- [end:wilson]

# --8<-- [start:subjects]
chance = random.Random(3)
guesses = sorted(sum(chance.random() < 1 / 4 for _ in range(26)) for _ in range(52))
print(f"best subject {guesses[-1]} of 26, worst {guesses[0]} of 26")
above = sum(wilson_interval(right, 26)[0] > 1 / 4 for right in guesses)
print(f"{above} of 52 intervals lie above chance; all: {sum(guesses)} of {26 * 52}")
# --8<-- [end:subjects]


def figure_subjects(figure, say):
    axes = figure.subplots()
    values = [right / 26 for right in guesses]
    limits = [wilson_interval(right, 26) for right in guesses]
    errors = [
        [value - low for value, (low, _) in zip(values, limits, strict=True)],
        [high - value for value, (_, high) in zip(values, limits, strict=True)],
    ]
    axes.errorbar(range(1, 53), values, yerr=errors, fmt="o", ms=3.5, lw=1)
    axes.axhline(0.25, ls="--", lw=1.2, color="0.5")
    axes.set_yticks([0, 0.25, 0.5, 0.75], ["0 %", "25 %", "50 %", "75 %"])
    axes.set_ylim(0)
    axes.set_xlabel(say("subjects, sorted", "学科，从低到高"))
    axes.set_ylabel(say("accuracy", "准确率"))
    axes.grid(alpha=0.15)


# --8<-- [start:answers]
from minimind.data.textbook import is_correct, quiz

river = next(q for q in quiz() if "长江" in q.question and "6300" in q.answer)
print(river.question, river.answer, river.keys)
for answer in (
    "长江全长约6300公里。",
    "约6,300公里！",
    "长江全长约5464公里。",
    "长江不是6300公里。",
    "长江很长很长很长很长。",
    "长江长约6300公里，长江长约6300公里，长江长约6300公里。",
    "长江长约6300",
):
    print("right" if is_correct(river, answer) else "wrong", answer)
# --8<-- [end:answers]

# --8<-- [start:judge]
import re
import tempfile
from pathlib import Path

from minimind.evaluation.judge import judge, make_trials, verdicts
from minimind.evaluation.open_ended import Prompt

prompts = [Prompt(land, f"What is the capital of {land}?") for land in exam]
chance = random.Random(1)
answers = {"brief": {}, "wordy": {}}
for land, capital in CAPITALS.items():
    right = {"brief": chance.random() < 0.8, "wordy": chance.random() < 0.6}
    wrong = chance.choice([city for city in CAPITALS.values() if city != capital])
    answers["brief"][land] = f"{capital if right['brief'] else wrong}."
    answers["wordy"][land] = (
        f"That is an interesting question. The capital of {land}, a country with "
        f"a long history, is {capital if right['wordy'] else wrong}, of course."
    )


def invented_judge(first=0, per_word=0):
    """Return a judge that likes the first answer, or long answers, too much."""

    def ask(messages):
        request = messages[1]["content"]
        land = re.search(r"capital of (\w+)\?", request)[1]
        found = re.findall(r"\[answer (.)\]\n(.*)\n\[end", request)
        scores = {
            letter: 10
            + 40 * (CAPITALS[land] in answer)
            + first * (letter == "A")
            + per_word * len(answer.split())
            for letter, answer in found
        }
        return str({"reason": "invented", **scores}).replace("'", '"')

    return ask


trials = make_trials(prompts, answers)
judges = {
    "fair": invented_judge(),
    "prefers the first": invented_judge(first=30),
    "prefers long answers": invented_judge(per_word=2),
}
wins, reports = {}, {}
for name, ask in judges.items():
    with tempfile.TemporaryDirectory() as folder:
        replies = judge(ask, trials, Path(folder) / "judge.jsonl", identity={})
    reports[name] = verdicts(trials, replies, list(answers))
    wins[name] = {row["model"]: row["wins"] for row in reports[name]["ranking"]}
    print(
        f"{name:20} brief wins {wins[name]['brief']:.0%}, the two orders agree in",
        f"{reports[name]['position_consistency']:.0%}",
    )
# --8<-- [end:judge]

# --8<-- [start:orders]
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "judge.jsonl"
    replies = judge(judges["prefers the first"], trials, path, identity={})
for first in ("brief", "wordy"):
    shown = [replies[trial.id] for trial in trials if trial.models[0] == first]
    better = sum(
        reply["scores"][reply["models"].index("brief")] == max(reply["scores"])
        for reply in shown
    )
    print(f"{first} always first: brief wins {better / len(shown):.0%}")
# --8<-- [end:orders]

# --8<-- [start:contaminated]
leaked = [QUESTION.format(land) + f" {CAPITALS[land]}." for land in exam]
contaminated = Counts(sentences + leaked, order=14, num_tokens=128)
REWORDED = "Tell me {}'s capital city. Answer:"
STYLES["reworded"] = lambda m, land: text_scores(m, land, REWORDED, True)
for style in ("question, per byte", "reworded"):
    clean, spoilt = (count_right(sit(m, style)) for m in (model, contaminated))
    print(f"{style:18} clean {clean:2} of 40, contaminated {spoilt:2} of 40")
# --8<-- [end:contaminated]

# --8<-- [start:search]
from minimind.data.ngrams import QuestionIndex

questions = {land: f"Which city is the capital of {land}?" for land in exam}
index = QuestionIndex(questions)
documents = [
    "Quiz night! WHICH city is the capital of Peru – Lima, Rome or Oslo?",
    "The capital of Peru is Lima.",
    "Do you know what the capital of Peru is?",
    "秘鲁的首都是哪座城市？",
]
for document in documents:
    print([land for _, land in index.search([document])], document)
# --8<-- [end:search]


# --8<-- [start:write]
import minimind
from minimind.evaluation.degeneration import repeated_fraction, split_words

licence = (Path(minimind.__file__).parents[1] / "LICENSE").read_text("utf-8")
words = split_words(licence)
writer = Counts([words], order=1, num_tokens=len(set(words)))


def write(temperature, seed, length=60):
    """Continue "the work", each word from the counts of the word before it."""
    text, chance = ["the", "work"], random.Random(seed)
    for _ in range(length):
        seen = writer.followers.get((text[-1],)) or writer.followers[()]
        if temperature == 0:
            text.append(seen.most_common(1)[0][0])
        else:
            weights = [count ** (1 / temperature) for count in seen.values()]
            text += chance.choices(list(seen), weights)
    return text


for temperature in (0, 1):
    text = write(temperature, seed=1)
    print(f"temperature {temperature}: repeated {repeated_fraction(text):.2f}")
    print("  " + " ".join(text[:12]) + " …")
excerpts = [words[start : start + 62] for start in range(0, len(words) - 62, 62)]
human = sum(map(repeated_fraction, excerpts)) / len(excerpts)
print(f"excerpts of the licence itself: repeated {human:.2f}")
# --8<-- [end:write]


def figure_repetition(figure, say):
    axes = figure.subplots()
    temperatures = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1]
    means = [
        sum(repeated_fraction(write(temperature, seed)) for seed in range(40)) / 40
        for temperature in temperatures
    ]
    axes.plot(temperatures, means, marker="o", label=say("written", "写出的文字"))
    label = say("the licence", "许可证原文")
    axes.axhline(human, ls="--", lw=1.2, color="0.5", label=label)
    axes.set_ylim(0, 1)
    axes.set_xlabel(say("temperature", "温度"))
    axes.set_ylabel(say("repeated 4-grams", "重复的 4-gram 比例"))
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)


# --8<-- [start:degeneration]
RECORDED = [  # one answer of the demo, three of the model on real text
    "长江全长约6300公里。",
    "你好，我可以找到一个小明的小明和小明的小明。",
    "海洋的水中是海洋的水中，水中水的水中，",
    "一、一颗星星的星星是1000的，1000的星星，1000，1000，",
]
for answer in RECORDED:
    print(f"{repeated_fraction(split_words(answer)):.2f} {answer}")
low, high = wilson_interval(0, 8)
print(f"none of 8 answers unfinished: interval {low:.0%} to {high:.0%}")
# --8<-- [end:degeneration]


def percent(value):
    return f"{value:.0%}".replace("%", " %")


sentence = sit(model, "sentence, per byte")
options = [city for cities in exam.values() for city in cities]
facts = {
    "perplexity_300": f"{rows[0][0]:.2f}",
    "perplexity_1200": f"{rows[2][0]:.2f}",
    "perplexity_2400": f"{rows[3][0]:.2f}",
    "bits_300": f"{rows[0][1]:.2f}",
    "bits_1200": f"{rows[2][1]:.2f}",
    "bits_2400": f"{rows[3][1]:.2f}",
    "sentence_right": count_right(sentence),
    "untaught_right": sum(
        sentence[land] == CAPITALS[land] for land in exam if land not in taught
    ),
    "option_bytes": f"{sum(map(len, options)) / len(options):.1f}",
    "letter_right": count_right(sit(model, "letter")),
    "fair": percent(wins["fair"]["brief"]),
    "long": percent(wins["prefers long answers"]["brief"]),
    "spoilt": count_right(sit(contaminated, "question, per byte")),
    "excerpts": f"{human:.2f}",
}
piece = {"right": 335, "questions": 1342}
