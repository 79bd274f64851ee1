"""Generation defaults of a model: its generation_config.json, interpreted as by vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minimind.errors import ModelError, UsageError
from minimind.files import read_json_object
from minimind.inference.sampling import Sampling
from minimind.model import resolve_model_directory

_INTEGERS = ("top_k", "max_new_tokens")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationDefaults:
    """Values for what a request leaves out. max_new_tokens: None = up to the end of the context."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None

    def sampling_with(self, settings: Mapping[str, Any]) -> Sampling:
        """Override the defaults with settings that are not None.

        Raises UsageError for values out of range.
        """
        overrides = {name: value for name, value in settings.items() if value is not None}
        return replace(self.sampling, **overrides)


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """Read generation_config.json of a model or run directory; without it sampling is neutral.

    Raises ModelError for an invalid value, and when the directory holds no model.
    """
    path = resolve_model_directory(directory) / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    try:
        raw = read_json_object(path)
        settings = {
            key: _number(key, raw[key])
            for key in (*_INTEGERS, *_NUMBERS)
            if raw.get(key) is not None
        }
        max_new_tokens = settings.pop("max_new_tokens", None)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
        return GenerationDefaults(Sampling(**settings), max_new_tokens)
    except (OSError, ValueError, RecursionError, UsageError) as error:
        raise ModelError(f"{path}: {error}. Correct the file, or delete the entry") from error


def _number(key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if key in _INTEGERS else int | float):
        kind = "an integer" if key in _INTEGERS else "a number"
        raise ValueError(f"{key} is {value!r}, not {kind}")
    return 0 if key == "top_k" and value == -1 else value  # both disable top-k
