"""Models without values, into which saved weights are loaded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from minimind.config.model import ModelConfig
from minimind.model.transformer import Transformer


def empty_transformer(config: ModelConfig) -> Transformer:
    """Return a model on the meta device, which stores shapes and dtypes only."""
    with torch.device("meta"), _SkipInit():
        return Transformer(config)


class _SkipInit(TorchFunctionMode):
    """Skips `torch.nn.init`.

    For random values on the meta device, torch imports its compiler, which takes over a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)
