"""Try out a grammar in a process of its own: `python -m minimind.inference.grammar_check`.

llguidance overflows its stack on references that nest thousands deep, and takes minutes and all
memory for some intersections of patterns. Here that ends this process and not the service.
The grammar comes on stdin; the reason why it cannot be used goes to stdout, empty if it can.
"""

import contextlib
import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_STACK = 2 * 2**20  # a quarter of what a thread of the service has
_MEMORY = 4 * 2**30


def main() -> None:
    """Check the grammar on stdin."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such module
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    grammar = sys.stdin.buffer.read().decode("utf-8")
    threading.stack_size(_STACK)
    checking = threading.Thread(target=_check, args=(grammar,))
    checking.start()
    checking.join()


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
