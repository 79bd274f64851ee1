"""Check a grammar in a separate process: `python -m minimind.inference.grammar_check`.

llguidance overflows its stack on references that are thousands of levels deep, and takes minutes
and all memory for some intersections of patterns. That must not end the service. The process reads
the grammar from stdin and writes why it cannot be used to stdout, or nothing. The service ends it
after CHECK_SECONDS; a limit on processor time does when the service has ended before.
"""

import contextlib
import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CHECK_SECONDS = 10
_STACK_BYTES = 2 * 2**20  # a quarter of a thread's stack in the service
_MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Check the grammar on stdin in a thread with a small stack."""
    with contextlib.suppress(ImportError):  # Windows has no `resource`
        import resource

        limits = {resource.RLIMIT_CPU: CHECK_SECONDS, resource.RLIMIT_CORE: 0}
        for limit, value in (limits | {resource.RLIMIT_AS: _MEMORY_BYTES}).items():
            with contextlib.suppress(ValueError, OSError):  # macOS; a lower limit is set
                resource.setrlimit(limit, (value, value))
    grammar = sys.stdin.buffer.read().decode("utf-8")
    threading.stack_size(_STACK_BYTES)
    checker = threading.Thread(target=_check, args=(grammar,))
    checker.start()
    checker.join()


def _check(grammar: str) -> None:
    limits = LLParserLimits(verbose_errors=False)
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
    if is_error:
        sys.stdout.buffer.write(messages[0][:2000].encode("utf-8", "replace"))
        return
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()
    if matcher.is_error():
        sys.stdout.buffer.write(b"no JSON value satisfies it")


if __name__ == "__main__":
    main()
