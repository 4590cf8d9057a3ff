"""The model that MLflow stores: it takes what the data set gave, pixels or floats, and predicts as ours does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from disttrain.tracking.export import DESCRIPTION_FILE, EXPORT_FILE
from tests.disttrain.tracking.exported import export_images


@pytest.mark.parametrize("statistics", [(0.5, 0.4, 0.3), None])
def test_it_takes_what_the_data_set_gave(statistics: tuple[float, ...] | None, tmp_path: Path) -> None:
    from mlflow import pyfunc
    from mlflow.models import Model

    from disttrain.tracking.mlflow.model import read_description, save_exported_model

    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    assert export_images(tmp_path / "model", module, statistics, statistics, list("abcd"), (3, 8, 8)) is None
    description = read_description(tmp_path / "model" / DESCRIPTION_FILE)
    save_exported_model(tmp_path / "model" / EXPORT_FILE, description, tmp_path / "stored", Model())
    loaded = pyfunc.load_model(str(tmp_path / "stored"))
    floats = torch.randn(5, 3, 8, 8)
    if statistics is None:
        given, seen = floats, floats
    else:
        given = torch.randint(0, 256, (5, 3, 8, 8)).float()
        values = torch.tensor(statistics).view(3, 1, 1)
        seen = (given / 255 - values) / values
    expected = module(seen).softmax(1).detach().numpy()
    np.testing.assert_allclose(loaded.predict(given.numpy()), expected, rtol=1e-4, atol=1e-5)
    example = loaded.input_example
    assert (example.min(), example.max()) == ((-1, 1) if statistics is None else (0, 255))
