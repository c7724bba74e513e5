"""What can go wrong, split by what the caller can do about it.

KVStoreError
 +- UsageError            the call or the configuration is wrong: change it            (exit 2)
 |   +- ConfigError       an unknown key, a value out of range
 |   +- BadRequest        an argument no server would accept
 +- SetupError            the environment is not ready: mend it and start again       (exit 2)
 +- ServiceError          a peer said no, or did not answer
 |   +- NotGranted        the namespace does not exist for this identity
 |   +- Unauthenticated   token missing or wrong
 |   +- Incompatible      protocol or format version, or namespaces.toml, differ
 |   +- Overloaded        a bound was reached: later, or less
 |   +- Unavailable       nobody answers there
 |   +- DeadlineExceeded  no answer in time
 +- TierError             a tier could not take or give a block; the block stays where it was
 |   +- TierFull          no room within its bound
 |   +- TierDown          the medium fails; the tier is out until it recovers
 +- DataError             bytes that must not be used
     +- Corrupt           a checksum, length or binding does not hold
     +- UnknownFormat     a version or codec this build does not know

Inside an engine none of these surface from `match`, `get` and `put`: they become misses and counters.
Every message is one line that says what to do.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Root of the tree. `code` is the gRPC status name a server answers with."""

    code = "INTERNAL"
    exit_code = 1


class UsageError(KVStoreError):
    code = "INVALID_ARGUMENT"
    exit_code = 2


class ConfigError(UsageError):
    pass


class BadRequest(UsageError):
    pass


class SetupError(KVStoreError):
    code = "FAILED_PRECONDITION"
    exit_code = 2


class ServiceError(KVStoreError):
    pass


class NotGranted(ServiceError):
    code = "NOT_FOUND"


class Unauthenticated(ServiceError):
    code = "UNAUTHENTICATED"


class Incompatible(ServiceError):
    code = "FAILED_PRECONDITION"


class Overloaded(ServiceError):
    code = "RESOURCE_EXHAUSTED"


class Unavailable(ServiceError):
    code = "UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    code = "DEADLINE_EXCEEDED"


class TierError(KVStoreError):
    pass


class TierFull(TierError):
    code = "RESOURCE_EXHAUSTED"


class TierDown(TierError):
    code = "UNAVAILABLE"


class DataError(KVStoreError):
    code = "DATA_LOSS"


class Corrupt(DataError):
    pass


class UnknownFormat(DataError):
    pass


def from_code(code: str, message: str) -> KVStoreError:
    """The error a peer reported: `code` is a gRPC status name, unknown ones become ServiceError."""
    told = (BadRequest, NotGranted, Unauthenticated, Incompatible, Overloaded, Unavailable, DeadlineExceeded, Corrupt)
    for kind in told:
        if kind.code == code:
            return kind(message)
    return ServiceError(f"{code}: {message}")
