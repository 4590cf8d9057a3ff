"""The tracking server: reachable, writable, and with a clock like ours. Its credentials are never shown."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

from disttrain.doctor.checks import Question
from disttrain.doctor.finding import Finding, failure, ok, warning
from disttrain.doctor.recipes import asked
from disttrain.errors import ConfigurationError
from disttrain.runs.redact import redact, split_credentials
from disttrain.tracking.mlflow.server_uri import resolve_uri

_CONNECT_S, _ANSWER_S = 3.0, 5.0
_SKEW_S = 5.0
_PROBE_TAG = "disttrain.doctor"
_NO_HARM = "Training continues without it, and `disttrain sync RUN` uploads later; "
_TRUE = ("1", "true")


def tracking(question: Question) -> Iterator[Finding]:
    """The server that the recipe, else the environment, names, with a write that leaves no run behind."""
    try:
        recipe = asked(question)
        settings = recipe.tracking if recipe else None
        uri = resolve_uri(settings.uri if settings else None, question.folder / "run")
    except ConfigurationError as error:
        yield failure("tracking", "; ".join(str(error).splitlines()), "Correct the address of the tracking server.")
        return
    if uri is None:
        yield ok("tracking", "MLflow is switched off; the journal has everything")
    elif uri.startswith("sqlite:"):
        yield _database(_file_of(uri))
    elif uri.startswith(("http://", "https://")):
        yield from _server(uri, settings.experiment if settings else "disttrain")
    else:
        yield _by_mlflow_itself(uri)


def _file_of(uri: str) -> Path:
    from sqlalchemy import make_url

    return Path(make_url(uri).database or ":memory:")


def _database(file: Path) -> Finding:
    """A database file is opened for writing, and nothing written; one that is not there is made when a run starts."""
    import sqlite3

    if not file.exists():
        return ok("tracking", f"{file} is made when the first run starts")
    try:
        database = sqlite3.connect(
            f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=_ANSWER_S, isolation_level=None
        )
        try:
            database.execute("BEGIN IMMEDIATE")
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            database.execute("ROLLBACK")
        finally:
            database.close()
    except sqlite3.Error as error:
        return warning(
            "tracking", f"{file}: {error}", f"{_NO_HARM}repair the file or move it away to have MLflow's pages."
        )
    return ok("tracking", f"{file} can be written")


class _Refused(Exception):
    """The server answered, but not as it should."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"HTTP {status}" + (f" {code}" if code else ""))
        self.status, self.code = status, code


class _Api:
    """MLflow's REST interface, with the credentials, certificates and proxies that MLflow would use."""

    def __init__(self, uri: str) -> None:
        import requests

        self.base, variables = split_credentials(uri)
        environment = {**os.environ, **variables}
        self._session = requests.Session()
        if token := environment.get("MLFLOW_TRACKING_TOKEN"):
            self._session.headers["Authorization"] = f"Bearer {token}"
        elif user := environment.get("MLFLOW_TRACKING_USERNAME"):
            self._session.auth = (user, environment.get("MLFLOW_TRACKING_PASSWORD", ""))
        insecure = environment.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in _TRUE
        self._verify = False if insecure else environment.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
        self.skew_s: float | None = None

    def ask(self, method: Literal["GET", "POST"], path: str, **fields: Any) -> dict[str, Any]:
        """Raises _Refused, requests.RequestException."""
        before = time.time()
        answer = self._session.request(
            method,
            f"{self.base.rstrip('/')}/api/2.0/mlflow/{path}",
            timeout=(_CONNECT_S, _ANSWER_S),
            verify=self._verify,
            allow_redirects=False,
            params=fields if method == "GET" else None,
            json=fields if method == "POST" else None,
        )
        if date := answer.headers.get("Date"):
            self.skew_s = _skew(date, before, time.time())
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.status_code != 200 or not isinstance(content, dict):
            code = content.get("error_code", "") if isinstance(content, dict) else ""
            raise _Refused(answer.status_code, str(code))
        return content


