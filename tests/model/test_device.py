import pytest
import torch

from minimind.errors import ResourceError
from minimind.model.device import choose_device


def test_auto_chooses_the_best_available_device() -> None:
    best = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.backends.mps.is_available():
        best = "mps"
    assert choose_device().type == best
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "mps:7", "meta", "xpu", "gpu", "", "cuda:x", "auto "])
def test_unavailable_devices_are_refused(name: str) -> None:
    with pytest.raises(ResourceError, match=r"[Uu]se (--device )?auto"):
        choose_device(name)
