"""The OpenAI API over real sockets: every route and every field that is right; test_openai_wrong.py has the others."""

from __future__ import annotations

import base64
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from gptcli.core.embedding import one_text_vector
from gptcli.core.generate import generate, prompt_ids
from gptcli.core.predict import next_logits
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from gptcli.text.transcript import Transcript, open_chat
from tests.serve.conftest import TALK, TEXT
from tests.serve.running import Running, running


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
