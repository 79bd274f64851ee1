"""Chapter 14: serving. See docs/en/book/contributing.md."""

# --8<-- [start:data]
from dataclasses import replace
from itertools import islice

import numpy as np

from minimind.data.packing import ChatSequences, MixedDataset
from minimind.data.store import Shard
from minimind.data.textbook import dialogues, load_subjects
from minimind.tokenizer import train_tokenizer
from minimind.tokenizer.chat import encode_chats


def part_of(name, columns):
    """Return a subject of the textbook with some of its columns."""
    [subject] = (s for s in load_subjects() if s.path.stem == name)
    kept = [r for r in subject.relations if r.column in columns and r.asks_by_name]
    kept = [replace(r, answers=r.answers[:1]) for r in kept]  # one way to answer
    return replace(subject, relations=tuple(kept))


subjects = [part_of("planets", ["order", "kind"]), part_of("english", ["capital"])]
facts_to_learn = [fact for subject in subjects for fact in subject.facts]
chats = list(islice(dialogues(1, subjects=subjects), 3000))
texts = [message["content"] for chat in chats for message in chat]
tokenizer = train_tokenizer(texts, vocab_size=512)


def packed(chats):
    """Return conversations as training reads them, in sequences of 128 tokens."""
    encoded = encode_chats(tokenizer, chats)
    shard = Shard(
        tokens=np.concatenate([np.array(ids) for ids, _ in encoded]),
        mask=np.concatenate([np.array(mask, np.uint8) for _, mask in encoded]),
        ends=np.cumsum([len(ids) for ids, _ in encoded]),
    )
    return ChatSequences([shard], 128, pad_id=tokenizer.end_of_text, seed=0)


data = MixedDataset([packed(chats)], [1.0], seed=0)
print(len(facts_to_learn), "facts,", len(chats), "conversations")
# --8<-- [end:data]

# --8<-- [start:learn]
import torch

from minimind.config.settings import OptimSettings, ScheduleSettings
from minimind.model import ModelConfig, Transformer
from minimind.training.batch import to_device
from minimind.training.objectives.next_token import NextToken
from minimind.training.optimizers import Optimizers
from minimind.training.schedule import lr_fraction

