"""The manifests as they stand in the folder k8s/, which this module reads as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from disttrain_launch.kubernetes.spec import Manifest

_PACKAGE = Path(__file__).parent.parent


def folder() -> Path:
    """The folder k8s/: the copy in the wheel, or else the checkout's."""
    installed = _PACKAGE / "k8s"
    return installed if installed.is_dir() else _PACKAGE.parent.parent / "k8s"


def base() -> dict[str, Manifest]:
    """The objects of k8s/base by kind."""
    listed = _read("kustomization.yaml")
    return {found["kind"]: found for found in map(_read, listed["resources"])}


def _read(name: str) -> dict[str, Any]:
    import yaml

    # libyaml's loader, where it is there, is several times as fast; it is as safe as the other.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)((folder() / "base" / name).read_text(encoding="utf-8"))
    try:
        found: dict[str, Any] = loader.get_single_data()
    finally:
        loader.dispose()
    return found


def to_yaml(manifests: list[Manifest]) -> str:
    """The objects as one stream that `kubectl apply -f -` takes."""
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
        """Text of several lines stays readable."""

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    Dumper.ignore_aliases = lambda _self, _data: True
    return str(
        yaml.dump_all(
            manifests, Dumper=Dumper, sort_keys=False, default_flow_style=False, width=120, allow_unicode=True
        )
    )
