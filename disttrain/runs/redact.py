"""Keeping passwords out of everything that is written or printed."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit, urlunsplit

# Greedy up to the last @ before a slash, as URL parsers read it: a password may hold an @ itself.
_USERINFO = re.compile(r"(?<=://)[^/\s\"'<>]+(?=@)")
_QUERY_SECRET = re.compile(r"(?i)(?<=[?&])((?:password|passwd|pwd|secret|token|access_token|api_key)=)[^&\s\"'<>]+")


def redact(text: str) -> str:
    """`text` with the user names, passwords and tokens of every URI in it replaced by `***`."""
    if "://" not in text:
        return text
    return _QUERY_SECRET.sub(r"\1***", _USERINFO.sub("***", text))


def split_credentials(uri: str) -> tuple[str, dict[str, str]]:
    """An HTTP URI without its credentials, and the variables by which MLflow takes them instead.

    MLflow puts the URI it was given into its error messages; what is not in the URI cannot get there. Other schemes
    (databases) have no other place for a password and come back as they are.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri, {}
    userinfo, _, host = parts.netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    variables = {"MLFLOW_TRACKING_USERNAME": unquote(user), "MLFLOW_TRACKING_PASSWORD": unquote(password)}
    return urlunsplit(parts._replace(netloc=host)), variables
