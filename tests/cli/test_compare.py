import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.config.settings import LoRASettings
from minimind.data.textbook import DEMO_QUESTIONS
from minimind.model import apply_lora, load_model, save_adapter
from minimind.model.lora import LoRALinear
from minimind.tokenizer import Tokenizer
from tests.support.judges import longer_is_better
from tests.support.killing import kill_amid
from tests.support.remote_services import RemoteService, like_gpt5
from tests.support.services import save_models, serving


def run(folder: Path, *arguments: object, **variables: str) -> Result:
    """Run `compare` with its results in FOLDER/out."""
    words = ["compare", *map(str, arguments), "--out", str(folder / "out"), "--device", "cpu"]
    return CliRunner().invoke(app, words, env={"COLUMNS": "160"} | variables)


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text("utf-8"))
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()[1:]]


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, `tiny` and `other`."""
    return save_models(tmp_path_factory.mktemp("models"), tokenizer)


def test_eight_questions_to_two_models(models: Path, tmp_path: Path) -> None:
    words = (models / "tiny", models / "other" / "model", "--max-new-tokens", 20)
    done = run(tmp_path, *words, "--json", tmp_path / "also.json")
    assert done.exit_code == 0, done.output
    found = written(tmp_path)
    assert json.loads((tmp_path / "also.json").read_text("utf-8")) == found
    assert list(found["models"]) == ["tiny", "other"]
    assert [one["question"] for one in found["questions"]] == list(DEMO_QUESTIONS)
    for name, metrics in found["models"].items():
        assert (metrics["answers"], metrics["failed"], metrics["tokens"]) == (8, 0, 20)
        assert metrics["never_end"] == 1
        answers = {
            line["id"]: line["answer"] for line in lines(tmp_path / "out" / name / "answers.jsonl")
        }
        assert answers == {one["id"]: one["answers"][name]["answer"] for one in found["questions"]}
    for page in ("compare.html", "compare.md"):
        assert DEMO_QUESTIONS[0] in (tmp_path / "out" / page).read_text("utf-8")
    assert "100.0% (67.6% – 100.0%)" in done.output
    again = run(tmp_path, *words)
    assert again.exit_code == 0
    assert written(tmp_path)["questions"] == found["questions"]
    for name in ("tiny", "other"):
        assert len(lines(tmp_path / "out" / name / "answers.jsonl")) == 8


def test_a_model_with_and_without_an_adapter(models: Path, tmp_path: Path) -> None:
    directory = models / "tiny" / "model"
    model = load_model(directory)
    torch.manual_seed(0)
    apply_lora(model, LoRASettings())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.normal_()
    save_adapter(tmp_path / "mine" / "adapter", model, LoRASettings(), directory)
    words = ("--limit", 2, "--max-new-tokens", 12)
    done = run(tmp_path, models / "tiny", f"{models / 'tiny'}+{tmp_path / 'mine'}", *words)
    assert done.exit_code == 0, done.output
    found = written(tmp_path)
    assert list(found["models"]) == ["tiny", "tiny + mine"]
    for one in found["questions"]:
        assert one["answers"]["tiny"]["answer"] != one["answers"]["tiny + mine"]["answer"]
    wrong = run(tmp_path, f"{models / 'tiny'}+{tmp_path / 'none'}", *words)
    assert wrong.exit_code == 1
    assert "none" in wrong.output


def test_failures_are_reported_and_the_rest_continues(models: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    rows = [
        {"question": "泰山在哪里？", "category": "地理"},
        {"nothing": "here"},
        {"question": "长江" * 3000, "category": "地理"},
        {"turns": ["\x1b[31mWhy is the sea salty?"], "category": "sci\x1bence"},
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn", "utf-8")
    words = ("--prompts", questions, "--max-new-tokens", 8)
    assert run(tmp_path / "alone", models / "tiny", *words).exit_code == 1, "an answer failed"
    done = run(tmp_path, tmp_path / "nowhere", models / "tiny", "http://127.0.0.1:9", *words)
    assert done.exit_code == 1
    assert "no such directory" in done.output
    assert "cannot be reached" in done.output
    assert "2 invalid lines in the questions" in done.output
    assert "tiny: 1 failed" in done.output
    assert "Traceback" not in done.output
    found = written(tmp_path)
    answers = [one["answers"]["tiny"] for one in found["questions"]]
    assert ["error" in answer for answer in answers] == [False, True, False]
    assert (found["models"]["tiny"]["answers"], found["models"]["tiny"]["failed"]) == (2, 1)
    assert "By category" in done.output
    assert "\x1b" not in done.output


def test_a_killed_comparison_is_resumed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """SIGKILL in the middle of the answers; the sampled answers are the same."""
    questions = tmp_path / "q.txt"
    questions.write_text("".join(f"第{n}个问题？\n" for n in range(30)), encoding="utf-8")
    save_models(tmp_path, tokenizer)
    words = ["tiny", "--prompts", "q.txt", "--max-new-tokens", "40", "--temperature", "1"]
    words = ["compare", *words, "--out", "out", "--device", "cpu"]
    results = tmp_path / "out" / "tiny" / "answers.jsonl"
    kept = kill_amid(words, tmp_path, results, 1_500)
    assert 1 < len(kept) < 31
    words = [tmp_path / "tiny", "--prompts", questions, "--max-new-tokens", 40, "--temperature", 1]
    assert run(tmp_path, *words).exit_code == 0
    found = results.read_bytes().splitlines()
    assert found[: len(kept)] == kept
    assert len(found) == 31
    assert written(tmp_path)["models"]["tiny"]["answers"] == 30
    # The same answers as without an interruption.
    assert run(tmp_path / "whole", *words).exit_code == 0
    whole = lines(tmp_path / "whole" / "out" / "tiny" / "answers.jsonl")
    assert {one["id"]: one["answer"] for one in whole} == {
        one["id"]: one["answer"] for one in lines(results)
    }


def test_results_with_other_settings_are_not_overwritten(models: Path, tmp_path: Path) -> None:
    words = (models / "tiny", "--limit", 2, "--max-new-tokens", 4)
    assert run(tmp_path, *words).exit_code == 0
    refused = run(tmp_path, *words, "--temperature", 0.5)
    assert refused.exit_code == 1
    assert "another evaluation" in refused.output
    assert written(tmp_path)["settings"]["temperature"] == 0
    assert run(tmp_path, *words, "--temperature", 0.5, "--fresh").exit_code == 0
    assert written(tmp_path)["settings"]["temperature"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", "3"), "less than or equal to 2"),
        (("--prompts", "gone.txt"), "no such file"),
        (("--prompts", __file__), "unsupported file format"),
    ],
)
def test_invalid_options(
    models: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    done = run(tmp_path, models / "tiny", *words)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_judge_ranks_models_by_its_scores(models: Path, tmp_path: Path) -> None:
    words = (models / "tiny", models / "other", "--max-new-tokens", 20)
    with RemoteService(longer_is_better) as judge:
        done = run(
            tmp_path, *words, "--judge", judge.url, MINIMIND_JUDGE_API_KEY="j", MINIMIND_API_KEY="k"
        )
        assert done.exit_code == 0, done.output
        found = written(tmp_path)
        assert len(judge.requests) == 16
        assert set(judge.keys) == {"Bearer j"}
        assert run(tmp_path, *words, "--judge", judge.url).exit_code == 0
        assert len(judge.requests) == 16
    lengths = {
        name: [min(one["answers"][name]["characters"], 100) for one in found["questions"]]
        for name in ("tiny", "other")
    }
    verdict = found["judge"]
    assert verdict["position_consistency"] == 1
    assert {row["model"]: row["score"] for row in verdict["ranking"]} == {
        name: pytest.approx(sum(own) / 8) for name, own in lengths.items()
    }
    best = max(lengths, key=lambda name: sum(lengths[name]))
    assert verdict["ranking"][0]["model"] == best
    won = [(a > b) + (a == b) / 2 for a, b in zip(*lengths.values(), strict=True)]
    wins = {row["model"]: row["wins"] for row in verdict["ranking"]}
    assert wins["tiny"] == pytest.approx(sum(won) / 8)
    assert "Position consistency: 100.0%" in done.output
    for page in ("compare.html", "compare.md"):
        assert "Ranking" in (tmp_path / "out" / page).read_text("utf-8")
    assert "The longer, the better." in (tmp_path / "out" / "compare.html").read_text("utf-8")


def test_failed_verdicts_are_requested_again(models: Path, tmp_path: Path) -> None:
    words = (models / "tiny", models / "other", "--limit", 3, "--max-new-tokens", 5)
    broken = True

    def say(messages: list[dict[str, str]]) -> str:
        if broken and "长江" in messages[-1]["content"]:
            raise RuntimeError("overloaded")
        return longer_is_better(messages)

    with RemoteService(say) as judge:
        first = run(tmp_path, *words, "--judge", f"{judge.url}#judge")
        assert first.exit_code == 1
        assert "2 of 6 requests failed" in first.output
        assert "overloaded" in first.output
        broken = False
        second = run(tmp_path, *words, "--judge", f"{judge.url}#judge")
        assert (second.exit_code, len(judge.requests)) == (0, 8)
    assert written(tmp_path)["judge"]["read"] == 6
    missing = run(tmp_path, *words, "--judge", "http://127.0.0.1:9")
    assert missing.exit_code == 1
    assert "--judge http://127.0.0.1:9 failed" in missing.output
    assert written(tmp_path)["models"]


def test_rejected_parameters_of_a_judge_are_reported(models: Path, tmp_path: Path) -> None:
    words = (models / "tiny", models / "other", "--limit", 2, "--max-new-tokens", 5)
    with RemoteService(longer_is_better, "judge", like_gpt5, "429") as judge:
        done = run(tmp_path, *words, "--judge", judge.url)
    assert done.exit_code == 0, done.output
    assert written(tmp_path)["judge"]["read"] == 4
    assert "judge: the service rejects temperature; its defaults apply" in done.output
    assert {body["max_completion_tokens"] for body in judge.requests} == {2048}


def test_services_answer_like_directories_and_unreadable_verdicts_are_counted(
    models: Path, tmp_path: Path
) -> None:
    words = ("--limit", 3, "--max-new-tokens", 12, "--temperature", 1, "--seed", 5)
    with serving(models, tmp_path / "log") as process:
        place = f"{process.url}#other"
        done = run(tmp_path, place, models / "other", *words, "--judge", f"{process.url}#tiny")
    assert done.exit_code == 0, done.output
    found = written(tmp_path)
    there, here = found["models"]
    assert (there, here) == ("other", "other 2")
    for one in found["questions"]:
        assert one["answers"][there] == one["answers"][here]
    verdict = found["judge"]
    assert (verdict["trials"], verdict["read"], verdict["unreadable"]) == (6, 0, 6)
    assert verdict["ranking"] == []
    assert "6 were not the requested JSON" in done.output


def test_degeneration_is_a_task_of_eval(models: Path, tmp_path: Path) -> None:
    words = ["eval", str(models / "tiny"), "--task", "degeneration", "--limit", "2"]
    words += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "out" / "tiny" / "degeneration.json").read_text("utf-8"))
    assert (metrics["answers"], metrics["never_end"]) == (2, 1)
    assert "never_end 1" in done.output
