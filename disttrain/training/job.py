"""A training job: everything that a recipe names, built on this worker and brought to where the run left off."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disttrain.checkpoint import optimizer_to_tensors, shared_names
from disttrain.data import Datasets, Digest, EvalLoader, Loader, SampleSets, StepSampler
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.health.nonfinite import NonFiniteGuard
from disttrain.health.nonfinite_later import guard_of
from disttrain.health.progress import Progress
from disttrain.health.spikes import SpikeGuard
from disttrain.health.watchdog import Watchdog
from disttrain.layout import EVAL, Best
from disttrain.models.freeze import hold_statistics
from disttrain.models.start import made_and_frozen
from disttrain.parallel.choose import parallelize
from disttrain.parallel.conditions import environment_fingerprint
from disttrain.parallel.strategy import Strategy
from disttrain.recipe import Recipe
from disttrain.task import Task, has_own, named
from disttrain.training.compiled import compile_model, facts_of_compiler
from disttrain.training.early_stopping import EarlyStopping, best_metric
from disttrain.training.ema import WeightAverage
from disttrain.training.given import Given, model_words
from disttrain.training.gradients import facts_of_fast_mode
from disttrain.training.groups import parameter_groups
from disttrain.training.hooks import Hooks, build_hooks
from disttrain.training.identity import describe_data, describe_task, digest_for_savers
from disttrain.training.optim import Schedule, build_optimizer, may_fuse
from disttrain.training.recompute import checkpoint_activations
from disttrain.training.sets import eval_loader, load_sets, model_for, served
from disttrain.training.sharding import constructing, is_to_shard

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step came to.

    `losses`: each slice's share of the loss, (num_slices,), zero for other workers' slices; summed over slices and
    ranks, it is the mean over the global batch. `grad_norm`: the 2-norm of the global batch's gradient, () on the
    device, before it is clipped, the same on every rank (and in exact mode at every world size, since the gradient is);
    None unless the step is logged or gradients are clipped, and for a step that was skipped.
    """

    losses: torch.Tensor
    grad_norm: torch.Tensor | None
    total_losses: torch.Tensor | None = None
    """The losses of all ranks' slices, (num_slices,) float64; None unless they are logged or watched, and at once."""


@dataclass
class Job:
    """What one worker trains with. `step` counts the steps done, over all epochs; `metrics` were measured there."""

    recipe: Recipe
    world: World
    data: Datasets | SampleSets
    task: Task
    strategy: Strategy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    non_finite: NonFiniteGuard
    spikes: SpikeGuard
    schedule: Schedule
    early_stopping: EarlyStopping
    loader: Loader
    eval_loader: EvalLoader
    steps_per_epoch: int
    total_steps: int
    step: int = 0
    metrics: dict[str, float] | None = None
    progress: Progress = field(default_factory=Progress)
    data_name: str = ""  # empty for sets that have none
    given: frozenset[str] = frozenset()  # what came as an object, in place of what the recipe names
    init: dict[str, str] | None = None  # the weights it started from, and their SHA-256
    ema: WeightAverage | None = None
    watchdog: Watchdog | None = None
    hooks: Hooks = field(default_factory=lambda: Hooks({}))
    best: Best = field(default_factory=Best)  # the metric that decides which checkpoints are kept as best
    compiled: set[tuple[str, int]] = field(default_factory=set)  # for which stages and sizes of batches the model is
    digest: Digest = field(default_factory=Digest)  # of the training set; whoever saves has it

    @property
    def model_name(self) -> str:
        """What the model is called: by its recipe, or by its class if it was given as an object."""
        return type(self.model).__name__ if "model" in self.given else self.recipe.model.name

    @property
    def data_words(self) -> str:
        """What the data set is called, and how large it is."""
        num_train, num_test = f"{len(self.data.train):,} training", f"{len(self.data.test):,} test samples"
        return f"{self.data_name} ({num_train}, {num_test})" if self.data_name else f"{num_train} and {num_test}"

    @property
    def model(self) -> nn.Module:
        """The bare model, whose names are those of the checkpoint."""
        return self.strategy.model

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that the forward pass computes in; None for float32."""
        return AUTOCAST[self.recipe.train.precision]

    @cached_property
    def computing(self) -> AbstractContextManager[None]:
        """The context of a forward pass in training. It can be entered again and again; making it takes longer."""
        if self.autocast is None and not torch.is_autocast_enabled(self.world.device.type):
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, counted from 0."""
        return self.step // self.steps_per_epoch

    @property
    def num_epochs(self) -> int:
        """How many epochs the run touches."""
        return -(-self.total_steps // self.steps_per_epoch)

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done and evaluated, or the last evaluation has ended the run."""
        return self.metrics is not None and (self.step >= self.total_steps or self.early_stopping.has_stopped)

    @property
    def evaluation_is_due(self) -> bool:
        """Whether an evaluation belongs to this step and has not been made."""
        return (self.step >= self.total_steps or self.is_at_evaluation) and self.metrics is None

    @property
    def is_at_evaluation(self) -> bool:
        """Whether every run of the recipe evaluates at this step, however far it goes."""
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        return rest == 0 and epoch > 0 and epoch % self.recipe.train.eval_every_epochs == 0

    def compiles_in(self, stage: str, sizes: Iterable[int]) -> bool:
        """Whether the model is now compiled for batches of these sizes, which may take minutes: true once for each."""
        if not self.recipe.train.compile:
            return False
        wanted = {(stage, size) for size in sizes}
        is_new = not wanted <= self.compiled
        self.compiled |= wanted
        return is_new

    def as_evaluated(self) -> AbstractContextManager[None]:
        """The context in which the model has the weights that are evaluated: their averages, over steps or workers."""
        return self.strategy.averaged() if self.ema is None else self.ema.in_place()

    def evaluation(self) -> dict[str, float]:
        """The metrics that were measured at this step, as the task names them."""
        return {name.removeprefix(EVAL): value for name, value in (self.metrics or {}).items()}

    def is_logged(self, step: int) -> bool:
        """Whether metrics are logged once `step` steps are done."""
        return step == self.total_steps or step % self.recipe.train.log_every_steps == 0

    def close(self) -> None:
        """Dismiss the processes that read data."""
        self.loader.close()
        self.eval_loader.close()

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """The model's state dict; what it has under several names is there under the first."""
        tensors = self.model.state_dict()
        shared = shared_names(tensors)
        return {name: tensor for name, tensor in tensors.items() if name not in shared}

    def optimizer_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The optimizer's tensors and the averages of the weights, and the rest of the optimizer's state."""
        tensors, rest = optimizer_to_tensors(self.optimizer, self.model)
        return {**tensors, **(self.ema.tensors() if self.ema is not None else {})}, rest

    @cached_property
    def described(self) -> dict[str, Any]:
        """What of a checkpoint's state no step changes. Looked up once: it takes as long as a small save."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "task": describe_task(self.task),
            "data": describe_data(self.data.train, self.digest),
            "environment_fingerprint": self.environment_fingerprint,
        }

    @cached_property
    def environment_fingerprint(self) -> dict[str, Any]:
        """What the bits of the run depend on besides its recipe."""
        facts = environment_fingerprint(self.world.device) | facts_of_compiler(self.recipe.train, self.world.device)
        return facts | (facts_of_fast_mode(self.world) if self.strategy.bits_depend_on_world_size else {})


