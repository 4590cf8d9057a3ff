"""The recipe: one training job as typed, validated values, from TOML and `-o key=value`. Imports no torch."""

from disttrain.errors import ConfigurationError, DisttrainError, ExitCode, RecipeError, UsageError, printable
from disttrain.files import make_folder, open_to_append, open_to_read, parse_json
from disttrain.recipe.installed import check_installed
from disttrain.recipe.load import as_recipe, load_recipe, old_names_in, parse_recipe, recipe_text, shipped_recipes
from disttrain.recipe.model import DataRecipe, ModelRecipe, Recipe, TaskRecipe, TrackingRecipe
from disttrain.recipe.optimizers import OptimRecipe
from disttrain.recipe.parallel import ParallelRecipe
from disttrain.recipe.stored import damage, load_recipe_for, recipe_of_checkpoints
from disttrain.recipe.train import CheckpointRecipe, ScheduleRecipe, TrainRecipe
from disttrain.recipe.trust import (
    KEYS_OF_CODE,
    ask_before_importing,
    ask_before_resuming,
    ask_before_sending,
    is_beside,
    is_named_by_user,
    is_own_recipe,
)
from disttrain.recipe.write import json_schema, to_toml

__all__ = [
    "KEYS_OF_CODE",
    "CheckpointRecipe",
    "ConfigurationError",
    "DataRecipe",
    "DisttrainError",
    "ExitCode",
    "ModelRecipe",
    "OptimRecipe",
    "ParallelRecipe",
    "Recipe",
    "RecipeError",
    "ScheduleRecipe",
    "TaskRecipe",
    "TrackingRecipe",
    "TrainRecipe",
    "UsageError",
    "as_recipe",
    "ask_before_importing",
    "ask_before_resuming",
    "ask_before_sending",
    "check_installed",
    "damage",
    "is_beside",
    "is_named_by_user",
    "is_own_recipe",
    "json_schema",
    "load_recipe",
    "load_recipe_for",
    "make_folder",
    "old_names_in",
    "open_to_append",
    "open_to_read",
    "parse_json",
    "parse_recipe",
    "printable",
    "recipe_of_checkpoints",
    "recipe_text",
    "shipped_recipes",
    "to_toml",
]
