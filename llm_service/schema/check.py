"""Checks a JSON schema in a process of its own: `python -m llm_service.schema.check < SCHEMA`; the exit code tells.

Making a grammar of a few hundred characters can take for ever, and nothing stops a thread that does it. Here the kernel
does.
"""

import json
import resource
import sys
import time

from llguidance import LLTokenizer, TokenizerWrapper

from llm_service.schema.grammar import can_begin, grammar_of, leads_nowhere, matcher_of
from llm_service.schema.satisfiable import is_satisfiable

# Exit codes. Anything else, a signal above all, means that it could not be found out.
SOUND, INVALID, UNSATISFIABLE, TOO_MUCH = 0, 3, 4, 5
# A sound schema's matcher is made again for every request, so it has to be made much faster than it may be checked.
_MATCHER_CPU_S = 0.25
_CPU_S = 2
_MEMORY_BYTES = 2 << 30


class _Bytes:
    """A vocabulary of the 256 bytes and an end: whether a schema makes a grammar does not depend on the tokens."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text."""
        return list(text)


def verdict_on(schema: str) -> int:
    """Return one of the verdicts above. How long it takes is bounded by nothing."""
    try:
        if not is_satisfiable(json.loads(schema)):
            return UNSATISFIABLE
        grammar = grammar_of(schema)
    except (ValueError, RecursionError):
        return INVALID
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=256)
    started = time.process_time()
    matcher = matcher_of(grammar, tokenizer)
    if matcher.is_error():
        return UNSATISFIABLE if leads_nowhere(matcher) else INVALID
    if time.process_time() - started > _MATCHER_CPU_S:
        return TOO_MUCH
    if can_begin(matcher):
        return SOUND
    return TOO_MUCH if matcher.is_error() and not leads_nowhere(matcher) else UNSATISFIABLE


def main() -> None:
    """Read a schema and exit with the verdict, or be killed."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S + 1))  # the first ends it with a signal of its own
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(verdict_on(sys.stdin.buffer.read().decode()))


if __name__ == "__main__":
    main()