def build_job(recipe: Recipe, world: World, given: Given, folder: Path | None = None) -> Job:
    """Build everything that `recipe` names, or take it from what was `given`; see `constructing` for the `folder`.

    The weights at the start are those of `torch.manual_seed(train.seed)` followed by the model's constructor. Every
    rank must call it. Raises ConfigurationError for whatever does not fit.
    """
    data, task = load_sets(recipe, world, given)
    train_sampler = StepSampler(
        len(data.train),
        num_replicas=world.size,
        rank=world.rank,
        seed=recipe.train.seed,
        batch_size=recipe.data.batch_size,
    )
    torch.manual_seed(recipe.train.seed)
    with constructing(recipe, world, folder):
        model = model_for(recipe, given, data.train, task)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        words = model_words(recipe, is_given=given.model is not None)
        raise ConfigurationError(f"{words}: it has no parameters to train.")
    model = made_and_frozen(model, recipe.model, channels_last=recipe.train.channels_last)
    model = model if is_to_shard(recipe, world) else model.to(world.device)  # else it goes there part by part
    if recipe.train.compile:
        compile_model(model, recipe.train, world.device)
    strategy = parallelize(model, world, recipe.parallel, sync_batchnorm=recipe.model.sync_batchnorm)
    hold_statistics(strategy.model, recipe.model.freeze)
    checkpoint_activations(strategy, is_wanted=recipe.train.checkpoint_activations)
    steps_per_epoch, settings = train_sampler.steps_per_epoch, recipe.train
    total_steps = min(whole := settings.epochs * steps_per_epoch, settings.max_steps or whole)
    with named(task, "param_groups"):
        groups = parameter_groups(recipe.optim, strategy.model, task.param_groups(strategy.model))
    optimizer = build_optimizer(recipe.optim, groups, may_fuse=may_fuse(strategy))
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.train.precision == "fp16")
    loader = Loader(
        served(data.train, task),
        train_sampler,
        recipe.data,
        task,
        accumulate=recipe.train.accumulate,
        seed=recipe.train.seed,
        device=world.device,
        slices=strategy.slices,
        num_slices=strategy.num_slices,
        fills_empty=strategy.fills_empty,
        passes_of=strategy.passes_of,
        weighs=has_own(task, "weight"),
    )
    best, hooks = best_metric(recipe, task), build_hooks(recipe.train.hooks, given.hooks or ())
    return Job(
        recipe=recipe,
        world=world,
        data=data,
        task=task,
        strategy=strategy,
        optimizer=optimizer,
        scaler=scaler,
        non_finite=guard_of(recipe, strategy, optimizer, scaler, world, has_hooks=bool(hooks))(
            recipe.train,
            strategy,
            optimizer,
            scaler,
            world,
            AUTOCAST[recipe.train.precision],
            task,
            lambda step, samples: loader.samples(step // steps_per_epoch, samples),
        ),
        spikes=SpikeGuard(recipe.train),
        schedule=Schedule(recipe.schedule, recipe.optim.lr, steps_per_epoch, total_steps),
        early_stopping=EarlyStopping(recipe.train, best),
        loader=loader,
        eval_loader=eval_loader(data.test, task, recipe, world),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        data_name=given.data_name if given.train_set is not None else recipe.data.dataset,
        given=given.names(),
        ema=WeightAverage(strategy.model, recipe.train.ema_decay) if recipe.train.ema_decay is not None else None,
        hooks=hooks,
        best=best,
        digest=digest_for_savers(data.train, recipe, world),
    )
