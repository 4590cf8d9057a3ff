"""The `optim` section. Its options depend on the optimizer, so each known optimizer has a model of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from disttrain.recipe.section import NonNegative, Patterns, Positive, Section

_Decay = Annotated[float, Field(ge=0, lt=1)]


class GroupRecipe(Section):
    """What is different for the parameters of some names; what is left out is as for all others."""

    match: Annotated[Patterns, Field(min_length=1)] = Field(
        description='the parameters, by patterns of their names: ["encoder.*"]'
    )
    weight_decay: NonNegative | None = Field(default=None, description="their weight decay")
    lr_scale: Positive = Field(default=1.0, description="their learning rate, relative to optim.lr and its schedule")
    epochs: Positive | None = Field(
        default=None, description="train them for so many epochs: their schedule ends there, and then they stay"
    )


class OptimRecipe(Section):
    """What every optimizer has. `options` are the optimizer's own, under the names `torch.optim` gives them."""

    name: str = Field(
        default="sgd", description="sgd, adam, adamw, muon, or any other optimizer of torch.optim by its name"
    )
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


def _in_lower_case(name: Any) -> Any:
    return name.lower() if isinstance(name, str) else name


class MuonRecipe(OptimRecipe):
    """Muon for weights of two or more dimensions, and AdamW or SGD for all other parameters."""

    name: Annotated[Literal["muon"], BeforeValidator(_in_lower_case)] = Field(
        default="muon", description="steps along orthogonalised momenta"
    )
    weight_decay: NonNegative | None = Field(default=None, description="decoupled, times the learning rate (0.1)")
    momentum: _Decay | None = Field(default=None, description="the momentum factor (0.95)")
    nesterov: bool | None = Field(default=None, description="Nesterov momentum (true)")
    ns_steps: Annotated[int, Field(ge=1, lt=100)] | None = Field(
        default=None, description="steps of the Newton-Schulz iteration that orthogonalises (5)"
    )
    ns_coefficients: Annotated[list[float], Field(min_length=3, max_length=3)] | None = Field(
        default=None, description="the coefficients of its polynomial (3.4445, -4.775, 2.0315)"
    )
    eps: Positive | None = Field(default=None, description="the smallest norm that is divided by (1e-7)")
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral_unclamped"] | None = Field(
        default=None, description="how the rate depends on a weight's rows and columns (original)"
    )
    hold_norms: bool | None = Field(
        default=None, description="before its step scale each weight to a norm of the square root of its rows (false)"
    )
    other: Literal["adamw", "sgd"] | None = Field(
        default=None, description="what trains the other parameters: adamw or sgd (adamw)"
    )
    other_match: Patterns = Field(
        default=[], description='weights that `other` trains, by patterns of their names: ["head.*", "*embedding*"]'
    )
    other_lr: Positive | None = Field(default=None, description="the learning rate of `other` (optim.lr)")
    other_weight_decay: NonNegative | None = Field(default=None, description="the weight decay of `other` (0)")
    other_momentum: _Decay | None = Field(default=None, description="sgd: its Nesterov momentum (0.9)")
    other_betas: Annotated[list[_Decay], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="adamw: its betas (0.9, 0.999)"
    )

    @property
    def options(self) -> dict[str, Any]:
        """As ever, but for the patterns: which parameters they are is for the groups to say."""
        return {key: value for key, value in super().options.items() if key != "other_match"}


class OtherOptimRecipe(OptimRecipe):
    """Any other class of `torch.optim`; its options are checked against its signature when it is built."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        description="any other optimizer of torch.optim",
        pattern=r"^[A-Za-z]\w*$",
        json_schema_extra={"not": {"enum": ["sgd", "adam", "adamw", "muon"]}},
    )


_MODEL_OF = {"sgd": "sgd", "adam": "adam", "adamw": "adam"}


def _tag(value: Any) -> str:
    name = value.get("name", "sgd") if isinstance(value, dict) else getattr(value, "name", "sgd")
    if not isinstance(name, str):
        return "other"
    return "muon" if name.lower() == "muon" else _MODEL_OF.get(name, "other")


AnyOptimRecipe = Annotated[
    Annotated[SgdRecipe, Tag("sgd")]
    | Annotated[AdamRecipe, Tag("adam")]
    | Annotated[MuonRecipe, Tag("muon")]
    | Annotated[OtherOptimRecipe, Tag("other")],
    Discriminator(_tag),
]
OPTIM_MODELS: dict[str, type[OptimRecipe]] = {
    "sgd": SgdRecipe,
    "adam": AdamRecipe,
    "muon": MuonRecipe,
    "other": OtherOptimRecipe,
}
