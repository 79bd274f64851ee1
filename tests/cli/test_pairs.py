"""`minimind data pairs`: pairs that `minimind dpo` trains on."""

import json
from pathlib import Path

from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.tokenizer import Tokenizer
from tests.support.services import save_models


def test_pairs_of_a_model_are_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = save_models(tmp_path, tokenizer) / "tiny"
    chats = tmp_path / "chats.jsonl"
    rows = [{"question": f"第{n}段多长？", "answer": f"{7 * n}公里。"} for n in range(9)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn\n", "utf-8")
    out = tmp_path / "pairs.jsonl"
    words = ["data", "pairs", model, chats, "--out", out, "--limit", 6, "--max-new-tokens", 8]
    runner = CliRunner(env={"COLUMNS": "200"})
    done = runner.invoke(app, [*map(str, words), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    count = len(out.read_text("utf-8").splitlines())
    assert f"{count} pairs from 6 conversations, in {out}; " in done.output
    assert "; 1 invalid record, the first: " in done.output
    dpo = f"minimind dpo dpo.loss=unlikelihood --model {model} --data {out} --out DIR"
    assert dpo in done.output
    assert f"{count} answers cut off after 8 tokens" in done.output
    for file, message in (
        (out, f"--out {out} exists; choose another file, or remove it"),
        (tmp_path / "pairs.csv", "the pairs are JSON Lines; choose a name with .jsonl"),
    ):
        refused = runner.invoke(app, ["data", "pairs", str(model), str(chats), "--out", str(file)])
        assert refused.exit_code == 1
        assert message in refused.output
    settings = ["data.seq_len=64", "data.validation_fraction=0", "training.steps=1"]
    settings += ["training.global_batch_size=2", "validation.prompts=[]"]
    words = ["dpo", *settings, "--model", model, "--data", out, "--out", tmp_path / "dpo"]
    trained = runner.invoke(app, [*map(str, words), "--device", "cpu"])
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "dpo" / "model" / "model.safetensors").is_file()
