"""Every error that a client can receive: a status, a type and one sentence.

ServiceError
  BadRequest 400, Unauthorized 401, Forbidden 403, NotFound 404, MethodNotAllowed 405,
  UploadTimeout 408, TooLarge 413, UnsupportedImage 415, UnsupportedEncoding 415,
  Unprocessable 422, ImageTooCostly 422, QueueFull 429, RateLimited 429, ClientGone 499,
  InternalError 500, NotReady 503, DeadlineExceeded 504
"""


class ServiceError(Exception):
    """An error with a sentence for the client. `retry_after` is in seconds, None for never."""

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


class Forbidden(ServiceError):
    """A browser asks on behalf of another site."""

    status, error_type = 403, "forbidden"


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


class UnsupportedEncoding(ServiceError):
    """The body is compressed in a way that is not supported."""

    status, error_type = 415, "unsupported_encoding"


class Unprocessable(ServiceError):
    status, error_type = 422, "unprocessable"


class ImageTooCostly(ServiceError):
    """Decoding the image would take, or took, more time or memory than one image may have."""

    status, error_type = 422, "image_too_costly"


class QueueFull(ServiceError):
    status, error_type = 429, "queue_full"


class RateLimited(ServiceError):
    """A key reached one of its limits; other keys are not affected."""

    status, error_type = 429, "rate_limited"


class ClientGone(ServiceError):
    """The client disconnected. The status appears only in metrics and the log."""

    status, error_type = 499, "client_gone"


class InternalError(ServiceError):
    status, error_type = 500, "internal"


class NotReady(ServiceError):
    status, error_type = 503, "not_ready"


class DeadlineExceeded(ServiceError):
    status, error_type = 504, "deadline"


_BY_TYPE = {error.error_type: error for error in ServiceError.__subclasses__()}


def make_error(error_type: str, message: str) -> ServiceError:
    """The error of a type that came from a worker; InternalError if the type is unknown."""
    return _BY_TYPE.get(error_type, InternalError)(message)


class ModelError(Exception):
    """The checkpoint or the bundle cannot be served. The message is one sentence for the operator;
    the process exits with it, so no client receives it."""


class KeysError(Exception):
    """The API keys cannot be used. The message is one sentence for the operator."""
