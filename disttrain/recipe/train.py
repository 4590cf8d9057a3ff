"""The sections of a recipe that say how to train: how long, at which learning rate, what is kept."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from disttrain.recipe.names import is_reference
from disttrain.recipe.section import Count, NoneIfSaid, NonNegative, Patterns, Positive, Section, WholeNumber


class ScheduleRecipe(Section):
    """The learning rate as a function of the step."""

    name: Literal["constant", "step", "cosine", "linear"] = Field(
        default="constant", description="constant, step, cosine or linear"
    )
    warmup_steps: WholeNumber = Field(default=0, description="increase linearly to optim.lr over this many steps")
    warmup_epochs: NonNegative = Field(default=0.0, description="the same in epochs; give one of the two")
    step_epochs: Count = Field(default=30, description="step: multiply by gamma each time this many epochs have passed")
    gamma: Positive = Field(default=0.1, description="step: the factor")
    min_lr: NonNegative = Field(default=0.0, description="cosine, linear: the learning rate at the end")

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("warmup_steps and warmup_epochs are both set; give one of the two")
        return self


def _are_references(names: list[str]) -> list[str]:
    for name in names:
        if not is_reference(name):
            raise ValueError(f"{name!r} does not name a hook; write package.module:Class")
    return names


class TrainRecipe(Section):
    """How long to train, and how."""

    epochs: Count = Field(default=1, description="how many passes over the training set")
    max_steps: Annotated[Count | None, NoneIfSaid] = Field(
        default=None, description="stop after at most this many steps"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="weights, order and augmentation follow from it"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="fp32, or bf16 or fp16 autocast")
    accumulate: Count = Field(
        default=1, description="cut the global batch into this many micro-batches; never changes what is learned"
    )
    clip_norm: Annotated[Positive | None, NoneIfSaid] = Field(
        default=None, description="clip the gradient's norm to this (left out: off)"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="the share of each label spread over all classes"
    )
    ema_decay: Annotated[float | None, Field(gt=0, lt=1), NoneIfSaid] = Field(
        default=None, description="evaluate a moving average of the weights that keeps this share of itself in a step"
    )
    hooks: Annotated[Patterns, AfterValidator(_are_references)] = Field(
        default=[], description="your own code at agreed points, subclasses of disttrain.Hook: package.module:Class"
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="compute what each block has computed again in the backward pass, and do not keep it: less memory, "
        "more time, the same bits",
    )
    compile: bool = Field(default=False, description="torch.compile the model")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        default="default", description="torch.compile's mode: how long to look for faster kernels"
    )
    compile_any_shape: bool = Field(
        default=False, description="from the second shape on, kernels for any shape: for texts of many lengths"
    )
    channels_last: bool = Field(
        default=False, description="keep weights and images in the order of pixels, which convolutions on GPUs prefer"
    )
    tf32: Annotated[bool | None, NoneIfSaid] = Field(
        default=None,
        description="GPUs: round what float32 products take in to 10 bits, for speed; left out: as torch has it, "
        "convolutions alone",
    )
    deterministic: bool = Field(
        default=False, description="kernels and sums of fixed order only, for the same bits on GPUs each time; slower"
    )
    threads: WholeNumber = Field(
        default=0, description="CPU threads per worker (0: OMP_NUM_THREADS, or the usable cores shared out)"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="auto: GPUs if each worker has one, else the CPU"
    )
    log_every_steps: Count = Field(default=50, description="steps between two rows of metrics")
    eval_every_epochs: Count = Field(default=1, description="epochs between two evaluations")
    eval_batch_size: Count = Field(default=500, description="samples per evaluation batch")
    eval_views: Literal["one", "mirror", "mirror-translate"] = Field(
        default="one",
        description="images: average the scores of the image and its mirror image, or also of both moved by a pixel",
    )
    patience: WholeNumber = Field(
        default=0, description="stop after this many evaluations without a better one, by checkpoint.best (0: off)"
    )
    min_delta: NonNegative = Field(default=0.0, description="how much better an evaluation has to be to count")
    hang_timeout_s: Positive = Field(
        default=600.0, description="seconds without progress after which a worker counts as hung"
    )
    non_finite: Literal["stop", "skip", "zero"] = Field(
        default="stop",
        description="a loss or gradient that is NaN or infinite: end the run, skip the step, or put zeros in its place",
    )
    spike_factor: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="a loss above so many times the median of the recent ones is a spike (0: off)"
    )
    spike_window: Annotated[int, Field(ge=4)] = Field(default=50, description="steps that the median is taken over")
    spike_limit: Count = Field(default=3, description="steps that may be left out; one more spike ends the run")
    non_finite_limit: Count = Field(
        default=10, description="skip, zero: the run ends after this many such steps in a row"
    )

    @model_validator(mode="after")
    def _recomputed_or_compiled(self) -> Self:
        if self.checkpoint_activations and self.compile:
            raise ValueError("checkpoint_activations and compile are both true; set one of the two to false")
        return self

    @model_validator(mode="after")
    def _spikes_stand_out(self) -> Self:
        if 0 < self.spike_factor <= 1:
            raise ValueError(f"spike_factor is {self.spike_factor}: half of all losses would be spikes; give 2 or more")
        return self


def _is_best(text: str | None) -> str | None:
    if text is not None and not (text.endswith((":min", ":max")) and text[:-4].strip()):
        raise ValueError(f"should be METRIC:min or METRIC:max, as in perplexity:min, not {text!r}")
    return text


class CheckpointRecipe(Section):
    """When to save (always at the end of an epoch and of the run), and how many to keep."""

    every_steps: WholeNumber = Field(default=0, description="save each time this many steps have passed (0: off)")
    every_seconds: NonNegative = Field(default=0.0, description="save each time this many seconds have passed (0: off)")
    keep_last: Count = Field(default=2, description="keep the newest checkpoints, this many")
    keep_best: WholeNumber = Field(default=1, description="keep the best checkpoints too, this many")
    best: Annotated[str | None, AfterValidator(_is_best), NoneIfSaid] = Field(
        default=None, description='which are best: "perplexity:min", "accuracy:max" (left out: as the task has it)'
    )
