"""Networks by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from disttrain.errors import ConfigurationError, ExitCode, TaskError
from disttrain.models import Net, build_model, given_model
from disttrain.recipe import ModelRecipe, Recipe, check_installed


class TutorialNet(nn.Module):
    """The network as the tutorial prints it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Any) -> Any:
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        return self.fc3(x)


def build(
    name: str, num_classes: int = 10, sample_shape: tuple[int, int, int] = (3, 32, 32), **options: Any
) -> nn.Module:
    return build_model(ModelRecipe(name=name, options=options), num_classes=num_classes, sample_shape=sample_shape)


def refusal(name: str, **arguments: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        build(name, **arguments)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_net_is_the_tutorials() -> None:
    torch.manual_seed(3)
    theirs = TutorialNet()
    torch.manual_seed(3)
    ours = build("net")
    assert num_parameters(ours) == 62_006
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 28, 40), (4, 33, 31)])
def test_net_fits_itself_to_the_images(shape: tuple[int, int, int]) -> None:
    assert build("net", 7, shape)(torch.randn(2, *shape)).shape == (2, 7)


def test_net_says_which_images_are_too_small() -> None:
    assert refusal("net", sample_shape=(1, 16, 15)) == (
        "model.name: 'net' needs images of at least 16 x 16 pixels, and these are 16 x 15."
    )


def test_resnet18_has_its_cifar_form_and_torchvisions_names() -> None:
    from torchvision.models import resnet18

    model = build("resnet18")
    assert num_parameters(model) == 11_173_962
    assert model.state_dict().keys() == resnet18(num_classes=10).state_dict().keys()
    sizes = []
    for name in ("layer1", "layer4"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape)))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(2, 64, 32, 32), (2, 512, 4, 4)]
    assert build("resnet18", 5, (1, 28, 28))(torch.randn(2, 1, 28, 28)).shape == (2, 5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (3, 64, 64)),
        ("regnet_x_400mf", (3, 32, 32)),
        ("shufflenet_v2_x0_5", (3, 32, 32)),
        ("googlenet", (3, 32, 32)),
        ("vit_b_32", (3, 32, 32)),
    ],
)
def test_torchvisions_models_give_logits_while_training(name: str, shape: tuple[int, int, int]) -> None:
    model = build(f"torchvision:{name}", 7, shape)
    assert model.training
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_the_check_of_a_torchvision_model_leaves_its_weights_alone() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(1)
    theirs = resnet18(num_classes=7)
    torch.manual_seed(1)
    ours = build("torchvision:resnet18", 7)
    assert torch.equal(torch.randn(1), torch.randn(1, generator=_after(theirs)))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def _after(_: nn.Module) -> torch.Generator:
    """The global generator as it stands after resnet18's construction."""
    from torchvision.models import resnet18

    torch.manual_seed(1)
    resnet18(num_classes=7)
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


def test_a_torchvision_model_that_does_not_fit() -> None:
    assert refusal("torchvision:resnet81").startswith(
        "model.name: torchvision has no classification model 'resnet81'; did you mean one of resnet18"
    )
    message = refusal("torchvision:alexnet")
    assert message.startswith("model.name: torchvision:alexnet cannot be built for 10 classes of images (3, 32, 32)")
    assert "Output size is too small" in message
    assert "unexpected keyword argument 'depth'" in refusal("torchvision:resnet18", depth=3)


