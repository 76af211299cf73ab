"""What only a server refuses: errors of HTTP, beside those of ``gemloom.errors``.

GemloomError
├── RequestError              400  invalid_request
│   └── FieldError            400  invalid_field        names the field, as ``param``
├── AddressError              500  address_unavailable
├── KeyRefusedError           401  invalid_api_key
├── ForbiddenError            403  forbidden
├── UnknownModelError         404  model_not_found
├── UnknownPathError          404  not_found
├── OverdueError              408  request_timeout
├── BodyTooLargeError         413  body_too_large
├── HungUpError               499  client_closed        never sent: nobody is there to read it
├── CrowdedError              503  too_many_connections
└── StoppedError              503  server_stopping
"""

from gemloom.errors import GemloomError, RequestError


class FieldError(RequestError):
    """A field of a request's JSON that cannot be used; ``param`` is its name."""

    code = "invalid_field"

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class KeyRefusedError(GemloomError):
    """No API key, or one that is not among the server's."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(GemloomError):
    """Something this server was not started for, or not for this client."""

    status = 403
    code = "forbidden"


class UnknownModelError(GemloomError):
    """A request for a model that is not the one served."""

    status = 404
    code = "model_not_found"


class UnknownPathError(GemloomError):
    """A request for a path that there is not."""

    status = 404
    code = "not_found"


class OverdueError(GemloomError):
    """A request that took longer than the server's limit."""

    status = 408
    code = "request_timeout"


class BodyTooLargeError(GemloomError):
    """A request body over the server's limit."""

    status = 413
    code = "body_too_large"


class HungUpError(GemloomError):
    """The client has gone; nobody is there to be told."""

    status = 499  # in the metrics alone
    code = "client_closed"


class StoppedError(GemloomError):
    """A request under way that the server ended because it is going down."""

    status = 503
    code = "server_stopping"


class CrowdedError(GemloomError):
    """A connection more than the server keeps."""

    status = 503
    code = "too_many_connections"


class AddressError(GemloomError):
    """An address that the server cannot listen on."""

    code = "address_unavailable"
