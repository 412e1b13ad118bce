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
    """Raise RemoteError, with ``advice``, if the server of a URL sends no response in 6 s.

    Any response will do, also an error. Proxies come from the environment, as in the libraries that
    download.
    """
    failures: list[str] = []
    done = threading.Event()

    def ask() -> None:
        if why := _failure(url):
            failures.append(why)
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    if not done.wait(RESPONSE_TIMEOUT_S + _DNS_TIMEOUT_S):
        failures = [f"no response in {RESPONSE_TIMEOUT_S + _DNS_TIMEOUT_S:g} s"]
    if failures:
        raise RemoteError(f"cannot reach {shown(url)}: {failures[0]}; {advice}")


def _failure(url: str) -> str | None:
    """Return why a server does not respond; None if it does."""
    proxies = urllib.request.getproxies()
    if "all" in proxies:  # SOCKS, which urllib does not know
        return None
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=RESPONSE_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
    except ssl.SSLError:  # the libraries may have other certificates
        return None
    except TimeoutError:
        return f"no response in {RESPONSE_TIMEOUT_S:g} s"
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return None
        if isinstance(error.reason, TimeoutError):
            return f"no response in {RESPONSE_TIMEOUT_S:g} s"
        return reason(error.reason) if isinstance(error.reason, OSError) else str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return reason(error)
    return None
