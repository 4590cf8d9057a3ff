"""What a task must not do is refused before the first step, in a line that says what to do instead."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import IterableDataset

import disttrain
from disttrain.data import SampleSet, StepSampler, tensors_in, to_device
from disttrain.errors import ConfigurationError, DivergedError, TaskError, UserCodeError
from disttrain.recipe import Recipe
from disttrain.task import build_task, task_maker
from disttrain.testing import run_workers
from disttrain.training.evaluate import Evaluation
from tests.disttrain.task.test_users_tasks import train
from tests.disttrain.task.users import Case, Language, Regression, case


def refusal(folder: Path, one: Case, *overrides: str) -> str:
    """Why the training is refused, before its first step."""
    with pytest.raises(ConfigurationError) as caught:
        train(folder, one, *overrides)
    assert not (folder / "journal.jsonl").exists()
    return str(caught.value)


def with_task(name: str, task: disttrain.Task) -> Case:
    one = case(name)
    return Case(task, one.model, one.train_set, one.test_set)


class Mean(Regression):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.mse_loss(model(batch[0]).squeeze(1), batch[1])


class MeanOfTokens(Language):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())


class Counting(Regression):
    def __init__(self) -> None:
        self.calls = 0

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.calls += 1
        return super().loss(model, batch)


class Drawing(Regression):
    """Its generator is nobody's attribute."""

    def __init__(self) -> None:
        generator = torch.Generator()
        self.noise = lambda: torch.rand((), generator=generator)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) * self.noise()


class Tallying(Regression):
    """Its state is a tensor that it holds."""

    def __init__(self) -> None:
        self.scale = torch.ones(1)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.scale *= 0.999
        return super().loss(model, batch)


def returning(change: Callable[[torch.Tensor], Any]) -> disttrain.Task:
    """A task whose loss is changed at the end."""

    class Returning(Regression):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            return change(super().loss(model, batch))

    return Returning()


def weighing(weight: Any) -> disttrain.Task:
    """A task with this weight."""

    class Weighing(Regression):
        def weight(self, batch: Any) -> Any:
            return weight

    return Weighing()


class Elsewhere(Regression):
    best = ("accuracy", "max")


