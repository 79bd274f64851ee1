"""The data of the road `night`: text, dialogues and preferences from local sets, filtered.

    python -m benchmarks.night_data DATA --out night-data
    minimind road night

DATA has the folders pretrain, sft, dpo and eval, with files NAME.jsonl.zst named as below. The same
command continues an interrupted preparation.

Text: `minimind data prepare` reads all Chinese sets together, so that copies are found across sets.
The held-out sets come first: of duplicates, the first is kept, so no copy of a held-out document
is trained on. Benchmark questions are removed. `text/GROUP` then has a link to each part, because
groups have different weights in the road.

Dialogues: conversations are dropped if a user message is about the subject of one of the eight
questions that the road asks, or is a prompt of the evaluation, or if an answer speaks as another
company's model. Long conversations are cut after the last turn that fits. `textbook` has the prose,
dialogues and pairs of the textbook, which do teach the eight facts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_objects, read_records
from minimind.data.schemas import Record
from minimind.data.textbook import write_corpus
from minimind.files import atomic_file, write_json
from minimind.tokenizer.chat import Message

HELD_OUT = "held-out"
# (group, sets). The order decides which copy of a document is kept: the first.
CHINESE = [
    (HELD_OUT, ("zh_wiki_sample", "zh_web_clue_sample")),
    ("reading", ("zh_reading_passages", "zh_kdconv_kb")),
    ("general", ("zh_news_thucnews_cnews", "zh_news_sogouc")),
    ("formal", ("zh_news_peopledaily199801", "zh_news_xinwenlianbo")),
    ("general", ("zh_wiki_tech_misc", "zh_tech_lctt", "zh_tech_goldminer", "zh_tech_python100")),
    ("general", ("zh_debian_docs", "zh_csl_abstracts", "zh_fewclue", "zh_essays_books")),
    ("general", ("zh_web_dureader_demo",)),
    ("life", ("zh_life_lifehacker_mt",)),
    ("reviews", ("zh_reviews", "zh_xiehouyu")),
    ("classical", ("zh_luxun", "zh_gushiwen_annotated", "zh_poetry")),
    ("classical", ("zh_history_baihua_niutrans", "zh_novel_classic_vernacular")),
    ("formal", ("zh_laws",)),
]
ENGLISH = [("english", ("en_wiki_sample", "en_misc", "en_lctt_sources"))]
# Weight of each set: the share of its records that is written; above 1, records are repeated.
SINGLE_TURN = {
    **dict.fromkeys(["zh_alpaca_open_v3", "zh_belle_2k", "zh_charent_qa"], 1.0),
    **dict.fromkeys(["zh_llamafactory_alpaca_demo", "zh_ruozhiba_better"], 2.0),
    "zh_telechat_single": 3.0,
    "zh_lawyer_llama": 0.3,
    "zh_hikariming_native": 0.15,
    "zh_cmrc_qa": 0.5,
    "en_alpaca_20k": 0.15,
}
EXAM = {"zh_c3_mcq": 1.0}
MULTI_TURN = {
    **dict.fromkeys(["zh_telechat_multiturn", "zh_oasst"], 3.0),
    **dict.fromkeys(["zh_sharegpt_1k", "zh_kdconv_multiturn", "zh_emollm_multiturn"], 1.0),
    **dict.fromkeys(["zh_smile_multiturn", "zh_cpsycoun_multiturn", "zh_crosswoz_multiturn"], 0.4),
}
PREFERENCES = dict.fromkeys(
    [
        *("zh_llamafactory_dpo_demo", "zh_llmeval2_pairs", "zh_medicalgpt_dpo500"),
        *("zh_oasst_rm", "zh_ruozhiba_correction"),
    ],
    1.0,
)
# Subjects of the eight questions, in any wording: a user message about one is not trained on.
EIGHT = re.compile(
    r"长江|扬子江|泰山|熊猫|引力|珠穆朗玛|珠峰|圣母峰|斯普特尼克|人造(地球)?卫星"
    r"|[第首][^，。？\n]{0,12}卫星|卫星[^，。？\n]{0,12}[第首]"
    r"|最高的?[^，。？\n]{0,6}[山峰]|[山峰][^，。？\n]{0,6}最高"
    r"|[海洋][^，。？\n]{0,6}咸|盐[^，。？\n]{0,6}海"
    r"|你(叫|是)(什么|啥|谁|哪)|你的?(名字|姓名)|(怎么|如何)称呼你|介绍一?下?你自己"
    r"|yangtze|mount tai\b|\bpandas?\b|gravit|everest|(highest|tallest) (mountain|peak)|sputnik"
    r"|first (artificial )?satellite|(ocean|sea)( ?water)? (is )?salt|your name|who are you",
    re.IGNORECASE,
)
# Answers of other assistants about themselves, and remnants of their prompts.
OTHER_ASSISTANT = re.compile(
    r"ChatGPT|OpenAI|GPT-?[34]|<noinput>|语言模型|language model|作为一?[个名款]?(AI|人工智能|聊天)"
)
TEXTBOOK = {
    "prose_characters": 2_000_000,
    "held_out_characters": 100_000,
    "single_turn": 20_000,
    "multi_turn": 6_000,
    "preference_pairs": 4_000,
    "multiple_choice_questions": 3_000,
}
_MAX_CHARACTERS = 600  # about 480 tokens, so that a conversation fits into 512
_NUM_PROMPTS = {"belle_eval_set": 60, "mt_bench_zh": 20}
_PROGRAM = [sys.executable, "-m", "minimind"]


def main() -> None:
    """Prepare everything, and write the counts to OUT/counts.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with pretrain, sft, dpo and eval")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["text", "chat"], help="default: both")
    args = parser.parse_args()
    if args.only != "chat":
        prepare_text(args.data, args.out)
    if args.only != "text":
        prepare_chat(args.data, args.out)


