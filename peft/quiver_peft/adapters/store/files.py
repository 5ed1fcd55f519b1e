"""The files of a store by their paths below its root: a folder of this machine, or a URL through fsspec.

Paths are names joined by "/", checked by who makes them. What is not there is None or FileNotFoundError; a store that
cannot be reached or read is a StoreError.
"""

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from quiver_peft.errors import StoreError, StoreUrlError
from quiver_peft.files.file_stamp import file_stamp

Stamp = tuple[object, ...]  # another one when the content is another
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_CONNECT_SECONDS, _READ_SECONDS = 5, 30
# Listings are never kept: a store changes under us.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "retries": {"max_attempts": 2},
        }
    },
    "gs": {},
    "http": {},
    "https": {},
}


class StoreFiles(Protocol):
    """Reads a store. url: its root, without a slash at the end."""

    url: str

    def stamp(self, path: str) -> Stamp | None:
        """What tells that a file was replaced; None: there is no such file."""
        ...

    def read(self, path: str) -> bytes:
        """A whole file."""
        ...

    def names(self, path: str) -> tuple[list[str], list[str]]:
        """The names in a folder: files, folders. Empty where there is none, or where nothing can be listed."""
        ...


class LocalFiles:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.url = str(self.root)

    def stamp(self, path: str) -> Stamp | None:
        """Size, times and number of the file."""
        file = self.root / path
        try:
            return file_stamp(file) if file.is_file() else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self.url}/{path}: not readable: {error}") from None

    def read(self, path: str) -> bytes:
        """A whole file."""
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{self.url}/{path}: not readable: {error}") from None

    def names(self, path: str) -> tuple[list[str], list[str]]:
        """Hidden folders, which something may be written in, are left out by who checks the names."""
        folder = self.root / path
        entries = list(folder.iterdir()) if folder.is_dir() else []
        return [e.name for e in entries if e.is_file()], [e.name for e in entries if e.is_dir()]


class RemoteFiles:
    """A URL through fsspec. Credentials are the environment's: AWS_*, GOOGLE_*; never the URL's."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = _file_system(self.url)

    def stamp(self, path: str) -> Stamp | None:
        """Size, digest and time as the store tells them."""
        try:
            with self._reaching(path):
                info: dict[str, Any] = self._fs.info(self._path(path))
        except FileNotFoundError:
            return None
        if info.get("type") == "directory":
            return None
        told = tuple(str(info.get(key)) for key in ("ETag", "etag", "LastModified", "Last-Modified", "mtime"))
        if set(told) == {"None"}:
            raise StoreError(f"{self.url}/{path}: the server sends neither ETag nor Last-Modified for it")
        return info.get("size"), *told

    def read(self, path: str) -> bytes:
        """A whole file."""
        with self._reaching(path):
            return self._fs.cat_file(self._path(path))

    def names(self, path: str) -> tuple[list[str], list[str]]:
        """Of a web server, what its page of the folder links to."""
        try:
            with self._reaching(path):
                found: list[dict[str, Any]] = self._fs.ls(self._path(path), detail=True)
        except FileNotFoundError:
            return [], []
        names: tuple[list[str], list[str]] = ([], [])
        for item in found:
            names[item["type"] == "directory"].append(str(item["name"]).rstrip("/").rpartition("/")[2])
        return names

    def write(self, path: str, content: bytes) -> None:
        """A whole file, which appears at once. Raises StoreError."""
        with self._reaching(path):
            self._fs.pipe_file(self._path(path), content)

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    @contextmanager
    def _reaching(self, path: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # each protocol's library has errors of its own
            # fsspec's web client calls every failure "not found", and says only in the cause which one it was.
            cause = error.__cause__
            is_missing = isinstance(cause, FileNotFoundError | None) or getattr(cause, "status", 0) == 404
            if isinstance(error, FileNotFoundError) and is_missing:
                raise
            reason = str(cause or error).partition("\n")[0] or type(cause or error).__name__
            raise StoreError(f"{self.url}/{path}: the store does not answer as it should: {reason}") from None


def is_url(place: str) -> bool:
    """Whether this names a store elsewhere, and not a folder."""
    return "://" in place


def open_files(place: str) -> StoreFiles:
    """The files below a folder or a URL. Raises StoreError."""
    return RemoteFiles(place) if is_url(place) else LocalFiles(Path(place))


def _file_system(url: str) -> tuple[Any, str]:
    parts = urlsplit(url)
    if parts.scheme not in _PACKAGES:
        raise StoreUrlError(f"{url}: stores are folders or URLs of {', '.join(f'{name}://' for name in _PACKAGES)}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise StoreUrlError(
            f"a store's URL ({parts.scheme}://{parts.hostname}/...) is a plain one: no user, query or '#'"
        )
    try:
        fsspec: Any = importlib.import_module("fsspec")
        importlib.import_module(_PACKAGES[parts.scheme])
    except ImportError as error:
        extra = "gcs" if parts.scheme == "gs" else "stores"
        raise StoreUrlError(f"{url}: {error}; pip install 'quiver[{extra}]'") from None
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True, **_OPTIONS[parts.scheme]}
    if parts.scheme in ("http", "https"):
        timeout: Any = importlib.import_module("aiohttp").ClientTimeout(
            connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS
        )
        options["client_kwargs"] = {"timeout": timeout}
    return fsspec.filesystem(parts.scheme, **options), url if parts.scheme.startswith("http") else url.split("://")[1]