class Vague(Regression):
    def score(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": self.loss(model, batch)[None]}

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return disttrain.Task.metrics(self, sums, weight)


class Best(Regression):
    best: Any = "loss"


class Detailed(Regression):
    def __init__(self, details: Any) -> None:
        self.given = details

    def details(self, sums: Any, weight: int) -> Any:
        return self.given


class Named(Regression):
    """With metrics of these names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return {**super().metrics(sums, weight), **dict.fromkeys(self.names, 0.5)}


class Grouped(Regression):
    def __init__(self, **options: Any) -> None:
        self.options = options

    def param_groups(self, model: nn.Module) -> Any:
        return [{"params": model.parameters(), **self.options}]


class Unprepared(Regression):
    def prepare(self, batch: Any, draw: Any, *, training: bool) -> Any:
        raise KeyError("mean")


class Words(Regression):
    def score(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": self.loss(model, batch), "name": "a word"}


class Nameless(Regression):
    items: Any = None


class Argumentless(Regression):
    def model_arguments(self, train_set: Any) -> Any:
        return None


class Unsendable(Regression):
    def score(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": self.loss(model, batch), "later": [lambda: 0]}


class Wordless(disttrain.Task):
    """What is at fault is the loss that it defines; its score is the default."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = model(batch["features"]).sum()
        return loss


class PerSample(disttrain.Task):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.mse_loss(model(batch[0]).squeeze(1), batch[1], reduction="none")


class Grades(Regression):
    def metrics(self, sums: Any, weight: int) -> Any:
        return {**super().metrics(sums, weight), "grade": "low"}


class Apart(Regression):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = batch[0].sum().requires_grad_(torch.is_grad_enabled())
        return loss


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            Mean(),
            r"^Mean\.loss returns a mean: it is (.*) for two samples and \1 for .*: reduction=\"sum\" in place of",
        ),
        (Counting(), r"^Counting\.calls changes when a loss is computed: .* keep state in the model's buffers"),
        (Tallying(), r"^Tallying\.scale changes when a loss is computed"),
        (
            Drawing(),
            r"^Drawing\.loss returned .* for the first samples and .* for the same ones again, so it keeps state",
        ),
        (returning(torch.detach), r"Returning\.loss returned a tensor without a gradient"),
        (returning(lambda loss: loss.item()), r"Returning\.loss returned a float: it has to be a tensor, the sum of"),
        (returning(lambda loss: loss[None]), r"Returning\.loss returned a tensor of shape \(1,\) and torch.float32"),
        (weighing(-1), r"Weighing\.weight\(batch\) returned -1: it has to be a whole number of at least 0"),
        (weighing(2.0), r"Weighing\.weight\(batch\) returned 2.0: it has to be a whole number"),
        (weighing(0), r"^Weighing: weight\(batch\) is 0 for the first samples and loss\(model, batch\) is not"),
        (weighing(True), r"Weighing\.weight\(batch\) returned True: it has to be a whole number"),
        (weighing(2**63), r"Weighing\.weight\(batch\) returned 9223372036854775808: it has to be a whole number"),
        (Vague(), r"^Vague\.metrics returned nothing: .* what score returns as tensors of shape \(\)"),
        (
            Named("recall a:b", "recall a_b"),
            r"^Named\.metrics: MLflow takes 'recall a:b' and 'recall a_b' for one metric, 'eval/recall a_b': rename",
        ),
        (Named("a/../b", "b"), r"MLflow takes 'a/../b' and 'b' for one metric, 'eval/b'"),
        (Detailed({"step": 3}), r"^Detailed\.details returned 'step', which evaluation\.json has already: rename it"),
        (Best(), r"^Best\.best is 'loss': it has to be the name of a metric and 'min' or 'max'"),
        (Detailed({"ids": {1}}), r"^Detailed\.details returned what JSON cannot hold"),
        (Detailed(None), r"^Detailed\.details returned a NoneType, not a dict"),
        (Grouped(lr_scale=-1.0), r"param_groups: lr_scale is -1.0, and has to be a number of 0 or more"),
        (Grouped(weight_decy=0.0), r"param_groups: SGD has no option 'weight_decy'; did you mean 'weight_decay'\?"),
        (Grouped(momentum=-1.0), r"param_groups: SGD refuses \{'momentum': -1\.0\}: Invalid momentum value: -1\.0"),
        (Grouped(weight_decay="0"), r"param_groups: SGD refuses \{'weight_decay': '0'\}: .*not supported between"),
        (Grouped(dampening="a"), r"optimizer option 'dampening' cannot be 'a'"),
        (Grouped(params=None), r"param_groups: 'params' is a NoneType"),
        (Elsewhere(), r"Elsewhere\.best is \('accuracy', 'max'\): .* the metrics, which are loss, mae"),
        (
            Apart(),
            r"^Apart\.loss returned a tensor that depends on no parameter of the model, so nothing would be learn",
        ),
        (
            Unsendable(),
            r"^Unsendable\.score returned a list for 'later' that cannot be sent to the other workers \(.*lamb",
        ),
        (Nameless(), r"^Nameless\.items is None: it has to be what `weight` counts, in the plural"),
        (Argumentless(), r"^Argumentless\.model_arguments returned None: it has to be a dict of arguments by name"),
        (PerSample(), r"^PerSample\.loss returned a tensor of shape \(2,\) and torch\.float32: .* scalar, the sum of"),
        (Grades(), r"^Grades\.metrics returned a str for 'grade', which is not a number: could not convert .* 'low'"),
        (Words(), r"Words\.score returned a str for 'name': tensors are added up and lists joined"),
    ],
)
def test_what_a_task_must_not_do_is_refused(tmp_path: Path, task: disttrain.Task, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        train(tmp_path, with_task("regression", task))


def test_a_task_given_that_is_none_is_called_so(tmp_path: Path) -> None:
    recipe = Recipe()
    for model in (nn.Identity(), nn.Identity):
        with pytest.raises(ConfigurationError, match=r"^the task given: a Identity is a model and not a disttrain\.T"):
            task_maker(recipe, model)

    def fail() -> disttrain.Task:
        raise KeyError("classes")

    with pytest.raises(UserCodeError, match=r"^the task given: KeyError: 'classes' \("):
        build_task(fail, recipe, [], is_given=True)
    with pytest.raises(ConfigurationError, match=r"^the task given: dict returned a dict, not a disttrain\.Task"):
        build_task(dict, recipe, [], is_given=True)
    with pytest.raises(ConfigurationError, match=r"^task\.name = 'image-classification': dict returned a dict"):
        build_task(dict, recipe, [])
    one = case("regression")
    with pytest.raises(UserCodeError, match=r"^the task given: KeyError"):
        train(tmp_path, Case(fail, one.model, one.train_set, one.test_set))  # type: ignore[arg-type]


def test_a_mean_over_tokens_is_refused_and_a_loss_of_none_is_not_taken_for_one(tmp_path: Path) -> None:
    assert "MeanOfTokens.loss returns a mean" in refusal(tmp_path / "1", with_task("language", MeanOfTokens()))
    zero = returning(lambda loss: loss * 0)
    assert train(tmp_path / "2", with_task("regression", zero), "train.max_steps=1").step == 1


def test_wrong_shapes_are_refused_with_the_method_the_model_and_the_place(tmp_path: Path) -> None:
    one = case("regression")
    said = refusal(tmp_path / "1", Case(one.task, nn.Linear(9, 1), one.train_set, one.test_set))
    assert said.startswith("the model given fails in Regression.score on the first 2 samples")
    assert "tensors of shapes (2, 10), (2,): RuntimeError: mat1 and mat2 shapes cannot be multiplied" in said
    assert "users.py:" in said
    assert "\n" not in said
    plain = type("Plain", (disttrain.Task,), {"loss": Mean.loss})()
    said = refusal(tmp_path / "4", Case(plain, nn.Linear(9, 1), one.train_set, one.test_set))
    assert said.startswith("the model given fails in Plain.loss on the first 2 samples of the test set")
    failing = type("Wrong", (Wordless,), {})()
    said = refusal(tmp_path / "3", with_task("regression", failing))
    assert said.startswith("Wrong.loss fails on the first 2 samples of the test set, tensors of shapes (2, 10), (2,): ")
    with pytest.raises(UserCodeError, match=r"^Speech cannot collate sample 0 of the test set: ValueError"):
        train(tmp_path / "2", Case(case("speech").task, one.model, [(1,)] * 9, [(1,)] * 9))


def test_what_prepare_raises_is_said_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match=r"^Unprepared\.prepare: KeyError: 'mean' \(.*test_contract\.py:"):
        train(tmp_path, with_task("regression", Unprepared()))


