"""Lost workers, as `disttrain runs` shows them."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from disttrain.commands import runs
from disttrain.runs.losses import losses


def test_a_run_shows_which_workers_it_lost_and_for_how_long(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    lost = {"time": 1.0, "kind": "event", "name": "worker-lost", "lost_ranks": [2, 0], "seconds": 0.25}
    damaged = [
        '{"name": "worker-lost", "lost_ranks": 3}',
        '{"name": "worker-lost"',
        json.dumps(lost | {"name": "note"}),
    ]
    lines = [json.dumps(lost), *damaged, json.dumps(lost | {"lost_ranks": [1], "seconds": 1}), ""]
    (tmp_path / "journal.jsonl").write_text("\n".join(lines))
    assert losses(tmp_path / "journal.jsonl") == ([2, 0, 1], 1.25)
    shown = CliRunner().invoke(runs.command, ["show", str(tmp_path)]).output
    assert "3 workers lost" in shown.splitlines()[0]
    assert "lost         3: ranks 2, 0, 1; 1.2 s in all" in shown
    as_json = json.loads(CliRunner().invoke(runs.command, ["show", str(tmp_path), "--json"]).output)
    assert as_json["lost_workers"] == {"ranks": [2, 0, 1], "seconds": 1.25}
    (tmp_path / "journal.jsonl").unlink()
    assert "lost" not in CliRunner().invoke(runs.command, ["show", str(tmp_path)]).output
