import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.cli.terminal import strip_controls
from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.tokenizer import Tokenizer, train_tokenizer
from tests.support.commands import fast_python

PROMPT = "秦始皇是"


def run(*arguments: object, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def make_model(tokenizer: Tokenizer) -> Transformer:
    """Return a random model whose output is varied."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**PRESETS["nano"] | {"vocab_size": tokenizer.vocab_size}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.mul_(60 if writes else 6)
    return model


@pytest.fixture(scope="module")
def model_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "model"
    save_model(directory, make_model(tokenizer), tokenizer)
    return directory


def test_generate_continues_the_prompt(model_dir: Path) -> None:
    long = run(model_dir, PROMPT, "--max-new-tokens", 30, "--seed", 1)
    assert long.exit_code == 0, long.output
    assert long.stdout.startswith(PROMPT)
    assert long.stdout.endswith("\n")
    assert len(long.stdout) > len(PROMPT) + 10
    again = run(model_dir.parent, PROMPT, "--max-new-tokens", 30, "--seed", 1)
    assert again.stdout == long.stdout
    other = run(model_dir, PROMPT, "--max-new-tokens", 30, "--seed", 2)
    assert other.stdout != long.stdout
    short = run(model_dir, PROMPT, "--max-new-tokens", 5, "--seed", 1)
    assert long.stdout.startswith(short.stdout.rstrip("\n\ufffd"))
    assert len(short.stdout) < len(long.stdout)


def test_prompt_from_stdin(model_dir: Path) -> None:
    command = [*fast_python(), "-m", "minimind", "generate", model_dir]
    done = subprocess.run(
        [*command, "-", "--seed", "1", "--max-new-tokens", "30"],
        input=f"{PROMPT}\n".encode(),
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    wanted = run(model_dir, PROMPT, "--seed", 1, "--max-new-tokens", 30).stdout
    assert done.stdout.decode().replace("\r\n", "\n") == wanted


@pytest.mark.parametrize("encoding", ["gbk", "cp1252"])
def test_output_files_are_utf_8_on_every_platform(
    encoding: str, model_dir: Path, tmp_path: Path
) -> None:
    command = [*fast_python(), "-m", "minimind", "generate"]
    with (tmp_path / "text").open("wb") as file:
        done = subprocess.run(
            [*command, model_dir, "-", "--max-new-tokens", "1"],
            input=f"{PROMPT}é\n".encode(),
            stdout=file,
            env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
            timeout=120,
        )
    assert done.returncode == 0
    assert (tmp_path / "text").read_text("utf-8").startswith(f"{PROMPT}é")


def test_sampling_options_take_effect(model_dir: Path) -> None:
    greedy = run(model_dir, PROMPT, "--temperature", 0).stdout
    assert run(model_dir, PROMPT, "--top-k", 1).stdout == greedy
    assert run(model_dir, PROMPT, "--top-p", 1e-9).stdout == greedy
    assert run(model_dir, PROMPT, "--temperature", 0, "--repetition-penalty", 5).stdout != greedy


def test_defaults_come_from_generation_config(
    model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def output(directory: Path, **settings: float) -> str:
        named = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items()]
        flags = ["--seed", 3, "--max-new-tokens", 30, *(part for pair in named for part in pair)]
        done = run(directory, PROMPT, *flags)
        assert done.exit_code == 0, done.output
        return done.stdout

    ours = dict(temperature=0.7, top_p=0.9)
    neutral = dict(temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1)
    assert output(model_dir) == output(model_dir, **ours) != output(model_dir, **neutral)
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    own = dict(temperature=1.3, top_k=9, min_p=0.01, repetition_penalty=1.2)
    (other / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    assert output(other) == output(other, **own)
    assert output(other, top_k=0) == output(other, **own | dict(top_k=0))
    (other / "generation_config.json").unlink()
    assert output(other) == output(other, **neutral)


def test_control_characters_are_stripped(
    tokenizer: Tokenizer, model_dir: Path, tmp_path: Path
) -> None:
    assert strip_controls("a\x1b[31mb\x9b2J\r\n\tc\x00\x7f\x85[b]é长") == "a[31mb2J\n\tc[b]é长"
    done = run(model_dir, "红\x1b[31m色[b]", "--max-new-tokens", 1)
    assert done.stdout.startswith("红[31m色[b]")
    # A model that generates only ESC.
    model = make_model(tokenizer)
    [escape] = tokenizer.encode("\x1b")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.head_weight.zero_()
        model.head_weight[:, 0] = 1
        model.head_weight[escape, 0] = 2
    save_model(tmp_path / "model", model, tokenizer)
    done = run(tmp_path, "[red]红", "--temperature", 0)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "[red]红\n", "")


def test_errors_print_one_line(model_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    tokenizer = train_tokenizer(["长江长江"], vocab_size=273)
    save_model(wrong, make_model(tokenizer), tokenizer)
    train_tokenizer(["长江长江"], vocab_size=272).save(wrong)
    (tmp_path / "file").write_text("not a model")
    for arguments, stdin, message in [
        ([model_dir, ""], "", "the prompt is empty; give a text to continue"),
        ([model_dir, "-"], "\n", "the prompt is empty"),
        ([model_dir, "-"], PROMPT.encode("gb18030"), "standard input, line 1: not utf-8 text"),
        ([model_dir, "长江" * 500], "", "tokens and the model's context is 256; shorten it"),
        ([model_dir, "a", "--temperature", "-1"], "", "temperature is -1.0; it must be"),
        ([model_dir, "a", "--top-p", "2"], "", "top-p is 2.0; it must be"),
        ([model_dir, "a", "--device", "cuda:99"], "", "device cuda:99 is not available"),
        ([model_dir, "a", "--device", "gpu"], "", "unknown device 'gpu'"),
        ([tmp_path / "nowhere", "a"], "", "there is no such directory"),
        ([tmp_path, "a"], "", "is not a model directory: it has no config.json"),
        ([tmp_path / "file", "a"], "", "is not a model directory"),
        ([tokenizer_dir, "a"], "", "is not a model directory"),
        ([wrong, "a"], "", "272 tokens, but its model has 273, so they do not match"),
    ]:
        done = run(*arguments, stdin=stdin)
        assert (done.exit_code, done.stdout) == (1, ""), arguments
        [error] = done.stderr.splitlines()
        assert error.startswith("error: ")
        assert message in error


@pytest.mark.parametrize(
    "arguments",
    [[], ["model"], ["model", "a", "--max-new-tokens", "0"], ["m", "a", "--seed", "-1"]],
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_context_limits_the_output(model_dir: Path) -> None:
    def generated(*options: object) -> str:
        done = run(model_dir, PROMPT, "--temperature", 0, "--max-new-tokens", 1000, *options)
        assert done.exit_code == 0, done.output
        return done.stdout

    short = generated()  # the model's context is 256
    assert generated("--context", 256) == short
    shorter = generated("--context", 100).rstrip("\n\ufffd")
    assert short.startswith(shorter)
    assert len(PROMPT) < len(shorter) < len(short)
    for kind in ("linear", "dynamic", "yarn"):
        longer = generated("--context", 600, "--rope-scaling", kind)
        assert len(longer) > 1.5 * len(short)
        assert longer.startswith(short.rstrip("\n\ufffd")) == (kind == "dynamic")


def test_rope_scaling_needs_a_context(model_dir: Path) -> None:
    alone = run(model_dir, PROMPT, "--rope-scaling", "yarn")
    assert alone.exit_code == 1
    assert "needs a longer context than" in alone.output
