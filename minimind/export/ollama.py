"""Modelfile for Ollama: which GGUF file, how a conversation is written, where an answer ends.

Ollama does not read the Jinja chat template of a GGUF file. It guesses one of its own templates by
the text, so ours is written out in its language (Go's text/template).
"""

from pathlib import Path

from minimind.errors import ModelError
from minimind.export.gguf_vocabulary import read_chat_template
from minimind.files import write_atomically
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.format import CHAT_TEMPLATE

_TEMPLATE = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def export_ollama(model: Path, gguf_file: Path, out: Path, *, temperature: float = 0.7) -> Path:
    """Write `out` (a Modelfile) for a GGUF file of the model directory; return its path.

    Raises ModelError for a model with a chat template that is not ours.
    """
    if read_chat_template(model) != CHAT_TEMPLATE:
        raise ModelError(
            f"{model}: its chat template is not minimind's, and there is no translation into "
            "Ollama's template language; write TEMPLATE in the Modelfile yourself"
        )
    tokenizer = Tokenizer.load(model)
    stops = [tokenizer.decode([token]) for token in tokenizer.stop_ids]
    lines = [
        f"FROM ./{gguf_file.name}",
        f'TEMPLATE """{_TEMPLATE}"""',
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        f"PARAMETER temperature {temperature}",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.0",
    ]
    write_atomically(out, "\n".join(lines) + "\n")
    return out
