"""The fused operations against PyTorch's, computed in float32 from the same bf16 inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.config.model import ModelConfig
from minimind.environment import NATIVE_VARIABLE
from minimind.model import Transformer, fused
from minimind.model.linear import Linear
from minimind.model.rope import apply_rotary, rope_table
from minimind.training.objectives.next_token import linear_cross_entropy
from tests.support.decoding import enable_native


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Use compiled code; skip the tests where that is impossible."""
    enable_native(monkeypatch)


EPSILON = 2.0**-8  # the largest relative error of rounding to bf16, which keeps 8 bits


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference divided by that of the expected values."""
    return float((result.detach().float() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (65, 24), (130, 512)])
def test_rms_norm(rows, width):
    x, weight, grad = torch.randn(rows, width), torch.rand(width) + 0.5, torch.randn(rows, width)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = F.rms_norm(leaves[0], (width,), leaves[1], 1e-5)
    expected_grads = torch.autograd.grad(expected, leaves, grad.bfloat16().float())
    out = fused.rms_norm(leaves[0], leaves[1], 1e-5)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected, rtol=EPSILON + 1e-6, atol=0)
    for result, reference in zip(
        torch.autograd.grad(out, leaves, grad.bfloat16()), expected_grads, strict=True
    ):
        assert relative_error(result, reference) < 1e-6  # float32 throughout


@pytest.mark.parametrize("halves", [False, True], ids=["two tensors", "halves of one"])
def test_swiglu(halves):
    both = (torch.randn(3, 5, 2 * 40) * 4).bfloat16()
    both[0, 0, :3] = torch.tensor([-200.0, 200.0, 0.0])  # no overflow at the ends of the sigmoid
    gate, up = both.chunk(2, dim=-1)
    if not halves:
        gate, up = gate.contiguous(), up.contiguous()
    grad = torch.randn(3, 5, 40).bfloat16()
    exact = [x.float().requires_grad_() for x in (gate, up)]
    expected = F.silu(exact[0]) * exact[1]
    expected_grads = torch.autograd.grad(expected, exact, grad.float())
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    out = fused.swiglu(*leaves)
    # One rounding to bf16 each.
    assert torch.allclose(out.float(), expected, rtol=EPSILON + 1e-5, atol=1e-30)
    for result, reference in zip(
        torch.autograd.grad(out, leaves, grad), expected_grads, strict=True
    ):
        assert torch.allclose(result.float(), reference, rtol=EPSILON + 1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim"),
    [
        *((1, 2, 1, 4), (37, 4, 2, 8), (128, 4, 4, 64), (300, 4, 1, 32), (515, 2, 2, 16)),
        *((90, 6, 2, 48), (700, 2, 1, 80)),  # G = 3; more rows than a thread packs together
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_attention(length, heads, kv_heads, head_dim, packed):
    num_sequences = 3
    q, k, v = (
        torch.randn(num_sequences, length, n, head_dim).bfloat16()
        for n in (heads, kv_heads, kv_heads)
    )
    grad = torch.randn(num_sequences, length, heads * head_dim).bfloat16()
    starts = torch.zeros(num_sequences, length, dtype=torch.int64)
    if packed:  # other segments in each sequence; one of a single token
        for row, borders in enumerate(([length // 3], [length // 2, length // 2 + 1], [])):
            for border in borders:
                starts[row, border:] = border
    positions = torch.arange(length) - starts
    config = ModelConfig(hidden_size=heads * head_dim, head_dim=head_dim)
    cos, sin = rope_table(config, positions if packed else positions[0], length)
    mask = torch.ones(length, length, dtype=torch.bool).tril() & (
        starts[:, :, None] == starts[:, None, :]
    )

    exact = [x.float().requires_grad_() for x in (q, k, v)]
    rotated = [apply_rotary(x, cos.unsqueeze(-2), sin.unsqueeze(-2)) for x in exact[:2]]
    query, key, value = (x.transpose(1, 2) for x in (*rotated, exact[2]))
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, key, value, mask[:, None], scale=0.3)
    expected = expected.transpose(1, 2).flatten(2)
    expected_grads = torch.autograd.grad(expected, exact, grad.float())

    leaves = [x.requires_grad_() for x in (q, k, v)]
    packed_mask = fused.packed_mask(starts, heads)
    out = fused.attention(*leaves, cos, sin, packed_mask, 0.3)
    # Three roundings before the output (rotated heads, scores, numerators), five before gradients.
    assert relative_error(out, expected) < 3 * EPSILON
    for result, reference in zip(
        torch.autograd.grad(out, leaves, grad), expected_grads, strict=True
    ):
        if reference.norm() > 1e-4:  # with one key the gradient of its score is 0
            assert relative_error(result, reference) < 5 * EPSILON
        else:
            assert result.float().norm() < 5 * EPSILON * grad.float().norm()


def test_blocks_leave_out_most_scores_between_segments():
    starts = torch.zeros(1, 1024, dtype=torch.int64)
    starts[0, 512:] = 512
    blocks = fused.blocks(starts, num_heads=16)
    assert [(b.queries.start, b.keys.start) for b in blocks] == [
        *((start, 0) for start in range(0, 512, 128)),
        *((start, 512) for start in range(512, 1024, 128)),
    ]


def test_cross_entropy_and_its_gradient():
    logits = (torch.randn(9, 70) * 5).bfloat16()
    labels, factors = torch.randint(70, (9,)), torch.rand(9)
    exact = logits.float().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected, exact, factors)
    losses = fused.cross_entropy_(logits, labels, factors)
    assert torch.allclose(losses, expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(logits.float(), expected_grad, rtol=EPSILON + 1e-5, atol=1e-7)


def test_not_a_number_and_infinity_reach_the_loss():
    for value in (float("nan"), float("inf")):
        logits = torch.zeros(2, 20).bfloat16()
        logits[0, 3] = value
        losses = fused.cross_entropy_(logits, torch.tensor([5, 5]), None)
        assert not losses[0].isfinite()
        assert losses[1].isfinite()
        assert not logits[0].isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same_with_and_without_kernels(monkeypatch, checkpointing):
    """Loss and gradients of a whole model, packed, with QK-norm and grouped queries."""
    config = ModelConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, qk_norm=True,
    )  # fmt: skip
    model = Transformer(config)
    model.activation_checkpointing = checkpointing
    tokens = torch.randint(96, (2, 150))
    segments = (torch.arange(150) > 60).int().expand(2, -1)

    def gradients() -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            hidden = model(tokens, segments=segments).flatten(0, 1)
            loss = linear_cross_entropy(hidden, model.head_weight, tokens.flatten()).mean()
        return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))

    loss, grads = gradients()
    monkeypatch.setenv(NATIVE_VARIABLE, "0")
    expected_loss, expected_grads = gradients()
    assert not torch.equal(
        torch.stack([g.norm() for g in grads]), torch.stack([g.norm() for g in expected_grads])
    )  # otherwise the kernels were not used
    assert float(loss) == pytest.approx(float(expected_loss), rel=2e-3)
    for name, grad, expected in zip(
        dict(model.named_parameters()), grads, expected_grads, strict=True
    ):
        assert relative_error(grad, expected) < 0.05, name


@pytest.fixture
def amx():
    """Skip the test on processors without AMX."""
    if not fused.takes_weight_grad(torch.empty(1, dtype=torch.bfloat16), torch.empty(32, 32)):
        pytest.skip("this processor has no AMX")


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 32, 32), (100, 64, 96), (300, 544, 800), (33, 32, 1024)]
)
def test_weight_grad(amx, rows, outputs, inputs):
    """More blocks than a thread keeps in its cache, rows that are no multiple of a block."""
    grad, x = torch.randn(rows, outputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    expected = grad.float().T @ x.float()
    result = fused.weight_grad(grad, x)
    assert result.dtype == torch.float32
    assert relative_error(result, expected) < 1e-6
    assert fused.weight_grad(grad, x, result) is result
    assert relative_error(result, 2 * expected) < 1e-6


def test_linear(amx):
    layer = Linear(96, 64)
    x, grad = torch.randn(3, 50, 96).bfloat16(), torch.randn(3, 50, 64).bfloat16()
    exact = [x.float().requires_grad_(), layer.weight.detach().bfloat16().float().requires_grad_()]
    expected = F.linear(*exact)
    expected_grads = torch.autograd.grad(expected, exact, grad.float())
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.grad_fn.name() == "_LinearBackward"
    grads = torch.autograd.grad(out, [x, layer.weight], grad)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    assert relative_error(out, expected) < EPSILON
    assert relative_error(grads[0], expected_grads[0]) < EPSILON
    assert relative_error(grads[1], expected_grads[1]) < 1e-6  # not rounded to bf16


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 40), (40, 64)])
def test_widths_that_are_no_multiples_of_a_block_are_left_to_torch(outputs, inputs):
    x = torch.randn(5, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(inputs, outputs)(x).grad_fn.name() != "_LinearBackward"


def test_the_bits_of_a_weight_gradient_do_not_depend_on_threads(amx):
    grad, x = torch.randn(200, 1088).bfloat16(), torch.randn(200, 96).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = fused.weight_grad(grad, x)
        torch.set_num_threads(3)
        assert torch.equal(fused.weight_grad(grad, x), single)
    finally:
        torch.set_num_threads(threads)
