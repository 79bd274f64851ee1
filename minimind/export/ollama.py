"""Model directory to Ollama: a GGUF file and a Modelfile.

Ollama does not use the Jinja chat template of a GGUF file: it recognizes known ones and replaces
them by its own. So the Modelfile has our chat format in Ollama's language, Go's text/template.
"""

from pathlib import Path

from minimind.errors import ModelError, UsageError
from minimind.export.gguf import GGUFReport, Progress, export_gguf
from minimind.export.gguf_vocabulary import read_chat_template
from minimind.files import write_atomically
from minimind.model import read_config
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.format import CHAT_TEMPLATE

_TEMPLATE = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def export_ollama(
    directory: Path,
    out: Path,
    *,
    name: str,
    type: str = "f16",
    adapter: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> GGUFReport:
    """Write NAME-TYPE.gguf and a Modelfile for it into the folder `out`.

    Raises ModelError for a chat template that is not minimind's, UsageError when `out` contains a
    Modelfile; otherwise as `export_gguf`.
    """
    file, modelfile = out / f"{name}-{type.lower()}.gguf", out / "Modelfile"
    if modelfile.exists():
        raise UsageError(f"{modelfile} already exists; delete it or choose another --out")
    text = _modelfile(directory, file.name)
    report = export_gguf(directory, file, type=type, adapter=adapter, progress=progress)
    write_atomically(modelfile, text)
    return report


def _modelfile(directory: Path, gguf_name: str) -> str:
    """Return the content of a Modelfile. Raises ModelError for another chat template than ours."""
    if read_chat_template(directory) != CHAT_TEMPLATE:
        raise ModelError(
            f"{directory}: its chat template is not minimind's, so it cannot be translated into "
            "Ollama's template language. Use `minimind export gguf`, and write a Modelfile with "
            "a TEMPLATE by hand"
        )
    tokenizer = Tokenizer.load(directory)
    context = read_config(directory).max_position_embeddings
    parameters = [
        *(f'stop "{tokenizer.decode([token])}"' for token in tokenizer.stop_ids),
        f"num_ctx {context}",
        f"num_predict {context}",  # Ollama's default is no limit, with a sliding context
        "temperature 0.7",
        "top_p 0.9",
        "top_k 0",
        "repeat_penalty 1.0",  # Ollama's default, 1.1, also penalizes the words of the question
    ]
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{_TEMPLATE}"""']
    return "\n".join([*lines, *(f"PARAMETER {line}" for line in parameters)]) + "\n"