def test_a_default_collate_that_cannot_batch_the_samples_is_explained(tmp_path: Path) -> None:
    one = case("regression")
    uneven = [(torch.zeros(10 + number % 3), torch.tensor(0.0)) for number in range(9)]
    with pytest.raises(TaskError) as caught:
        train(tmp_path, Case(type("Ragged", (Regression,), {})(), one.model, uneven, uneven))
    said = str(caught.value)
    assert said.startswith("Ragged (")
    assert "does not define collate(samples)" in said
    assert "stack expects each tensor to be equal size" in said
    assert said.endswith("Define it; pad in it what differs in length.")
    assert caught.value.exit_code == 78


def test_what_json_cannot_hold_is_null() -> None:
    one = Evaluation({"loss": math.nan, "accuracy": 0.5}, {"by_class": [1, {"far": -math.inf}]})
    assert one.to_json() == {"metrics": {"loss": None, "accuracy": 0.5}, "by_class": [1, {"far": None}]}


class Misspelt(disttrain.Task):
    def losss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        raise AssertionError


@pytest.mark.parametrize("task", [Misspelt, Misspelt()])
def test_a_task_without_loss_is_refused_before_its_data_is_read(tmp_path: Path, task: Any) -> None:
    class Unread:
        def __len__(self) -> int:
            raise AssertionError

    said = refusal(tmp_path, Case(task, nn.Linear(1, 1), Unread(), Unread()))  # type: ignore[arg-type]
    assert "Misspelt (" in said
    assert "test_contract.py:" in said
    assert said.endswith(
        "does not define loss(model, batch), which a task needs; did you mean its method losss to be loss?"
    )


