"""The download, from a real server on loopback, raced by real workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchvision.datasets import CIFAR10

from disttrain.data.sources.cifar import load_cifar
from disttrain.distributed.collectives import one_per_machine_first
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe
from disttrain.testing import run_workers
from tests.disttrain.data.sources.cifar_files import ROWS, published, write_archive, write_cifar

WORKERS = 4


class Publisher(ThreadingHTTPServer):
    """Serves a folder and counts the downloads. torchvision asks twice for each, once for the address alone."""

    downloads = 0


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Publisher)
        self.server.downloads += self.headers.get("Method") != "HEAD"
        super().do_GET()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[tuple[Publisher, dict[str, Any]]]:
    """A server with a small set, and the attributes of a CIFAR10 class that downloads it."""
    public = tmp_path / "public"
    write_cifar(public)
    archive = public / "cifar-10-python.tar.gz"
    write_archive(public / "cifar-10-batches-py", archive)
    handler = type("PublicHandler", (Handler,), {})
    server = Publisher(
        ("127.0.0.1", 0),
        lambda *arguments: handler(*arguments, directory=str(public)),
    )
    thread = Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    yield server, published(public / "cifar-10-batches-py", archive, url)
    server.shutdown()
    thread.join()
    server.server_close()


def train_size(root: Path, facts: dict[str, Any], first: AbstractContextManager[None]) -> int:
    with first:
        return len(load_cifar(DataRecipe(dataset="cifar10", root=str(root)), type("Small", (CIFAR10,), facts)).train)


def race(root: Path, facts: dict[str, Any]) -> int:
    world = World(dist.get_rank(), dist.get_rank(), WORKERS, WORKERS, torch.device("cpu"), "here")
    return train_size(root, facts, one_per_machine_first(world))


def test_four_workers_race_and_one_downloads(publisher: tuple[Publisher, dict[str, Any]], tmp_path: Path) -> None:
    server, facts = publisher
    root = tmp_path / "root"
    assert run_workers(race, WORKERS, timeout_s=240, args=(root, facts)) == [5 * ROWS] * WORKERS
    assert server.downloads == 1
    assert sorted(entry.name for entry in root.iterdir()) == [".disttrain", "cifar-10-batches-py"]
    assert len(list((root / ".disttrain").iterdir())) == 1


def test_a_set_that_is_there_is_not_downloaded_again(
    publisher: tuple[Publisher, dict[str, Any]], tmp_path: Path
) -> None:
    server, facts = publisher
    for _ in range(2):
        assert train_size(tmp_path / "root", facts, nullcontext()) == 5 * ROWS
    assert server.downloads == 1


def test_something_else_than_was_published(publisher: tuple[Publisher, dict[str, Any]], tmp_path: Path) -> None:
    _, facts = publisher
    with pytest.raises(ConfigurationError, match="failed: the download does not have the published md5 sum"):
        train_size(tmp_path / "root", facts | {"tgz_md5": "0" * 32}, nullcontext())
    assert list((tmp_path / "root").iterdir()) == []


def test_an_address_that_is_gone(publisher: tuple[Publisher, dict[str, Any]], tmp_path: Path) -> None:
    _, facts = publisher
    with pytest.raises(
        ConfigurationError, match=r"downloading http://.*/gone failed: .*(404|Not Found|File not found)"
    ):
        train_size(tmp_path / "root", facts | {"url": facts["url"].rsplit("/", 1)[0] + "/gone"}, nullcontext())
    assert list((tmp_path / "root").iterdir()) == []
