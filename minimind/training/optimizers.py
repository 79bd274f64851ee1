"""Muon for the hidden weight matrices, AdamW for everything else.

AdamW divides each element of the momentum by a running estimate of its gradient's magnitude. Muon
treats a weight matrix as a whole: it replaces the momentum, in which a few directions usually
dominate, by the nearest orthogonal matrix, so that the step is equally long in every direction.
The nearest orthogonal matrix is U Vᵀ of the singular value decomposition U S Vᵀ. The Newton-Schulz
iteration approximates it by a few matrix products, much faster than a decomposition.

Sources: Loshchilov and Hutter 2019 (AdamW); Keller Jordan et al. 2024, "Muon: an optimizer for
hidden layers in neural networks", kellerjordan.github.io/posts/muon (Muon); Amsel et al. 2025, "The
Polar Express" (polynomials that differ between iterations).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minimind.config.settings import OptimSettings
from minimind.errors import CheckpointError
from minimind.training import newton_schulz

# p(s) = a s + b s³ + c s⁵, one polynomial per iteration. Each has the smallest maximum distance to
# 1 on the interval to which its predecessors map [0.005, 1] (Amsel et al. 2025, algorithm 1).
_POLYNOMIALS = (
    (8.1836, -23.4691, 17.2446),
    (3.9196, -2.9243, 0.5596),
    (3.1847, -2.3881, 0.4987),
    (2.1965, -1.5738, 0.4086),
)
_GRAM_ASPECT_RATIO = 1.5  # columns / rows above which iterating on the Gram matrix is cheaper
_FLUSHED_SCALE = 1e15  # of matrices whose elements have squares below 1e-38, flushed to 0
_SYMMETRIC_BLOCK = 128  # rows of a symmetric product that are computed together
_CHUNK_NUMEL = 1 << 22  # elements orthogonalised together; the iteration holds four copies of them
STATE_MISMATCH = "the optimizer's state belongs to another model or optimizer"


class Muon(torch.optim.Optimizer):
    """Momentum that is orthogonalised before each step (Jordan et al. 2024).

    With gradient G, momentum μ, learning rate η, weight decay λ and rows × columns matrices W:

        M ← μ M + (1 - μ) G
        O ← orthogonalize(μ M + (1 - μ) G)                   (Nesterov momentum)
        W ← (1 - η λ) W - η √max(1, rows / columns) O        (decoupled weight decay)

    A parameter is one matrix [rows, columns], or several: [experts, rows, columns] holds one per
    expert, and a group's `num_stacked` says how many are stacked along the rows, such as the gate
    and up projections of an expert. Each is orthogonalised separately.

    `torch.optim.Muon` agrees up to the rounding of its bf16. This one keeps float32 and stacks
    matrices of one shape into batched products: on a CPU, and on a GPU for small models, that is
    several times faster than a loop over matrices.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "num_stacked": 1}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Their momentum exists from the start, with zeros."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step. Parameters without a gradient are unchanged; gradients are overwritten."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                chunk = _chunk_size(parameters[0])
                for start in range(0, len(parameters), chunk):
                    self._step(group, shape, parameters[start : start + chunk])

    def _step(
        self, group: dict[str, Any], shape: torch.Size, parameters: list[nn.Parameter]
    ) -> None:
        """Update n parameters of one shape together."""
        # --8<-- [start:muon-step]
        rows, columns = shape[-2] // group["num_stacked"], shape[-1]
        momentum = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, momentum, group["momentum"])
        # [n, *shape] -> [matrices of all parameters, rows, columns]
        matrices = torch.stack(gradients).view(-1, rows, columns)
        updates = orthogonalize(matrices).reshape(-1, *shape)  # [n, *shape]
        scale = max(1.0, rows / columns) ** 0.5
        weights: list[Tensor] = list(parameters)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates), alpha=-group["lr"] * scale)
        # --8<-- [end:muon-step]


