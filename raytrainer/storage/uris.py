"""The URIs of storages and the names below them: which are valid, and how they are shown without secrets."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from raytrainer.errors import StorageError

_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SECRET = re.compile(r"key|secret|token|sas|sig|password|credential", re.IGNORECASE)


def has_scheme(uri: str) -> bool:
    return _SCHEME.match(uri) is not None


def local_root(uri: str) -> str | None:
    """Return the path that a path or `file://` URI names; None for another URI.

    Raises:
        StorageError: It is neither an absolute path nor a URI of a known scheme.
    """
    if "\0" in uri:
        raise StorageError(f"{uri!r} holds a NUL")
    scheme = _SCHEME.match(uri)
    if scheme is None:
        if not Path(uri).is_absolute():
            raise StorageError(f"{uri!r} is neither an absolute path nor a URI ({', '.join(_SCHEMES)})")
        return uri
    name, url = scheme[1].lower(), urlsplit(uri)
    if name not in _SCHEMES:
        hint = "; Azure is abfs://" if name in ("az", "adl", "wasb", "wasbs") else ""
        raise StorageError(f"{scheme[1]}:// is not a known scheme: one of {', '.join(_SCHEMES)}{hint}")
    if name != "file":
        return None
    path = unquote(url.path)
    if url.netloc not in ("", "localhost") or not Path(path).is_absolute():
        raise StorageError(f"{uri!r} is not file:///ABSOLUTE/PATH")
    return path


def parts_of(rel: str, *, file: bool = False) -> tuple[str, ...]:
    """Return the parts of a relative name. The name of a file cannot be empty.

    Raises:
        StorageError: The name could leave the storage.
    """
    if rel == "" and not file:
        return ()
    parts = tuple(rel.split("/"))
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise StorageError(f"{rel!r} is not a name below a storage: parts between '/' that are not empty, '.' or '..'")
    return parts


def below(uri: str, parts: tuple[str, ...], *, quoted: bool) -> str:
    """Return the URI of a name below another URI, with the same query."""
    url = urlsplit(uri)
    return urlunsplit(url._replace(path="/".join((url.path.rstrip("/"), *(map(quote, parts) if quoted else parts)))))


def with_secrets(display: str, root: str) -> str:
    """Return a redacted URI with the user, password and query of `root`, if it is `root` or below it."""
    shown, whole = urlsplit(display), urlsplit(root)
    known, path = urlsplit(redacted(root)), whole.path.rstrip("/")
    is_below = shown.path == path or shown.path.startswith(f"{path}/")
    if not shown.scheme or not is_below:
        return display
    if (shown.scheme, shown.netloc, shown.query) != (known.scheme, known.netloc, known.query):
        return display
    return urlunsplit(shown._replace(netloc=whole.netloc, query=whole.query))


def redacted(uri: str) -> str:
    """Return a path or URI without user, password and secret-looking query values."""
    if not has_scheme(uri):
        return uri
    url = urlsplit(uri)
    # Azure's `abfs://container@account` is a location, not a secret, so the user is removed only if there is a
    # password.
    user, at, host = url.netloc.rpartition("@")
    netloc = host if at and ":" in user else url.netloc
    query = [(key, "***" if _SECRET.search(key) else value) for key, value in parse_qsl(url.query)]
    return urlunsplit(url._replace(netloc=netloc, query=urlencode(query, safe="*:/")))
