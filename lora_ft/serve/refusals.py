"""What a client is told of a request that cannot be met: OpenAI's error object, and the status it comes with."""

from __future__ import annotations

from typing import Any

from lora_ft.errors import LoraFtError

INVALID = "invalid_request_error"
# Types by status; every other 4xx is an invalid request, as it is where this API comes from.
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestError(LoraFtError):
    """A request that cannot be met, with what the error object says of it."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """Returns the JSON of the answer."""
        return body(self.status, str(self), self.code, self.param)


def body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Returns an error object; `param` and `code` are there even where they are null, for clients read them."""
    kind = TYPES.get(status, "server_error" if status >= 500 else INVALID)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad(param: str | None, message: str, code: str | None = "invalid_value") -> RequestError:
    """Returns a refusal of one field of a request: status 400."""
    return RequestError(400, message, code=code, param=param)


def no_file(file_id: str) -> RequestError:
    """Returns the refusal of a file that is not there."""
    return RequestError(404, f"No such File object: {file_id}", param="id")


def no_job(job_id: str) -> RequestError:
    """Returns the refusal of a job that is not there."""
    return RequestError(404, f"Could not find fine tune: {job_id}", code="fine_tune_not_found", param="fine_tune_id")


def no_model(name: str, known: str = "") -> RequestError:
    """Returns the refusal of a model that is not there; `known` says which are."""
    message = f"The model `{name}` does not exist or you do not have access to it.{known}"
    return RequestError(404, message, code="model_not_found", param="model")
