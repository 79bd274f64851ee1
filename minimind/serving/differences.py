"""Annotations of schema fields that differ from OpenAI's API.

They appear in /openapi.json as `x-openai-difference` and in the generated HTTP reference.
"""

from pydantic.config import JsonDict

DIFFERENCE = "x-openai-difference"
SUPPORT = "x-support"  # "ignored" for parameters that are accepted without effect
EXTENSION = "Not in OpenAI's API."


def differs(text: str) -> JsonDict:
    """Return `json_schema_extra` that states a difference from OpenAI's API."""
    return {DIFFERENCE: text}


def ignored(text: str = "No effect.") -> JsonDict:
    """Return `json_schema_extra` for a parameter that is accepted without effect."""
    return {SUPPORT: "ignored", DIFFERENCE: text}
