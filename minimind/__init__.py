"""Train a small GPT from zero on your own computer, and use it from Python.

    import minimind

    model = minimind.load("out/demo")
    print(model.chat("长江流入哪里？"))

Imports are lazy: torch is imported by the first call that needs it.
"""

import os
from typing import TYPE_CHECKING, Any

from minimind.version import __version__ as __version__

if TYPE_CHECKING:
    from minimind.api import Model, Recipe, RunResult, Tokenizer, evaluate, load, train

# PyTorch reads this at its first allocation on Linux: tensors of 2 MiB and more then lie in huge
# pages. On one core a training step takes a sixth less time (benchmarks/records/cpu-kernels.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["Model", "Recipe", "RunResult", "Tokenizer", "evaluate", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in __all__:
        from minimind import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
