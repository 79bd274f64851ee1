"""Run the numerically sensitive tests as on other processors: `python -m tests.processors`.

    python -m tests.processors               all of them
    python -m tests.processors avx2-1        those of these names; `--help` lists them

Three libraries choose kernels by the processor, and each has a switch that makes it take an older
one: oneDNN (packed and bf16 products), ATen (element-wise operations, softmax, int8 products) and
MKL (float32 products). Compiled decoding is compiled for an older processor. No sum is shared by
two of them, so each value of each switch is needed once, not in each combination; they go together
as in real processors. Kernels divide their work by the number of threads, so both numbers are tried
with old and with new kernels.

A switch only goes down: without AMX, "amx-2" is the newest kernel that the processor has.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

Variables = dict[str, str]


def _processor(onednn: str, aten: str, mkl: str, native: str, threads: int) -> Variables:
    return {
        "CXXFLAGS": f"-march={native}",
        "ONEDNN_MAX_CPU_ISA": onednn,
        "ATEN_CPU_CAPABILITY": aten,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "MINIMIND_TEST_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin slow down tests on busy cores
    }


PROCESSORS: dict[str, Variables] = {
    "sse4-1": _processor("SSE41", "default", "SSE4_2", "nehalem", 1),
    "avx2-1": _processor("AVX2", "avx2", "AVX2", "haswell", 1),
    "avx2-2": _processor("AVX2", "avx2", "AVX2", "haswell", 2),
    "avx512-2": _processor("AVX512_CORE", "avx512", "AVX512", "skylake-avx512", 2),
    "avx512-bf16-1": _processor("AVX512_CORE_BF16", "avx512", "AVX512", "cooperlake", 1),
    "amx-1": _processor("AVX512_CORE_AMX", "avx512", "AVX512", "native", 1),
    "amx-2": _processor("AVX512_CORE_AMX", "avx512", "AVX512", "native", 2),
}


def run(name: str, flags: list[str]) -> bool:
    """Run the tests as on that processor; return True if they pass."""
    command = [sys.executable, "-m", "pytest", "-m", "numeric and not slow", "-q", *flags]
    started = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | PROCESSORS[name], capture_output=True, text=True, encoding="utf-8"
    )
    passed = done.returncode == 0
    outcome = "passed" if passed else f"FAILED\n{done.stdout}{done.stderr}"
    print(f"{name}: {time.monotonic() - started:.0f} s, {outcome}", flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROCESSORS))
    parser.add_argument("--pytest", default="", help="More arguments for pytest, in one string.")
    args = parser.parse_args()
    if unknown := set(args.names) - PROCESSORS.keys():
        parser.error(f"no such processor: {', '.join(sorted(unknown))}")
    with ThreadPoolExecutor(os.cpu_count()) as executor:  # one per core
        names = args.names or list(PROCESSORS)
        passed = list(executor.map(lambda name: run(name, args.pytest.split()), names))
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
