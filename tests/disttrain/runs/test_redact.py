from __future__ import annotations

import pytest

from disttrain.runs.redact import redact, split_credentials


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:secret@host:5000/x", "http://***@host:5000/x"),
        ("http://token@host", "http://***@host"),
        ("cannot reach 'http://u:p@ss@host/': refused", "cannot reach 'http://***@host/': refused"),
        ("mysql+pymysql://u:p@h/db and http://a:b@c", "mysql+pymysql://***@h/db and http://***@c"),
        ("http://host/x?token=abc&y=1", "http://host/x?token=***&y=1"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_redact(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_split_credentials() -> None:
    uri, variables = split_credentials("https://user%40corp:s%3Acret@host:5000/mlflow")
    assert uri == "https://host:5000/mlflow"
    assert variables == {"MLFLOW_TRACKING_USERNAME": "user@corp", "MLFLOW_TRACKING_PASSWORD": "s:cret"}
    assert split_credentials("sqlite:////x/mlflow.db") == ("sqlite:////x/mlflow.db", {})
