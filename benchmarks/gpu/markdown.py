"""The GPU report as Markdown, rendered from its record alone."""

import statistics
from collections import defaultdict
from typing import Any

Rows = list[list[str]]


def render(record: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    parts = record["parts"]
    lines = ["# GPU report", "", f"{record['date']}, by `{record['command']}`.", ""]
    lines += table(["", ""], [[key, str(value)] for key, value in record["machine"].items()])
    lines += ["", "## Parts", ""]
    lines += table(
        ["part", "result", "seconds", "failures"],
        [
            [
                name,
                part["status"],
                str(part.get("seconds", "")),
                ", ".join(failures(part)) or "none",
            ]
            for name, part in parts.items()
        ],
    )
    for name, section in SECTIONS.items():
        if name in parts:
            lines += ["", *section(parts)]
    errors = [
        f"- {name}, {key}: `{part[key]['error'][:400]}`"
        for name, part in parts.items()
        for key in failures(part)
    ]
    if errors:
        lines += ["", "## Failures", "", *errors]
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: Rows) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def failures(part: dict[str, Any]) -> list[str]:
    """Return the names of the measurements of a part that raised an exception."""
    return [k for k, v in part.items() if isinstance(v, dict) and "error" in v]


def _measured(part: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    return {k: v for k, v in part.items() if isinstance(v, dict) and key in v}


def _training(parts: dict[str, Any]) -> list[str]:
    part = parts["training"]
    ceiling = part.get("attainable", {}).get("bf16_tflops")
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, value in _measured(part, "real_tokens_per_second").items():
        rounds[key.rsplit(" ", 1)[0]].append(value)
    rows = []
    for name, measured in rounds.items():
        rates = [x["real_tokens_per_second"] for x in measured]
        tflops = measured[0].get("model_tflops")
        used = f"{tflops:.0f}" if tflops else ""
        share = f"{tflops / ceiling:.1%}" if tflops and ceiling else ""
        rows.append(
            [
                name,
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f}-{max(rates):,.0f}",
                used,
                share,
                f"{measured[0]['peak_memory_mb']:,.0f}",
                str(measured[0].get("micro_batch", "")),
            ]
        )
    head = ["contender", "real tokens/s", "spread", "TFLOP/s", "MFU", "peak MB", "micro-batch"]
    note = ""
    if ceiling:
        note = (
            f"MFU is relative to a large bf16 matrix product here: {ceiling:.0f} TFLOP/s; a copy "
            f"moves {part['attainable']['copy_gb_per_second']:,.0f} GB/s."
        )
    return ["## Training speed", "", note, "", *table(head, rows)]


def _capped(parts: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{x['real_tokens_per_second']:,.0f}",
            f"{x['reserved_mb']:,.0f}",
            str(x["micro_batch"]),
        ]
        for name, x in _measured(parts["capped"], "real_tokens_per_second").items()
    ]
    head = ["model", "real tokens/s", "reserved MB", "micro-batch"]
    return ["## Training within 2 GiB", "", *table(head, rows)]


def _decoding(parts: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{x['tokens_per_second']:,.0f}",
            f"{x['min']:,.0f}-{x['max']:,.0f}",
            f"{x['first_token_ms']:.1f}",
        ]
        for name, x in _measured(parts["decoding"], "tokens_per_second").items()
    ]
    head = ["model, streams, way", "tokens/s", "spread", "first token, ms"]
    agreement = parts["decoding"].get("agreement", {})
    notes = [f"- {name}: {value}" for name, value in agreement.items() if name != "at"]
    return ["## Decoding speed", "", *table(head, rows), "", *notes]


def _profile(parts: dict[str, Any]) -> list[str]:
    lines = ["## Kernels of two optimizer steps"]
    for name, x in _measured(parts["profile"], "kernels").items():
        lines += [
            "",
            f"{name}: {1000 * x['seconds_of_two_steps']:.0f} ms, kernels busy "
            f"{x['busy_fraction']:.0%}, {x['launches']:,} launches.",
            "",
            *table(
                ["kernel", "ms", "calls"],
                [
                    [f"`{k['name'].replace('`', '')}`", str(k["ms"]), str(k["calls"])]
                    for k in x["kernels"][:15]
                ],
            ),
        ]
    return lines


def _processes(parts: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{x['all_reduce_gb_per_second']:,.1f}",
            f"{x['real_tokens_per_second']:,.0f}",
            str(x["replicas_equal"]),
        ]
        for name, x in _measured(parts["processes"], "replicas_equal").items()
    ]
    head = ["processes", "all-reduce GB/s", "real tokens/s", "replicas equal"]
    return ["## Processes on one GPU", "", *table(head, rows)]


def _pretraining(parts: dict[str, Any]) -> list[str]:
    part, lines = parts["pretraining"], ["## Training on real text"]
    for stage in ("pretrain", "sft"):
        if not isinstance(part.get(stage), dict) or "error" in part[stage]:
            continue
        x = part[stage]
        note = ", stopped before the last" if x.get("unfinished") else ""
        lines += ["", f"### {stage}: {x['steps']:,} steps{note}", ""]
        summary = x.get("summary", {})
        plain = {k: v for k, v in summary.items() if isinstance(v, (str, int, float))}
        lines += table(["", ""], [[k, str(v)] for k, v in plain.items()])
        curve = x["curve"][:: max(1, len(x["curve"]) // 15)]
        lines += ["", *table(["step", "loss"], [[str(p["step"]), str(p["loss"])] for p in curve])]
        rows = [[str(p["step"]), str(p["bits_per_byte"])] for p in x["validation"]]
        lines += ["", *table(["step", "held-out bits per byte"], rows), ""]
        lines += [f"> {s['prompt']}{s['text']}".replace("\n", " ") + "\n" for s in x["samples"]]
    answers = part.get("answers", [])
    for x in answers if isinstance(answers, list) else []:
        lines += ["", f"**{x['question']}** {x['answer']}"]
    return lines


def _output(title: str, name: str) -> Any:
    def section(parts: dict[str, Any]) -> list[str]:
        text = parts[name].get("output", "")
        return [f"## {title}", "", "```", text[-5000:].replace("```", "'''"), "```"]

    return section


SECTIONS = {
    "training": _training,
    "capped": _capped,
    "decoding": _decoding,
    "profile": _profile,
    "processes": _processes,
    "pretraining": _pretraining,
    "doctor": _output("minimind doctor", "doctor"),
    "tests": _output("Tests marked gpu", "tests"),
}
