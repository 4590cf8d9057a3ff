from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from disttrain.tracking.mlflow.limits import metric_key, shorten


@given(st.text(min_size=1, max_size=400) | st.text("ab/.@", min_size=1, max_size=8))
def test_mlflow_takes_every_name_we_give_it(name: str) -> None:
    key = metric_key(name)
    _validate_metric_name(key)
    _validate_param_name(key)
    assert 0 < len(key) <= 250


def test_usual_names_stay_as_they_are() -> None:
    for name in ("train/loss", "system/node-0/cpu_percent", "optim.lr", "eval/top 5"):
        assert metric_key(name) == name
    assert metric_key("top@5 (%)") == "top_5 ___"


def test_shorten() -> None:
    assert shorten("r\udcff", 9) == "r?"  # a file's name that is not UTF-8
    assert shorten("x" * 10, 10) == "x" * 10
    assert shorten("x" * 11, 10) == "x" * 9 + "…"
