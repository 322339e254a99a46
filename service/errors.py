"""Every error a client can meet, one shape each: a status, a type, one sentence.

ServiceError
  BadRequest 400, Unauthorized 401, NotFound 404, MethodNotAllowed 405, UploadTimeout 408,
  TooLarge 413, UnsupportedImage 415, Unprocessable 422, ImageTooCostly 422, QueueFull 429,
  RateLimited 429, ClientGone 499, InternalError 500, NotReady 503, DeadlineExceeded 504
"""


class ServiceError(Exception):
    """An error with a client-facing sentence. `retry_after` is in seconds, if it makes sense."""

    status = 500
    error_type = "internal"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class BadRequest(ServiceError):
    status, error_type = 400, "bad_request"


class Unauthorized(ServiceError):
    status, error_type = 401, "unauthorized"


class NotFound(ServiceError):
    status, error_type = 404, "not_found"


class MethodNotAllowed(ServiceError):
    status, error_type = 405, "method_not_allowed"


class UploadTimeout(ServiceError):
    status, error_type = 408, "upload_timeout"


class TooLarge(ServiceError):
    status, error_type = 413, "too_large"


class UnsupportedImage(ServiceError):
    status, error_type = 415, "unsupported_image"


class Unprocessable(ServiceError):
    status, error_type = 422, "unprocessable"


class ImageTooCostly(ServiceError):
    """Decoding the image would take, or took, more time or memory than one image may have."""

    status, error_type = 422, "image_too_costly"


class QueueFull(ServiceError):
    status, error_type = 429, "queue_full"


class RateLimited(ServiceError):
    """One key asked too often; the others do not notice."""

    status, error_type = 429, "rate_limited"


class ClientGone(ServiceError):
    """The client closed the connection; nobody reads this answer, the status is for the metrics."""

    status, error_type = 499, "client_gone"


class InternalError(ServiceError):
    status, error_type = 500, "internal"


class NotReady(ServiceError):
    status, error_type = 503, "not_ready"


class DeadlineExceeded(ServiceError):
    status, error_type = 504, "deadline"


ERRORS: dict[str, type[ServiceError]] = {
    error.error_type: error for error in ServiceError.__subclasses__()
}


class ModelError(Exception):
    """The checkpoint or the bundle cannot be served. The message is one sentence for the operator;
    the process ends with it, so no client ever meets it."""


class KeysError(Exception):
    """The keys that the server was given cannot be used; one sentence for the operator."""
