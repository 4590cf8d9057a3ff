"""`disttrain recipe list|show|schema`."""

from __future__ import annotations

import json

import click

from disttrain.commands.arguments import RECIPE
from disttrain.commands.options import json_option, overrides_option


@click.group()
def recipe() -> None:
    """Inspect recipes."""


@recipe.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """List the recipes that come with disttrain."""
    from disttrain.recipe import shipped_recipes

    found = shipped_recipes()
    if as_json:
        click.echo(json.dumps({"recipes": [{"name": name, "description": found[name]} for name in found]}))
        return
    width = max(map(len, found), default=0)
    for name, description in found.items():
        click.echo(f"{name:{width}}  {description}")


@recipe.command()
@click.argument("name", metavar="RECIPE", type=RECIPE)
@overrides_option
@json_option
def show(name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show every key of RECIPE (a shipped name or a TOML file) with its value and meaning.

    What it prints is a recipe itself: `disttrain recipe show digits > mine.toml`.
    """
    from disttrain.recipe import load_recipe, to_toml

    loaded = load_recipe(name, overrides)
    click.echo(loaded.model_dump_json() if as_json else to_toml(loaded, comments=True), nl=as_json)


@recipe.command()
def schema() -> None:
    """Print the JSON schema of recipes, with which editors complete and check them."""
    from disttrain.recipe import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
