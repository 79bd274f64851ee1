"""Recipes and settings: everything a run can be told."""

from minimind.config.explain import explain
from minimind.config.grid import Variant, variants
from minimind.config.load import (
    ResolvedRecipe,
    difference,
    dump_recipe,
    load_recipe,
    packaged_recipes,
)
from minimind.config.model import PRESETS, ModelConfig
from minimind.config.settings import Recipe

__all__ = [
    "PRESETS",
    "ModelConfig",
    "Recipe",
    "ResolvedRecipe",
    "Variant",
    "difference",
    "dump_recipe",
    "explain",
    "load_recipe",
    "packaged_recipes",
    "variants",
]
