"""A cluster's API: the only module that talks to it. Objects are dictionaries, as they stand in manifests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from disttrain_launch.kubernetes.kinds import Api
from disttrain_launch.kubernetes.spec import Manifest

MANAGER = "disttrain"
PODS = Api("", "v1", "Pod", "pods")
EVENTS = Api("", "v1", "Event", "events")
WORKLOADS = Api("kueue.x-k8s.io", "v1beta1", "Workload", "workloads")
_NOT_FOUND, _BAD_REQUEST, _FORBIDDEN = 404, 400, 403
_BUSY, _SERVER_ERROR = (408, 429), 500
_NATIVE_GROUPS = ("", "batch", "networking.k8s.io")


class LostConnection(Exception):
    """A stream from the cluster broke off."""


class Cluster:
    """The cluster of a context of the kubeconfig, or the one that this process runs in.

    Every method raises ConfigurationError with the server's own message when it refuses, and DisttrainError when it
    cannot be reached.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        """Raises ConfigurationError if there is no such context."""
        import msgspec
        import yaml
        from lightkube import Client, KubeConfig
        from lightkube.config.models import User
        from lightkube.core.exceptions import ConfigError

        from disttrain.recipe import ConfigurationError

        self._context, self._namespace = context, namespace
        try:
            config = KubeConfig.from_env().get(context)
            if config is None:
                raise ConfigError("no context is current")
            config = config._replace(user=config.user or User())  # a context may do without, behind a proxy
            self._client: Any = Client(config=config, namespace=namespace, field_manager=MANAGER)
        except (ConfigError, KeyError, OSError, yaml.YAMLError, msgspec.MsgspecError) as error:
            raise ConfigurationError(
                f"no cluster to connect to: {error}. Name a kubeconfig in KUBECONFIG, or a context by --context"
            ) from None
        self.namespace = self._client.namespace
        self._server = str(self._client.config.cluster.server)

    def log_in_again(self) -> None:
        """Read the kubeconfig anew: a new login writes a new token there. Raises ConfigurationError."""
        self._client = Cluster(self._context, self._namespace)._client

    def apply(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Make the object, or change it into this (server-side apply); its state afterwards."""
        name = manifest["metadata"]["name"]
        with self._explained(f"{manifest['kind']} {name}"):
            resource = _resource(_api_of(manifest))
            # Ours to force: `submit` has seen that the object is ours, and `stop` has set a field by another verb.
            return dict(self._client.apply(resource(manifest), namespace=self.namespace, force=True, dry_run=dry_run))

    def get(self, api: Api, name: str) -> Manifest | None:
        """The object, or None."""
        from lightkube import ApiError

        with self._explained(f"{api.kind} {name}"):
            try:
                return dict(self._client.get(_resource(api), name, namespace=self.namespace))
            except ApiError as error:
                if _is_absent(error, api):
                    return None
                raise

    def find_all(
        self, api: Api, labels: dict[str, str] | None = None, fields: dict[str, str] | None = None
    ) -> list[Manifest]:
        """The objects with these labels and fields; none where the cluster lacks the kind."""
        from lightkube import ApiError

        with self._explained(api.plural):
            try:
                found = self._client.list(_resource(api), namespace=self.namespace, labels=labels, fields=fields)
                return [dict(item) for item in found]
            except ApiError as error:
                if _is_absent(error, api):
                    return []
                raise

    def snapshot(self, api: Api, labels: dict[str, str]) -> tuple[list[Manifest], str]:
        """The objects with these labels, and the version from which to watch for what happens to them."""
        with self._explained(api.plural):
            found = self._client.list(_resource(api), namespace=self.namespace, labels=labels)
            return [dict(item) for item in found], str(found.resourceVersion)

    def watch(self, api: Api, labels: dict[str, str], *, since: str, for_s: int) -> Iterator[tuple[str, Manifest]]:
        """What has happened to the objects since that version: ("ADDED" | "MODIFIED" | "DELETED", object).

        Ends after about `for_s` seconds, or when the connection is lost: then take a snapshot, and watch again.
        """
        from lightkube.types import OnErrorAction, OnErrorResult

        with self._explained(api.plural):
            changes = self._client.watch(
                _resource(api),
                namespace=self.namespace,
                labels=labels,
                resource_version=since,
                server_timeout=for_s,
                on_error=lambda _error, _count: OnErrorResult(OnErrorAction.STOP),
            )
            for change, item in changes:
                yield change, dict(item)

    def patch(self, api: Api, name: str, change: dict[str, Any]) -> None:
        """Change these fields."""
        from lightkube.types import PatchType

        with self._explained(f"{api.kind} {name}"):
            self._client.patch(_resource(api), name, change, namespace=self.namespace, patch_type=PatchType.MERGE)

    def delete(self, api: Api, name: str) -> bool:
        """Delete the object and what belongs to it; whether it was there.

        The owner goes last, so that it is gone once its pods are; without a policy the API leaves them as orphans.
        """
        from lightkube import ApiError
        from lightkube.types import CascadeType

        with self._explained(f"{api.kind} {name}"):
            try:
                self._client.delete(_resource(api), name, namespace=self.namespace, cascade=CascadeType.FOREGROUND)
            except ApiError as error:
                if error.status.code == _NOT_FOUND:
                    return False
                raise
        return True

    def may(self, verb: str, group: str, resource: str) -> bool:
        """Whether this user may do that in the namespace; `resource` is a plural, or one with a subresource."""
        from lightkube.models.authorization_v1 import ResourceAttributes, SelfSubjectAccessReviewSpec
        from lightkube.resources.authorization_v1 import SelfSubjectAccessReview

        kind, _, part = resource.partition("/")
        wanted = ResourceAttributes(
            namespace=self.namespace, verb=verb, group=group, resource=kind, subresource=part or None
        )
        with self._explained("the check of what is allowed"):
            spec = SelfSubjectAccessReviewSpec(resourceAttributes=wanted)
            answer = self._client.create(SelfSubjectAccessReview(spec=spec))
        return bool(answer.status and answer.status.allowed)

    def log(self, pod: str, *, follow: bool) -> Iterator[str]:
        """The lines of a pod's log, each behind its time stamp; none while it has not started.

        Raises LostConnection if the stream broke off, FileNotFoundError if the pod is gone.
        """
        import httpx2
        from lightkube import ApiError
        from lightkube.core.exceptions import ConfigError

        try:
            yield from self._client.log(pod, namespace=self.namespace, follow=follow, timestamps=True, newlines=False)
        except ApiError as error:
            if error.status.code == _NOT_FOUND:
                raise FileNotFoundError(pod) from None
            if error.status.code != _BAD_REQUEST:  # which means that it has not started
                raise LostConnection(str(error.status.message)) from None
        except (httpx2.HTTPError, httpx2.StreamError, ConfigError) as error:
            raise LostConnection(str(error)) from None

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        import httpx2
        import msgspec
        from lightkube import ApiError
        from lightkube.core.exceptions import ConfigError

        from disttrain.recipe import ConfigurationError, DisttrainError

        try:
            yield
        except ApiError as error:
            code = error.status.code or 0
            if code in _BUSY or code >= _SERVER_ERROR:
                raise DisttrainError(f"the cluster cannot answer for {what}: {error.status.message}") from None
            raise ConfigurationError(f"the cluster refused {what}: {error.status.message}") from None
        except ConfigError as error:
            raise ConfigurationError(f"cannot log in to {self._server}: {error}") from None
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"{self._server} answers unlike a Kubernetes API: {error}") from None
        except httpx2.HTTPError as error:
            raise DisttrainError(f"cannot reach the cluster at {self._server}: {error}") from None


def _is_absent(error: Any, api: Api) -> bool:
    """Whether there is no such object, or no such kind: users of narrow roles are forbidden kinds that do not exist."""
    code = error.status.code
    return bool(code == _NOT_FOUND or (code == _FORBIDDEN and api.group not in _NATIVE_GROUPS))


def _resource(api: Api) -> Any:
    from lightkube.generic_resource import GenericNamespacedResource, create_api_info

    # Not by create_namespaced_resource, which refuses kinds that lightkube has classes for.
    info = create_api_info(api.group, api.version, api.kind, api.plural)
    return type(api.kind, (GenericNamespacedResource,), {"_api_info": info})


def _api_of(manifest: Manifest) -> Api:
    from disttrain_launch.kubernetes.kinds import PARTS

    return PARTS[manifest["kind"]]
