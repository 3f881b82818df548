"""Opens a session's debugger to programs, and closes it to them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vmexit.sdk.requests import Requests
from vmexit.sdk.server import Server

if TYPE_CHECKING:
    from vmexit.commands.session import Session


def serve_at(session: Session, path: str | None) -> None:
    """Listens at ``path`` from now on, and nowhere else; None: nowhere. Raises VmexitError, and leaves everything as it is.

    Events that programs have made stay, and with them their tags where it listens elsewhere.
    """
    before = session.sdk
    wanted = None if path is None else Path(path).expanduser().absolute()
    if before is not None and before.path == wanted:
        return
    server = None
    if wanted is not None:
        if session.sdk_requests is None:
            session.sdk_requests = Requests(session.debugger, lambda: session.debugger.code_failures)
        server = Server(wanted, session.sdk_requests.serve)
        session.debugger.at_close.append(server.close)
    session.sdk = server
    if before is not None:
        before.close()
