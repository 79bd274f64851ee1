"""The generated model card."""

from pathlib import Path

from minimind.data.registry import find
from minimind.export.model_card import make_model_card
from minimind.tokenizer import Tokenizer
from tests.support.run_folders import write_run
from tests.support.small_models import save_small_model

DATA = '[data]\nsources = [{path = "cmmlu"}, {path = "mine.jsonl"}]\n'


def test_card_of_a_chain_of_runs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write_run(tmp_path / "base", more=DATA)
    chat = write_run(tmp_path / "chat", init=str(first), objective="sft", more=DATA)
    save_small_model(chat / "model", "qwen3", tokenizer)
    card = make_model_card(chat, chat / "model", "alice/tiny", hub="hf", licence="mit")
    text = card.files["README.md"]
    assert text.startswith("---\nlicense: mit\n")
    assert "\n# tiny\n" in text and "Qwen3ForCausalLM" in text
    assert "datasets:\n- haonan-li/cmmlu\n" in text
    assert "| mine.jsonl | pretrain, sft | unknown |" in text
    for command in (
        'pipeline("text-generation", model="alice/tiny")',
        "\nvllm serve alice/tiny\n",
        "\nminimind get alice/tiny --out tiny\nminimind chat tiny\n",
        "minimind export web tiny",
    ):
        assert command in text
    assert "library_name: transformers\n" in text and "modelscope" not in text.lower()
    assert "\n## Stages\n" in text and "\n## Recipes\n" in text and "中国的河。" in text
    plots = [name for name in card.files if name != "README.md"]
    assert plots and all(f"]({name})" in text for name in plots)
    assert all(card.files[name].startswith("<svg") for name in plots)
    assert len(card.conflicts) == 2
    assert (
        make_model_card(chat / "model", chat / "model", "alice/tiny", hub="hf", licence="mit")
        == card
    )


def test_card_on_modelscope_names_its_commands_and_datasets(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = '[data]\nsources = [{path = "minimind:sft_mini"}, {path = "cmmlu"}]\n'
    run = write_run(tmp_path / "chat", objective="sft", more=data)
    save_small_model(run / "model", "llama", tokenizer)
    card = make_model_card(run, run / "model", "alice/tiny", hub="modelscope", licence="mit")
    text = card.files["README.md"]
    [minimind, *_] = find("minimind:sft_mini").repositories("modelscope")
    # CMMLU is on Hugging Face only, so it has no name here.
    assert f"\ndatasets:\n- {minimind.id}\n---\n" in text
    assert "frameworks:\n- pytorch\ntasks:\n- text-generation\n" in text
    for command in (
        "from modelscope import snapshot_download\nfrom transformers import pipeline\n",
        'model=snapshot_download("alice/tiny"))',
        "\nVLLM_USE_MODELSCOPE=True vllm serve alice/tiny\n",
        "\nminimind get modelscope:alice/tiny --out tiny\nminimind chat tiny\n",
    ):
        assert command in text


def test_card_of_a_pretrained_model_continues_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = write_run(tmp_path / "base", more=DATA)
    save_small_model(run / "model", "llama", tokenizer)
    text = make_model_card(run, run / "model", "alice/tiny", hub="hf").files["README.md"]
    assert "license:" not in text
    assert "only pretrained" in text and "minimind generate tiny" in text


def test_card_of_a_model_without_its_runs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "tiny", "moe", tokenizer)
    card = make_model_card(tmp_path / "tiny", tmp_path / "tiny", "alice/tiny", hub="hf")
    assert list(card.files) == ["README.md"] and not card.conflicts
    assert "The training data was not recorded." in card.files["README.md"]
    write_run(tmp_path / "another", more=DATA)  # beside it, as after `minimind merge`
    assert card == make_model_card(tmp_path / "tiny", tmp_path / "tiny", "alice/tiny", hub="hf")


def test_the_home_folder_is_not_published(tokenizer: Tokenizer, tmp_path: Path) -> None:
    more = f'[data]\nsources = [{{path = "{Path.home()}/secret/mine.jsonl"}}]\n'
    run = write_run(tmp_path / "base", more=more)
    save_small_model(run / "model", "llama", tokenizer)
    text = make_model_card(run, run / "model", "alice/tiny", hub="hf").files["README.md"]
    assert str(Path.home()) not in text and "~/secret/mine.jsonl" in text
