"""Recipes (TOML files), the settings of a training run, and model architectures."""

from minimind.config.explain import explain
from minimind.config.grid import Variant, variants
from minimind.config.load import (
    ResolvedRecipe,
    difference,
    dump_recipe,
    identity,
    load_recipe,
    packaged_recipes,
    role_of,
)
from minimind.config.model import PRESETS, ModelConfig
from minimind.config.roles import Role
from minimind.config.settings import Recipe

__all__ = [
    "PRESETS",
    "ModelConfig",
    "Recipe",
    "ResolvedRecipe",
    "Role",
    "Variant",
    "difference",
    "dump_recipe",
    "explain",
    "identity",
    "load_recipe",
    "packaged_recipes",
    "role_of",
    "variants",
]
