"""Check a grammar in a separate process: `python -m minimind.inference.grammar_check`.

llguidance overflows its stack on references that are thousands of levels deep, and takes minutes
and all memory for some intersections of patterns. That must not end the service. The process reads
the grammar from stdin and writes why it cannot be used to stdout, or nothing. A limit on
processor time ends it. The service does so after CHECK_SECONDS, when the machine is busy.
"""

import contextlib
import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CHECK_SECONDS = 10
_PROCESSOR_SECONDS = 8  # on an idle machine this limit is reached first
_STACK_BYTES = 2 * 2**20  # a quarter of a thread's stack in the service
_MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Check the grammar on stdin in a thread with a small stack."""
    with contextlib.suppress(ImportError):  # Windows has no `resource`
        import resource

        limits = {resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_AS: (_MEMORY_BYTES,) * 2}
        # Above the first number of seconds the signal is SIGXCPU, which nothing else sends.
        limits[resource.RLIMIT_CPU] = (_PROCESSOR_SECONDS, _PROCESSOR_SECONDS + 1)
        for limit, values in limits.items():
            with contextlib.suppress(ValueError, OSError):  # macOS; a lower limit is set
                resource.setrlimit(limit, values)
    grammar = sys.stdin.buffer.read().decode("utf-8")
    threading.stack_size(_STACK_BYTES)
    checked = threading.Event()
    checker = threading.Thread(target=_check, args=(grammar, checked))
    checker.start()
    checker.join()
    if not checked.is_set():  # the thread has died of an exception
        sys.exit(1)


def _check(grammar: str, checked: threading.Event) -> None:
    limits = LLParserLimits(verbose_errors=False)
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
    if is_error:
        sys.stdout.buffer.write(messages[0][:2000].encode("utf-8", "replace"))
    else:
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
        matcher.compute_bitmask()
        if matcher.is_error():
            sys.stdout.buffer.write(b"no JSON value satisfies it")
    checked.set()


if __name__ == "__main__":
    main()
