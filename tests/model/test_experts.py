import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.model.experts import (
    RoutedExperts,
    Routing,
    _supports_grouped_mm,
    moe,
    moe_grouped_mm,
    moe_loop,
    moe_reference,
)

pytestmark = pytest.mark.numeric

EXPERTS, CHOSEN, HIDDEN, INNER, TOKENS = 5, 3, 16, 24, 60
IMPLEMENTATIONS = {"loop": moe_loop, "grouped_mm": moe_grouped_mm}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run `moe` with the loop and with grouped products, which PyTorch has for a CPU too."""
    monkeypatch.setattr("minimind.model.experts.moe_loop", IMPLEMENTATIONS[request.param])
    return str(request.param)


def router_logits(tokens: int = TOKENS, idle: int | None = 4) -> Tensor:
    """Return logits [tokens, EXPERTS] that never choose the expert `idle`."""
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(3))
    if idle is not None:
        logits[:, idle] = -99
    return logits


def run(function, logits: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the output and the gradients of x, weights and both matrices; bf16: autocast."""
    torch.manual_seed(1)
    x = torch.randn(len(logits), HIDDEN).to(dtype).requires_grad_()
    w_in = torch.randn(EXPERTS, 2 * INNER, HIDDEN).mul_(0.25).requires_grad_()
    w_out = torch.randn(EXPERTS, HIDDEN, INNER).mul_(0.25).requires_grad_()
    top_logits, chosen = logits.topk(CHOSEN)
    weights = top_logits.softmax(-1).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = function(x, chosen, weights, w_in, w_out)
    assert out.dtype == dtype
    (out.float() * torch.linspace(-1, 2, HIDDEN)).sum().backward()
    results = [out.detach(), *(tensor.grad for tensor in (x, weights, w_in, w_out))]
    return [tensor.float() for tensor in results if tensor is not None]


@pytest.mark.parametrize("idle", [None, 0, 2, 4])
def test_moe_equals_reference(implementation: str, idle: int | None) -> None:
    """Values and gradients agree; experts without tokens have zero gradients."""
    expected, actual = (run(f, router_logits(idle=idle)) for f in (moe_reference, moe))
    assert len(actual) == 5
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    for gradient in actual[3:]:
        assert gradient.flatten(1).any(dim=1).tolist() == [e != idle for e in range(EXPERTS)]


def test_bfloat16_is_close_to_float32(implementation: str) -> None:
    expected = run(moe_reference, router_logits())
    actual = run(moe, router_logits(), torch.bfloat16)
    for e, a in zip(expected, actual, strict=True):
        assert (a - e).norm() < 0.02 * e.norm()


def test_a_single_token(implementation: str) -> None:
    expected, actual = (run(f, router_logits(1)) for f in (moe_reference, moe))
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_experts_that_are_not_chosen_do_not_compute() -> None:
    """NaN in their weights does not reach the output."""
    torch.manual_seed(0)
    config = ModelConfig(**PRESETS["nano-moe"])
    experts, routing = RoutedExperts(config), Routing()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 1, config.hidden_size)
    with torch.no_grad():
        before = experts(x, routing)
        for expert in {0, 1, 2, 3} - set(routing.chosen[0].flatten().tolist()):
            experts.input_linear.weight[expert] = torch.nan
        assert torch.equal(experts(x), before)
        assert before.any()


def test_weights_are_the_softmax_over_the_chosen_experts() -> None:
    """Each expert returns a constant in its own dimension, so the output is the weights."""
    config = ModelConfig(**PRESETS["nano-moe"] | {"num_experts_per_tok": 3})
    torch.manual_seed(0)
    experts, routing = RoutedExperts(config), Routing()
    torch.nn.init.normal_(experts.router.layer.weight)
    with torch.no_grad():
        experts.input_linear.weight.zero_()
        experts.output_linear.weight.zero_()
        experts.input_linear.weight[:, 0, 0] = 50.0  # SiLU(50) = 50
        experts.input_linear.weight[:, 16, 0] = 0.02
        for expert in range(4):
            experts.output_linear.weight[expert, expert, 0] = 1.0
        x = torch.randn(2, 9, config.hidden_size)
        x[..., 0] = 1.0
        out = experts(x, routing)
    (logits,), (chosen,) = routing.logits, routing.chosen
    assert logits.shape == (2, 9, 4) and chosen.shape == (2, 9, 3)
    not_chosen = logits.argmin(-1, keepdim=True)
    expected = logits.scatter(-1, not_chosen, -torch.inf).softmax(-1)
    torch.testing.assert_close(out[..., :4], expected, rtol=1e-4, atol=1e-5)


def test_routers_compute_in_float32() -> None:
    model = Transformer(ModelConfig(**PRESETS["nano-moe"]))
    tokens, routing = torch.arange(40)[None], Routing()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, routing=routing)
    assert [logits.dtype for logits in routing.logits] == [torch.float32] * 2
    assert len(routing.chosen) == 2
    exact = Routing()
    model(tokens, routing=exact)
    torch.testing.assert_close(routing.logits[0], exact.logits[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_grouped_products_are_compiled_where_torch_can_trace_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors are what `torch.compile` traces with."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        rows = torch.empty(TOKENS, HIDDEN, device="cuda", dtype=dtype)
        w_in = torch.empty(EXPERTS, 2 * INNER, HIDDEN, device="cuda")
        w_out = torch.empty(EXPERTS, HIDDEN, INNER, device="cuda")
        experts = torch.empty(TOKENS, dtype=torch.int64, device="cuda")
        assert _supports_grouped_mm(rows, w_out)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        if _supports_grouped_mm(rows, w_out):
            assert moe_grouped_mm(rows, experts, w_in, w_out).shape == rows.shape
        # As under autocast, which torch refuses to enable without CUDA.
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: dtype)
        assert _supports_grouped_mm(rows.float(), w_out) == (dtype == torch.bfloat16)


@pytest.mark.filterwarnings("ignore")  # warnings of torch.compile itself
def test_a_compiled_model_gives_the_same_gradients_and_routing() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**PRESETS["nano-moe"]))
    compiled = torch.compile(model, backend="eager")
    tokens = torch.arange(60).view(2, 30)
    results = []
    for variant in (model, compiled):
        routing = Routing()
        variant(tokens, routing=routing).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([*routing.logits, *routing.chosen, *gradients])
        model.zero_grad()
    assert len(results[0]) == len(results[1]) > 20
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
