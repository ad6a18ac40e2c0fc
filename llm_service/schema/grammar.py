"""From a JSON schema to a grammar: the options, and the limits on the work that following it may cost."""

from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# They come after what a schema says of itself (`x-guidance`), so that no schema changes them. White space is bounded,
# or a model without a better idea would write it for ever; `\u` is left out because it can spell the name of a
# property whose own schema would then not count.
_OPTIONS: Final[Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"( |\n[ \t]{0,32})?",
    "json_allowed_escapes": 'nrbtf\\"',
    "json_allow_general_unicode_escapes": False,
    "coerce_one_of": False,
    "lenient": False,
}
# What a step may cost beside its walk through the vocabulary: the library does about 14,000 units of fuel and 20,000
# items in a millisecond. A state of the lexer takes half a kilobyte, and text within a string whose length is limited
# takes two to nine states a character.
_LIMITS: Final = LLParserLimits(
    step_lexer_fuel=10_000, step_max_items=10_000, max_lexer_states=50_000, verbose_errors=False
)


def grammar_of(schema: str) -> str:
    """Return the grammar's text. Raises `ValueError` where the schema is not even JSON."""
    return LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)


def matcher_of(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Return a matcher at the grammar's beginning; `is_error()` where the schema made no grammar.

    How long it takes is bounded by nothing. Its copies share its limit on states, and what they remember.
    """
    return LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)


def can_begin(matcher: LLMatcher) -> bool:
    """Return whether a matcher at its beginning allows any token but the end: no JSON text is empty."""
    matcher.compute_bitmask()
    return not matcher.is_error() and not matcher.is_stopped() and not matcher.is_accepting()


def leads_nowhere(matcher: LLMatcher) -> bool:
    """Return whether a matcher failed because nothing can be said, and not for the work that it is."""
    error = matcher.get_error()
    return error.startswith("Unsatisfiable") or "NoExtension" in error