def _chunk_size(parameter: Tensor) -> int:
    """Return the number of parameters of this shape that are orthogonalized together."""
    size = max(1, _CHUNK_NUMEL // parameter.numel())
    if newton_schulz.takes(parameter):  # one thread per matrix
        threads = torch.get_num_threads()
        size = -(-size // threads) * threads
    return size


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace each matrix by approximately the nearest one whose singular values are all 1.

    matrices: [n, rows, columns] in float32. The Newton-Schulz iteration applies the polynomials to
    every singular value without computing them: X ← P X with P = a I + b G + c G² of the Gram
    matrix G = X Xᵀ. Values down to a hundredth of the largest become 0.9 to 1.1.

    It runs in float32: in bf16 one ulp of summation noise in a gradient, such as that of another
    number of processes, grows to 1e-3 in the loss (benchmarks/records/process-count.md).

    On processors with AMX it is compiled code with the same precision: `newton_schulz.py`.
    """
    if newton_schulz.takes(matrices):
        return newton_schulz.orthogonalize(matrices, _POLYNOMIALS)
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # rows <= columns: the Gram matrix is the smaller one
    x, gram, gram_squared = _scaled_to_one(x)
    is_wide = x.shape[-1] > _GRAM_ASPECT_RATIO * x.shape[-2]
    iterate = _newton_schulz_by_gram if is_wide else _newton_schulz
    x = iterate(x, gram, gram_squared)
    return x.mT if is_tall else x


def _scaled_to_one(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale x so that its singular values are at most 1; return it with G = x xᵀ and G².

    The iteration needs G² anyway, and its norm gives a close bound: (Σ s⁸)^(1/8) ≥ the largest s.
    The norm of x, (Σ s²)^(1/2), is several times as large for most gradients, and the smaller the
    values are, the more iterations they need.
    """
    gram = _symmetric_product(x, x.mT)
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_(min=1e-30)  # Σ s²
    gram /= squares  # first, because s⁸ of a small gradient is no float32
    gram_squared = _symmetric_product(gram, gram)
    bound = gram_squared.norm(dim=(-2, -1), keepdim=True).sqrt_().clamp_(min=1e-10)
    # For a zero matrix the product is 1e-40, which a device without subnormal numbers turns into 0.
    scale = (squares * bound).rsqrt_().nan_to_num_(nan=math.nan, posinf=_FLUSHED_SCALE)
    return x * scale, gram.div_(bound), gram_squared.div_(bound.square())


def _symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b [n, rows, rows], which must be symmetric: x xᵀ, or polynomials of one matrix.

    Blocks above the diagonal are copied from below it: a quarter less time for 512 rows.
    """
    num_rows = a.shape[-2]
    if num_rows <= _SYMMETRIC_BLOCK or a.device.type != "cpu":
        return a @ b
    out = a.new_empty(*a.shape[:-1], num_rows)
    for start in range(0, num_rows, _SYMMETRIC_BLOCK):
        stop = start + _SYMMETRIC_BLOCK
        block_row = a[..., start:stop, :] @ b[..., :stop]
        out[..., start:stop, :stop] = block_row
        out[..., :start, start:stop] = block_row[..., :start].mT
    return out


def _newton_schulz(x: Tensor, gram: Tensor, gram_squared: Tensor) -> Tensor:
    """Iterate X ← a X + (b G + c G²) X. x: [n, rows, columns]; gram, gram_squared: of x."""
    # --8<-- [start:newton-schulz]
    for iteration, (a, b, c) in enumerate(_POLYNOMIALS):
        if iteration:
            gram = _symmetric_product(x, x.mT)  # [n, rows, rows]
            gram_squared = _symmetric_product(gram, gram)
        x = torch.baddbmm(x, torch.add(b * gram, gram_squared, alpha=c), x, beta=a)
    # --8<-- [end:newton-schulz]
    return x


def _newton_schulz_by_gram(x: Tensor, gram: Tensor, gram_squared: Tensor) -> Tensor:
    """Compute `_newton_schulz` by products of [rows, rows] matrices, except the last one.

    X ← P X turns the Gram matrix G into P G P. Polynomials of G commute, so all P are multiplied
    into one factor [n, rows, rows], which is applied to X once.
    """
    factor = product = None
    for a, b, c in _POLYNOMIALS:
        if factor is not None:
            gram = _symmetric_product(_symmetric_product(factor, gram), factor)
            gram_squared = _symmetric_product(gram, gram)
        factor = torch.add(b * gram, gram_squared, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else _symmetric_product(factor, product)
    assert product is not None
    return product @ x


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return True for the weight matrices inside the layers, which Muon trains.

    AdamW trains embeddings, the output head, routers and norms. Orthogonalising a matrix with one
    row per token or expert does not help; for routers see benchmarks/records/moe-step.md.
    """
    in_layer = ".layers." in f".{name}" and not name.endswith(".router.layer.weight")
    return in_layer and parameter.ndim >= 2


def build_adamw(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only (Loshchilov and Hutter 2019)."""
    all_parameters = list(parameters)
    # --8<-- [start:weight-decay]
    matrices = [p for p in all_parameters if p.ndim >= 2]
    vectors = [p for p in all_parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # --8<-- [end:weight-decay]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=all_parameters[0].device.type in ("cpu", "cuda", "mps"),
    )


def initial_adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter before the first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def count_moments(model: nn.Module, settings: OptimSettings) -> int:
    """Count the elements of the optimizer state: one per weight with Muon, two with AdamW."""
    return sum(
        parameter.numel()
        * (1 if settings.name == "muon" and is_hidden_matrix(name, parameter) else 2)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


class Optimizers:
    """The optimizers of a model's trained parameters: AdamW, or AdamW and Muon.

    `all` maps their names to them. Their state exists before the first step, so that a checkpoint
    of step 0 has the same tensors as any other.
    """

    def __init__(self, model: nn.Module, settings: OptimSettings) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named}
        muon = [
            (name, p) for name, p in named if settings.name == "muon" and is_hidden_matrix(name, p)
        ]
        hidden = {parameter for _, parameter in muon}
        rest = [parameter for _, parameter in named if parameter not in hidden]
        assert rest, "every model has norms, which AdamW trains"
        adamw = build_adamw(rest, settings)
        adamw.state.update({parameter: initial_adamw_state(parameter) for parameter in rest})
        self.all: dict[str, torch.optim.Optimizer] = {"adamw": adamw}
        if muon:
            # A mixture of experts stacks gate_proj on up_proj in one input_linear.
            stacked = [p for name, p in muon if name.endswith(".input_linear.weight")]
            single = [p for name, p in muon if not name.endswith(".input_linear.weight")]
            groups: list[dict[str, Any]] = [
                {"params": single},
                {"params": stacked, "num_stacked": 2},
            ]
            self.all["muon"] = Muon(
                [group for group in groups if group["params"]],
                lr=settings.muon_lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            )
        for optimizer in self.all.values():
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]  # the peak, named as by torch's schedulers

    def set_lr(self, fraction: float) -> None:
        """Set every learning rate to a fraction of its peak."""
        for optimizer in self.all.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * fraction

    def lrs(self) -> dict[str, float]:
        """Return the current learning rates by optimizer."""
        return {name: float(opt.param_groups[0]["lr"]) for name, opt in self.all.items()}

    def step(self) -> None:
        """Take one step with the current gradients."""
        for optimizer in self.all.values():
            optimizer.step()

    def zero_grad(self) -> None:
        """Free all gradients."""
        for optimizer in self.all.values():
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state of all optimizers by `<quantity>/<parameter>`, for a checkpoint."""
        return {
            f"{quantity}/{self._names[parameter]}": tensor
            for optimizer in self.all.values()
            for parameter, state in optimizer.state.items()
            for quantity, tensor in state.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `state_tensors` into the optimizers, one at a time.

        Raises CheckpointError if names or shapes differ; the state is unusable then.
        """
        own = self.state_tensors()
        if own.keys() != tensors.keys():
            raise CheckpointError(STATE_MISMATCH)
        for name, tensor in own.items():
            saved = tensors[name]
            if saved.shape != tensor.shape:
                raise CheckpointError(STATE_MISMATCH)
            tensor.copy_(saved)
