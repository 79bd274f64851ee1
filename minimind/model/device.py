"""Which device to work on, and how much memory it has free."""

from pathlib import Path

import torch

from minimind.errors import ResourceError


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises ResourceError for a device that is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ResourceError(
            f"device {name!r} is not known; use auto, cpu, cuda, cuda:1, … or mps"
        ) from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available() and not device.index,
    }
    if not there.get(device.type, False):
        found = [kind for kind, is_there in there.items() if is_there]
        raise ResourceError(
            f"device {name} is not there; this machine has: {', '.join(found)} "
            f"({torch.cuda.device_count()} CUDA devices). Use --device auto"
        )
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself: elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        if (
            torch.backends.mkldnn.is_available()
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            return False  # ONEDNN_MAX_CPU_ISA, for one, keeps it from using what is there
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return False


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on the device, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    free = next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
    try:  # a container may be allowed less; what it caches of files can be given back
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{x}").read_text("ascii") for x in ("max", "current"))
        stat = (group / "memory.stat").read_text("ascii").splitlines()
        cached = next(int(line.split()[1]) for line in stat if line.startswith("file "))
        return min(free, int(limit) - int(used) + cached)
    except (OSError, ValueError, StopIteration):
        return free
