"""JSON-RPC 2.0, one object a line: the messages of the control socket, as bytes and as Python values.

Pure: no I/O. What comes in is taken for hostile. Batches are not spoken, and params are always by name. A line,
with its newline, has at most MAX_LINE bytes; a server's answer at most MAX_ANSWER.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
from typing import Any, NamedTuple

from pyhv.errors import BadInput, Cancelled, GaveUp, HandoverUnknown, HostError, Incompatible

MAX_LINE = 64 << 10
MAX_ANSWER = 1 << 20

# Codes that JSON-RPC 2.0 defines (section 5.1) ...
PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603
# ... and pyhv's own, the exit statuses of a command that fails in the same way.
BAD_INPUT, HOST_ERROR, CANCELLED = 2, 125, 130

_SHOWN = 40  # characters of what a client sent that an answer repeats


class RpcError(Exception):
    """A message that is no good request. code: JSON-RPC's. id: the request's, None where that is not known."""

    def __init__(self, code: int, message: str, id: object = None) -> None:
        self.code = code
        self.message = message
        self.id = id
        super().__init__(message)


class Param(NamedTuple):
    """A parameter of a method."""

    kind: type
    required: bool = False
    path: bool = False
    """A str that must be an absolute path."""


class Request(NamedTuple):
    """What a client wants."""

    method: str
    params: dict[str, Any]
    id: int | float | str | None
    notification: bool
    """Whether nobody waits for an answer."""


def parse_request(line: bytes, methods: dict[str, dict[str, Param]]) -> Request:
    """The request in a line. methods: what there is, with parameters. Raises RpcError."""
    message = _load(line)
    if not isinstance(message, dict):
        what = "batches are not supported" if isinstance(message, list) else "it is no object"
        raise RpcError(INVALID_REQUEST, f"not a request: {what}")
    id = message.get("id")
    if isinstance(id, bool) or not isinstance(id, int | float | str | None):
        raise RpcError(INVALID_REQUEST, "not a request: its id is neither a string nor a number")
    if message.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'not a request: "jsonrpc" is not "2.0"', id)
    method = message.get("method")
    if not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, "not a request: it has no method", id)
    if method not in methods:
        raise RpcError(METHOD_NOT_FOUND, f"there is no method {_show(method)}; there are {', '.join(methods)}", id)
    params = message.get("params", {})
    if not isinstance(params, dict):
        raise RpcError(INVALID_PARAMS, f"{method}: params must be an object", id)
    try:
        _check_params(params, methods[method])
    except ValueError as error:
        raise RpcError(INVALID_PARAMS, f"{method}: {error}", id) from None
    return Request(method, params, id, "id" not in message)


def _check_params(params: dict[str, Any], known: dict[str, Param]) -> None:
    """Raises ValueError."""
    for name, value in params.items():
        param = known.get(name)
        if param is None:
            raise ValueError(f"there is no parameter {_show(name)}")
        if type(value) is int and param.kind is float:  # JSON knows one kind of number
            with contextlib.suppress(OverflowError):
                params[name] = value = float(value)
        if type(value) is not param.kind:
            raise ValueError(f"parameter {name} is not of the type {param.kind.__name__}")
        if param.path:
            assert isinstance(value, str)
            try:
                encoded = os.fsencode(value)
            except UnicodeEncodeError:
                encoded = b""
            if not encoded.startswith(b"/") or b"\0" in encoded:
                raise ValueError(f"parameter {name} is no absolute path")
    for name, param in known.items():
        if param.required and name not in params:
            raise ValueError(f"the parameter {name} is missing")


def encode_request(method: str, params: dict[str, Any], id: int | None) -> bytes:
    """A request, or with id None a notification."""
    return _line({"method": method, "params": params} | ({} if id is None else {"id": id}))


def encode_result(id: object, result: object) -> bytes:
    """The answer to a request that was carried out."""
    return _line({"result": result, "id": id})


def encode_notification(method: str, params: dict[str, Any]) -> bytes:
    """What a server tells a client without having been asked."""
    return _line({"method": method, "params": params})


def encode_error(id: object, error: BaseException) -> bytes:
    """The answer to a request that failed. What pyhv raises on purpose travels with its facts; of what nobody
    expected only the kind does."""
    data: dict[str, Any] | None = None
    match error:
        case RpcError():
            code, message = error.code, error.message
        case Incompatible():
            code, message = BAD_INPUT, str(error)
            # Clients of the version before know of no reasons: for them all is in the problem.
            data = {"kind": "BadInput", "subject": error.subject, "problem": message.removeprefix(f"{error.subject}: ")}
            data |= {"summary": error.problem, "reasons": [str(reason) for reason in error.reasons]}
        case BadInput():
            code, message = BAD_INPUT, str(error)
            data = {"kind": "BadInput", "subject": error.subject, "problem": error.problem}
        case Cancelled():
            code, message = CANCELLED, str(error)
            data = {"kind": "Cancelled", "subject": error.peer, "problem": "was cancelled"}
        case HandoverUnknown():
            code, message = HOST_ERROR, str(error)
            data = {"kind": "HandoverUnknown", "subject": error.peer, "problem": error.problem}
        case GaveUp():
            code, message = HOST_ERROR, str(error)
            # For clients of the version before it is a HostError.
            data = {"kind": "GaveUp", "subject": error.what, "problem": error.detail, "reason": error.reason}
        case HostError():
            code, message = HOST_ERROR, str(error)
            data = {"kind": "HostError", "subject": error.what, "problem": error.detail, "errnum": error.errnum}
        case _:
            code, message = INTERNAL_ERROR, f"internal error: {type(error).__name__}"
    value: dict[str, Any] = {"code": code, "message": message}
    if data is not None:
        value["data"] = {**data, "advice": getattr(error, "advice", "")}
    return _line({"error": value, "id": id})


class Answer(NamedTuple):
    """What a server sent: a result or an error, for the request `id`; or a notification."""

    id: object
    result: Any = None
    error: Exception | None = None
    method: str = ""
    """Of a notification; params is then in `result`."""


def parse_answer(line: bytes, name: str) -> Answer:
    """What the server of the VM `name` sent; an error as the exception that it stands for. Raises HostError for what is
    no answer."""
    try:
        message = _load(line)
        if not isinstance(message, dict):
            raise ValueError
        if "method" in message:
            method, params = message["method"], message.get("params", {})
            if not isinstance(method, str) or not isinstance(params, dict):
                raise ValueError
            return Answer(None, params, None, method)
        if "error" in message:
            return Answer(message.get("id"), None, _error_of(message["error"], name))
        return Answer(message.get("id"), message["result"])
    except (RpcError, ValueError, KeyError, TypeError):
        raise HostError(f"the control socket of {name}", 0, "what came from it is no answer") from None


def _error_of(value: Any, name: str) -> Exception:
    """Raises ValueError, KeyError or TypeError for what is no error object."""
    if not isinstance(value, dict):
        raise ValueError
    message = value["message"]
    data = value.get("data", {})
    if not isinstance(data, dict):
        raise ValueError
    facts = [data.get(key, "") for key in ("subject", "problem", "advice")]
    errnum = data.get("errnum", 0)
    if not all(isinstance(fact, str) for fact in (message, *facts)) or type(errnum) is not int:
        raise ValueError
    if data.get("kind") == "Cancelled":
        return Cancelled(facts[0])
    if data.get("kind") == "HandoverUnknown":
        return HandoverUnknown(*facts[:2])
    if data.get("kind") == "GaveUp" and isinstance(data.get("reason"), str):
        return GaveUp(facts[0], data["reason"])
    if value["code"] == BAD_INPUT:
        summary, reasons = data.get("summary"), data.get("reasons")
        if isinstance(summary, str) and isinstance(reasons, list):
            return Incompatible(facts[0], summary, [str(reason) for reason in reasons])
        return BadInput(*facts)
    if value["code"] == HOST_ERROR:
        return HostError(facts[0], max(0, min(errnum, 4095)), *facts[1:])
    return HostError(f"the control socket of {name}", 0, message)


def encode_bytes(data: bytes) -> str:
    """Bytes as they travel in a parameter: base64."""
    return binascii.b2a_base64(data, newline=False).decode()


def decode_bytes(text: object) -> bytes:
    """The bytes in a parameter. Raises ValueError."""
    if not isinstance(text, str):
        raise ValueError("is no base64")
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except ValueError:  # binascii.Error and UnicodeEncodeError are
        raise ValueError("is no base64") from None


def _load(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        raise RpcError(PARSE_ERROR, "not JSON") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value - value:  # of 1e999: it could not be sent back
        raise ValueError(f"{text} is too large")
    return value


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")).encode() + b"\n"


def _show(text: str) -> str:
    return ascii(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
