"""Runs behind a URL: an object is written there, read and removed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from disttrain.doctor.finding import Finding, failure, ok
from disttrain.errors import ConfigurationError, brief
from disttrain.recipe.address import file_system


def run_url(url: str) -> Iterator[Finding]:
    """Whether what is written behind the URL can be read again."""
    content = secrets.token_bytes(1024)
    try:
        files, root = file_system(url)
        place = f"{root}/.doctor-{secrets.token_hex(4)}"
        try:
            files.pipe_file(place, content)
            same = files.cat_file(place) == content
        finally:
            if files.exists(place):
                files.rm_file(place)
    except ConfigurationError as error:
        yield failure("run-url", str(error), "Correct the address, or install what opens it.")
    except Exception as error:  # each library has errors of its own
        why = brief(error) or type(error).__name__
        yield failure("run-url", f"{url} cannot be used: {why}", "Look at its credentials and at the network.")
    else:
        if same:
            yield ok("run-url", f"{url}: wrote an object, read it and removed it")
        else:
            yield failure("run-url", f"{url}: an object that was written reads otherwise", "Use another store.")
