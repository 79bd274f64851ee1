"""The training commands, run with the smallest model."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.cli.train import finish
from minimind.training.stage import StageResult
from tests.support.commands import fast_python

NANO = (
    *("device=cpu", "data.seq_len=32", "data.validation_fraction=0.1"),
    *(
        "training.steps=6",
        "training.global_batch_size=4",
        "training.precision=fp32",
        "validation.num_sequences=4",
    ),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MINIMIND_CACHE": "cache", "COLUMNS": "200"}


class Place:
    """A folder with data and a tokenizer, in which commands run."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder = folder
        self.pretrain = ("pretrain", *NANO, "model.preset=nano", "--data", "text.jsonl")
        self.pretrain += ("--tokenizer", str(tokenizer))
        self.sft = ("sft", *NANO, "--data", "chat.jsonl")
        self.dpo = ("dpo", *NANO, "data.seq_len=64", "--data", "pairs.jsonl")

    def run(self, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*fast_python(), "-m", "minimind", *map(str, arguments)],
            cwd=self.folder,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=200,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def run_here(self, *arguments: object, status: int = 0, input: str | None = None) -> Result:
        """Run a command in this process, which saves seconds of start-up."""
        with contextlib.chdir(self.folder):
            done = CliRunner().invoke(app, [*map(str, arguments)], input=input, env=ENVIRONMENT)
        assert done.exit_code == status, done.output
        return done

    def error(self, *arguments: object) -> str:
        """Return the error message of a command that fails."""
        return only_line(self.run_here(*arguments, status=1).stderr)


