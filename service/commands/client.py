"""A client of a running server, for the command line."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx2

from service.errors import ServiceError, make_error

TIMEOUT = httpx2.Timeout(120.0, connect=10.0)  # seconds; a deep defense on a CPU takes long


class Client:
    """Asks one server; threads may share it. A context manager.

    It blocks: httpx2's asynchronous client reads nothing while it sends, and loses the answer of a
    server that refuses a large body before it has arrived.

    Args:
        url: of the server, without a path, or with the prefix that a proxy serves it under.
        key: an API key; none if empty.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self._url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(headers=headers, timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the server answers: to a POST with a body, else to a GET.

        Raises ServiceError with the server's own sentence if it refuses, ConnectionError if it
        cannot be reached or is not tapt-serve.
        """
        method = "GET" if body is None else "POST"
        try:
            answer = self._http.request(method, self._url + path, json=body)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ConnectionError(f"{self._url} cannot be reached: {reason}.") from None
        if answer.is_success:
            try:
                return answer.json()
            except ValueError:
                raise ConnectionError(f"{self._url} is not a tapt-serve server.") from None
        raise _refusal(self._url, answer)


def _refusal(url: str, answer: httpx2.Response) -> Exception:
    try:
        body = answer.json()
        refused: ServiceError = make_error(body["error_type"], str(body["error"]))
    except (ValueError, KeyError, TypeError):  # a proxy's own page
        return ConnectionError(f"{url} answered {answer.status_code}.")
    wait = answer.headers.get("retry-after", "")
    if wait.isdecimal():
        refused.retry_after = float(wait)
    return refused
