"""The real ``openai`` client against the server, and curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptcli.core.generate import prompt_ids
from gptcli.serve.limits import Access, Limits
from tests.conftest import PATIENCE
from tests.serve.running import Running, running

openai: Any = pytest.importorskip("openai", reason="runs the openai client: install the extra 'peers'")
httpx: Any = pytest.importorskip("httpx")
pytestmark = pytest.mark.peer

TEXT = "Once upon a time"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_folder, tmp_path_factory.mktemp("s"), Limits(rows=4), Access(api_key="secret")) as server:
        yield server


@pytest.fixture(params=["tcp", "socket"])
def client(server: Running, request: pytest.FixtureRequest) -> Iterator[Any]:
    own: dict[str, Any] = {"http_client": httpx.Client(transport=httpx.HTTPTransport(uds=str(server.path)))}
    url = "http://gptcli/v1"
    if request.param == "tcp":
        own, url = {}, f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=PATIENCE, **own) as client:
        yield client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gptcli"


def test_completions(client: Any, server: Running) -> None:
    fields = {"model": "tiny", "prompt": TEXT, "seed": 1, "max_tokens": 8, "n": 2, "logprobs": 2}
    whole = client.completions.create(**fields, extra_body={"top_k": 20})
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage.prompt_tokens == len(prompt_ids(server.service.model, TEXT))
    parts = {0: "", 1: ""}
    last = None
    options = {"include_usage": True}
    for last in client.completions.create(**fields, extra_body={"top_k": 20}, stream=True, stream_options=options):
        for choice in last.choices:
            parts[choice.index] += choice.text
    assert [parts[0], parts[1]] == [choice.text for choice in whole.choices]
    assert last is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    told = whole.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    echoed = client.completions.create(model="tiny", prompt=TEXT, max_tokens=0, echo=True, logprobs=0)
    assert echoed.choices[0].text == TEXT == "".join(echoed.choices[0].logprobs.tokens)


def test_chat(client: Any) -> None:
    fields = {"model": "tiny", "messages": TALK, "seed": 1, "max_completion_tokens": 24}
    fields["extra_body"] = {"ignore_eos": True}  # a text of that length, whatever the arithmetic makes of it
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob <= max(other.logprob for other in token.top_logprobs) <= 0
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    text = choice.message.content
    stop = text[len(text) // 2 :][:2]
    with client.chat.completions.stream(**fields, stop=stop) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.message.content, final.finish_reason) == (text[: text.index(stop)], "stop")


def test_embeddings(client: Any) -> None:
    """The client asks for base64 and decodes it, unless told otherwise."""
    coded = client.embeddings.create(model="tiny", input=[TEXT, "The king"])
    plain = client.embeddings.create(model="tiny", input=[TEXT, "The king"], encoding_format="float")
    for one, other in zip(coded.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-5)


def test_errors(client: Any, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt=TEXT, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt=TEXT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[5] * 99)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=TALK, response_format={"type": "json_object"})
    url = f"http://127.0.0.1:{server.port}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="other", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


def test_a_stream_that_is_closed_leaves_the_server_well(client: Any, server: Running) -> None:
    fields = {"model": "tiny", "prompt": TEXT, "max_tokens": 60, "n": 8, "stream": True}
    stream = client.completions.create(**fields, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    server.rest()
    assert server.engine.load == (0, 0)
    assert client.completions.create(model="tiny", prompt=TEXT, max_tokens=1).choices


def test_too_many(tiny_folder: Path, tmp_path: Path) -> None:
    with running(tiny_folder, tmp_path, Limits(requests=0)) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as busy:
                client.completions.create(model="tiny", prompt=TEXT)
            assert busy.value.response.headers["retry-after"] == "1"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_over_the_socket(server: Running) -> None:
    def curl(path: str, *more: str) -> str:
        command = ["curl", "-sS", "--max-time", "60", "--unix-socket", str(server.path), f"http://gptcli{path}", *more]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert json.loads(curl("/health")) == {"status": "ok"}
    asked = {"prompt": TEXT, "seed": 1, "max_tokens": 5}
    text = json.loads(curl("/v1/completions", "-d", json.dumps(asked)))["choices"][0]["text"]
    events = curl("/v1/completions", "-N", "-d", json.dumps({**asked, "stream": True})).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    values = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(value["choices"][0]["text"] for value in values) == text