def test_torchvisions_weights_start_all_but_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    name, theirs = "torchvision:mobilenet_v3_small", models.mobilenet_v3_small().state_dict()
    known = models.MobileNet_V3_Small_Weights
    monkeypatch.setattr(known, "get_state_dict", lambda self, **_: theirs)
    torch.manual_seed(0)
    fresh = build(name, 7).state_dict()
    torch.manual_seed(0)
    ours = build(name, 7, weights="DEFAULT").state_dict()
    for key, value in ours.items():
        is_of_the_head = key.startswith("classifier.3.")
        assert torch.equal(value, fresh[key] if is_of_the_head else theirs[key]), key
    assert "has no 'V3'; it has IMAGENET1K_V1, DEFAULT." in refusal(name, weights="V3")
    message = refusal(name, reduced_tail=True, weights="DEFAULT")
    assert re.search(
        r"'features\.\S+' of torchvision:mobilenet_v3_small is \(.*\) for these images and options", message
    )

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(known, "get_state_dict", unreachable)
    assert "DEFAULT of torchvision:mobilenet_v3_small cannot be downloaded: no network. Retry, or put https" in refusal(
        name, weights="DEFAULT"
    )
    recipe = ModelRecipe(name=name, options={"weights": "DEFAULT"})  # to load a checkpoint, they are not needed
    build_model(recipe, num_classes=7, sample_shape=(3, 32, 32), pretrained=False)


