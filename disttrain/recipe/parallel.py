"""The section of a recipe that says how the workers' gradients meet."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from disttrain.recipe.section import Count, Patterns, Positive, Section, WholeNumber

_SAME_BITS_ANYHOW = 2  # workers: there is one order in which two numbers are added


def _true_false_or_auto(value: Any) -> Any:
    if type(value) is not bool and value != "auto":
        raise ValueError(f'should be "auto", true or false, not {value!r}')
    return value


class ParallelRecipe(Section):
    """How the workers' gradients meet."""

    strategy: Literal["auto", "ddp", "fsdp", "dp", "none"] = Field(
        default="auto",
        description="auto: ddp with several workers, dp for one process that sees several GPUs, else none; fsdp: each "
        "worker holds a part of the model and of the optimizer's state",
    )
    find_unused_parameters: bool = Field(
        default=False, description="ddp: a step may leave parameters without a gradient (LayerDrop, an unused head)"
    )
    compress: Literal["none", "bf16", "fp16", "int8"] = Field(
        default="none",
        description="ddp: gradients travel as float32, or in half the bytes as bf16 or fp16; sync_every: what an outer "
        "step sends, or in a quarter as int8",
    )
    sync_every: WholeNumber = Field(
        default=0,
        description="each worker trains by itself for so many steps between two outer steps (DiLoCo; 0: gradients meet "
        "in every step)",
    )
    sync_fragments: Count = Field(
        default=1,
        description="sync_every: the parts of the model that meet at steps of their own, so that fewer bytes are sent "
        "at once (Streaming DiLoCo)",
    )
    outer_learning_rate: Positive = Field(default=0.7, description="sync_every: what the outer step is multiplied by")
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="sync_every: the outer step's Nesterov momentum (0: none); often too much with SGD"
    )
    exact: bool = Field(default=False, description="the same bits at every number of workers")
    slices: Count = Field(default=4, description="exact: the pieces each global batch is computed in")
    shard_modules: Patterns = Field(
        default=[],
        description="fsdp: the classes of the blocks that are gathered as one (left out: as the model has them)",
    )
    shard_size: WholeNumber = Field(
        default=0,
        description="fsdp: the workers that hold one copy of the model together, of several that are trained (0: all)",
    )
    param_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="fsdp: what weights are gathered as; bf16, beside train.precision: half the bytes and memory, and "
        "blocks compute in it throughout",
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="fsdp: what gradients are sent and summed as; bf16: half the bytes, rounded"
    )
    prefetch: WholeNumber = Field(
        default=0,
        description="fsdp: how many blocks ahead weights are gathered (0: none on CPUs, as FSDP2 does on GPUs)",
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="fsdp: a block's weights are let go of after its forward pass, and gathered again in the backward "
        "pass; false: kept in between, for more memory and less traffic",
    )
    cpu_offload: bool = Field(
        default=False,
        description="fsdp: GPUs keep weights and optimizer state in main memory, and get them block by block",
    )
    shared_memory: Annotated[bool | Literal["auto"], BeforeValidator(_true_false_or_auto)] = Field(
        default="auto",
        description="ddp and exact: gradients of CPU workers of one machine meet in memory they share, and several "
        "machines send one sum each; auto: where the bits are the same as without (exact mode, or two workers)",
    )
    on_lost_worker: Literal["auto", "restart", "continue", "stop"] = Field(
        default="auto",
        description="restart all when one is killed; continue without it (exact mode, gloo); or stop: end the run; "
        "auto: continue in exact mode with `disttrain train` or `disttrain node`, else restart",
    )
    audit_every_steps: WholeNumber = Field(
        default=0,
        description="exact: in every so many steps one slice is computed by a second worker as well, and the bits are "
        "compared (0: off)",
    )

    @property
    def most_sharing_memory(self) -> int:
        """How many workers at most may have their gradients meet in memory they share."""
        if not self.shared_memory or self.sync_every or self.strategy not in ("auto", "ddp"):
            return 0
        # In fast mode three or more are added up in another order than gloo's: an older run would get other bits.
        return sys.maxsize if self.exact or self.shared_memory is True else _SAME_BITS_ANYHOW

    def asks_to_continue(self, *, under_a_launcher: bool) -> bool:
        """Whether the others are to continue without a lost worker, where they can.

        `under_a_launcher`: one of ours, which gives verdicts. The one place that settles what "auto" means.
        """
        if self.on_lost_worker == "auto":
            return under_a_launcher and self.exact and self.strategy != "fsdp"
        return self.on_lost_worker == "continue"

    @model_validator(mode="after")
    def _something_to_compress(self) -> Self:
        if self.compress != "none" and self.strategy in ("dp", "none"):
            raise ValueError(
                f'compress = "{self.compress}" is for several workers, and strategy = "{self.strategy}" is for one; '
                "leave one of the two out"
            )
        if self.compress == "int8" and not self.sync_every:
            raise ValueError(
                'compress = "int8" is for the outer steps of sync_every, and sync_every is 0; set it, or compress = '
                '"bf16", which also suits the gradients of every step'
            )
        if self.sync_every and self.sync_fragments > self.sync_every:
            raise ValueError(
                f"sync_fragments = {self.sync_fragments} has each fragment meet at a step of its own, and sync_every = "
                f"{self.sync_every} has fewer; lower sync_fragments"
            )
        if self.shard_size == 1:
            raise ValueError('shard_size = 1 has every worker hold the whole model, which is strategy = "ddp"')
        if self.sync_every and self.strategy in ("fsdp", "dp"):
            raise ValueError(
                f"sync_every = {self.sync_every} has every worker train a whole model by itself, which strategy = "
                f'"{self.strategy}" does not; leave one of the two out'
            )
        return self