def prepare_text(data: Path, out: Path) -> None:
    """Run `minimind data prepare` on the Chinese and the English sets, and link the groups."""
    benchmarks = {"zh": ("ceval", "cmmlu", "c3", "cmath"), "en": ("mmlu", "gsm8k")}
    thresholds = {
        "zh": ["length.minimum=20"],
        "en": ["length.minimum=20", "language.min_chinese=0"],
    }
    for language, groups in (("zh", CHINESE), ("en", ENGLISH)):
        names = [(group, name) for group, members in groups for name in members]
        paths = [str(data / "pretrain" / f"{name}.jsonl.zst") for _, name in names]
        checks = [f"--decontaminate={name}:{data / 'eval'}" for name in benchmarks[language]]
        command = [*_PROGRAM, "data", "prepare", *paths, "--out", str(out / language), *checks]
        subprocess.run([*command, "--memory", "2", *thresholds[language]], check=True)
        manifest = json.loads((out / language / "manifest.json").read_text("utf-8"))
        # Parts are numbered over all shards, which are named by the number of their input.
        for part, shard in enumerate(sorted(manifest["stages"]["read"])):
            group, name = names[int(shard.partition("-")[0])]
            link(out / language / "text" / f"part-{part:05}.jsonl.zst", out / "text" / group / name)


def link(part: Path, target: Path) -> None:
    """Link a part of the prepared text as `target` and the name of the part."""
    target.parent.mkdir(parents=True, exist_ok=True)
    name = target.with_name(f"{target.name}-{part.name}")
    if not name.exists():
        os.link(part, name)


def prepare_chat(data: Path, out: Path) -> None:
    """Write dialogues, preference pairs, evaluation prompts, their counts, and the textbook."""
    prompts = list(evaluation_prompts(data / "eval"))
    write_lines(out / "prompts.jsonl", prompts)
    known = {normalized(turn) for prompt in prompts for turn in prompt["turns"]}
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for folder, file, sets in (
        ("sft", "single-turn", SINGLE_TURN),
        ("sft", "exam", EXAM),
        ("sft", "multi-turn", MULTI_TURN),
        ("dpo", "preferences", PREFERENCES),
    ):
        counts[file] = {}
        values: list[dict[str, Any]] = []
        for name, weight in sets.items():
            counter: Counter[str] = Counter()
            path = data / folder / f"{name}.jsonl.zst"
            kept = list(filtered(read_set(path), known, counter))
            chosen = share(kept, weight)
            counts[file][name] = dict(counter) | {"kept": len(kept), "written": len(chosen)}
            values += chosen
        write_lines(out / f"{file}.jsonl", values)
        print(f"{file}: {len(values):,}")
    write_json(out / "counts.json", counts)
    write_corpus(out / "textbook", seed=0, **TEXTBOOK)
    if not (out / "eval").exists():
        (out / "eval").symlink_to((data / "eval").resolve())


def read_set(path: Path) -> Iterator[Record]:
    """Yield the records of a file."""
    return read_records(list_files(str(path)), invalid=InvalidRecords())


def evaluation_prompts(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield prompts evenly spaced over the files, as `minimind eval --task degeneration` reads."""
    for name, count in _NUM_PROMPTS.items():
        files = list_files(str(folder / f"{name}.jsonl.zst"))
        objects = [value for _, _, value in read_objects(files, invalid=InvalidRecords())]
        for number in range(count):
            value = objects[number * len(objects) // count]
            turns = value.get("turns") or [value["question"]]
            yield {"question": turns[0], "category": name, "turns": turns}


def filtered(
    records: Iterable[Record], prompts: set[str], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the records to train on, as JSON objects; count the reasons of the others.

    prompts: normalized prompts of the evaluation.
    """
    for record in records:
        counts["records"] += 1
        sides = [side for side in (record.messages, record.chosen, record.rejected) if side]
        sides = [cut(side) for side in sides] if record.kind == "messages" else sides
        users = [m["content"] for side in sides for m in side if m["role"] == "user"]
        answers = [m["content"] for side in sides for m in side if m["role"] == "assistant"]
        if not answers or sum(map(characters, sides)) > _MAX_CHARACTERS * len(sides):
            counts["too long"] += 1
        elif any(normalized(user) in prompts for user in users):
            counts["prompt of the evaluation"] += 1
        elif any(EIGHT.search(user) for user in users):
            counts["eight questions"] += 1
        elif any(OTHER_ASSISTANT.search(answer) for answer in answers):
            counts["other assistant"] += 1
        elif record.kind == "pair":
            yield {"chosen": sides[0], "rejected": sides[1]}
        else:
            yield {"conversations": sides[0]}


def cut(messages: Sequence[Message]) -> list[Message]:
    """Return the messages up to the last answer with which they fit into `_MAX_CHARACTERS`."""
    fitting: list[Message] = []
    size = 0
    for number, message in enumerate(messages, 1):
        size += len(message["content"])
        if size > _MAX_CHARACTERS:
            break
        if message["role"] == "assistant":
            fitting = list(messages[:number])
    return fitting


def characters(messages: Iterable[Message]) -> int:
    """Return the number of characters of all messages."""
    return sum(len(message["content"]) for message in messages)


def share(values: Sequence[dict[str, Any]], weight: float) -> list[dict[str, Any]]:
    """Return `weight` times as many values: repeated, or evenly spaced ones."""
    count = round(len(values) * weight)
    return [values[number * len(values) // count % len(values)] for number in range(count)]


def normalized(text: str) -> str:
    """Return the letters and digits of a text."""
    return "".join(filter(str.isalnum, text.lower()))


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for value in values:
            stream.write(json.dumps(value, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