torch.set_num_threads(1)
torch.manual_seed(1)
config = ModelConfig(
    vocab_size=tokenizer.vocab_size,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
model, cpu, steps = Transformer(config), torch.device("cpu"), 200
objective = NextToken(tokenizer.token_bytes, cpu)
optimizers = Optimizers(model, OptimSettings(lr=1e-2, muon_lr=0.03))
for step in range(steps):
    optimizers.set_lr(lr_fraction(step, steps, ScheduleSettings()))
    output = objective.loss(model, to_device(data.batch(8 * step, 8), cpu))
    (output.loss_sum / output.count).backward()
    optimizers.step()
    optimizers.zero_grad()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
# --8<-- [end:learn]

# --8<-- [start:directory]
import tempfile
from pathlib import Path

from minimind.model import save_model

folder = Path(tempfile.mkdtemp())
save_model(folder / "planets", model, tokenizer)
for file in sorted((folder / "planets").iterdir()):
    print(f"{file.name:24} {file.stat().st_size:7} bytes")
# --8<-- [end:directory]

# --8<-- [start:serve]
import threading
import time

from minimind.serving.models import find_models, load_models
from minimind.serving.server import Server, bind, url_of

served = load_models(find_models([folder]), device="cpu", slots=4)
sockets = bind("127.0.0.1", 0)  # port 0: any free one
server = Server(served)
thread = threading.Thread(target=server.serve_at, args=(sockets,), daemon=True)
thread.start()
while not server.started:
    time.sleep(0.01)
print(list(served), url_of(sockets).rpartition(":")[0])
# --8<-- [end:serve]

# --8<-- [start:request]
import json
import urllib.error
import urllib.request

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post(body):
    """Send a chat request; return the open response."""
    request = urllib.request.Request(
        url_of(sockets) + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    return opener.open(request, timeout=60)


def question(text, **parameters):
    messages = [{"role": "user", "content": text}]
    return {"model": "planets", "messages": messages, "temperature": 0} | parameters


with post(question("What is the capital of Peru?")) as response:
    answer = json.load(response)
print(answer["choices"][0]["message"]["content"])
print(answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"])
# --8<-- [end:request]

# --8<-- [start:stream]
with post(question("火星是第几颗行星？", stream=True)) as response:
    events = [line.decode().strip() for line in response if line.strip()]
for event in events[:-1]:
    [choice] = json.loads(event.removeprefix("data: "))["choices"]
    print(choice["delta"], choice["finish_reason"])
print(events[-1])
# --8<-- [end:stream]

# --8<-- [start:characters]
from minimind.inference.detokenizer import StreamingDetokenizer

detokenizer = StreamingDetokenizer(tokenizer)
for token in tokenizer.encode("冥王星"):
    print(f"{tokenizer.bytes_of[token].hex(' '):10} {detokenizer.push(token)!r}")
# --8<-- [end:characters]

# --8<-- [start:stop]
from minimind.inference.stop_strings import TextStream

stream = TextStream(tokenizer, stop=["Lima."])
for token in tokenizer.encode("Lisbon or Lima. Or"):
    stream.push(token)
    ready = stream.take()
    print(f"{tokenizer.decode([token])!r:6} -> {ready[0] if ready else ''!r}")
    if stream.stopped:
        break
# --8<-- [end:stop]

# --8<-- [start:together]
from concurrent.futures import ThreadPoolExecutor


def ask(text):
    with post(question(text, max_tokens=32)) as response:
        return json.load(response)["choices"][0]["message"]["content"]


questions = [fact.questions[0] for fact in facts_to_learn[::4]]
alone = [ask(text) for text in questions]
with ThreadPoolExecutor(len(questions)) as clients:
    together = list(clients.map(ask, questions))
print(len(questions), "at the same time, the same answers:", alone == together)
# --8<-- [end:together]

# --8<-- [start:queue]
from minimind.serving.admission import AdmissionQueue
from minimind.serving.errors import APIError

queue = AdmissionQueue(slots=2, max_queued=1)
try:
    for number in (1, 2, 3, 4):
        queue.admit(1)
        print(f"request {number} admitted, {queue.queued} waiting")
except APIError as error:
    print(error.status, error, "retry-after:", error.headers["retry-after"])
# --8<-- [end:queue]

# --8<-- [start:errors]
for wrong in ({"temprature": 0.5}, {"tools": [{"type": "function"}]}):
    try:
        post(question("Hello", **wrong))
    except urllib.error.HTTPError as error:
        print(error.code, json.load(error)["error"]["message"])
server.should_exit = True  # that was all; the service ends
thread.join()
# --8<-- [end:errors]

# --8<-- [start:export]
from minimind.export.gguf import export_gguf

report = export_gguf(folder / "planets", folder / "planets.gguf", type="q8_0")
content = report.path.read_bytes()
print(f"{len(content):,} bytes: {len(content) // 1000} kB")
print(content[:24].hex(" "))
# --8<-- [end:export]

# --8<-- [start:read]
import struct


class Reader:
    """Read the numbers and strings of a GGUF file, one after the other."""

    def __init__(self, content):
        self.content, self.at = content, 0

    def number(self, kind):
        [value] = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self):
        length = self.number("Q")
        self.at += length
        return self.content[self.at - length : self.at].decode()

    def value(self, kind):
        """Read a value of one of the thirteen types of GGUF."""
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, length = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(length)]
        return self.number("BbHhIif?  Qqd"[kind])


def read_gguf(content):
    """Return the metadata, and (dimensions, type, start) of each tensor by name."""
    reader = Reader(content)
    assert reader.number("4s") == b"GGUF" and reader.number("I") == 3
    num_tensors, num_keys = reader.number("Q"), reader.number("Q")
    metadata = {}
    for _ in range(num_keys):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
    tensors = {}
    for _ in range(num_tensors):
        name = reader.text()
        dimensions = [reader.number("Q") for _ in range(reader.number("I"))]
        tensors[name] = (dimensions, reader.number("I"), reader.number("Q"))
    start = (
        -(-reader.at // 32) * 32
    )  # the next multiple of 32, the default alignment
    return metadata, {n: (d, t, start + at) for n, (d, t, at) in tensors.items()}


# --8<-- [end:read]

# --8<-- [start:metadata]
metadata, tensors = read_gguf(content)
for key, value in metadata.items():
    if isinstance(value, list) or len(str(value)) > 40:
        unit = "entries" if isinstance(value, list) else "characters"
        value = f"{len(value)} {unit}"
    print(f"{key:38} {f'{value:g}' if isinstance(value, float) else value}")
# --8<-- [end:metadata]

# --8<-- [start:tensors]
for name in ("token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight"):
    dimensions, kind, start = tensors[name]
    print(f"{name:23} {dimensions!s:10} type {kind} at byte {start}")
print(len(tensors), "tensors")
# --8<-- [end:tensors]

# --8<-- [start:block]
start = tensors["token_embd.weight"][2]
row = model.model.embed_tokens.weight[0, :32].detach().numpy()
scale = np.frombuffer(content, np.float16, 1, start)[0].astype(np.float32)
integers = np.frombuffer(content, np.int8, 32, start + 2)
ours = np.rint(row / (abs(row).max() / 127))
print("the same integers:", np.array_equal(integers, ours))
print("the largest of them:", abs(integers).max())
error = abs(integers * scale - row).max()
print("every error is at most half a step:", bool(error <= 1.01 * scale / 2))
# --8<-- [end:block]


def figure_block(figure, say):
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import dequantize, quantize

    values = model.model.layers[1].mlp.up_proj.weight[5, :32].detach().numpy()
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, (Kind.Q8_0, Kind.Q4_0), strict=True):
        packed_values = quantize(values, kind)
        stored = dequantize(packed_values, kind)
        axes.plot(values, "o", ms=4, mfc="none", label=say("weight", "权重"))
        axes.plot(stored, "x", ms=4, label=say("stored", "存下的值"))
        for i, (a, b) in enumerate(zip(values, stored, strict=True)):
            axes.plot([i, i], [a, b], color="0.5", lw=0.8)
        axes.set_title(kind.name.lower(), fontsize=10)
        axes.set_xlabel(say("number within the block", "块内的序号"))
        axes.grid(alpha=0.15)
    panels[1].legend(frameon=False, fontsize=8)


# --8<-- [start:quantized]
import copy


def rounded(model, bits):
    """Return a copy whose weights have `bits` bits, in blocks of 32."""
    changed, highest = copy.deepcopy(model), 2 ** (bits - 1) - 1
    for parameter in changed.parameters():
        if parameter.ndim == 2:
            blocks = parameter.detach().view(-1, 32)
            scales = blocks.abs().amax(1, keepdim=True) / highest
            parameter.data = ((blocks / scales).round() * scales).view_as(parameter)
    return changed


def weight_error(changed):
    """Return the relative error of all matrices together."""
    pairs = zip(changed.parameters(), model.parameters(), strict=True)
    both = [(a.detach(), b.detach()) for a, b in pairs if b.ndim == 2]
    squares = sum((a - b).square().sum() for a, b in both)
    return (squares / sum(b.square().sum() for _, b in both)).sqrt().item()


for bits in (8, 6, 4, 3, 2):
    print(f"{bits} bits: weights off by {weight_error(rounded(model, bits)):.1g}")
# --8<-- [end:quantized]


# --8<-- [start:losses]
unseen = packed(list(islice(dialogues(2, subjects=subjects), 300)))
held_out = to_device(MixedDataset([unseen], [1.0], seed=0).batch(0, 64), cpu)


@torch.no_grad()
def loss_of(model):
    """Return the loss on answers to unseen questions, in nats per token."""
    output = objective.loss(model, held_out)
    return (output.loss_sum / output.count).item()


plain = loss_of(model)
losses = {bits: loss_of(rounded(model, bits)) for bits in range(2, 9)}
print("the same with 8 bits:", abs(losses[8] - plain) < 0.1 * plain)
# --8<-- [end:losses]


def figure_bits(figure, say):
    axes = figure.subplots()
    axes.plot(list(losses), list(losses.values()), marker="o")
    axes.axhline(plain, ls="--", lw=1.2, color="0.5")
    axes.set_xlabel(
        say(
            "bits per weight, without the scales",
            "每个权重的比特数（不算缩放因子）",
        )
    )
    axes.set_ylabel(
        say("loss on answers, nats per token", "回答的损失（奈特／词元）")
    )
    axes.set_yscale("log")
    axes.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    axes.minorticks_off()
    axes.text(2, 1.15 * plain, say("not rounded", "未舍入"), color="0.5",
              fontsize=9)  # fmt: skip
    axes.grid(alpha=0.15)


# --8<-- [start:modelfile]
from minimind.export.ollama import export_ollama

export_ollama(folder / "planets", folder / "ollama", name="planets", type="q8_0")
print((folder / "ollama" / "Modelfile").read_text("utf-8"))
# --8<-- [end:modelfile]

import base64
import shutil

shutil.rmtree(folder)


def table_types(say):
    head = [
        say("type", "格式"),
        say("a block of 32 weights", "一块 32 个权重"),
        say("bits per weight", "每个权重的比特数"),
        say("matrices of this model, kB", "本模型的矩阵，kB"),
        say("matrices of small, MB", "small 的矩阵，MB"),
    ]
    scale, bytes_of = say("a scale and", "一个缩放因子加"), say("bytes", "字节")
    blocks = {
        "f16": (16, f"64 {bytes_of}"),
        "q8_0": (8.5, f"{scale} 32 {bytes_of}"),
        "q5_0": (5.5, f"{scale} 20 {bytes_of}"),
        "q4_0": (4.5, f"{scale} 16 {bytes_of}"),
    }
    count = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    return [
        head,
        *(
            [
                kind,
                block,
                f"{bits:g}",
                f"{count * bits / 8000:.0f}",
                f"{26.9 * bits / 8:.0f}",
            ]
            for kind, (bits, block) in blocks.items()
        ),
    ]


from minimind.data.textbook.quiz import QuizQuestion, is_correct
from minimind.inference.generate import answer_all

asked = [(fact, fact.held_out[0]) for fact in facts_to_learn]
given = answer_all(model, tokenizer, [text for _, text in asked], max_new_tokens=32)
right = sum(
    is_correct(QuizQuestion(text, fact.keys, "", fact.answers[0]), reply)
    for (fact, text), reply in zip(asked, given, strict=True)
)
# The model of the piece: what the file holds, so that both can be compared.
import gguf
from gguf.quants import dequantize, quantize

stored = copy.deepcopy(model)
for parameter in stored.parameters():
    if parameter.ndim == 2:
        blocks = quantize(
            parameter.detach().numpy(), gguf.GGMLQuantizationType.Q8_0
        )
        numbers = dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        parameter.data = torch.from_numpy(numbers)
PIECE_QUESTIONS = ["What is the capital of Peru?", "火星是第几颗行星？"]
prompts = [
    encode_chats(tokenizer, [[{"role": "user", "content": text}]])[0][0]
    + [tokenizer.im_start, *tokenizer.encode("assistant\n")]
    for text in PIECE_QUESTIONS
]
with torch.inference_mode():
    last = [stored.logits(stored(torch.tensor([ids])))[0, -1] for ids in prompts]
facts = {
    "num_facts": len(facts_to_learn),
    "num_right": right,
    "num_asked": len(asked),
}
piece = {
    "questions": [
        *PIECE_QUESTIONS,
        "天王星是什么类型的行星？",
        "What is the capital of Mexico?",
    ],
    "prompts": prompts,
    "logits": [[round(value, 4) for value in logits.tolist()] for logits in last],
    "answers": answer_all(stored, tokenizer, PIECE_QUESTIONS, max_new_tokens=32),
    "gguf": base64.b64encode(content).decode(),
}
