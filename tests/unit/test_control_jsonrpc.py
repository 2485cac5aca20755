"""The messages of the control socket: whatever comes, it is understood or refused, and errors arrive as they left."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyhv.control import jsonrpc
from pyhv.control.jsonrpc import Param, Request, RpcError, parse_answer, parse_request
from pyhv.control.server import METHODS
from pyhv.errors import BadInput, GaveUp, HostError, Incompatible, NotAvailable

IDS = st.integers() | st.text(max_size=5) | st.none() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def request(**changes: Any) -> bytes:
    message = {"jsonrpc": "2.0", "method": "save", "params": {"path": "/x"}, "id": 1} | changes
    return json.dumps({key: value for key, value in message.items() if value is not ...}).encode()


def code_of(line: bytes) -> int:
    with pytest.raises(RpcError) as refused:
        parse_request(line, METHODS)
    # What is answered is itself JSON, on one line.
    answer = jsonrpc.encode_error(refused.value.id, refused.value)
    assert answer.count(b"\n") == 1 and json.loads(answer)["error"]["code"] == refused.value.code
    return refused.value.code


def test_requests() -> None:
    assert parse_request(request(), METHODS) == Request("save", {"path": "/x"}, 1, False)
    assert parse_request(request(id=...), METHODS) == Request("save", {"path": "/x"}, None, True)
    assert parse_request(request(id=None), METHODS) == Request("save", {"path": "/x"}, None, False)
    assert parse_request(request(method="pause", params=...), METHODS) == Request("pause", {}, 1, False)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\xff", -32700),
        (b'{"id": NaN}', -32700),
        (b'{"jsonrpc": "2.0", "method": "status", "id": -1e999}', -32700),
        (b"[" * 60000, -32700),
        (b'{"id": ' + b"1" * 60000 + b"}", -32700),
        (b"1", -32600),
        (b"null", -32600),
        (b"[]", -32600),
        (b"[" + request() + b"]", -32600),
        (request(jsonrpc="1.0"), -32600),
        (request(jsonrpc=...), -32600),
        (request(id=True), -32600),
        (request(id=[1]), -32600),
        (request(id={}), -32600),
        (request(method=7), -32600),
        (request(method=...), -32600),
        (request(method="fly"), -32601),
        (request(method="__init__"), -32601),
        (request(method=""), -32601),
        (request(params=["/x"]), -32602),
        (request(params=None), -32602),
        (request(params={}), -32602),
        (request(params={"path": 1}), -32602),
        (request(params={"path": None}), -32602),
        (request(params={"path": "x"}), -32602),
        (request(params={"path": ""}), -32602),
        (request(params={"path": "/a\0b"}), -32602),
        (request(params={"path": "/\ud800"}), -32602),
        (request(params={"path": "/x", "stop": 1}), -32602),
        (request(params={"path": "/x", "more": 1}), -32602),
        (request(method="status", params={"path": "/x"}), -32602),
    ],
)
def test_what_is_refused(line: bytes, code: int) -> None:
    assert code_of(line) == code


def test_a_path_need_not_be_text() -> None:
    params = parse_request(request(params={"path": "/\udcff"}), METHODS).params
    assert params["path"].encode("utf-8", "surrogateescape") == b"/\xff"


def check_request(line: bytes) -> None:
    """It is understood or refused."""
    try:
        made = parse_request(line, METHODS)
    except RpcError as refused:
        assert len(jsonrpc.encode_error(refused.id, refused)) < 70000
    else:
        assert made.method in METHODS


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"jsonrpc": "2.0", "method": "' + "\u20ac".encode() * 9000 + b'", "id": 1}')
def test_nothing_but_a_request_or_a_refusal(line: bytes) -> None:
    check_request(line)


@given(
    st.fixed_dictionaries(
        {"jsonrpc": st.just("2.0") | JSON, "method": st.sampled_from([*METHODS]) | JSON, "params": JSON, "id": JSON}
    )
)
def test_nothing_but_a_request_or_a_refusal_of_what_looks_like_one(message: Any) -> None:
    check_request(json.dumps(message).encode())


@given(IDS, JSON)
def test_requests_and_results_arrive_as_they_left(id: Any, value: Any) -> None:
    methods = {"m": {"v": Param(type(value))}}
    if value == value and "Infinity" not in json.dumps(value) and "NaN" not in json.dumps(value):
        line = json.dumps({"jsonrpc": "2.0", "method": "m", "params": {"v": value}, "id": id}).encode()
        assert parse_request(line, methods) == Request("m", {"v": value}, id, False)
        answer = jsonrpc.encode_result(id, value)
        assert answer.endswith(b"\n") and answer.count(b"\n") == 1
        assert parse_answer(answer, "t") == (id, value, None, "")


def test_the_clients_requests_are_requests() -> None:
    line = jsonrpc.encode_request("save", {"path": "/x"}, 5)
    assert parse_request(line, METHODS) == Request("save", {"path": "/x"}, 5, False)
    assert parse_request(jsonrpc.encode_request("pause", {}, None), METHODS) == Request("pause", {}, None, True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadInput("a\nb", "is wrong", "mend it"), BadInput),
        (BadInput("a", "is wrong"), BadInput),
        (NotAvailable("/dev/kvm", "is missing"), BadInput),
        (Incompatible("f", "cannot run", ["one", "two"]), Incompatible),
        (HostError("write /x", 28, "no snapshot was made", "make room"), HostError),
        (HostError("pause", 0), HostError),
        (GaveUp("unix:m", "it was interrupted"), GaveUp),
    ],
)
def test_errors_arrive_as_they_left(error: Exception, kind: type[Exception]) -> None:
    answer = parse_answer(jsonrpc.encode_error(1, error), "t")
    assert type(answer.error) is kind
    assert str(answer.error) == str(error)
    assert json.loads(jsonrpc.encode_error(1, error))["error"]["code"] == (2 if issubclass(kind, BadInput) else 125)


def test_of_an_unexpected_error_only_the_kind_is_told() -> None:
    line = jsonrpc.encode_error(1, KeyError("secret"))
    assert b"secret" not in line
    assert json.loads(line)["error"]["code"] == -32603
    assert "internal error: KeyError" in str(parse_answer(line, "t").error)


def check_answer(line: bytes) -> None:
    """It is understood or refused."""
    try:
        parse_answer(line, "t")
    except HostError as error:
        assert "the control socket of t" in str(error)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_client_understands_or_refuses_what_a_server_sends(line: bytes) -> None:
    check_answer(line)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "error": JSON
            | st.fixed_dictionaries(
                {
                    "code": st.sampled_from([2, 125, -1]),
                    "message": st.just("m") | JSON,
                    "data": JSON | st.fixed_dictionaries({"subject": JSON, "problem": JSON, "errnum": JSON}),
                }
            ),
            "result": JSON,
            "method": JSON,
            "params": JSON,
            "id": JSON,
        },
    )
)
def test_a_client_understands_or_refuses_what_looks_like_an_answer(message: Any) -> None:
    check_answer(json.dumps(message).encode())


@given(st.binary())
def test_bytes(data: bytes) -> None:
    assert jsonrpc.decode_bytes(jsonrpc.encode_bytes(data)) == data


@pytest.mark.parametrize("text", ["a", "ab=", "a b=", "\u20ac", "YQ==YQ==", 5, None])
def test_what_is_no_base64(text: object) -> None:
    with pytest.raises(ValueError, match="is no base64"):
        jsonrpc.decode_bytes(text)
