"""AdamW, and Muon for the matrices of the layers with AdamW for the rest."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from minimind.config.settings import OptimSettings
from minimind.errors import CheckpointError

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_WIDE = 1.5  # columns / rows from which fewer products are done by the Gram matrix
OTHER_STATE = "the optimizer's state belongs to another model or optimizer"
_AT_ONCE = 1 << 22  # numbers that go through the iteration together, which needs four copies


class Muon:
    """Momentum whose every matrix is made orthogonal (Jordan et al. 2024, "Muon").

    Matrices of one shape go through the iteration together: on a CPU, and for small models on a
    GPU, that is several times faster than one after the other. A parameter may hold several: of
    [experts, rows, columns] each expert's is a matrix, and those of `fused` have two above each
    other, which go through as two.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        settings: OptimSettings,
        *,
        fused: Collection[nn.Parameter] = (),
    ) -> None:
        self.lr = settings.muon_lr
        self._momentum, self._decay = settings.momentum, settings.weight_decay
        together = set(fused)
        # By shape of the parameter, and rows of its matrices.
        self.groups: dict[tuple[torch.Size, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            rows = parameter.shape[-2] // (2 if parameter in together else 1)
            self.groups[parameter.shape, rows].append(parameter)
        self.buffers = {p: torch.zeros_like(p) for group in self.groups.values() for p in group}

    @torch.no_grad()
    def step(self) -> None:
        """One step along the orthogonalised Nesterov momentum, with decoupled weight decay."""
        for (shape, rows), group in self.groups.items():
            at_once = max(1, _AT_ONCE // shape.numel())
            for start in range(0, len(group), at_once):
                self._step(shape, rows, group[start : start + at_once])

    def _step(self, shape: torch.Size, rows: int, group: list[nn.Parameter]) -> None:
        columns = shape[-1]
        buffers = [self.buffers[parameter] for parameter in group]
        gradients = [p.grad for p in group if p.grad is not None]
        assert len(gradients) == len(group), "all matrices take part in every loss"
        torch._foreach_lerp_(buffers, gradients, 1 - self._momentum)
        torch._foreach_lerp_(gradients, buffers, self._momentum)
        matrices = torch.stack(gradients).view(-1, rows, columns)
        updates = orthogonalize(matrices).reshape(-1, *shape)
        scale = max(1.0, rows / columns) ** 0.5
        weights: list[Tensor] = list(group)
        torch._foreach_mul_(weights, 1 - self.lr * self._decay)
        torch._foreach_add_(weights, list(updates), alpha=-self.lr * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Send each [rows, columns] of [n, rows, columns] near the closest matrix whose singular
    values are all 1: five steps of a quintic Newton-Schulz iteration, in the float32 of weights.

    In bf16, be it in the last steps alone, a last bit of a gradient, which any other order of
    adding turns, becomes a loss that is 1e-3 another: benchmarks/records/process-count.md. On
    NVIDIA's GPUs torch multiplies float32 in TF32, which has few bits more than bf16, only where
    it is told to; nothing here does.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = _by_gram(x) if x.shape[-1] > _WIDE * x.shape[-2] else _plain(x)
    return x.mT if tall else x


def _plain(x: Tensor) -> Tensor:
    """Each step is x <- a x + b (x xT) x + c (x xT)^2 x."""
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor) -> Tensor:
    """The same with products of the short sides alone, but for the first and the last.

    A step is x <- p x with p = a + b g + c g^2 of the Gram matrix g = x xT, which becomes p g p;
    all these commute, so that the steps make one factor.
    """
    a, b, c = _NEWTON_SCHULZ
    gram, factor = x @ x.mT, None
    for step in range(_NEWTON_SCHULZ_STEPS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = p if factor is None else p @ factor
        if step < _NEWTON_SCHULZ_STEPS - 1:
            gram = p @ gram @ p
    assert factor is not None
    return factor @ x


def _is_map(name: str, parameter: nn.Parameter) -> bool:
    """Whether it holds matrices that send a layer's width to another.

    Embeddings, a head and routers are tables, a row for each word or expert: orthogonalising them
    helps nobody. For routers that was measured: benchmarks/records/moe-step.md.
    """
    in_a_layer = ".layers." in f".{name}" and not name.endswith(".router.layer.weight")
    return in_a_layer and parameter.ndim >= 2


def adamw(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone (Loshchilov and Hutter 2019)."""
    every = list(parameters)
    decays = {"params": [p for p in every if p.ndim >= 2], "weight_decay": settings.weight_decay}
    plain = {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW(
        [group for group in (decays, plain) if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=every[0].device.type in ("cpu", "cuda", "mps"),
    )


def new_state(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW remembers of a parameter before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def count_moments(model: nn.Module, settings: OptimSettings) -> int:
    """How many numbers the optimizers keep: one for what Muon trains, two for the rest."""
    return sum(
        parameter.numel() * (1 if settings.name == "muon" and _is_map(name, parameter) else 2)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


class Optimizers:
    """The optimizers of a model as one."""

    def __init__(self, model: nn.Module, settings: OptimSettings) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        trained = [parameter for parameter in self._names if parameter.requires_grad]
        by_muon = [
            parameter
            for parameter in trained
            if settings.name == "muon" and _is_map(self._names[parameter], parameter)
        ]
        assert len(by_muon) < len(trained), "AdamW has something to do"
        taken = set(by_muon)
        # What a dense model has as gate_proj and up_proj.
        fused = [p for p in by_muon if self._names[p].endswith(".input_linear.weight")]
        rest = [parameter for parameter in trained if parameter not in taken]
        self._settings = settings
        self._muon = Muon(by_muon, settings, fused=fused) if by_muon else None
        self._adamw = adamw(rest, settings)
        # State from the start, so that a checkpoint of step 0 has the same tensors as any.
        self._adamw.state.update({parameter: new_state(parameter) for parameter in rest})

    def set_lr(self, fraction: float) -> None:
        """Set every learning rate to this share of its peak."""
        for group in self._adamw.param_groups:
            group["lr"] = self._settings.lr * fraction
        if self._muon:
            self._muon.lr = self._settings.muon_lr * fraction

    def lrs(self) -> dict[str, float]:
        """The learning rates in force, by optimizer."""
        rates = {"adamw": float(self._adamw.param_groups[0]["lr"])}
        return rates | ({"muon": self._muon.lr} if self._muon else {})

    def step(self) -> None:
        """Use the gradients."""
        self._adamw.step()
        if self._muon:
            self._muon.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._names:
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything the optimizers remember, by `<what>/<parameter>`."""
        tensors = {
            f"{what}/{name}": tensor
            for parameter, name in self._names.items()
            for what, tensor in self._adamw.state.get(parameter, {}).items()
        }
        for parameter, buffer in self._muon.buffers.items() if self._muon else ():
            tensors[f"momentum/{self._names[parameter]}"] = buffer
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what `state_tensors` gave, one tensor at a time.

        Raises CheckpointError, after which the state must not be used, if it is not this model's.
        """
        own = self.state_tensors()
        if own.keys() != tensors.keys():
            raise CheckpointError(OTHER_STATE)
        for name, tensor in own.items():
            saved = tensors[name]
            if saved.shape != tensor.shape:
                raise CheckpointError(OTHER_STATE)
            tensor.copy_(saved)
