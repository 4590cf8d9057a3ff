"""The `optim` section. Its options depend on the optimizer, so each known optimizer has a model of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from disttrain.recipe.section import NonNegative, Patterns, Positive, Section

_Decay = Annotated[float, Field(ge=0, lt=1)]


class GroupRecipe(Section):
    """What is different for the parameters of some names; what is left out is as for all others."""

    match: Annotated[Patterns, Field(min_length=1)] = Field(
        description='the parameters, by patterns of their names: ["encoder.*"]'
    )
    weight_decay: NonNegative | None = Field(default=None, description="their weight decay")
    lr_scale: Positive = Field(default=1.0, description="their learning rate, relative to optim.lr and its schedule")


class OptimRecipe(Section):
    """What every optimizer has. `options` are the optimizer's own, under the names `torch.optim` gives them."""

    name: str = Field(default="sgd", description="sgd, adam, adamw, or any other optimizer of torch.optim by its name")
    lr: NonNegative = Field(default=0.01, description="the learning rate the schedule starts from")
    decay_biases_and_norms: bool = Field(
        default=True, description="false: no weight decay for parameters of fewer than two dimensions"
    )
    groups: list[GroupRecipe] = Field(
        default=[], description="parameters with a weight decay or a learning rate of their own: the first match counts"
    )

    @property
    def options(self) -> dict[str, Any]:
        """The options the recipe gives; those it leaves out keep torch's own defaults."""
        given = self.model_dump(exclude_none=True)
        return {key: value for key, value in given.items() if key not in OPTIONS_OF_ALL}


OPTIONS_OF_ALL = frozenset(OptimRecipe.model_fields)
"""The keys of `optim` that are not options of one optimizer: another one leaves them as they are."""


class _Common(OptimRecipe):
    weight_decay: NonNegative | None = Field(
        default=None, description="the weight decay (torch's default when left out)"
    )
    maximize: bool | None = Field(default=None, description="maximize the loss instead of minimizing it")
    foreach: bool | None = Field(default=None, description="torch's multi-tensor implementation")
    fused: bool | None = Field(default=None, description="torch's fused implementation")
    differentiable: bool | None = Field(default=None, description="let autograd see the optimizer's step")


class SgdRecipe(_Common):
    """`torch.optim.SGD`."""

    name: Literal["sgd"] = Field(default="sgd", description="stochastic gradient descent")
    momentum: NonNegative | None = Field(default=None, description="the momentum factor")
    dampening: float | None = Field(default=None, description="the dampening of the momentum")
    nesterov: bool | None = Field(default=None, description="Nesterov momentum; needs momentum and no dampening")


class AdamRecipe(_Common):
    """`torch.optim.Adam` and `torch.optim.AdamW`."""

    name: Literal["adam", "adamw"] = Field(default="adam", description="Adam, or AdamW with its decoupled weight decay")
    betas: Annotated[list[_Decay], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="the decay of the running means of the gradient and of its square"
    )
    eps: Positive | None = Field(default=None, description="added to the denominator")
    amsgrad: bool | None = Field(default=None, description="the AMSGrad variant")
    capturable: bool | None = Field(default=None, description="safe to capture in a CUDA graph")


class OtherOptimRecipe(OptimRecipe):
    """Any other class of `torch.optim`; its options are checked against its signature when it is built."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        description="any other optimizer of torch.optim",
        pattern=r"^[A-Za-z]\w*$",
        json_schema_extra={"not": {"enum": ["sgd", "adam", "adamw"]}},
    )


_MODEL_OF = {"sgd": "sgd", "adam": "adam", "adamw": "adam"}


def _tag(value: Any) -> str:
    name = value.get("name", "sgd") if isinstance(value, dict) else getattr(value, "name", "sgd")
    return _MODEL_OF.get(name, "other") if isinstance(name, str) else "other"


AnyOptimRecipe = Annotated[
    Annotated[SgdRecipe, Tag("sgd")] | Annotated[AdamRecipe, Tag("adam")] | Annotated[OtherOptimRecipe, Tag("other")],
    Discriminator(_tag),
]
OPTIM_MODELS: dict[str, type[OptimRecipe]] = {"sgd": SgdRecipe, "adam": AdamRecipe, "other": OtherOptimRecipe}