def test_timm_builds_its_models_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(model_name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        built = nn.Sequential(nn.Flatten(), nn.Linear(options.pop("in_chans", 3) * 32 * 32, options.pop("num_classes")))
        built.asked = {"name": model_name, "pretrained": pretrained, **options}
        return built

    timm = ModuleType("timm")
    timm.create_model = create_model  # type: ignore[attr-defined]
    timm.is_model = lambda name: name.partition(".")[0] in ("small", "fixed")  # type: ignore[attr-defined]
    timm.list_models = lambda: ["small", "fixed"]  # type: ignore[attr-defined]
    timm.get_pretrained_cfg = lambda name: SimpleNamespace(fixed_input_size=name == "fixed")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert build("timm:small.v1", 7, (1, 32, 32))(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert build("timm:small", pretrained=True).asked == {"name": "small", "pretrained": True}
    assert build("timm:fixed").asked == {"name": "fixed", "pretrained": False, "img_size": (32, 32)}
    assert build("timm:create_model", model_name="small").asked["name"] == "small"
    recipe = ModelRecipe(name="timm:small", options={"pretrained": True})
    assert not build_model(recipe, num_classes=7, sample_shape=(3, 32, 32), pretrained=False).asked["pretrained"]
    assert refusal("timm:smal") == "model.name: timm has no model 'smal'; did you mean one of small?"
    assert refusal("timm:small", sample_shape=(3, 16, 16)).startswith("model.name: timm:small cannot be built for 10")
    monkeypatch.setitem(sys.modules, "timm", None)
    without = "model.name: 'timm:small' comes with timm, which is not installed; pip install timm."
    assert refusal("timm:small") == without
    monkeypatch.setattr("disttrain.recipe.installed.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError) as caught:
        check_installed(Recipe(model=recipe))
    assert str(caught.value) == without


MODULE = """
import torch
from collections import OrderedDict as Ordered
from subprocess import run

def linear(num_classes, sample_shape, bias=True):
    channels, height, width = sample_shape
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * height * width, num_classes, bias))

def nonsense(num_classes, sample_shape):
    return "a model"

def without_classes():
    return linear(1, (1, 1, 1))

def of_classes_alone(num_classes, width=3):
    return torch.nn.Linear(width, num_classes)

def any_options(which, **options):
    return {"linear": of_classes_alone}[which](**options)

def hands_on(**options):
    return without_classes(**options)

class Holder:
    linear = staticmethod(linear)
"""


@pytest.fixture
def my_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the user's, in the folder where the command is started."""
    (tmp_path / "my_models.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "needy.py").write_text("import not_installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in ("my_models", "broken", "needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("my_models")
def test_a_callable_builds_the_model() -> None:
    assert num_parameters(build("my_models:linear", 2, (3, 4, 1))) == 26
    assert num_parameters(build("my_models:linear", 2, (3, 4, 1), bias=False)) == 24
    assert num_parameters(build("my_models:Holder.linear", 2, (3, 4, 1))) == 26


@pytest.mark.usefixtures("my_models")
def test_a_callable_gets_the_arguments_that_it_names() -> None:
    assert num_parameters(build("my_models:without_classes")) == 2
    assert num_parameters(build("my_models:of_classes_alone", 2)) == 8
    assert num_parameters(build("my_models:of_classes_alone", 2, width=1)) == 4
    assert num_parameters(build("my_models:any_options", 2, which="linear")) == 8
    assert num_parameters(build("my_models:any_options", 2, which="linear", width=1)) == 4
    assert build("torchvision.models:squeezenet1_1", 7).num_classes == 7


def test_a_model_may_be_given_as_what_makes_it() -> None:
    given = {"num_classes": 3, "sample_shape": (1, 16, 16)}
    module = nn.Linear(1, 1)
    assert given_model(module, **given) is module
    assert given_model(Net, **given).fc3.out_features == 3
    assert given_model(lambda num_classes: nn.Linear(1, num_classes), **given).out_features == 3
    for wrong, message in (
        ("net", "model: a str is neither a torch.nn.Module nor a class or function that makes one"),
        (nn.Linear, "model.options: Linear: missing a required argument: 'in_features'"),
        (dict, "model.name: dict returned a dict, not a torch.nn.Module"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            given_model(wrong, **given)


@pytest.mark.usefixtures("my_models")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("my_model:linear", {}, "model.name: there is no module 'my_model'; start in the folder that holds it"),
        ("my_models.deep:linear", {}, "model.name: there is no module 'my_models.deep'"),
        ("my_models:linaer", {}, "model.name: module 'my_models' has no 'linaer'; did you mean 'linear'?"),
        ("my_models:Holder.x", {}, "model.name: module 'my_models' has no 'Holder.x'; check the name after the colon"),
        ("my_models:MODULE", {}, "model.name: module 'my_models' has no 'MODULE'"),
        ("my_models:__name__", {}, "model.name: 'my_models:__name__' is a str, not something that can be called"),
        ("my_models:nonsense", {}, "model.name: my_models:nonsense returned a str, not a torch.nn.Module"),
        ("my_models:linear", {"depth": 1}, "model.options: my_models:linear does not take depth; it takes "),
        ("my_models:hands_on", {}, "model.name: my_models:hands_on passes num_classes on to something that does not"),
        ("os:system", {"command": "true"}, "model.name: 'os:system' is part of Python's standard library (os)"),
        (
            "torch:os.system",
            {"command": "true"},
            "model.name: 'torch:os.system' is part of Python's standard library (os)",
        ),
        ("numpy.f2py:os.system", {"command": "true"}, "model.name: 'numpy.f2py:os.system' is part of Python's st"),
        (
            "my_models:run",
            {"args": "true"},
            "model.name: 'my_models:run' is part of Python's standard library (subprocess)",
        ),
        ("my_models:Ordered", {}, "model.name: 'my_models:Ordered' is part of Python's standard library (collections)"),
        ("broken:linear", {}, "model.name: importing 'broken' failed: ZeroDivisionError: division by zero"),
        ("needy:linear", {}, "model.name: importing 'needy' failed: No module named 'not_installed'; install what"),
        ("mlp", {"dropout": 0.1, "width": [8]}, "model.options: mlp does not take width; did you mean widths?"),
        ("net", {"depth": 1}, "model.options: net does not take depth; it takes none"),
        (
            "mlp",
            {"width": [8], "drop": 0.1},
            "model.options: mlp does not take width, drop; did you mean widths and dr",
        ),
        ("mlp", {"width": [8], "zzz": 1}, "model.options: mlp does not take width, zzz; it takes num_features"),
    ],
)
def test_a_callable_that_does_not_fit(name: str, options: dict[str, int], message: str) -> None:
    assert refusal(name, **options).startswith(message)


@pytest.mark.usefixtures("my_models")
def test_what_a_constructor_raises_is_named_with_its_place() -> None:
    with pytest.raises(TaskError, match=r"^model.name: my_models:of_classes_alone: RuntimeError: .*my_models.py:17\)$"):
        build("my_models:of_classes_alone", 2, width=-1)
