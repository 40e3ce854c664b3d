"""Whether a port of a machine can be reached, found out in a time that is known."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable


def reachable(host: str, port: int, within_s: float) -> str:
    """Why no connection to a port can be made within so many seconds, looking the name up included; empty when one can."""

    def connect() -> str:
        try:
            with socket.create_connection((host, port), within_s):
                return ""
        except TimeoutError:
            return silent
        except socket.gaierror as error:
            return f"no machine of that name is known ({error.strerror})"
        except (OSError, UnicodeError) as error:
            return str(getattr(error, "strerror", None) or error).lower()

    silent = f"no answer within {within_s:g} s"
    return answer_within(within_s + 0.5, connect, silent)


def answer_within(seconds: float, ask: Callable[[], str], otherwise: str) -> str:
    """What `ask` returns, or `otherwise` when that takes longer. In a thread: looking up a name knows no limit, and a name may
    have several addresses, each with its own."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise
