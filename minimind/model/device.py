"""Choice of the device, and its free memory."""

from pathlib import Path

import torch

from minimind.errors import ResourceError


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of this name; `auto` prefers CUDA, then Apple's MPS, then the CPU.

    Raises ResourceError for an unknown or unavailable device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ResourceError(
            f"unknown device {name!r}; use auto, cpu, cuda, cuda:1, … or mps"
        ) from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available() and not device.index,
    }
    if not available.get(device.type, False):
        names = [kind for kind, is_available in available.items() if is_available]
        raise ResourceError(
            f"device {name} is not available; this machine has: {', '.join(names)} "
            f"({torch.cuda.device_count()} CUDA devices). Use --device auto"
        )
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Return True if the hardware multiplies bfloat16; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        if (
            torch.backends.mkldnn.is_available()
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            return False  # for example because ONEDNN_MAX_CPU_ISA disables it
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return False


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of the device in bytes; None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    free = next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
    try:  # the memory limit of a container; its page cache counts as free
        cgroup = Path("/sys/fs/cgroup")
        limit, used = ((cgroup / f"memory.{x}").read_text("ascii") for x in ("max", "current"))
        stat = (cgroup / "memory.stat").read_text("ascii").splitlines()
        cached = next(int(line.split()[1]) for line in stat if line.startswith("file "))
        return min(free, int(limit) - int(used) + cached)
    except (OSError, ValueError, StopIteration):
        return free