def test_what_metrics_raises_is_said_with_its_place(tmp_path: Path) -> None:
    def metrics(self: Any, sums: Any, weight: int) -> Any:
        return {"loss": sums["los"]}

    task = type("Broken", (Regression,), {"metrics": metrics})()
    with pytest.raises(TaskError, match=r"^Broken\.metrics: KeyError: 'los' \(.*test_contract\.py:\d+\)$"):
        train(tmp_path, with_task("regression", task), "train.max_steps=1")


@pytest.mark.parametrize("method", ["describe", "details", "headline", "model_arguments", "param_groups"])
def test_what_other_methods_raise_is_said_with_the_method_and_its_place(tmp_path: Path, method: str) -> None:
    def broken(self: Any, *arguments: Any) -> Any:
        raise KeyError("mean")

    task = type("Broken", (Regression,), {method: broken})()
    with pytest.raises(UserCodeError, match=rf"^Broken\.{method}: KeyError: 'mean' \(.*test_contract\.py:\d+\)$"):
        train(tmp_path, with_task("regression", task), "train.max_steps=1")


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield from range(9)


def test_sets_that_cannot_be_numbered_are_refused(tmp_path: Path) -> None:
    one = case("regression")
    assert "a Numbers is an iterable data set, whose samples have no index" in refusal(
        tmp_path, Case(one.task, one.model, Numbers(), one.test_set)
    )
    assert "the training set is empty" in refusal(tmp_path, Case(one.task, one.model, [], one.test_set))
    assert "the test set is empty" in refusal(tmp_path, Case(one.task, one.model, one.train_set, SampleSet([])))


def test_a_sample_that_makes_the_loss_nan_is_named(tmp_path: Path) -> None:
    one = case("regression")
    one.train_set[17] = (torch.full((10,), torch.nan), torch.tensor(0.0))

    def diverge(folder: Path) -> str:
        with pytest.raises(DivergedError) as caught:
            train(folder, one)
        return str(caught.value)

    (said, other) = run_workers(diverge, 2, args=(tmp_path / "2",), process_group=False)
    assert said == other
    assert "an input is not finite at step" in said
    assert "in sample 17 of the training set" in said
    far = case("regression")
    far.train_set[5] = (torch.zeros(10), torch.tensor(3e38))  # its square is not finite
    with pytest.raises(DivergedError, match=r"^the loss is not finite at step .*, in sample 5 of the training set"):
        train(tmp_path / "1", far)


class Each(Regression):
    """With the losses of each sample, as `change` makes them of the true ones."""

    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        self.change = change

    def losses(self, model: nn.Module, batch: Any) -> Any:
        return self.change((model(batch[0]).squeeze(1) - batch[1]).square())


