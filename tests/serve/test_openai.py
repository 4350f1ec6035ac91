"""The OpenAI API over real sockets: every route, every field, every error."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcli.core.embedding import one_text_vector
from gptcli.core.generate import generate, prompt_ids
from gptcli.core.predict import next_logits
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from gptcli.serve.limits import Access, Limits
from gptcli.text.transcript import Transcript, open_chat
from tests.conftest import PATIENCE, ROOT
from tests.serve.running import Running, running

TEXT = "Once upon a time there was"
LIMITS = Limits(body_bytes=20_000, choices=12, waiting=16, rows=4, stops=4, inputs=5)


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_folder, tmp_path_factory.mktemp("s"), LIMITS) as server:
        yield server


def alone(server: Running, ids: list[int], seed: int = 1, tokens: int = 16, sampling: Sampling | None = None) -> str:
    """What the core makes of the same request."""
    request = Request(ids, seed, tokens)
    return "".join(step.text for step in generate(server.service.model, [request], sampling or Sampling()))


def ids_of(server: Running, text: str) -> list[int]:
    return prompt_ids(server.service.model, text)


# --- Completions


def test_a_completion_is_what_the_core_makes(server: Running) -> None:
    answer = server.complete(TEXT)
    (choice,) = answer["choices"]
    ids = ids_of(server, TEXT)
    assert choice["text"] == alone(server, ids)
    assert (choice["index"], choice["logprobs"]) == (0, None)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert server.complete(TEXT)["usage"]["prompt_tokens_details"]["cached_tokens"] == len(ids)


def test_a_prompt_may_be_text_or_ids_one_or_several(server: Running) -> None:
    first, second = ids_of(server, TEXT), ids_of(server, "The king")
    wanted = [alone(server, first, 1), alone(server, second, 2)]
    for prompt in ([TEXT, "The king"], [first, second]):
        answer = server.complete(prompt)
        assert [choice["text"] for choice in answer["choices"]] == wanted
        assert answer["usage"]["prompt_tokens"] == len(first) + len(second)
    assert server.complete(first)["choices"][0]["text"] == wanted[0]
    assert server.complete(None)["choices"] == server.complete("")["choices"] == server.complete([[]])["choices"]


def test_choice_i_has_the_seed_plus_i(server: Running) -> None:
    answer = server.complete([TEXT, "The king"], n=3, seed=40)
    first, second = ids_of(server, TEXT), ids_of(server, "The king")
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert texts == [alone(server, first if i < 3 else second, 40 + i) for i in range(6)]
    assert answer["usage"]["prompt_tokens"] == len(first) + len(second)


def test_without_a_seed_texts_differ(server: Running) -> None:
    assert len({server.complete(TEXT, seed=None)["choices"][0]["text"] for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"temperature": 0}, Sampling(0)),
        ({"temperature": 0.5, "top_p": 0.6}, Sampling(0.5, top_p=0.6)),
        ({"top_p": 0}, Sampling(0)),
        ({"top_k": 3}, Sampling(top_k=3)),
        ({"top_k": -1}, Sampling()),
        ({"min_p": 0.02}, Sampling(min_p=0.02)),
        ({"repetition_penalty": 1.4}, Sampling(repetition_penalty=1.4)),
        ({"frequency_penalty": 1.5, "presence_penalty": 0.5}, Sampling(frequency_penalty=1.5, presence_penalty=0.5)),
        ({"logit_bias": {"70": 100}}, Sampling(logit_bias={70: 100.0})),
    ],
    ids=lambda value: "" if isinstance(value, Sampling) else "+".join(value),
)
def test_sampling(server: Running, fields: dict[str, Any], sampling: Sampling) -> None:
    text = server.complete(TEXT, **fields)["choices"][0]["text"]
    assert text == alone(server, ids_of(server, TEXT), sampling=sampling)


def test_lengths_and_why_a_text_ends(server: Running) -> None:
    whole = server.complete(TEXT, max_tokens=40)["choices"][0]["text"]
    short = server.complete(TEXT, max_tokens=3)
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    stop = whole[5:7]
    stopped = server.complete(TEXT, max_tokens=40, stop=stop)["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert server.complete(TEXT, max_tokens=40, stop=["\0never", stop])["choices"][0] == stopped
    beyond = server.complete(TEXT, max_tokens=10**6, ignore_eos=True)
    assert beyond["choices"][0]["finish_reason"] == "length"
    assert beyond["usage"]["total_tokens"] == server.service.model.config.context + 1
    ended = server.complete(TEXT, logit_bias={"0": 100}, temperature=0)
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")
    assert server.complete(TEXT, max_tokens=0)["choices"][0]["text"] == ""


def test_logprobs_name_the_tokens_of_the_text(server: Running) -> None:
    choice = server.complete(TEXT, max_tokens=12, logprobs=3)["choices"][0]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == 12
    model = server.service.model
    steps = list(generate(model, [Request(ids_of(server, TEXT), 1, 12)], Sampling(), logprobs=3))
    assert told["token_logprobs"] == pytest.approx([step.chosen.logprob for step in steps if step.chosen], abs=1e-4)
    assert all(0 < len(top) <= 3 for top in told["top_logprobs"])
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].lstrip("�").startswith(token)  # behind half a character
    assert len(server.complete(TEXT, max_tokens=2, logprobs=0)["choices"][0]["logprobs"]["tokens"]) == 2


def test_tokens_of_a_stop_are_not_told(server: Running) -> None:
    whole = server.complete(TEXT, max_tokens=30, logprobs=0, ignore_eos=True)["choices"][0]
    place = next(offset for offset in whole["logprobs"]["text_offset"] if offset > 8)
    stop = whole["text"][place : place + 3]
    assert whole["text"].index(stop) == place
    fields = {"max_tokens": 30, "logprobs": 0, "ignore_eos": True, "stop": stop}
    choice = server.complete(TEXT, **fields)["choices"][0]
    count = len(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["tokens"] == whole["logprobs"]["tokens"][:count]
    assert [offset < place for offset in whole["logprobs"]["text_offset"]].count(True) == count
    events = server.post("/v1/completions", {"prompt": TEXT, "seed": 1, "stream": True, **fields}).events
    told = [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]]
    assert told == choice["logprobs"]["tokens"]


def test_echo_tells_how_likely_the_prompt_was(server: Running) -> None:
    ids = ids_of(server, TEXT)
    plain = server.complete(TEXT, max_tokens=4)["choices"][0]["text"]
    assert server.complete(TEXT, max_tokens=4, echo=True)["choices"][0]["text"] == TEXT + plain
    choice = server.complete(TEXT, max_tokens=0, echo=True, logprobs=2)["choices"][0]
    assert choice["text"] == TEXT == "".join(choice["logprobs"]["tokens"])
    found = choice["logprobs"]["token_logprobs"]
    assert len(found) == len(choice["logprobs"]["top_logprobs"]) == len(ids)
    assert found[0] is None
    for place in range(1, len(ids)):
        logprobs = next_logits(server.service.model, ids[:place]).log_softmax(-1)
        assert found[place] == pytest.approx(logprobs[ids[place]].item(), abs=1e-4)
        assert max(choice["logprobs"]["top_logprobs"][place].values()) == pytest.approx(logprobs.max().item(), abs=1e-4)
    assert choice["logprobs"]["top_logprobs"][0] is None
    both = server.complete(TEXT, max_tokens=3, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert len(both["tokens"]) == len(ids) + 3
    assert both["text_offset"][: len(ids)] == choice["logprobs"]["text_offset"]
    assert both["text_offset"][len(ids)] == len(TEXT)


def test_a_stream_says_the_same_as_the_whole(server: Running) -> None:
    fields = {"prompt": [TEXT, "The king"], "n": 2, "seed": 5, "max_tokens": 20, "logprobs": 1, "echo": True}
    whole = server.post("/v1/completions", fields).json
    answer = server.post("/v1/completions", {**fields, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = answer.events
    assert {event["id"] for event in events} == {last["id"]}
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    usage = {name: last["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == {name: whole["usage"][name] for name in usage}
    for wanted in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == wanted["index"]]
        assert "".join(part["text"] for part in parts) == wanted["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [wanted["finish_reason"]]
        assert parts[-1]["finish_reason"]
        for name in ("tokens", "text_offset"):
            assert [value for part in parts for value in part["logprobs"][name]] == wanted["logprobs"][name]


# --- Chat

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


def test_a_base_model_goes_on_with_a_transcript(server: Running) -> None:
    model, folder = server.service.model, server.service.folder
    template = open_chat(folder, model.tokenizer, model.config.bos_id, model.config.eos_ids[0])
    assert isinstance(template, Transcript)
    ids = template.encode(model.tokenizer, TALK)
    answer = server.post("/v1/chat/completions", {"messages": TALK, "seed": 3, "max_tokens": 20, "n": 2}).json
    assert answer["object"] == "chat.completion"
    for index, choice in enumerate(answer["choices"]):
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == alone(server, ids, 3 + index, 20).strip()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}]
    fields = {"messages": [*parts, TALK[1]], "seed": 3, "max_completion_tokens": 20, "n": 2, "max_tokens": 1}
    assert server.post("/v1/chat/completions", fields).json["choices"] == answer["choices"]


def test_the_next_turn_ends_a_base_models_answer(server: Running) -> None:
    tokenizer = server.service.model.tokenizer
    colon = tokenizer.encode(":")[0]
    fields = {"messages": TALK, "seed": 3, "max_tokens": 12, "temperature": 0, "logit_bias": {str(colon): 100}}
    answer = server.post("/v1/chat/completions", {**fields, "stop": "::::"}).json["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("", "stop")


def test_an_answer_may_take_all_the_context(server: Running) -> None:
    usage = server.post("/v1/chat/completions", {"messages": TALK, "seed": 3, "ignore_eos": True}).json["usage"]
    assert usage["total_tokens"] == server.service.model.config.context + 1


def test_a_chat_stream_begins_with_the_role(server: Running) -> None:
    fields = {"messages": TALK, "seed": 3, "max_tokens": 12, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = server.post("/v1/chat/completions", fields).json
    events = server.post("/v1/chat/completions", {**fields, "stream": True}).events
    assert all(event["object"] == "chat.completion.chunk" and len(event["choices"]) == 1 for event in events)
    for wanted in whole["choices"]:
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == wanted["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == wanted["message"]["content"]
        assert parts[-1]["finish_reason"] == wanted["finish_reason"]
        told = [token for part in parts[1:] for token in part["logprobs"]["content"]]
        assert [token["token"] for token in told] == [token["token"] for token in wanted["logprobs"]["content"]]
        for token in told:
            assert len(token["top_logprobs"]) == 2
            assert token["token"].startswith("bytes:") or token["token"].encode() == bytes(token["bytes"])


def test_a_models_own_template_writes_the_conversation(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "own")
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}>"
    (tmp_path / "own" / "chat_template.jinja").write_text(source)
    with running(tmp_path / "own", tmp_path) as server:
        tokenizer = server.service.model.tokenizer
        asked = {"messages": [{"role": "user", "content": "a<|endoftext|>"}]}
        ids = server.post("/tokenize", asked).json["tokens"]
        assert ids == [*tokenizer.encode("[user] a<|endoftext|>"), 0, *tokenizer.encode(">")]
        text = server.post("/v1/chat/completions", {**asked, "seed": 1, "max_tokens": 9}).json["choices"][0]
        assert text["message"]["content"] == alone(server, ids, tokens=9)
        refusing = "{{ raise_exception('only users, please') }}"
        (tmp_path / "own" / "chat_template.jinja").write_text(refusing)
        answer = server.post("/v1/chat/completions", asked)
        assert answer.status == 400
        assert "only users, please" in answer.error["message"]


# --- Embeddings, tokens, models, health


def test_embeddings_are_those_of_the_embed_command_at_length_one(server: Running) -> None:
    model = server.service.model
    texts = [TEXT, "The king", "a"]
    answer = server.post("/v1/embeddings", {"input": texts, "model": "tiny"}).json
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    for item, text in zip(answer["data"], texts, strict=True):
        vector = one_text_vector(model, ids_of(server, text))
        assert item["embedding"] == pytest.approx((vector / vector.norm()).tolist(), abs=1e-5)
    coded = server.post("/v1/embeddings", {"input": texts, "encoding_format": "base64"}).json
    for item, same in zip(answer["data"], coded["data"], strict=True):
        values = struct.unpack(f"<{model.config.width}f", base64.b64decode(same["embedding"]))
        assert list(values) == pytest.approx(item["embedding"], abs=1e-6)
    ids = [ids_of(server, text) for text in texts]
    assert server.post("/v1/embeddings", {"input": ids}).json["data"] == answer["data"]
    one = server.post("/v1/embeddings", {"input": TEXT}).json
    assert one["data"][0]["embedding"] == pytest.approx(answer["data"][0]["embedding"], abs=1e-5)
    assert one["usage"] == {"prompt_tokens": len(ids[0]), "total_tokens": len(ids[0])}


def test_tokens_there_and_back(server: Running) -> None:
    text = "Once upon a time €"
    ids = ids_of(server, text)
    told = server.post("/tokenize", {"prompt": text}).json
    assert told == {"tokens": ids, "count": len(ids), "max_model_len": 64}
    assert server.post("/tokenize", {"content": text}).json["tokens"] == ids
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True}).json["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    data = b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces)
    assert data.decode() == text
    assert server.post("/detokenize", {"tokens": ids}).json == {"content": text, "prompt": text}


def test_models_and_health(server: Running) -> None:
    models = server.get("/v1/models").json
    assert models["object"] == "list"
    (model,) = models["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert server.get("/v1/models/tiny").json == model
    assert server.get("/v1/models/gpt-5").error["code"] == "model_not_found"
    assert server.get("/health").json == {"status": "ok"}


def test_metrics_count_what_was_done(tiny_folder: Path, tmp_path: Path) -> None:
    with running(tiny_folder, tmp_path) as server:

        def numbers() -> dict[str, float]:
            lines = server.get("/metrics").body.decode().splitlines()
            return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

        assert numbers()["gptcli_made_tokens_total"] == 0
        for stream in (False, True):
            server.post("/v1/completions", {"prompt": TEXT, "seed": 1, "max_tokens": 5, "stream": stream, "n": 2})
        server.post("/v1/completions", {"prompt": 5.5})
        server.get("/elsewhere/1")
        server.get("/elsewhere/2")
        found = numbers()
        assert found["gptcli_made_tokens_total"] == 20
        prompt = len(ids_of(server, TEXT))
        assert found["gptcli_prompt_tokens_total"] == 4 * prompt
        assert found["gptcli_known_tokens_total"] == 3 * prompt
        assert found['gptcli_requests_total{route="/v1/completions",status="200"}'] == 2
        assert found['gptcli_requests_total{route="/v1/completions",status="400"}'] == 1
        assert found['gptcli_requests_total{route="other",status="404"}'] == 2
        for name in ("first_token", "token"):
            assert found[f"gptcli_{name}_seconds_count"] == found[f'gptcli_{name}_seconds_bucket{{le="+Inf"}}'] == 4
            assert found[f"gptcli_{name}_seconds_sum"] > 0
        assert found["gptcli_running"] == found["gptcli_waiting"] == 0
        assert found["gptcli_cache_bytes"] > 0
        assert found["process_resident_memory_bytes"] > 10_000_000


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
