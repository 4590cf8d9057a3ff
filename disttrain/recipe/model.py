"""The recipe: its sections, and every key with its type, its range and its default."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from disttrain.errors import ConfigurationError
from disttrain.recipe.address import is_text, settled
from disttrain.recipe.names import check_dataset, check_model, check_task
from disttrain.recipe.optimizers import AnyOptimRecipe, SgdRecipe
from disttrain.recipe.parallel import ParallelRecipe
from disttrain.recipe.section import Count, NoneIfSaid, Patterns, Positive, Section, WholeNumber
from disttrain.recipe.table import table_options
from disttrain.recipe.train import CheckpointRecipe, ScheduleRecipe, TrainRecipe


class TaskRecipe(Section):
    """What is learned: the loss, the metrics, how samples become a batch."""

    name: Annotated[str, AfterValidator(check_task)] = Field(
        default="image-classification",
        description="image-classification, language-modeling, tabular, or package.module:callable",
    )
    options: dict[str, Any] = Field(default={}, description="arguments of the task's constructor")


def _is_flip(value: Any) -> Any:
    if type(value) is not bool and value != "alternate":
        raise ValueError(f'should be true, false or "alternate", not {value!r}')
    return value


class DataRecipe(Section):
    """What is learned from, and how it is cut into batches."""

    dataset: Annotated[str, AfterValidator(check_dataset)] = Field(
        default="digits",
        description="cifar10, cifar100, folder, digits, text, table, synthetic, or package.module:callable",
    )
    root: str = Field(default="data", description="the folder that holds the data, or into which it is downloaded")
    verify: bool = Field(default=True, description="check the published md5 sums; false accepts an altered copy")
    download: bool = Field(default=True, description="download what is missing")
    batch_size: Count = Field(default=64, description="the global batch: samples per step over all workers together")
    image_size: Annotated[Count | None, NoneIfSaid] = Field(
        default=None, description="folder: resize and centre-crop to this many pixels a side"
    )
    mean: Annotated[list[float] | None, NoneIfSaid] = Field(
        default=None, description="per channel, for pixels in 0..1 (left out: the dataset's own)"
    )
    std: Annotated[list[Positive] | None, NoneIfSaid] = Field(
        default=None, description="per channel, for pixels in 0..1 (left out: the dataset's own)"
    )
    crop_padding: WholeNumber = Field(default=0, description="pad by this many pixels, then crop at random (0: off)")
    crop_fill: Literal["black", "reflect"] = Field(
        default="black", description="what the padding holds: black, or the image's own edge mirrored"
    )
    flip: Annotated[bool | Literal["alternate"], BeforeValidator(_is_flip)] = Field(
        default=False,
        description="mirror each image with probability one half; alternate: in every second epoch, half of them first",
    )
    cutout: WholeNumber = Field(default=0, description="blank out a square of this many pixels a side (0: off)")
    layout: Literal["auto", "memory", "stream"] = Field(
        default="auto", description="hold the set as one tensor in memory, or stream it through DataLoader workers"
    )
    workers: WholeNumber = Field(default=2, description="DataLoader workers per training worker, when streaming")
    options: dict[str, Any] = Field(
        default={}, description="arguments of text, table, synthetic, or of your own callable"
    )

    @model_validator(mode="after")
    def _mean_and_std_belong_together(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together; give both or neither")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std has {len(self.std)}; give as many of each")
        return self

    @model_validator(mode="after")
    def _options_have_a_taker(self) -> Self:
        if self.options and self.dataset not in ("text", "table", "synthetic") and ":" not in self.dataset:
            raise ValueError(f"options: dataset {self.dataset!r} takes none; leave them out")
        if self.dataset == "table":
            table_options(self.options)
        return self


class ModelRecipe(Section):
    """What learns."""

    name: Annotated[str, AfterValidator(check_model)] = Field(
        default="net",
        description="net, resnet18, airbench, gpt, mlp, torchvision:NAME, timm:NAME, or package.module:callable",
    )
    options: dict[str, Any] = Field(default={}, description="further arguments of the model's constructor")
    sync_batchnorm: bool = Field(
        default=False, description="batch-norm statistics over the global batch, not each worker's"
    )
    init: Annotated[str | None, NoneIfSaid] = Field(
        default=None, description="start from the weights of a run, a checkpoint, or a safetensors file or folder"
    )
    init_skip: Patterns = Field(default=[], description='tensors that init leaves alone, by patterns: ["head.*"]')
    freeze: Patterns = Field(default=[], description='parameters that are not trained, by patterns: ["backbone.*"]')
    dirac: Patterns = Field(
        default=[], description='convolutions whose first filters pass their input on, by patterns: ["layers.*"]'
    )
    whiten: Annotated[str | None, NoneIfSaid] = Field(
        default=None, description="the convolution that gets filters which whiten the training images, and keeps them"
    )

    @model_validator(mode="after")
    def _something_to_skip_from(self) -> Self:
        if self.init_skip and self.init is None:
            raise ValueError("init_skip is set and init is not; give what to start from, or leave it out")
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        for key, value in (("whiten", self.whiten), ("dirac", self.dirac)):
            if value and self.init is not None:
                raise ValueError(f"{key} and init both say what the weights are at the start; leave one of the two out")
        return self


# For a server, whatever stands before the @ grants access; for a database, a user name alone does not.
_SECRET = re.compile(
    r"^(https?://[^/]*@|[a-z][a-z0-9+.-]*://[^/@]*:[^/@]+@)|[?&](password|passwd|pwd|secret|(access_)?token|api_key)=",
    re.IGNORECASE,
)


def _without_password(uri: str | None) -> str | None:
    # The recipe is stored in the run directory and logged: a secret in it would be everywhere.
    if uri is not None and _SECRET.search(uri):
        raise ValueError(
            "holds a password or a token, and recipes are stored and logged; set MLFLOW_TRACKING_URI instead"
        )
    return uri


class TrackingRecipe(Section):
    """Where metrics go besides the journal."""

    uri: Annotated[str | None, AfterValidator(_without_password)] = Field(
        default=None, description='MLflow (left out: MLFLOW_TRACKING_URI, else a database beside the runs; "none": off)'
    )
    experiment: Annotated[str, Field(min_length=1)] = Field(default="disttrain", description="the MLflow experiment")
    system_metrics: bool = Field(default=True, description="CPU, memory, disk, network and GPU of every machine")
    log_model: bool = Field(default=True, description="store the trained model in MLflow, ready to predict")


def _absolute(folder: str | None) -> str | None:
    if folder is not None and "\0" in folder:
        raise ValueError("should be a folder, and has a NUL character")
    try:
        found = folder if folder is None else settled(folder)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None
    if found is not None and not is_text(found):
        raise ValueError("should be in a folder whose name is UTF-8")
    return found


class Recipe(Section):
    """One training job: everything that decides what is learned, and nothing about where it runs."""

    name: Annotated[str, Field(pattern=r"^[\w.-]*$")] = Field(
        default="", description="what runs of this recipe are called (left out: the file's name)"
    )
    code: Annotated[str | None, AfterValidator(_absolute)] = Field(
        default=None,
        description="the folder where package.module:callable is looked for, after what is installed "
        "(left out: that of the recipe's file)",
    )
    task: TaskRecipe = TaskRecipe()
    data: DataRecipe = DataRecipe()
    model: ModelRecipe = ModelRecipe()
    optim: AnyOptimRecipe = SgdRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    train: TrainRecipe = TrainRecipe()
    parallel: ParallelRecipe = ParallelRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    tracking: TrackingRecipe = TrackingRecipe()

    @model_validator(mode="after")
    def _batch_can_be_cut(self) -> Self:
        if self.train.accumulate > self.data.batch_size:
            raise ValueError(
                f"train.accumulate is {self.train.accumulate}, but a batch has {self.data.batch_size} samples "
                "(data.batch_size); give at most as many micro-batches"
            )
        return self

    @model_validator(mode="after")
    def _exact_mode_can_be_exact(self) -> Self:
        for stands, key, why in (
            (
                self.parallel.strategy == "dp",
                'parallel.strategy = "dp"',
                "it cuts batches by the GPUs it sees",
            ),
            (
                self.parallel.compress != "none",
                f'parallel.compress = "{self.parallel.compress}"',
                "it rounds sums that depend on the number of workers",
            ),
            (
                self.parallel.sync_every > 0,
                f"parallel.sync_every = {self.parallel.sync_every}",
                "as many replicas are trained as there are workers",
            ),
            (self.model.sync_batchnorm, "model.sync_batchnorm = true", "its sums depend on the number of workers"),
            (
                self.train.compile and self.train.compile_any_shape,
                "train.compile_any_shape = true",
                "kernels are then made for the shapes a worker has met before",
            ),
            (
                self.train.compile and self.train.compile_mode.startswith("max-autotune"),
                f'train.compile_mode = "{self.train.compile_mode}"',
                "each worker takes the kernels that happen to be fastest there",
            ),
            (self.train.device == "mps", 'train.device = "mps"', "an Apple GPU serves one worker only"),
        ):
            if self.parallel.exact and stands:
                raise ValueError(f"{key} cannot be exact, since {why}; change it or set parallel.exact = false")
        if self.parallel.audit_every_steps and not self.parallel.exact:
            raise ValueError(
                "parallel.audit_every_steps compares bits that only exact mode has in common; set parallel.exact = true"
            )
        if self.parallel.audit_every_steps and self.parallel.strategy == "fsdp":
            raise ValueError(
                "parallel.audit_every_steps has a second worker compute a slice by itself, and with "
                'parallel.strategy = "fsdp" none has the whole model; leave one of the two out'
            )
        return self

    @model_validator(mode="after")
    def _workers_can_train_apart(self) -> Self:
        for stands, key, why in (
            (self.model.sync_batchnorm, "model.sync_batchnorm = true", "takes sums over all workers in every step"),
            (self.train.spike_factor > 0, "train.spike_factor", "looks at the loss of all workers in every step"),
            (
                self.train.ema_decay is not None,
                "train.ema_decay",
                "averages weights that all workers have in each step",
            ),
        ):
            if self.parallel.sync_every and stands:
                raise ValueError(
                    f"{key} {why}, which parallel.sync_every = {self.parallel.sync_every} does not have; leave one of "
                    "the two out"
                )
        return self

    @model_validator(mode="after")
    def _learning_rate_does_not_climb(self) -> Self:
        if self.schedule.name in ("cosine", "linear") and self.schedule.min_lr > self.optim.lr:
            raise ValueError(
                f"schedule.min_lr is {self.schedule.min_lr}, above optim.lr, which is {self.optim.lr}; lower it"
            )
        return self
