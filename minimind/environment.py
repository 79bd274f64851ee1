"""Environment variables that several packages read, Python's command, cores of this process."""

import os
import sys

KEY_VARIABLE = "MINIMIND_API_KEY"  # the API key that the service requires and clients send
EXIT_WITH_PARENT_VARIABLE = "MINIMIND_EXIT_WITH_PARENT"  # set where stdin closes with the parent
NATIVE_VARIABLE = "MINIMIND_NATIVE"  # "0": neither compile nor use C++ code


def python_module(name: str) -> list[str]:
    """Return the command that runs a module; files of the current folder replace no modules."""
    return [sys.executable, "-P", "-m", name]


def num_cores() -> int:
    """Return the number of CPU cores that this process may use; a scheduler may allow only some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