def _server(uri: str, experiment: str) -> Iterator[Finding]:
    import requests

    api = _Api(uri)
    place = redact(uri)
    try:
        told = _write(api, experiment)
    except _Refused as error:
        yield _refusal(place, error)
    except requests.Timeout:
        yield warning("tracking", f"{place} does not answer", f"{_NO_HARM}look for a firewall in between.")
    except requests.exceptions.SSLError as error:
        yield warning(
            "tracking",
            f"{place}: {_cause(error)}",
            f"{_NO_HARM}MLFLOW_TRACKING_SERVER_CERT_PATH names the certificate to trust.",
        )
    except requests.RequestException as error:
        yield warning(
            "tracking",
            f"{place} cannot be reached: {_cause(error)}",
            f"{_NO_HARM}start the server, or correct its address.",
        )
    else:
        yield ok("tracking", f"{place} {told}")
    if api.skew_s is not None:
        yield _clock(place, api.skew_s)


def _write(api: _Api, experiment: str) -> str:
    """Write something that no run can see: a tag of the experiment, or else an experiment that is deleted at once."""
    try:
        found = api.ask("GET", "experiments/get-by-name", experiment_name=experiment)
    except _Refused as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        made = api.ask("POST", "experiments/create", name=f"disttrain-doctor-{secrets.token_hex(4)}")
        api.ask("POST", "experiments/delete", experiment_id=_number(made))
        return "accepts new experiments"
    number = _number(found.get("experiment"))
    api.ask("POST", "experiments/set-experiment-tag", experiment_id=number, key=_PROBE_TAG, value=str(int(time.time())))
    return f"lets the experiment {experiment!r} be written"


def _number(experiment: Any) -> str:
    if not isinstance(experiment, dict) or "experiment_id" not in experiment:
        raise _Refused(200, "and what it speaks is not MLflow's protocol")
    return str(experiment["experiment_id"])


def _refusal(place: str, error: _Refused) -> Finding:
    refusal = f"{place} refuses: {error}"
    if error.status in (401, 403):
        return failure(
            "tracking",
            refusal,
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, to those of a user who may write there.",
        )
    if error.status < 500:
        return failure("tracking", refusal, "Give the address of an MLflow server, with https:// if it wants that.")
    return warning("tracking", refusal, f"{_NO_HARM}see the server's log.")


def _by_mlflow_itself(uri: str) -> Finding:
    """Databases behind a driver, and what plugins bring: only MLflow can reach those."""
    place = redact(uri)
    try:
        from mlflow.tracking import MlflowClient

        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow's, a driver's, a network library's
        why = redact(str(error)).splitlines()[0] if str(error) else type(error).__name__
        return warning("tracking", f"{place} cannot be read: {why}", f"{_NO_HARM}start it, or correct its address.")
    return ok("tracking", f"{place} can be read")


def _skew(date: str, before: float, after: float) -> float | None:
    """By how many seconds the server's clock, which has a resolution of a second, is certainly ahead of ours."""
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    return max(0.0, theirs - after) + min(0.0, theirs + 1 - before)


def _clock(place: str, skew_s: float) -> Finding:
    if abs(skew_s) <= _SKEW_S:
        return ok("server-clock", f"{place}: the same time as here")
    where = "ahead of" if skew_s > 0 else "behind"
    return warning(
        "server-clock",
        f"{place} is {abs(skew_s):.0f} s {where} this machine's clock",
        "Have both machines' clocks set by NTP (chronyc tracking, timedatectl).",
    )


def _cause(error: BaseException) -> str:
    """The innermost reason, which has no address in it and no credentials."""
    found = re.search(
        r"(Connection refused|Name or service not known|Failed to resolve|No route to host|Network is "
        r"unreachable|Connection reset by peer|certificate verify failed[^(]*)",
        str(error),
    )
    return found[0].strip() if found else type(error).__name__
