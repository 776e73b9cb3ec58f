"""What the API server says when it refuses: Status objects with the real wording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


class ApiError(Exception):
    """A request that ends in a Status object instead of an answer."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: Json | None = None,
        metadata: Json | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.headers = dict(headers or {})
        self.status: Json = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata or {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details,
            "code": code,
        }
        if details is None:
            del self.status["details"]


def success(resource: str, name: str, uid: str) -> Json:
    """What DELETE answers for kinds that are not handed back."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": {"name": name, "kind": resource, "uid": uid},
    }


def not_found(resource: str, name: str) -> ApiError:
    return ApiError(
        404,
        "NotFound",
        f'{resource} "{name}" not found',
        details={"name": name, "kind": resource},
    )


def no_such_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource", details={})


def method_not_allowed() -> ApiError:
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message, details={})


def already_exists(resource: str, name: str) -> ApiError:
    return ApiError(
        409,
        "AlreadyExists",
        f'{resource} "{name}" already exists',
        details={"name": name, "kind": resource},
    )


def conflict(resource: str, name: str, why: str) -> ApiError:
    return ApiError(
        409,
        "Conflict",
        f'Operation cannot be fulfilled on {resource} "{name}": {why}',
        details={"name": name, "kind": resource},
    )


def modified_meanwhile(resource: str, name: str) -> ApiError:
    why = (
        "the object has been modified; please apply your changes to the latest version "
        "and try again"
    )
    return conflict(resource, name, why)


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


# How a validation message begins decides the machine-readable reason beside it.
_CAUSES = {
    "Required value": "FieldValueRequired",
    "Forbidden": "FieldValueForbidden",
    "Unsupported value": "FieldValueNotSupported",
    "Too long": "FieldValueTooLong",
}


def invalid(kind: str, name: str, field: str, why: str, *, group: str = "") -> ApiError:
    cause = _CAUSES.get(why.partition(":")[0], "FieldValueInvalid")
    details: Json = {"kind": kind, "causes": [{"reason": cause, "message": why, "field": field}]}
    if name:
        details["name"] = name
    if group:
        details["group"] = group
    shown = f"{kind}.{group}" if group else kind
    message = f'{shown} "{name}" is invalid: {field}: {why}'
    return ApiError(422, "Invalid", message, details=details)


def invalid_list_option(field: str, why: str) -> ApiError:
    return invalid("ListOptions", "", field, why, group="meta.k8s.io")


def unauthorized() -> ApiError:
    return ApiError(401, "Unauthorized", "Unauthorized")


def forbidden(user: str, verb: str, resource: str, namespace: str, name: str) -> ApiError:
    scope = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    what = f'{resource} "{name}"' if name else resource
    details = {"name": name, "kind": resource} if name else {"kind": resource}
    return ApiError(
        403,
        "Forbidden",
        f'{what} is forbidden: User "{user}" cannot {verb} resource "{resource}" '
        f'in API group "" {scope}',
        details=details,
    )


def too_old(asked: int, oldest: int) -> ApiError:
    return ApiError(410, "Expired", f"too old resource version: {asked} ({oldest})")


def continue_expired(fresh_token: str) -> ApiError:
    message = (
        "The provided continue parameter is too old to display a consistent list result. "
        "You can start a new list without the continue parameter, or use the continue token "
        "in this response to retrieve the remainder of the results. Continuing with the "
        "provided token results in an inconsistent list - objects that were created, modified, "
        "or deleted between the time the first chunk was returned and now may show up in the "
        "list."
    )
    return ApiError(410, "Expired", message, metadata={"continue": fresh_token})


def version_too_large(asked: int, current: int) -> ApiError:
    return ApiError(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {asked}, current: {current}",
        details={
            "causes": [
                {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
            ],
            "retryAfterSeconds": 1,
        },
        headers={"Retry-After": "1"},
    )


def not_acceptable(why: str) -> ApiError:
    return ApiError(406, "NotAcceptable", why)


def unsupported_media_type(accepted: str) -> ApiError:
    message = (
        "the body of the request was in an unknown format - accepted media types include: "
        + accepted
    )
    return ApiError(415, "UnsupportedMediaType", message)


def too_large_body() -> ApiError:
    message = "Request entity too large: limit is 3145728"
    return ApiError(413, "RequestEntityTooLarge", message)


def injected(code: int, retry_after_s: int | None) -> ApiError:
    """An error a test asked for."""
    reasons = {
        410: ("Expired", "The resourceVersion for the provided list is too old."),
        429: ("TooManyRequests", "Too many requests, please try again later."),
        500: ("InternalError", "Internal error occurred: injected by the test"),
        503: ("ServiceUnavailable", "the server is currently unable to handle the request"),
        504: ("Timeout", "Timeout: request did not complete within the allotted timeout"),
    }
    reason, message = reasons.get(code, ("InternalError", f"injected status {code}"))
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    details = None if retry_after_s is None else {"retryAfterSeconds": retry_after_s}
    return ApiError(code, reason, message, headers=headers, details=details)
