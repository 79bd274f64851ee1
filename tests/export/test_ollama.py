"""The Modelfile. Ollama itself is not run; llama.cpp loads the GGUF file in other tests."""

import re
from pathlib import Path

import jinja2
import pytest

from minimind.errors import ModelError, UsageError
from minimind.export.ollama import export_ollama
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.format import CHAT_TEMPLATE
from tests.support.small_models import save_small_model

_MESSAGES = [
    {"role": "system", "content": "请用中文回答。"},
    {"role": "user", "content": "泰山在哪里？\n\n请简短。"},
    {"role": "assistant", "content": "在山东。"},
    {"role": "user", "content": " 谢谢 "},
]


def render(template: str, messages: list[dict[str, str]]) -> str:
    """Render a Go template that is a loop over messages, with `{{-` trimming the text before."""
    match = re.fullmatch(r"(.*)\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S)
    assert match
    before, body, after = match.groups()
    assert "{{" not in before + after
    parts = [before.rstrip()]
    for message in messages:
        fields = {"{{ .Role }}": message["role"], "{{ .Content }}": message["content"]}
        pieces = re.split(r"(\{\{.*?\}\})", body)
        parts += [fields[piece] if piece.startswith("{{") else piece for piece in pieces]
    return "".join([*parts, after])


def test_the_modelfile(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", "llama", tokenizer)
    export_ollama(tmp_path / "model", tmp_path / "out", name="小模型", type="Q8_0")
    text = (tmp_path / "out" / "Modelfile").read_text("utf-8")
    first, template, rest = text.split('"""')
    assert first == "FROM ./小模型-q8_0.gguf\nTEMPLATE "
    assert (tmp_path / "out" / "小模型-q8_0.gguf").is_file()
    ours = jinja2.Template(CHAT_TEMPLATE).render(messages=_MESSAGES, add_generation_prompt=True)
    assert render(template, _MESSAGES) == ours
    assert rest.splitlines()[1:] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 64",
        "PARAMETER num_predict 64",
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
        "PARAMETER top_k 0",
        "PARAMETER repeat_penalty 1.0",
    ]
    with pytest.raises(UsageError, match="Modelfile already exists; delete it or choose another"):
        export_ollama(tmp_path / "model", tmp_path / "out", name="b")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ModelError, match="its chat template is not minimind's"):
        export_ollama(tmp_path / "model", tmp_path / "other", name="a")
    assert not (tmp_path / "other").exists()
