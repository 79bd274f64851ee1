import pytest
import torch
from torch import Tensor

from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.model.experts import (
    RoutedExperts,
    Routing,
    moe,
    moe_grouped_mm,
    moe_loop,
    moe_reference,
)

pytestmark = pytest.mark.numeric

EXPERTS, CHOSEN, HIDDEN, INNER, TOKENS = 5, 3, 16, 24, 60
WAYS = {"sliced": moe_loop, "grouped": moe_grouped_mm}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the experts; the one of GPUs, which torch has for a CPU too."""
    monkeypatch.setattr("minimind.model.experts.sliced", WAYS[request.param])
    return str(request.param)


def choices(tokens: int = TOKENS, idle: int | None = 4) -> Tensor:
    """[tokens, EXPERTS] logits that never choose the expert `idle`."""
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(3))
    if idle is not None:
        logits[:, idle] = -99
    return logits


def run(function, logits: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output, and the gradients of tokens, weights and both matrices; bf16 under autocast."""
    torch.manual_seed(1)
    x = torch.randn(len(logits), HIDDEN).to(dtype).requires_grad_()
    into = torch.randn(EXPERTS, 2 * INNER, HIDDEN).mul_(0.25).requires_grad_()
    back = torch.randn(EXPERTS, HIDDEN, INNER).mul_(0.25).requires_grad_()
    best, chosen = logits.topk(CHOSEN)
    weights = best.softmax(-1).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = function(x, chosen, weights, into, back)
    assert out.dtype == dtype
    (out.float() * torch.linspace(-1, 2, HIDDEN)).sum().backward()
    found = [out.detach(), *(tensor.grad for tensor in (x, weights, into, back))]
    return [tensor.float() for tensor in found if tensor is not None]


@pytest.mark.parametrize("idle", [None, 0, 2, 4])
def test_sorted_by_expert_is_the_definition(way: str, idle: int | None) -> None:
    """Values and gradients; an expert without tokens, first, last or between, has none."""
    wanted, found = (run(f, choices(idle=idle)) for f in (moe_reference, moe))
    assert len(found) == 5
    for expected, tensor in zip(wanted, found, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    for gradient in found[3:]:
        assert gradient.flatten(1).any(dim=1).tolist() == [e != idle for e in range(EXPERTS)]


def test_half_precision_is_near(way: str) -> None:
    wanted, found = run(moe_reference, choices()), run(moe, choices(), torch.bfloat16)
    for expected, tensor in zip(wanted, found, strict=True):
        assert (tensor - expected).norm() < 0.02 * expected.norm()


def test_one_token(way: str) -> None:
    wanted, found = (run(f, choices(1)) for f in (moe_reference, moe))
    for expected, tensor in zip(wanted, found, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_only_the_chosen_experts_compute() -> None:
    """What the others hold does not matter, not even when it is no number."""
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


def test_weights_are_the_softmax_over_the_chosen() -> None:
    """With experts that each give one constant, the output is the weights themselves."""
    config = ModelConfig(**PRESETS["nano-moe"] | {"num_experts_per_tok": 3})
    torch.manual_seed(0)
    experts, routing = RoutedExperts(config), Routing()
    torch.nn.init.normal_(experts.router.layer.weight)
    with torch.no_grad():
        experts.input_linear.weight.zero_()
        experts.output_linear.weight.zero_()
        experts.input_linear.weight[:, 0, 0] = 50.0  # the gate lets 50 pass
        experts.input_linear.weight[:, 16, 0] = 0.02
        for expert in range(4):
            experts.output_linear.weight[expert, expert, 0] = 1.0
        x = torch.randn(2, 9, config.hidden_size)
        x[..., 0] = 1.0
        out = experts(x, routing)
    (logits,), (chosen,) = routing.logits, routing.chosen
    assert logits.shape == (2, 9, 4) and chosen.shape == (2, 9, 3)
    least = logits.argmin(-1, keepdim=True)
    wanted = logits.scatter(-1, least, -torch.inf).softmax(-1)
    torch.testing.assert_close(out[..., :4], wanted, rtol=1e-4, atol=1e-5)


def test_routers_decide_in_float32() -> None:
    model = Transformer(ModelConfig(**PRESETS["nano-moe"]))
    tokens, routing = torch.arange(40)[None], Routing()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, routing=routing)
    assert [logits.dtype for logits in routing.logits] == [torch.float32] * 2
    assert len(routing.chosen) == 2
    exact = Routing()
    model(tokens, routing=exact)
    torch.testing.assert_close(routing.logits[0], exact.logits[0], rtol=0.05, atol=0.02)


@pytest.mark.filterwarnings("ignore")  # of what torch does itself when it compiles
def test_a_compiled_model_computes_and_collects_the_same() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**PRESETS["nano-moe"]))
    compiled = torch.compile(model, backend="eager")
    tokens = torch.arange(60).view(2, 30)
    results = []
    for one in (model, compiled):
        routing = Routing()
        one(tokens, routing=routing).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([*routing.logits, *routing.chosen, *gradients])
        model.zero_grad()
    assert len(results[0]) == len(results[1]) > 20
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
