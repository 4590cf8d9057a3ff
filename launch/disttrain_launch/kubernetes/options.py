"""The options of `disttrain k8s render|submit`, and the request they make."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from disttrain.commands.arguments import RECIPE
from disttrain.commands.options import overrides_option
from disttrain_launch.kubernetes.places import KINDS, RUNS

if TYPE_CHECKING:
    from disttrain.recipe import Recipe
    from disttrain_launch.kubernetes.spec import JobRequest, RecipeFile

_Function = TypeVar("_Function", bound=Callable[..., Any])
_PAIR = "NAME=VALUE"


def _nodes(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a valid number of nodes; give N, or MIN:MAX.", ctx, parameter)
    return int(found[1]), int(found[2] or found[1])


def _pairs(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{value!r} should be {_PAIR}.", ctx, parameter)
        pairs[name] = text
    return pairs


_OPTIONS = (
    click.option("--image", default="", help="The image that has disttrain and your code; k8s/Dockerfile makes one."),
    click.option(
        "--kind", type=click.Choice(KINDS), default="job", show_default=True, help="The kind of object to create."
    ),
    click.option("--name", help="The job's name (default: the recipe's)."),
    click.option("--namespace", help="The namespace (default: that of the current context)."),
    click.option("--nodes", default="1", show_default=True, metavar="N|MIN:MAX", callback=_nodes, help="Pods."),
    click.option("--gpus", type=click.IntRange(0, 64), default=0, show_default=True, help="GPUs per node."),
    click.option("--workers", type=click.IntRange(1, 64), help="Workers per node (default: one per GPU, else one)."),
    click.option("--cpu", help="Cores per node (default: 4 per GPU, else 2)."),
    click.option("--memory", help="Memory per node (default: 32Gi per GPU, else 4Gi)."),
    click.option("--shm-size", help="Size of /dev/shm, which is in memory (default: 2Gi per GPU, else 1Gi)."),
    click.option(
        "--rdma", multiple=True, metavar="RESOURCE=N", callback=_pairs, help="RDMA devices, as in rdma/hca=1."
    ),
    click.option("--run-dir", help=f"A folder in {RUNS}, or a URL such as s3://bucket/run (default: {RUNS}/NAME)."),
    click.option("--claim", help="An existing PersistentVolumeClaim for runs (default: create 'disttrain-runs')."),
    click.option("--claim-size", default="50Gi", show_default=True, help="Size of the claim that is created."),
    click.option(
        "--access-mode",
        type=click.Choice(["ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]),
        default="ReadWriteMany",
        show_default=True,
        help="Mode of the claim that is created.",
    ),
    click.option("--storage-class", help="Class of the claim that is created (default: the cluster's)."),
    click.option("--queue", help="The Kueue LocalQueue that starts the job when there is room."),
    click.option(
        "--secret", "secrets", multiple=True, help="A Secret whose keys become variables of the pods: MLflow, S3, …"
    ),
    click.option(
        "--env",
        "environment",
        multiple=True,
        metavar=_PAIR,
        callback=_pairs,
        help="An environment variable for the pods.",
    ),
    click.option(
        "--node-selector", multiple=True, metavar="LABEL=VALUE", callback=_pairs, help="Only machines with this label."
    ),
    click.option(
        "--placement",
        type=click.Choice(["spread", "one-host", "any"]),
        default="spread",
        show_default=True,
        help="Pods on many machines, all on one, or wherever there is room.",
    ),
    click.option(
        "--topology-key", default="kubernetes.io/hostname", show_default=True, help="What pods are spread over."
    ),
    click.option(
        "--max-restarts",
        type=click.IntRange(0, 1000),
        default=3,
        show_default=True,
        help="Restarts per node; disruptions do not count.",
    ),
    click.option(
        "--stop-grace",
        type=click.IntRange(1, 86400),
        default=90,
        show_default=True,
        help="Seconds to save after SIGTERM.",
    ),
    click.option("--grace-period", type=click.IntRange(1, 90000), help="Seconds until SIGKILL (default: 30 more)."),
    click.option(
        "--ttl", type=click.IntRange(0), default=604800, show_default=True, help="Seconds a finished job is kept."
    ),
    click.option(
        "--pull-policy",
        type=click.Choice(["IfNotPresent", "Always", "Never"]),
        default="IfNotPresent",
        show_default=True,
        help="When to pull the image.",
    ),
    click.option("--pull-secret", "pull_secrets", multiple=True, help="A Secret with which to pull the image."),
)


def job_options(function: _Function) -> _Function:
    """RECIPE, `-o` and every option of a job, which `request_of` takes as keywords."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return click.argument("recipe", type=RECIPE)(overrides_option(function))


def request_of(recipe: str, overrides: tuple[str, ...], **given: Any) -> JobRequest:
    """The checked request. Raises RecipeError for the recipe, and UsageError with a line for each other mistake."""
    from disttrain.recipe import load_recipe
    from disttrain_launch.kubernetes.checks import check
    from disttrain_launch.kubernetes.spec import RecipeFile

    loaded = load_recipe(recipe, overrides)
    file = RecipeFile(_filename(recipe, loaded), _text(recipe), overrides)
    request = _request(file, given["name"] or _dns_name(loaded.name), given)
    check(request, loaded)
    return request


def _request(recipe: RecipeFile, name: str, given: dict[str, Any]) -> JobRequest:
    from disttrain.recipe.address import is_url
    from disttrain_launch.kubernetes.spec import JobRequest, Resources, Storage

    gpus, stop_grace_s = given["gpus"], given["stop_grace"]
    resources = Resources(
        gpus=gpus,
        workers=given["workers"] or gpus or 1,
        cpu=given["cpu"] or str(4 * gpus or 2),
        memory=given["memory"] or f"{32 * gpus or 4}Gi",
        shm=given["shm_size"] or f"{2 * gpus or 1}Gi",
        devices=given["rdma"],
    )
    run_dir = given["run_dir"] or f"{RUNS}/{name}"
    behind_url = is_url(run_dir)
    storage = Storage(
        run_dir=run_dir,
        claim=given["claim"] or (None if behind_url else "disttrain-runs"),
        create=not given["claim"] and not behind_url,
        size=given["claim_size"],
        access_mode=given["access_mode"],
        storage_class=given["storage_class"],
    )
    same = ("kind", "namespace", "image", "pull_policy", "pull_secrets", "nodes", "queue", "secrets", "environment",
            "node_selector", "placement", "topology_key", "max_restarts")  # fmt: skip
    return JobRequest(
        recipe=recipe,
        name=name,
        resources=resources,
        storage=storage,
        stop_grace_s=stop_grace_s,
        grace_period_s=given["grace_period"] or stop_grace_s + 30,
        ttl_s=given["ttl"],
        **{key: given[key] for key in same},
    )


def _filename(recipe: str, loaded: Recipe) -> str:
    stem = Path(recipe).name.removesuffix(".toml")
    return f"{re.sub(r'[^-._a-zA-Z0-9]+', '-', stem) or loaded.name}.toml"


def _text(recipe: str) -> str:
    from disttrain.recipe import recipe_text

    return recipe_text(recipe)


def _dns_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
