"""Whether a server can be reached, found in seconds; libraries wait for minutes, or for ever."""

import http.client
import ssl
import threading
import urllib.error
import urllib.request

from mealv2.errors import RemoteError
from mealv2.storage.transfer import reason
from mealv2.storage.urls import shown

RESPONSE_TIMEOUT_S = 5.0  # of the server to connect and answer
_DNS_TIMEOUT_S = 1.0  # more for the name: a resolver has no time limit of its own


def require_reachable(url: str, advice: str) -> None:
    """Raise RemoteError, with ``advice``, if the server of a URL cannot be reached."""
    if why := unreachable(url):
        raise RemoteError(f"{why}; {advice}")


def unreachable(url: str) -> str | None:
    """Return that the server of a URL sends no response in 6 s, and why; None if it sends one.

    Any response will do, also an error. Proxies come from the environment, as in the libraries that
    download.
    """
    failures: list[str | None] = []
    limit_s = RESPONSE_TIMEOUT_S + _DNS_TIMEOUT_S
    thread = threading.Thread(target=lambda: failures.append(_failure(url)), daemon=True)
    thread.start()
    thread.join(limit_s)
    why = failures[0] if failures else f"no response in {limit_s:g} s"
    return why and f"cannot reach {shown(url)}: {why}"


def _failure(url: str) -> str | None:
    """Return why a server does not respond; None if it does."""
    if "all" in urllib.request.getproxies():  # SOCKS, which urllib does not know
        return None
    try:
        request = urllib.request.Request(shown(url), method="HEAD")  # no secret is needed
        urllib.request.urlopen(request, timeout=RESPONSE_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
    except urllib.error.URLError as error:
        return _reason(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return _reason(error)
    return None


def _reason(error: object) -> str | None:
    """Return the reason as text; None if only the certificate is a problem: clients have theirs."""
    if isinstance(error, ssl.SSLError):
        return None
    if isinstance(error, TimeoutError):
        return f"no response in {RESPONSE_TIMEOUT_S:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return reason(error) if isinstance(error, BaseException) else str(error)
