"""LoRA (Hu et al. 2021): low-rank matrices trained beside frozen linear layers.

An adapted layer computes W x + (alpha / rank) * B A x. W stays frozen; A [rank, in] and
B [out, rank] are trained. `adapter.py` reads and writes the files that hold them.
"""

import difflib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config.settings import LoRASettings
from minimind.errors import ConfigError
from minimind.model.transformer import Transformer

_GROUPS = {"attention": ("self_attn",), "mlp": ("mlp", "shared_mlp")}  # names of parent modules


class LoRALinear(nn.Linear):
    """A frozen linear layer plus the trained low-rank term scale * B A dropout(x).

    B starts at zero, so that training starts from the unchanged model.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        # --8<-- [start:init]
        # Drawn by the CPU's generator, so that every device starts from the same values.
        a = torch.empty(rank, base.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as in nn.Linear and peft
        self.lora_A = nn.Parameter(a.to(device))
        b = torch.zeros(base.out_features, rank, dtype=torch.float32, device=device)
        self.lora_B = nn.Parameter(b)
        self.scale, self.dropout = alpha / rank, dropout
        # --8<-- [end:init]

    # --8<-- [start:forward]
    def forward(self, input: Tensor) -> Tensor:
        x = F.dropout(input, self.dropout, self.training)  # [..., in]
        x = F.linear(F.linear(x, self.lora_A), self.lora_B)  # [..., rank], then [..., out]
        return super().forward(input) + x * self.scale

    # --8<-- [end:forward]
    # --8<-- [start:merged]
    def merged(self) -> Tensor:
        """Return W + scale * B A, the weight [out, in] of an equivalent linear layer."""
        return self.weight + (self.scale * (self.lora_B @ self.lora_A)).to(self.weight.dtype)

    # --8<-- [end:merged]


def apply_lora(model: Transformer, settings: LoRASettings) -> Transformer:
    """Freeze the model and replace each target module by a `LoRALinear`, in place.

    Raises ConfigError for a target that the model does not have.
    """
    names = _target_modules(model, settings.targets)
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        adapted = LoRALinear(base, settings.rank, settings.alpha, settings.dropout)
        model.set_submodule(name, adapted.train(model.training))
    return model


def _target_modules(model: Transformer, targets: Sequence[str]) -> list[str]:
    """Return the full names of the modules that `targets` selects by name or by group."""
    groups: dict[str, set[str]] = {group: set() for group in (*_GROUPS, "all")}
    by_name: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        parent, leaf = ["", *name.split(".")][-2:]
        for group, parents in _GROUPS.items():
            if isinstance(module, nn.Linear) and parent in parents:
                by_name.setdefault(leaf, set()).add(name)
                groups[group].add(name)
                groups["all"].add(name)
    # A mixture of experts without shared ones has no mlp.
    known = by_name | {group: names for group, names in groups.items() if names}
    for target in targets:
        if target not in known:
            nearest = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise ConfigError(
                f"lora.targets: the model has no {target!r}; {hint}available: {', '.join(known)}"
            )
    selected = set().union(*(known[target] for target in targets))
    return [name for name, _ in model.named_modules() if name in selected]


def adapted_modules(model: Transformer) -> Iterator[tuple[str, LoRALinear]]:
    """Yield the name and module of each adapted layer."""
    return ((n, module) for n, module in model.named_modules() if isinstance(module, LoRALinear))
