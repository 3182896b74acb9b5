"""What the errors of databases mean, whatever driver raises them."""

from __future__ import annotations

_DEADLOCKS = frozenset({"40001", "40P01", 1020, 1213})
"""SQLSTATEs, and error numbers of MySQL: a serialization failure, or a deadlock."""


def code_of(error: BaseException) -> str | int | None:
    """The SQLSTATE of an error, or MySQL's number; None if it was not the server that raised it."""
    error = getattr(error, "orig", None) or error  # SQLAlchemy's wrapper
    state: object = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        return state
    if type(error).__module__.partition(".")[0] == "sqlite3":
        return "SQLITE"
    number: object = error.args[0] if error.args else None
    module = type(error).__module__.partition(".")[0]
    if module in {"asyncmy", "pymysql", "aiomysql", "MySQLdb"} and isinstance(number, int):
        return number
    return None


def is_deadlock(error: BaseException) -> bool:
    """Whether the same transaction may succeed when it is run again from its beginning."""
    return code_of(error) in _DEADLOCKS


_LOST = ("08", "57P")
"""Classes of SQLSTATEs: a connection that is lost, a server that is shutting down."""
_CLIENT_ERRORS = 2000
"""From here on, MySQL's numbers are those of its client library."""


def is_refusal(error: BaseException) -> bool:
    """Whether the server has reported that it did not commit.

    Otherwise it is unknown whether a COMMIT that failed has taken effect.
    """
    match code_of(error):
        case None:
            return False
        case int() as number:
            return number < _CLIENT_ERRORS
        case state:
            return not state.startswith(_LOST)
