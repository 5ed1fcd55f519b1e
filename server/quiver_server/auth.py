"""Who may ask: bearer tokens from a file that is read again when it changes, and what each of them allows."""

import hashlib
import hmac
import logging
import time
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quiver_peft.errors import QuiverError
from quiver_peft.files.file_stamp import FileStamp, file_stamp
from quiver_server.errors import BusyError, ForbiddenError, UnauthenticatedError

log = logging.getLogger(__name__)

_RECHECK_SECONDS = 0.5
_KEYS = {"name", "token", "sha256", "role", "adapters", "base", "requests_per_second", "max_concurrent"}


@dataclass(frozen=True)
class Grant:
    """What one token allows.

    sha256: of the token, as bytes. adapters: shell patterns of adapter ids. base: whether the bare base may be asked.
    requests_per_second, max_concurrent (sequences running or waiting): None where there is no limit.
    """

    name: str
    sha256: bytes
    is_admin: bool
    adapters: tuple[str, ...]
    base: bool
    requests_per_second: float | None
    max_concurrent: int | None

    def allows(self, adapter_id: str) -> bool:
        """Whether this adapter ("": the base) may be asked; of "id@revision" the id decides."""
        name = adapter_id.partition("@")[0]
        return any(fnmatchcase(name, pattern) for pattern in self.adapters) if name else self.base


FULL_ACCESS = Grant("", b"", True, ("*",), True, None, None)


@dataclass
class ClientUsage:
    """What a token's requests use now. Lives as long as the server, by name: a file read again resets nothing.

    allowance: requests that may come at once, refilled as time passes.
    """

    num_open: int = 0
    allowance: float | None = None
    refilled_seconds: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Caller:
    """Who asks, for the length of one call."""

    grant: Grant
    usage: ClientUsage

    def check_adapter(self, adapter_id: str) -> None:
        """Raises ForbiddenError, whether there is such an adapter or not."""
        if not self.grant.allows(adapter_id):
            what = f"the adapter {adapter_id!r}" if adapter_id else "the base without an adapter"
            raise ForbiddenError(f"this token does not allow {what}", "adapter_id")

    def check_admin(self) -> None:
        """Raises ForbiddenError."""
        if not self.grant.is_admin:
            raise ForbiddenError("adapters are loaded and unloaded with a token of the role admin")

    @contextmanager
    def reserve(self, num_sequences: int) -> Generator[None]:
        """Count a request against the token's limits while it runs. Raises BusyError with a retry hint."""
        self._consume_rate_limit()
        grant, tenant = self.grant, self.usage
        if grant.max_concurrent is not None and tenant.num_open + num_sequences > grant.max_concurrent:
            raise BusyError(
                f"this token has {tenant.num_open} sequences running or waiting and asks for {num_sequences} more; its "
                f"limit is {grant.max_concurrent}"
            )
        tenant.num_open += num_sequences
        try:
            yield
        finally:
            tenant.num_open -= num_sequences

    def _consume_rate_limit(self) -> None:
        """A token bucket that holds one second's requests, at least one."""
        rate, tenant = self.grant.requests_per_second, self.usage
        if rate is None:
            return
        now = time.monotonic()
        full = max(rate, 1.0)
        allowance = full if tenant.allowance is None else tenant.allowance + rate * (now - tenant.refilled_seconds)
        tenant.allowance, tenant.refilled_seconds = min(allowance, full), now
        if tenant.allowance < 1:
            error = BusyError(f"this token's limit is {rate:g} requests per second")
            error.retry_after_seconds = (1 - tenant.allowance) / rate
            raise error
        tenant.allowance -= 1


ANONYMOUS = Caller(FULL_ACCESS, ClientUsage())
_caller: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


def current_caller() -> Caller:
    """Who the running call is from."""
    return _caller.get()


