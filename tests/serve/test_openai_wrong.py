"""The OpenAI API over real sockets: every field that is wrong, every limit, and who may ask."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcli.serve.limits import Access, Limits
from tests.conftest import PATIENCE, ROOT
from tests.serve.conftest import LIMITS, TALK, TEXT
from tests.serve.running import Running, running

# --- What can be wrong


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [[-1]]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 13}, "n"),
        ({"prompt": ["a"] * 5, "n": 3}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "."}, "suffix"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": []}, "frequency_penalty"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "a"}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "a"}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": {}}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"echo": 1}, "echo"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_tokens": 4}, "min_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:40],
)
def test_a_wrong_field_is_named(server: Running, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        answer = server.post("/v1/completions", {"prompt": "a", "stream": stream, **fields} | fields)
        assert answer.status == 400
        assert answer.error["param"] == param
        assert answer.error["type"] == "invalid_request_error"
        if "stream_options" in fields:
            return


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "long " * 100}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 100}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"n": 13}, "n"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:40],
)
def test_a_wrong_field_of_a_chat_is_named(server: Running, fields: dict[str, Any], param: str) -> None:
    answer = server.post("/v1/chat/completions", {"messages": TALK, **fields})
    assert answer.status == 400
    assert answer.error["param"] == param


def test_what_changes_nothing_is_ignored(server: Running) -> None:
    plain = server.complete(TEXT)["choices"]
    harmless = {"user": "me", "best_of": 1, "suffix": "", "response_format": {"type": "text"}, "made_up": [1, {}]}
    assert server.complete(TEXT, **harmless, logit_bias={}, stop=None, stream=False, logprobs=None)["choices"] == plain
    chat = {"messages": TALK, "seed": 1, "max_tokens": 4}
    harmless = {"tools": [], "tool_choice": "auto", "store": True, "metadata": {}, "service_tier": "auto", "user": "x"}
    answers = [server.post("/v1/chat/completions", {**chat, **more}).json["choices"] for more in ({}, harmless)]
    assert answers[0] == answers[1]


def test_wrong_inputs_for_embeddings_and_tokens(server: Running) -> None:
    for path, body, param in (
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": [[]]}, "input"),
        ("/v1/embeddings", {"input": ["a"] * 6}, "input"),
        ("/v1/embeddings", {"input": "long " * 100}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ):
        answer = server.post(path, body)
        assert (answer.status, answer.error["param"]) == (400, param), (path, body)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"\xff\xfe\xfd", b'{"prompt": NaN}', b"[" * 15_000, b'{"n": ' + b"1" * 9999 + b"}"],
    ids=["empty", "half", "list", "string", "bytes", "NaN", "deep", "long"],
)
def test_a_body_that_is_no_object(server: Running, body: bytes) -> None:
    answer = server.post("/v1/completions", body)
    assert answer.status == 400
    assert answer.error["code"] in ("invalid_json", "invalid_value")


def test_half_a_surrogate_is_no_trouble(server: Running) -> None:
    choice = server.complete("a\ud800b", echo=True, max_tokens=1)["choices"][0]
    assert choice["text"].startswith("a?b")
    assert server.post("/v1/completions", {"model": "\ud800"}).status == 404
    assert server.post("/v1/completions", {"prompt": "a", "seed": "\udfff"}).status == 400


def test_a_prompt_longer_than_the_context(server: Running) -> None:
    context = server.service.model.config.context
    assert server.complete([5] * context)["usage"]["completion_tokens"] <= 1
    error = server.post("/v1/completions", {"prompt": [5] * (context + 1)}).error
    assert error["code"] == "context_length_exceeded"
    assert "65" in error["message"]


def test_an_unknown_model_is_not_found_and_none_is_the_one_that_is_there(server: Running) -> None:
    for model in ("tiny", str(server.service.folder), "", None):
        assert server.post("/v1/completions", {"prompt": "a", "model": model}).status == 200
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        for model in ("gpt-5", 7):
            answer = server.post(path, {"prompt": "a", "model": model})
            assert (answer.status, answer.error["code"]) == (404, "model_not_found")


def test_unknown_paths_and_methods(server: Running) -> None:
    assert server.get("/v1/nothing").error["code"] == "unknown_url"
    answer = server.get("/v1/completions")
    assert (answer.status, answer.headers["allow"], answer.error["code"]) == (405, "POST", "wrong_method")
    assert server.ask("DELETE", "/health").status == 405


def test_a_body_too_large(server: Running) -> None:
    for body in (b"x" * 20_001, iter([b"x" * 15_000, b"x" * 15_000])):
        connection = server.connection()
        with suppress(BrokenPipeError, ConnectionResetError):  # it need not be read to its end to be refused
            connection.request("POST", "/v1/completions", body)
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == "body_too_large"
        connection.close()


def test_a_body_too_slow(tiny_folder: Path, tmp_path: Path) -> None:
    with running(tiny_folder, tmp_path, Limits(body_seconds=0.1)) as server, server.raw() as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(100).startswith(b"HTTP/1.1 408 ")


def test_too_many_at_once_are_told_when_to_come_back(tiny_folder: Path, tmp_path: Path) -> None:
    limits = Limits(rows=1, waiting=1, requests=4, retry_seconds=7)
    body = json.dumps({"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}).encode()
    with running(tiny_folder, tmp_path, limits) as server:
        hold, held = threading.Event(), threading.Event()

        def block() -> None:
            held.set()
            assert hold.wait(PATIENCE)

        blocked = server.engine.call(block)
        assert held.wait(PATIENCE)
        connection = server.connection()
        connection.request("POST", "/v1/completions", body)
        while server.engine.load != (0, 1):  # it waits; the engine is held
            assert server.get("/health").status == 200
        answer = server.post("/v1/completions", body)
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert (answer.error["type"], answer.error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        others = [server.connection() for _ in range(3)]
        for other in others:
            other.request("POST", "/v1/embeddings", b'{"input": "a"}')
        while server.get("/health").status == 200:  # until they have come
            pass
        hold.set()
        blocked.result(PATIENCE)
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
        for other in others:
            assert other.getresponse().status == 200
            other.close()
        connection.close()


def test_an_error_is_a_status_before_a_stream_and_an_event_in_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_folder, tmp_path) as server:
        transformer = server.service.model.transformer
        assert transformer.positions is not None
        transformer.positions.weight[20] = float("nan")
        body = {"prompt": [3] * 21, "stream": True, "ignore_eos": True}
        answer = server.post("/v1/completions", body)
        assert (answer.status, answer.error["type"]) == (500, "server_error")

        pool, step, steps = server.engine._pool, server.engine._pool.step, []

        def fail(tokens: Any) -> Any:
            steps.append(tokens)
            if len(steps) % 4 == 0:
                raise MemoryError
            return step(tokens)

        monkeypatch.setattr(pool, "step", fail)
        answer = server.post("/v1/completions", {**body, "prompt": [4]})
        assert answer.status == 200
        *events, error, rest = answer.body.decode().split("\n\n")
        assert events
        assert rest == ""
        assert "memory" in json.loads(error.removeprefix("data: "))["error"]["message"]
        answer = server.post("/v1/completions", {"prompt": [4], "ignore_eos": True})
        assert (answer.status, answer.error["type"], answer.headers["retry-after"]) == (503, "server_error", "1")
        monkeypatch.undo()
        assert server.complete([4])["usage"]["prompt_tokens"] == 1


# --- Who may ask


def test_over_tcp_the_host_has_to_be_the_loopback(server: Running) -> None:
    for host in ("localhost", "127.0.0.1:80", "[::1]:9", "LOCALHOST:1"):
        assert server.get("/health", tcp=True, Host=host).status == 200
    for host in ("example.com", "localhost.example.com:80", "127.0.0.1.example.com", "", "[::2]"):
        answer = server.get("/health", tcp=True, Host=host)
        assert (answer.status, answer.error["code"]) == (403, "wrong_host")
    assert server.get("/health", Host="example.com").status == 200


def test_pages_from_elsewhere_may_not_ask_unless_they_were_asked(tiny_folder: Path, tmp_path: Path) -> None:
    page = "https://example.com"
    (tmp_path / "a").mkdir()
    with running(tiny_folder, tmp_path / "a") as server:
        assert server.get("/health", tcp=True, Origin=page).status == 403
        assert server.get("/health", tcp=True, Origin="null").status == 403
        assert server.ask("OPTIONS", "/v1/completions", tcp=True, Origin=page).status == 403
        own = server.get("/health", tcp=True, Origin=f"http://127.0.0.1:{server.port}")
        assert own.status == 200
        assert "access-control-allow-origin" not in own.headers
    with running(tiny_folder, tmp_path, access=Access(api_key="k", origins=(page,), hosts=("box",))) as server:
        asked = {"Access_Control_Request_Headers": "authorization", "Access_Control_Request_Method": "POST"}
        answer = server.ask("OPTIONS", "/v1/completions", tcp=True, Origin=page, **asked)
        assert answer.status == 204
        assert answer.headers["access-control-allow-headers"] == "authorization"
        answer = server.get("/v1/models", tcp=True, Origin=page, Host="Box:8000", Authorization="Bearer k")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, page)
        assert server.get("/v1/models", tcp=True, Origin="https://other").status == 403


def test_over_tcp_the_key_has_to_be_right(tiny_folder: Path, tmp_path: Path) -> None:
    with running(tiny_folder, tmp_path, access=Access(api_key="säcret")) as server:
        for sent in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic säcret"}, {"Authorization": "Bearer"}):
            answer = server.post("/v1/completions", {"prompt": "a"}, tcp=True, **sent)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert server.get("/metrics", tcp=True, **sent).status == 401
        connection = server.connection(tcp=True)
        connection.putrequest("GET", "/v1/models")
        connection.putheader("Authorization", "Bearer säcret".encode())
        connection.endheaders()
        assert connection.getresponse().status == 200
        connection.close()
        assert server.get("/health", tcp=True).status == 200
        assert server.post("/v1/completions", {"prompt": "a"}).status == 200  # by the socket


def test_our_own_routes_are_there_beside_it_by_the_socket_alone(server: Running) -> None:
    assert server.get("/gptcli/status").json["model"] == "tiny"
    assert server.get("/gptcli/status", tcp=True).status == 404


def test_the_reference_names_every_metric_and_route(server: Running) -> None:
    part = (ROOT / "docs" / "reference.md").read_text().split("\n## The HTTP API\n")[1].split("\n## ")[0]
    names = [line.split()[2] for line in server.get("/metrics").body.decode().splitlines() if line.startswith("# TYPE")]
    assert names
    assert [name for name in names if f"`{name}`" not in part] == []
    for route in server.api.routes:
        (method,) = (route.methods or set()) - {"HEAD"}
        assert f"`{method} {route.path.replace(':path', '')}`" in part


def test_limits_reach_the_engine(server: Running) -> None:
    assert (server.engine.rows, server.engine.waiting) == (4, 16)
    assert replace(LIMITS, rows=9).engine["rows"] == 9
