# --8<-- [start:break-even]
def adapter_size(inputs, outputs, rank):
    return rank * (inputs + outputs)


assert adapter_size(512, 512, rank=8) == 8192 == 512 * 512 // 32
assert adapter_size(512, 512, rank=256) == 512 * 512
assert adapter_size(512, 1408, rank=375) < 512 * 1408 < adapter_size(512, 1408, 376)
# --8<-- [end:break-even]

# --8<-- [start:both-zero]
import torch
from torch import nn

from minimind.model.lora import LoRALinear


def gradients(a_is_zero, b_is_zero):
    """Return whether A and B receive a gradient in the first step."""
    torch.manual_seed(1)
    layer = LoRALinear(nn.Linear(6, 4, bias=False), rank=2, alpha=16, dropout=0)
    nn.init.zeros_(layer.lora_A) if a_is_zero else None
    nn.init.zeros_(layer.lora_B) if b_is_zero else nn.init.normal_(layer.lora_B)
    layer(torch.randn(5, 6)).square().sum().backward()
    return [bool(m.grad.any()) for m in (layer.lora_A, layer.lora_B)]


assert gradients(a_is_zero=False, b_is_zero=True) == [False, True]
assert gradients(a_is_zero=True, b_is_zero=False) == [True, False]
assert gradients(a_is_zero=True, b_is_zero=True) == [False, False]
# --8<-- [end:both-zero]

# --8<-- [start:two-adapters]
torch.manual_seed(1)
A1, A2 = torch.randn(2, 3, 16)
B1, B2 = torch.randn(2, 16, 3)
assert torch.linalg.matrix_rank(B1 @ A1) == 3
assert torch.linalg.matrix_rank(B1 @ A1 + B2 @ A2) == 6
joined = torch.cat([B1, B2], dim=1) @ torch.cat([A1, A2], dim=0)
assert torch.allclose(joined, B1 @ A1 + B2 @ A2, atol=1e-5)
# --8<-- [end:two-adapters]

# --8<-- [start:extract]
extracted = copy.deepcopy(base)
for name, module in extracted.named_modules():
    if isinstance(module, torch.nn.Linear):
        change = (full.get_submodule(name).weight - module.weight).detach()
        B, A = low_rank(change, rank=4)
        module.weight.data += B @ A
for question in ("Your name?", "Your author?"):
    assert answer(extracted, question) == answer(full, question)
# --8<-- [end:extract]
