"""Base class of settings, and the role that decides if a setting may change on resume.

Each setting is declared with its role. `Identity` settings determine the result of a run and
must be the same when it is resumed. `Operation` settings, such as the micro-batch size, do not
affect the result and may change.
"""

from enum import Enum
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict


class Role(Enum):
    """Role of a setting when a run is resumed."""

    IDENTITY = "identity"
    OPERATION = "operation"


_T = TypeVar("_T")
Identity = Annotated[_T, Role.IDENTITY]
Operation = Annotated[_T, Role.OPERATION]


class Settings(BaseModel):
    """Base of all groups of settings."""

    # Strict: no conversion of "64" to 64 or of true to 1.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True
    )
