"""Settings of data preparation. Their values, with reasons, are in `recipes/prepare/zh.toml`."""

from pydantic import Field

from minimind.config.load import load_settings
from minimind.config.roles import Settings

RECIPES = "prepare"  # subfolder of the packaged recipes


class LengthSettings(Settings):
    """Lengths of documents, in letters and digits; a Chinese character counts as a letter."""

    minimum: int = Field(ge=0, description="Documents with fewer letters and digits are dropped.")
    maximum: int = Field(ge=1, description="Documents with more letters and digits are dropped.")


class LanguageSettings(Settings):
    """Language of documents."""

    min_chinese: float = Field(
        ge=0, le=1, description="Minimum share of Chinese characters among all letters."
    )


class CharacterSettings(Settings):
    """Limits on kinds of characters, as a share of all characters that are not white space."""

    max_symbols: float = Field(ge=0, le=1, description="Symbols, such as ■, ★, =, | and emoji.")
    max_punctuation: float = Field(ge=0, le=1, description="Punctuation marks.")
    max_digits: float = Field(ge=0, le=1, description="Digits.")
    max_unreadable: float = Field(
        ge=0, le=1, description="U+FFFD, private and unassigned code points, format characters."
    )


class RepetitionSettings(Settings):
    """Repetition within a document."""

    max_duplicate_lines: float = Field(
        ge=0, le=1, description="Share of characters in lines that repeat an earlier line."
    )
    ngram: int = Field(ge=1, description="Length of an n-gram, in letters and digits.")
    max_duplicate_ngrams: float = Field(
        ge=0, le=1, description="Share of n-grams that repeat an earlier one."
    )


class BoilerplateSettings(Settings):
    """Text of web pages that is not content: navigation, copyright, requests to log in."""

    phrases: list[str] = Field(description="A line with one of these phrases is boilerplate.")
    max_share: float = Field(ge=0, le=1, description="Share of characters in boilerplate lines.")


class NearDuplicateSettings(Settings):
    """Near-duplicates by MinHash with banding (Broder 1997; Leskovec et al., chapter 3).

    Two documents are candidates if all hash values of at least one band are equal. With similarity
    s (Jaccard, of the sets of shingles), the probability is 1 - (1 - s^rows)^bands.
    """

    shingle: int = Field(ge=1, description="Length of a shingle, in letters and digits.")
    bands: int = Field(ge=1, le=255, description="Number of bands.")
    rows: int = Field(ge=1, le=255, description="Number of hash values per band.")


class PrepareSettings(Settings):
    """All settings that determine the output of data preparation."""

    max_invalid_fraction: float = Field(
        ge=0, le=1, description="Share of invalid records of a file above which reading stops."
    )
    validation_fraction: float = Field(
        ge=0,
        le=0.5,
        description="Share of documents in the validation split of the token store; "
        "equal to data.validation_fraction of the training recipe.",
    )
    shard_mb: int = Field(ge=1, le=256, description="Size of a shard in MB of text.")
    length: LengthSettings
    language: LanguageSettings
    characters: CharacterSettings
    repetition: RepetitionSettings
    boilerplate: BoilerplateSettings
    near_duplicates: NearDuplicateSettings


def load_prepare_settings(name: str = "zh", overrides: list[str] | None = None) -> PrepareSettings:
    """Load a recipe of data preparation: a file, or a packaged one. Raises ConfigError."""
    return load_settings(PrepareSettings, name, RECIPES, overrides=overrides or [])