def only_line(stderr: str) -> str:
    [line] = stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def place(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    with (folder / "text.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(200):
            stream.write(json.dumps({"text": f"长江第{number}段长{7 * number}公里。"}) + "\n")
    with (folder / "chat.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(100):
            turns = [("user", f"第{number}段多长？"), ("assistant", f"{7 * number}公里。")]
            chat = [{"role": role, "content": content} for role, content in turns]
            stream.write(json.dumps({"conversations": chat}) + "\n")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(100):
            pair = {"chosen": f"{7 * number}公里。", "rejected": "不知道。"}
            stream.write(json.dumps({"prompt": f"第{number}段多长？"} | pair) + "\n")
    return Place(folder, tokenizer_dir)


@pytest.mark.skipif(sys.platform == "win32", reason="another shell")
@pytest.mark.parametrize("name", ["我的 模型[1]", "it's $HOME"])
def test_the_suggested_command_works_when_pasted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = tmp_path / name, tmp_path / f"base of {name}"
    for objective, adapter, words in [
        ("pretrain", None, ["minimind", "generate", str(run), "..."]),
        ("chat", None, ["minimind", "chat", str(run)]),
        ("chat", run / "adapter", ["minimind", "chat", str(base), "--adapter", str(run)]),
    ]:
        summary = {"objective": objective, "base": str(base)}
        model = None if adapter else run / "model"
        finish(StageResult(run, model, summary, adapter), None)
        suggested = capsys.readouterr().out.rstrip().rpartition("Try it: ")[2]
        program, *rest = shlex.split(suggested)
        assert [Path(program).name, *rest] == words


def test_pretrain_sft_dpo_and_finished_runs(place: Place) -> None:
    done = place.run(*place.pretrain, "--out", "out/base", "--json", "figures/base.json")
    assert "bits per byte" in done.stdout
    model = r"The model is in out/base/model. Try it: \S*minimind generate out/base"
    assert re.search(model, done.stdout)
    assert "  长江是 → " in done.stdout, "a sample for a prompt of the recipe"
    run = place.folder / "out" / "base"
    metrics = json.loads((place.folder / "figures" / "base.json").read_text("utf-8"))
    assert metrics == json.loads((run / "summary.json").read_text("utf-8"))
    assert (metrics["objective"], metrics["steps"]) == ("pretrain", 6)
    assert (place.folder / "cache" / "stores").is_dir()

    hint = "out/base was only pretrained: it continues text and has not been trained to answer. "
    hint += "Fine-tune it on conversations: minimind sft --model out/base --data CHATS --out DIR"
    said = place.run_here("chat", "out/base", "--device", "cpu", input="长江\n")
    assert said.stdout and said.stderr.splitlines() == [hint]
    quiz = ("--task", "quiz", "--limit", "1", "--device", "cpu", "--out", "eval")
    scored = place.run_here("eval", "out/base", *quiz)
    assert scored.stdout.splitlines().count(hint) == 1

    done = place.run(*place.sft, "--model", "out/base", "--out", "out/chat")
    assert re.search(r"Try it: \S*minimind chat out/chat", done.stdout)
    assert " conversations in " in done.stdout
    assert (place.folder / "out" / "chat" / "model" / "model.safetensors").is_file()

    assert place.run_here("chat", "out/chat", "--device", "cpu", input="长江\n").stderr == ""
    assert "pretrained" not in place.run_here("eval", "out/chat", *quiz).output

    done = place.run_here(*place.dpo, "--model", "out/chat", "--out", "out/dpo")
    assert " pairs in " in done.stdout and "reference log-probabilities" in done.stdout
    assert "accuracy" in done.stdout and "rewards/margin" in done.stdout
    assert re.search(r"Try it: \S*minimind chat out/dpo", done.stdout)
    adapters = (*place.dpo, "--model", "out/chat", "--out", "out/dpo-lora", "lora.rank=2")
    assert "The adapter is in out/dpo-lora/adapter" in place.run_here(*adapters).stdout
    message = place.error(*place.dpo, "--model", "out/chat", "--out", "no", "--data", "chat.jsonl")
    assert (
        "chat.jsonl: no preference pairs found (skipped records: 100 no preference pairs)"
        in message
    )

    # `train` with the recipe of a finished run says so, and how to train longer.
    done = place.run_here("train", "out/chat/recipe.toml", "--json", "again.json")
    assert "out/chat is already finished, after 6 steps; nothing was trained\n" in done.stdout
    assert re.search(r"Try it: \S*minimind chat out/chat", done.stdout)
    advice = (
        "To train longer, add training.steps=12 to the same command; to start over, add --fresh"
    )
    assert done.stdout.splitlines()[-1] == advice
    again = json.loads((place.folder / "again.json").read_text("utf-8"))
    assert again == json.loads((place.folder / "out/chat/summary.json").read_text("utf-8"))

    message = place.error(*place.sft, "--model", "out/base", "--out", "out/base")
    assert message == (
        'out/base holds a run of another stage: objective was "pretrain" and is now "sft". '
        "Choose another --out"
    )

    # A different recipe for the same run is an error without --fresh.
    message = place.error("train", "out/chat/recipe.toml", "training.steps=2")
    assert message.startswith("out/chat holds a run of another recipe: training.steps was ")
    place.run_here("train", "out/chat/recipe.toml", "training.steps=12")
    assert json.loads((place.folder / "out/chat/summary.json").read_text("utf-8"))["steps"] == 12
    place.run_here("train", "out/chat/recipe.toml", "training.steps=2", "--fresh")
    assert json.loads((place.folder / "out/chat/summary.json").read_text("utf-8"))["steps"] == 2


def test_mixture_of_experts(place: Place) -> None:
    moe = ("model.preset=nano-moe", "training.log_every=2")
    done = place.run_here(*place.pretrain, *moe, "--out", "out/moe")
    assert "parameters (" in done.output and " active per token) on cpu" in done.output
    place.run_here(*place.sft, "--model", "out/moe", "--out", "out/moe-chat")
    for run in (place.folder / "out" / "moe", place.folder / "out" / "moe-chat"):
        config = json.loads((run / "model" / "config.json").read_text("utf-8"))
        assert config["architectures"] == ["GraniteMoeSharedForCausalLM"]
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        for kind in ("train", "validation"):
            last = [line for line in lines if line["kind"] == kind][-1]
            loads = [last[f"expert_load/{expert}"] for expert in range(4)]
            assert sum(loads) == pytest.approx(1.0)
            assert 0 <= last["expert_load/min"] <= min(loads)
            assert max(loads) <= last["expert_load/max"] <= 0.5  # two of four for each token
            assert 0 < last["router_entropy"] < 1.3863  # ln 4, rounded up
            assert last["dropped_tokens"] == 0
        metrics = json.loads((run / "summary.json").read_text("utf-8"))
        assert metrics["active_parameters"] < metrics["parameters"]
    done = place.run_here("generate", "out/moe", "长江", "--device", "cpu", "--max-new-tokens", "9")
    assert done.output.startswith("长江")
    chat = ["chat", str(place.folder / "out" / "moe-chat"), "--device", "cpu"]
    said = CliRunner().invoke(app, chat, input="你好\n", env=ENVIRONMENT)
    assert said.exit_code == 0 and said.output


def test_explain_shows_origins_without_torch(place: Place) -> None:
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(sorted({'torch', 'numpy'} & set(sys.modules))))\n"
        "import runpy; runpy.run_module('minimind', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *place.pretrain, "--out", "never", "--explain"],
        cwd=place.folder,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert "command line" in rows["training.steps"] and " 6 " in rows["training.steps"]
    assert "flag" in rows["data.sources"] and "text.jsonl" in rows["data.sources"]
    assert "pretrain-small.toml:" in rows["schedule.name"]
    assert "default" in rows["seed"]
    assert not (place.folder / "never").exists()


def test_dry_run_trains_nothing(place: Place) -> None:
    done = place.run_here(*place.pretrain, "--out", "dry/run", "--dry-run")
    assert "6 steps of 4 sequences" in done.stdout
    assert done.stdout.endswith("Without --dry-run: a new run begins in dry/run\n")
    assert not (place.folder / "dry").exists()
    message = place.error(*place.pretrain, "--out", "dry", "--dry-run", "--json", "dry.json")
    assert message == "--dry-run trains nothing and has no metrics for --json; omit one of them"


def test_dry_run_says_what_becomes_of_an_earlier_run(place: Place) -> None:
    """Each outcome is the one of the same command without --dry-run."""
    run = place.folder / "earlier"
    command = (*place.pretrain, "--out", "earlier", "checkpoint.every=2")

    def dry(*arguments: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        done = place.run_here(*command, *arguments, "--dry-run")
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
        return str(done.stdout.splitlines()[-1]).removeprefix("Without --dry-run: ")

    place.run_here(*command)
    assert dry() == "earlier is already finished, after 6 steps, so nothing is trained"
    assert dry("--fresh") == "the run in earlier is removed, and a new one begins"
    longer = dry("training.steps=12")
    assert longer.startswith("earlier: 12 steps instead of 6, continued from step ")
    for wrong in ("optim.lr=0.5", "training.steps=2"):
        refused = place.error(*command, wrong, "--dry-run")
        assert refused.startswith("earlier holds a run of another recipe: ")
        assert refused == place.error(*command, wrong)
    (run / "summary.json").unlink()  # as if it had been stopped
    shutil.rmtree(run / "model")
    assert dry() == "the run in earlier resumes from step 6"
    assert "resuming from step 6" in place.run_here(*command).stdout
    assert longer in place.run_here(*command, "training.steps=12").stdout


def test_a_mistyped_setting_gets_a_suggestion(place: Place) -> None:
    message = place.error(*place.pretrain, "--out", "typo", "optim.ler=0.1")
    assert message == "command line: optim.ler is not a setting; did you mean optim.lr?"
    assert "training.steps" in place.error(*place.pretrain, "--out", "typo", "training.steps=many")
    assert not (place.folder / "typo").exists()


def test_missing_files_are_named(place: Place) -> None:
    arguments: tuple[str, ...] = (*place.pretrain, "--out", "no1", "--data", "gone.jsonl")
    assert "gone.jsonl" in only_line(place.run(*arguments, status=1).stderr)
    for arguments, name in [
        ((*place.pretrain, "--out", "no2", "--tokenizer", "gone"), "gone"),
        ((*place.sft, "--out", "no3", "--model", "gone"), "gone"),
        (("train", "gone.toml"), "gone.toml"),
    ]:
        assert name in place.error(*arguments)


def test_a_missing_device_is_an_error(place: Place) -> None:
    others = [argument for argument in place.pretrain if not argument.startswith("device=")]
    message = place.error(*others, "--out", "no4", "--device", "cuda:77")
    assert message.startswith("device cuda:77 is not available; this machine has: cpu")
    assert "--device auto" in message
    (place.folder / "file").write_text("")
    assert place.error(*place.pretrain, "--out", "file").startswith("file is a file. --out")


def test_contradictory_arguments(place: Place) -> None:
    assert "no run to resume" in place.error(*place.pretrain, "--out", "no5", "--resume")
    assert place.error(*place.pretrain, "--out", "failed", "--data", "gone.jsonl")
    assert not (place.folder / "failed").exists()
    assert "no run to resume" in place.error(*place.pretrain, "--out", "failed", "--resume")
    assert "exclude each other" in place.error(
        *place.pretrain, "--out", "no5", "--resume", "--fresh"
    )
    assert "no recipe is given" in place.error("train")
    assert "two recipes are given, a.jsonl and b.jsonl" in place.error(
        "pretrain", "a.jsonl", "b.jsonl"
    )
    assert "the recipe has the objective sft; use `minimind sft`" in place.error(
        "dpo", "sft-small", "--out", "no5"
    )
    assert "--explain trains nothing" in place.error(*place.pretrain, "--explain", "--json", "a")
    (place.folder / "lr=3.toml").write_text("objective = 'pretrain'\nwait = 1\n")
    assert "lr=3.toml:2: wait is not a setting" in place.error("train", "lr=3.toml")
    assert "--out DIR" in place.error(*place.pretrain)
    assert "give --model MODEL" in place.error(*place.sft, "--out", "no5")
    message = place.error("pretrain", "text.jsonl", "--out", "no5")
    assert message.startswith("text.jsonl:1: not TOML: ")
    assert message.endswith("If it is data, give it with --data")
    message = place.error(*place.pretrain, "--out", "no5", "--tokenizer", "gone")
    assert message.startswith("gone does not exist. Train one with")