def test_a_fault_in_losses_does_not_hide_what_is_not_finite(tmp_path: Path) -> None:
    def said(folder: str, change: Callable[[torch.Tensor], Any], sample: tuple[torch.Tensor, torch.Tensor]) -> str:
        one = with_task("regression", Each(change))
        one.train_set[5] = sample
        with pytest.raises(DivergedError) as caught:
            train(tmp_path / folder, one)
        return str(caught.value)

    far = torch.zeros(10), torch.tensor(3e38)  # its square is not finite
    faults: list[Callable[[torch.Tensor], Any]] = [lambda losses: 1 / 0, torch.mean, torch.detach, lambda losses: "all"]
    for number, fault in enumerate(faults):
        assert "the loss is not finite" in (message := said(str(number), fault, far))
        assert "in sample 5 of the training set" in message
    empty = torch.full((10,), torch.nan), torch.tensor(0.0)
    assert said("empty", lambda losses: losses, empty).startswith("an input is not finite at step")


def test_a_step_that_cannot_be_computed_again_is_not_said_to_be_finite(tmp_path: Path) -> None:
    """What the second worker raises then is said; of the first nothing is known to be wrong."""

    def diverge(folder: Path) -> str:
        calls: list[int] = []

        def loss(self: Any, model: nn.Module, batch: Any) -> torch.Tensor:
            if not batch[0].isfinite().all():
                calls.append(1)
                if len(calls) > 1:
                    raise KeyError("again")
            return Regression.loss(self, model, batch)

        one = with_task("regression", type("Once", (Regression,), {"loss": loss})())
        one.train_set[StepSampler(38, batch_size=16).order(0).tolist()[9]] = (
            torch.full((10,), torch.nan),
            torch.tensor(0.0),
        )
        with pytest.raises(DivergedError) as caught:
            train(folder, one)
        return str(caught.value)

    (said, other) = run_workers(diverge, 2, args=(tmp_path,), process_group=False)
    assert said == other
    start = "the gradient of the global batch is not finite at step 1; why is not known, since rank 1 failed to "
    assert said.startswith(f"{start}compute it again: KeyError: 'again' (")
    assert "each worker's own" not in said


@pytest.mark.parametrize("max_steps", [2, 9])
def test_a_training_set_that_holds_nothing_to_learn_from_is_refused(tmp_path: Path, max_steps: int) -> None:
    """Of a part of an epoch, and of two epochs; one whose first samples hold nothing is trained on."""
    nothing = [1, -100]
    one = case("language")
    one.train_set[:] = [nothing] * 38
    before = {key: value.clone() for key, value in one.model.state_dict().items()}
    with pytest.raises(ConfigurationError) as caught:
        train(tmp_path / "none", one, f"train.max_steps={max_steps}", "train.epochs=9")
    num_steps = min(3, max_steps)
    assert str(caught.value) == (
        "the training set holds no tokens to learn from: Language.weight(batch) is 0 for each batch of "
        f"{num_steps} steps; give a training set that holds some."
    )
    assert caught.value.exit_code == 78
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, before[key])
    some = case("language")
    some.train_set[:37] = [nothing] * 37
    assert train(tmp_path / "some", some, f"train.max_steps={max_steps}", "train.epochs=9").step == max_steps


class Point(NamedTuple):
    place: torch.Tensor
    name: str


@dataclasses.dataclass(frozen=True)
class Scene:
    points: list[Point]


def test_tensors_move_to_the_device_wherever_they_are() -> None:
    scene = Scene([Point(torch.zeros(2), "here"), Point(torch.ones(2), "there")])
    batch = (
        {"scene": scene, "words": ["a", "b"], "none": None},
        collections.UserDict(mask=torch.ones(1)),
        collections.OrderedDict(order=torch.ones(1)),
        pack_sequence([torch.ones(3), torch.ones(2)]),
    )
    moved = to_device(batch, torch.device("meta"))
    assert len(list(tensors_in(moved))) >= 5
    assert all(tensor.device.type == "meta" for tensor in tensors_in(moved[:3]))
    assert moved[3].data.device.type == "meta"
    assert [type(part) for part in moved] == [type(part) for part in batch]
    assert moved[0]["scene"].points[1].name == "there"
    assert moved[0]["words"] == ["a", "b"]
    assert scene.points[0].place.device.type == "cpu"
