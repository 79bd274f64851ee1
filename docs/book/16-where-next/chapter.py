"""Chapter 16: where to go from here. See docs/en/book/contributing.md."""

# --8<-- [start:answers]
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
ANSWERS = [
    "The capital of Peru is Lima.",
    "Lima, Lima, Lima, Lima, Lima.",
    "That is a good question.",
    "The capital of Peru is Rome.",
]
start = torch.tensor([0.30, 0.20, 0.40, 0.10], dtype=torch.float64)
is_right = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
# --8<-- [end:answers]


# --8<-- [start:group]
def group_step(logits, generator, size=8, lr=0.5):
    """Return the logits after one step on a group of sampled answers."""
    probabilities = F.softmax(logits, 0)
    group = torch.multinomial(probabilities, size, True, generator=generator)
    rewards = is_right[group]
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    slopes = F.one_hot(group, 4) - probabilities  # of log-probabilities, [size, 4]
    return logits + lr * (advantages[:, None] * slopes).mean(0)


# --8<-- [end:group]


# --8<-- [start:reinforce]
def reinforce(seed, steps=30, size=8):
    """Return the probability of the right answer before each step."""
    generator = torch.Generator().manual_seed(seed)
    logits, history = start.log(), []
    for _ in range(steps):
        history.append(F.softmax(logits, 0)[0].item())
        logits = group_step(logits, generator, size)
    return history


curves = [reinforce(seed) for seed in range(5)]
for step in (0, 5, 10, 29):
    print(f"{step:2}", " ".join(f"{curve[step]:.2f}" for curve in curves))
# --8<-- [end:reinforce]


def figure_reinforce(figure, say):
    panels = figure.subplots(1, 2, sharey=True)
    for axes, size in zip(panels, (2, 16), strict=True):
        for seed in range(5):
            axes.plot(reinforce(seed, size=size), color="C0", lw=1.2, alpha=0.8)
        axes.set_title(say(f"groups of {size}", f"每组 {size} 个回答"))
        axes.set_xlabel(say("step", "步数"))
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.15)
    panels[0].set_ylabel(say("probability of the right answer", "正确回答的概率"))


# --8<-- [start:distill]
def divergence(teacher, student):
    """Return KL(teacher, student) in nats."""
    return (teacher * (teacher / student).log()).sum(-1)


generator = torch.Generator().manual_seed(1)
for count in (10, 100, 1000):
    drawn = torch.multinomial(
        start.expand(500, 4), count, True, generator=generator
    )
    counts = F.one_hot(drawn, 4).sum(1) + 0.5  # [500 students, 4]
    students = counts / counts.sum(1, keepdim=True)
    print(f"{count:4} sampled answers: KL {divergence(start, students).mean():.4f}")
# --8<-- [end:distill]


# --8<-- [start:vote]
def vote(probabilities, count, trials=20_000):
    """Return how often the right answer wins a vote of `count` samples."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(
        probabilities.expand(trials, 4), count, True, generator=generator
    )
    votes = F.one_hot(drawn, 4).sum(1) + torch.rand(trials, 4, generator=generator)
    return (votes.argmax(1) == 0).double().mean().item()  # ties are drawn by lot


better = torch.tensor([0.40, 0.20, 0.30, 0.10], dtype=torch.float64)
for count in (1, 5, 25, 125):
    print(f"{count:3} answers: {vote(better, count):.2f}")
# --8<-- [end:vote]

# --8<-- [start:tool]
import re

TABLE = {"Peru": "Lima", "Cuba": "Havana"}


def run_calls(text):
    """Replace each call in a text by its result."""
    return re.sub(
        r"\[capital\((\w+)\)\]", lambda call: TABLE.get(call[1], "unknown"), text
    )


print(run_calls("The capital of Peru is [capital(Peru)]."))
# --8<-- [end:tool]

# --8<-- [start:recurrence]
torch.manual_seed(1)
inputs, decay = torch.randn(6, dtype=torch.float64), 0.5
state, states = torch.tensor(0.0), []
for value in inputs:
    state = decay * state + value
    states.append(state)

distance = torch.arange(6)[:, None] - torch.arange(6)
weights = torch.where(distance >= 0, decay ** distance.double(), 0)
print(weights[:4, :4])
print(torch.allclose(weights @ inputs, torch.stack(states)))
# --8<-- [end:recurrence]

# Stage: English and Chinese name, chapter, files, command.
ROAD = [
    ("Text", "文本", "03-data", ["data/prepare/pipeline.py"], "data prepare TEXTS"),
    (
        *("Tokenizer", "分词器", "02-tokenizer", ["tokenizer/train.py"]),
        "tokenizer train TEXTS",
    ),
    (
        *("Model", "模型", "04-transformer"),
        ["model/transformer.py", "model/attention.py"],
        "plan",
    ),
    (
        "Experts",
        "混合专家",
        "09-experts",
        ["model/experts.py"],
        "pretrain pretrain-moe",
    ),
    (
        *("Pretraining", "预训练", "05-training"),
        ["training/trainer.py", "training/optimizers.py"],
        "pretrain --data TEXTS",
    ),
    (
        *("Many processes", "多进程", "13-many-processes"),
        ["training/distributed.py"],
        "pretrain --data TEXTS --nproc N",
    ),
    (
        "Scaling",
        "规模",
        "15-scaling",
        ["planning/sweep.py"],
        "sweep RECIPE KEY=A,B",
    ),
    (
        *("Fine-tuning", "监督微调", "06-conversation"),
        ["tokenizer/chat.py", "data/packing.py"],
        "sft --data CHATS",
    ),
    ("LoRA", "LoRA", "07-lora", ["model/lora.py"], "lora --data CHATS"),
    (
        *("Preferences", "偏好优化", "08-preferences"),
        ["training/objectives/preference.py"],
        "dpo --data PAIRS",
    ),
    (
        *("Longer contexts", "长上下文", "12-long-context"),
        ["model/rope.py"],
        "chat --context N",
    ),
    (
        *("Evaluation", "评测", "11-evaluation"),
        ["evaluation/bits_per_byte.py", "evaluation/multiple_choice.py"],
        "eval --task bpb",
    ),
    (
        *("Decoding", "解码", "10-decoding"),
        ["inference/engine.py", "inference/sampling.py"],
        "chat",
    ),
    ("Service", "服务", "14-serving", ["serving/app.py"], "serve"),
    ("Export", "导出", "14-serving", ["export/gguf.py"], "export gguf"),
]


def table_road(say):
    head = [
        say("stage", "环节"),
        say("chapter", "章"),
        say("begins in", "从哪个文件读起"),
    ]
    rows = [
        [
            say(english, chinese),
            str(int(chapter[:2])),
            f"`minimind/{files[0]}`",
            f"`minimind {command}`",
        ]
        for english, chinese, chapter, files, command in ROAD
    ]
    return [[*head, say("command", "命令")], *rows]


facts = {
    "right_before": f"{curves[0][0]:.2f}",
    "lowest_after": f"{min(curve[-1] for curve in curves):.2f}",
    "vote_one": f"{vote(better, 1):.2f}",
    "vote_many": f"{vote(better, 125):.2f}",
}
piece = [
    {
        "names": [english, chinese],
        "chapter": chapter,
        "files": files,
        "command": command,
    }
    for english, chinese, chapter, files, command in ROAD
]
