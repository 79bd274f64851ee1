"""Install minimind into `.venv` with the pinned versions; the Makefile calls this.

    python3 tools/install.py [EXTRA ...]

On Linux, PyPI's torch is the CUDA build of several gigabytes. Without an NVIDIA GPU the CPU build
is taken from PyTorch's own index if that answers, else whatever pip finds. Needs Python alone.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TIMEOUT_S = 5


def main(extras: list[str]) -> None:
    """Create the environment if it is missing, and install the package with `extras`."""
    check_python()
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    target = f".[{','.join(extras)}]" if extras else "."
    command, reason = installer()
    print(f"Installing minimind into {VENV}: {reason}", flush=True)
    done = subprocess.run(
        [*command, "--constraint", "constraints.txt", "--editable", target], cwd=ROOT
    )
    sys.exit(done.returncode)


def check_python() -> None:
    """Exit with the remedy if this Python is too old or cannot create environments."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(
            "minimind needs Python 3.11 or newer. On Debian: apt install python3 python3-venv. "
            "Or use another interpreter: make PYTHON=python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        sys.exit(
            "This Python cannot create virtual environments. On Debian: apt install python3-venv"
        )


def installer() -> tuple[list[str], str]:
    """Return the command that installs packages, and the reason for choosing it."""
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet"]
    if platform.system() != "Linux":
        return pip, "torch from PyPI"
    if not answers(CPU_INDEX):
        return pip, "PyTorch's own index does not answer; using the torch that pip finds"
    uv = shutil.which("uv")
    if uv:
        command = [uv, "pip", "install", "--quiet", "--python", str(PYTHON)]
        return [*command, "--torch-backend", "auto"], "uv chooses the torch build for this machine"
    if shutil.which("nvidia-smi"):
        return pip, "NVIDIA GPU found; torch with CUDA from PyPI"
    return [*pip, "--extra-index-url", CPU_INDEX], "no NVIDIA GPU found; the CPU build of torch"


def answers(url: str) -> bool:
    """Return True if `url` responds within a few seconds."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=TIMEOUT_S):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
