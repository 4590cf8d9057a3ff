"""An API server that keeps objects in memory: paths, server-side apply, dry run, merge patch, watch, log, deletion.

It validates native objects strictly against Kubernetes' own schemas, and refuses what a real server was seen to refuse.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import kubernetes_validate

VERSION = "1.33"
Object = dict[str, Any]
_PATH = re.compile(r"/(?:api|apis/[^/]+)/[^/]+/namespaces/([^/]+)/([^/]+)(?:/([^/]+))?(?:/(log))?")
_NATIVE = {"Job", "Service", "ConfigMap", "NetworkPolicy", "PersistentVolumeClaim"}


class Refused(Exception):
    """The server's answer is no."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "kind": "Status", "apiVersion": "v1", "status": "Failure",
            "code": code, "reason": reason, "message": message,
        }  # fmt: skip


class Store:
    """Objects by plural and name, and everything that happened to them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.objects: dict[tuple[str, str], Object] = {}
        self.history: list[tuple[int, str, str, Object]] = []  # version, plural, what happened, object
        self.logs: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.refuse: Callable[[Object], str | None] = lambda _manifest: None
        self.forbidden: set[str] = set()  # plurals that the user may not see
        self.token = "secret"  # of the user; another one is refused
        self.is_overloaded = False
        self.drop_logs_after: list[int] = []  # the next log streams break off after so many lines
        self._version = 0

    def get(self, plural: str, name: str) -> Object | None:
        """The object, or None."""
        return self.objects.get((plural, name))

    def of(self, plural: str) -> list[Object]:
        """Every object of a kind."""
        with self.lock:
            return [found for (kind, _), found in self.objects.items() if kind == plural]

    def put(self, plural: str, found: Object) -> Object:
        """Store the object, and tell watchers."""
        with self.changed:
            key = (plural, found["metadata"]["name"])
            what = "MODIFIED" if key in self.objects else "ADDED"
            self.objects[key] = found
            self._happened(plural, what, found)
            return found

    def remove(self, plural: str, name: str) -> None:
        """Forget the object, and tell watchers."""
        with self.changed:
            found = self.objects.pop((plural, name), None)
            if found is not None:
                self._happened(plural, "DELETED", found)

    def _happened(self, plural: str, what: str, found: Object) -> None:
        self._version += 1
        found["metadata"]["resourceVersion"] = str(self._version)
        self.history.append((self._version, plural, what, copy.deepcopy(found)))
        self.changed.notify_all()

    @property
    def version(self) -> int:
        """Of the newest change."""
        return self._version

    def apply(self, plural: str, manifest: Object, *, dry_run: bool) -> Object:
        """Server-side apply."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if (message := self.refuse(manifest)) is not None:
            raise Refused(403, "Forbidden", message)
        if kind in _NATIVE:
            try:
                kubernetes_validate.validate(manifest, VERSION, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = ".".join(str(part) for part in error.path)
                raise Refused(422, "Invalid", f'{kind} "{name}" is invalid: {where}: {error.message}') from None
        with self.lock:
            there = self.get(plural, name)
            merged = _merged(copy.deepcopy(there) if there else {}, manifest)
            if there and kind == "Job" and there["spec"]["template"] != merged["spec"]["template"]:
                raise Refused(422, "Invalid", f'Job.batch "{name}" is invalid: spec.template: field is immutable')
            if dry_run:
                return merged
            merged["metadata"].setdefault("uid", f"uid-{plural}-{name}-{self._version}")
            merged["metadata"].setdefault("creationTimestamp", now())
            return self.put(plural, merged)


def now() -> str:
    """As kubelets write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def serve(store: Store, delete: Callable[[str, str, str | None], None]) -> ThreadingHTTPServer:
    """The server, running; `delete(plural, name, propagation)` does what controllers do."""

    class Handler(_Handler):
        pass

    Handler.store, Handler.remove = store, staticmethod(delete)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    store: Store
    remove: Callable[[str, str, str | None], None]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.store.requests.append((self.command, url.path, query))
        found = _PATH.fullmatch(url.path)
        try:
            if self.store.is_overloaded:
                raise Refused(503, "ServiceUnavailable", "the server is currently unable to handle the request")
            if self.headers["Authorization"] != f"Bearer {self.store.token}":
                raise Refused(401, "Unauthorized", "Unauthorized")
            if url.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
                self._send(201, self._review(json.loads(body)))
                return
            if found is None:
                raise Refused(404, "NotFound", "the server could not find the requested resource")
            _, plural, name, log = found.groups()
            if plural in self.store.forbidden:
                raise Refused(403, "Forbidden", f'{plural} is forbidden: User "me" cannot list resource "{plural}"')
            if log:
                self._log(name, query)
            elif query.get("watch") == "true":
                self._stream(self._watch(plural, query))
            else:
                self._send(200, self._act(plural, name, query, json.loads(body) if body else None))
        except Refused as refusal:
            self._send(refusal.status["code"], refusal.status)

    do_GET = do_PATCH = do_DELETE = do_POST = _answer

    def _review(self, asked: Object) -> Object:
        """Whether the user may do what is asked about."""
        wanted = asked["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (wanted["resource"], wanted.get("subresource"))))
        return {**asked, "status": {"allowed": resource not in self.store.forbidden}}

    def _act(self, plural: str, name: str | None, query: dict[str, str], body: Any) -> Object:
        store = self.store
        with store.lock:
            if name is None:
                items = [copy.deepcopy(item) for item in store.of(plural) if _selected(item, query)]
                return {"kind": "List", "metadata": {"resourceVersion": str(store.version)}, "items": items}
            if self.headers.get("Content-Type") == "application/apply-patch+yaml":
                assert query["fieldManager"], "server-side apply needs a manager"
                return store.apply(plural, body, dry_run=query.get("dryRun") == "All")
            there = store.get(plural, name)
            if there is None:
                raise Refused(404, "NotFound", f'{plural} "{name}" not found')
            if self.command == "PATCH":
                return store.put(plural, _merged(there, body))
            if self.command == "DELETE":
                self.remove(plural, name, query.get("propagationPolicy"))
            return there

    def _watch(self, plural: str, query: dict[str, str]) -> Iterator[bytes]:
        store, until = self.store, time.monotonic() + float(query.get("timeoutSeconds", 60))
        with store.lock:
            since = int(query.get("resourceVersion", 0))
            position = len(store.history)
            news = [("ADDED", copy.deepcopy(item)) for item in store.of(plural)]
            if since:
                news = [
                    (what, item) for version, kind, what, item in store.history if version > since and kind == plural
                ]
        while True:
            for what, item in news:
                if _selected(item, query):
                    yield json.dumps({"type": what, "object": item}).encode() + b"\n"
            with store.changed:
                if len(store.history) == position:
                    store.changed.wait(max(0.0, min(1.0, until - time.monotonic())))
                news = [(what, item) for _, kind, what, item in store.history[position:] if kind == plural]
                position = len(store.history)
            if time.monotonic() >= until:
                return

    def _log(self, name: str, query: dict[str, str]) -> None:
        store = self.store
        with store.lock:
            pod = store.get("pods", name)
            if pod is None:
                raise Refused(404, "NotFound", f'pods "{name}" not found')
            if name not in store.logs:
                raise Refused(400, "BadRequest", f'container "node" in pod "{name}" is waiting to start')
            drop = store.drop_logs_after.pop(0) if store.drop_logs_after else None
        self._stream(self._log_lines(name, query.get("follow") == "true"), drop)

    def _log_lines(self, name: str, follow: bool) -> Iterator[bytes]:
        store, position = self.store, 0
        while True:
            with store.changed:
                lines = store.logs[name][position:]
                pod = store.get("pods", name)
                ended = pod is None or pod["status"]["phase"] in ("Succeeded", "Failed")
                if not lines and not ended and follow:
                    store.changed.wait(0.5)
            position += len(lines)
            yield from (f"{line}\n".encode() for line in lines)
            if not lines and (ended or not follow):
                return

    def _stream(self, chunks: Iterator[bytes], drop_after: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):
            for number, chunk in enumerate(chunks):
                if number == drop_after:
                    self.wfile.write(b"%x\r\n%s" % (len(chunk) + 9, chunk[:5]))  # in the middle of a line
                    self.close_connection = True
                    return
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

    def _send(self, code: int, body: Object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _selected(item: Object, query: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels", {})
    for pair in filter(None, query.get("labelSelector", "").split(",")):
        name, _, value = pair.replace("==", "=").partition("=")
        if labels.get(name) != value:
            return False
    field = query.get("fieldSelector", "")
    return not field or item.get("involvedObject", {}).get("name") == field.partition("=")[2].lstrip("=")


def _merged(there: Any, change: Any) -> Any:
    """`there` with the fields of `change`; lists are replaced whole, None removes."""
    if not isinstance(there, dict) or not isinstance(change, dict):
        return change
    for key, value in change.items():
        if value is None:
            there.pop(key, None)
        else:
            there[key] = _merged(there.get(key), value)
    return there