class Authenticator:
    """The tokens of a file; with no file everybody may do everything.

    Raises QuiverError when the file is missing or breaks a rule at the start; later such a file is logged and the
    tokens before it stay.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._usage_by_digest: dict[str, ClientUsage] = {}
        self._seen: FileStamp = ()
        self._checked_seconds = time.monotonic()
        self._grants: tuple[Grant, ...] = ()
        if path is not None:
            try:
                self._seen = file_stamp(path)
                self._grants = read_grants(path)
            except OSError as error:
                raise QuiverError(f"--token-file {path}: cannot be read: {error.strerror}") from None

    def authenticate(self, authorization: str) -> None:
        """Make the bearer of an Authorization header the current caller. Raises UnauthenticatedError."""
        if self._path is None:
            return
        self._reread(self._path)
        scheme, _, token = authorization.partition(" ")
        digest = hashlib.sha256(token.strip().encode()).digest()
        # All are compared, whichever is the one: how long it takes tells nothing.
        found = [grant for grant in self._grants if hmac.compare_digest(grant.sha256, digest)]
        if scheme.lower() != "bearer" or not found:
            raise UnauthenticatedError("send a valid token as authorization: Bearer TOKEN")
        grant = found[0]
        _caller.set(Caller(grant, self._usage_by_digest.setdefault(grant.name, ClientUsage())))

    def _reread(self, path: Path) -> None:
        now = time.monotonic()
        if now - self._checked_seconds < _RECHECK_SECONDS:
            return
        self._checked_seconds = now
        try:
            seen = file_stamp(path)
            if seen == self._seen:
                return
            self._seen = seen
            self._grants = read_grants(path)
            log.info("read %d tokens from %s", len(self._grants), path)
        except (OSError, QuiverError) as error:
            log.error("the tokens stay as they were: %s", error)


def read_grants(path: Path) -> tuple[Grant, ...]:
    """The `[[token]]` tables of a TOML file. Raises QuiverError, which never quotes a token."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise QuiverError(f"--token-file {path}: not valid TOML") from None
    tables = content.get("token")
    if set(content) != {"token"} or not isinstance(tables, list) or not tables:
        raise QuiverError(f"--token-file {path}: must hold [[token]] tables and nothing else, at least one")
    grants = tuple(_read_grant(table, f"--token-file {path}: token {i + 1}") for i, table in enumerate(tables))
    for what in ("name", "sha256"):
        if len({getattr(grant, what) for grant in grants}) < len(grants):
            raise QuiverError(f"--token-file {path}: two tokens have the same {what}")
    return grants


def _read_grant(table: Any, where: str) -> Grant:
    def require(ok: bool, rule: str) -> None:
        if not ok:
            raise QuiverError(f"{where}: {rule}")

    require(isinstance(table, dict), "must be a table")
    unknown = sorted(set(table) - _KEYS)
    require(not unknown, f"unknown key {', '.join(unknown)}; the keys are {', '.join(sorted(_KEYS))}")
    name, token, digest = table.get("name"), table.get("token"), table.get("sha256")
    require(isinstance(name, str) and bool(name), "name must be a text that is not empty")
    require((token is None) != (digest is None), "give either token or sha256")
    if token is None:
        require(isinstance(digest, str) and _is_sha256(digest), "sha256 must be 64 hexadecimal digits")
    else:
        require(isinstance(token, str) and len(token) >= 16, "token must be a text of 16 or more characters")
        digest = hashlib.sha256(token.encode()).hexdigest()
    role, adapters, base = table.get("role", "user"), table.get("adapters", ["*"]), table.get("base", True)
    require(role in ("user", "admin"), "role must be user or admin")
    require(
        isinstance(adapters, list) and all(isinstance(a, str) for a in adapters), "adapters must be a list of texts"
    )
    require(isinstance(base, bool), "base must be true or false")
    rate, concurrent = table.get("requests_per_second"), table.get("max_concurrent")
    require(rate is None or (_is_number(rate) and 0 < rate < float("inf")), "requests_per_second must be above 0")
    require(concurrent is None or (type(concurrent) is int and concurrent >= 1), "max_concurrent must be 1 or more")
    return Grant(
        str(name), bytes.fromhex(str(digest)), role == "admin", tuple(adapters), base, rate, concurrent
    )  # fmt: skip


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(character in "0123456789abcdefABCDEF" for character in text)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
