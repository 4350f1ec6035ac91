"""What a server takes on, and from whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much may be asked for; the length of a prompt is limited by the model's context.

    Attributes:
        header_seconds: that a request's headers may take to come; the connection is closed then.
        body_bytes, body_seconds: size of a request's body, and how long it may take to come.
        requests: answered at once, with those that wait; more are told to come back (429).
        rows: texts that are decoded together; ``waiting`` more may wait for a place.
        choices: of one request: prompts times ``n``; and never more than may wait.
        inputs: texts of one request for embeddings.
        stops, biases: stop strings, and entries of ``logit_bias``.
        logprobs: likeliest tokens told beside each.
        prefix_bytes: for keys and values of texts that were read before.
        retry_seconds: after which whoever is told to come back should.
    """

    header_seconds: float = 30.0
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    requests: int = 512
    rows: int = 32
    waiting: int = 256
    choices: int = 128
    inputs: int = 2048
    stops: int = 16
    biases: int = 1024
    logprobs: int = 20
    prefix_bytes: int = 256 << 20
    retry_seconds: int = 1

    @property
    def engine(self) -> Mapping[str, int]:
        """Those that ``Engine`` keeps."""
        return {"rows": self.rows, "waiting": self.waiting, "prefix_bytes": self.prefix_bytes}


@dataclass(frozen=True)
class Access:
    """Who may ask over TCP; whoever reaches the Unix socket may.

    Attributes:
        api_key: has to be sent as ``Authorization: Bearer KEY``; empty: none is needed.
        hosts: names under which the server may be called, besides those of the loopback. A page in a browser that has
            made its own name point here (DNS rebinding) is told by the name.
        origins: of pages in a browser that may ask (CORS), or ``*``; others are refused.
    """

    api_key: str = ""
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
