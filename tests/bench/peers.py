"""The same work done by gptcli, transformers, CTranslate2 and llama.cpp, side by side in one run, with ratios.

    pip install -e ".[peers]" ctranslate2 gguf llama-cpp-python     # the last compiles some minutes
    python tests/bench/peers.py [--model gpt2] [--rounds 5] [--threads 2] [--only "gptcli int8" "llama.cpp q8_0" ...]
    python tests/bench/peers.py --model weights/fable
    python tests/bench/peers.py --short                             # does everything once, proves that it works

A model of random weights in the shape of a preset, or a GPT-2 folder, is written as a Hugging Face folder; from it come
CTranslate2's model (by its own converter) and a GGUF (as `models export` writes it, then quantized by llama.cpp itself:
q4_0 holds its unembedding in q6_K, as its files do). Tokens are numbers to all of them: the
vocabulary is made up.

Measured are, for one row on ``--threads`` CPU threads: greedy decoding behind a prompt of 32 tokens and behind one of
768 (less where the context is short), each without the time of the prompt and of the first token; and the prompt of 768
up to its first token. A peer is a process of its own; while one is measured, the others are stopped (SIGSTOP) and burn
nothing. They take turns, over several rounds. What is not installed is left out, and its install line is told.

That it is the same work is checked: in float32 all must choose the tokens that gptcli chooses, unless gptcli's own two
best logits are as close together as rounding explains (llama.cpp looks its GELU up in half precision, and keeps its
cache in it), or the run fails.

For gptcli's native step first build it (``gptcli models prepare``); what is there is used. A busy machine slows peers
with OpenMP threads several times over: the numbers count on a quiet one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import ROOT, in_turn, random_folder, report, summary

sys.path.insert(0, str(ROOT))

# name -> the module that it needs, and in what it computes
PEERS = {
    "gptcli fp32": ("gptcli", "float32"),
    "gptcli bf16": ("gptcli", "bfloat16"),
    "gptcli int8": ("gptcli", "int8"),
    "gptcli int4": ("gptcli", "int4"),
    "transformers fp32": ("transformers", "float32"),
    "transformers bf16": ("transformers", "bfloat16"),
    "CTranslate2 fp32": ("ctranslate2", "float32"),
    "CTranslate2 int8": ("ctranslate2", "int8"),
    "llama.cpp f32": ("llama_cpp", "f32"),
    "llama.cpp bf16": ("llama_cpp", "bf16"),
    "llama.cpp q8_0": ("llama_cpp", "q8_0"),
    "llama.cpp q4_0": ("llama_cpp", "q4_0"),
}
INSTALL = {
    "transformers": 'pip install -e ".[peers]"',
    "ctranslate2": "pip install ctranslate2 transformers",
    "llama_cpp": "pip install llama-cpp-python gguf",
}
# What the ratios compare.
PAIRS = (
    ("gptcli fp32", "llama.cpp f32"),
    ("gptcli bf16", "llama.cpp bf16"),
    ("gptcli int8", "llama.cpp q8_0"),
    ("gptcli int4", "llama.cpp q4_0"),
    ("gptcli int8", "CTranslate2 int8"),
    ("gptcli fp32", "CTranslate2 fp32"),
    ("gptcli fp32", "transformers fp32"),
    ("gptcli bf16", "transformers bf16"),
)
REFERENCE = "gptcli fp32"
# Two logits this close may change places by rounding.
CLOSE = 0.02


# --- a child: one peer, asked over lines of JSON ---


@dataclass(frozen=True)
class Files:
    """What a model is written as, below one folder."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "hf"

    @property
    def ctranslate2(self) -> Path:
        return self.root / "ct2"

    def gguf(self, kind: str) -> Path:
        return self.root / f"{kind}.gguf"


class Runner:
    """A peer that continues a prompt greedily."""

    def decode(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], float]:
        """So many tokens behind a prompt, and the seconds that those behind the first took."""
        self.generate(prompt, 1)  # so that nothing is done for the first time
        made, times = self.generate(prompt, tokens)
        return made, times[-1] - times[0]

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds until the first token."""
        start = time.perf_counter()
        return self.generate(prompt, 1)[1][0] - start

    def generate(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
        """The tokens, and when each was there."""
        raise NotImplementedError


class Gptcli(Runner):
    def __init__(self, files: Files, kind: str, threads: int) -> None:
        from gptcli.cli.caches import native_cache
        from gptcli.core import runtime
        from gptcli.core.build import open_model
        from gptcli.text.tokenizer import Tokenizer

        runtime.set_threads(threads)
        more: dict[str, Any] = {"native": native_cache()}
        if kind in ("int8", "int4"):
            more["quantize"], kind = kind, "bfloat16" if runtime.has_cpu_bf16() else "float32"
        tokenizer = Tokenizer.from_folder(ROOT / "weights" / "fable")  # of which only the bytes of a token are asked
        self.model = open_model(files.folder, tokenizer, device="cpu", dtype=kind, **more)

    def generate(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
        from gptcli.core.generate import generate
        from gptcli.core.requests import Request
        from gptcli.core.settings import Sampling

        made, times = [], []
        request = Request(list(prompt), seed=0, max_tokens=tokens, ignore_eos=True)
        for step in generate(self.model, [request], Sampling(temperature=0), lookup=False):
            if step.token is not None:
                made.append(step.token)
                times.append(time.perf_counter())
        return made, times

    def margins(self, prompt: Sequence[int], made: Sequence[int]) -> list[float]:
        """By how much each token of a continuation leads before the next best, in logits of a plain forward pass."""
        import torch

        with torch.inference_mode():
            logits = self.model.transformer(torch.tensor([[*prompt, *made[:-1]]]))[0, len(prompt) - 1 :].float()
        best = logits.topk(2).values
        margins: list[float] = (best[:, 0] - best[:, 1]).tolist()
        return margins


class Transformers(Runner):
    def __init__(self, files: Files, kind: str, threads: int) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        torch.set_num_threads(threads)
        self.model = GPT2LMHeadModel.from_pretrained(files.folder, dtype=getattr(torch, kind)).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def generate(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
        import torch

        ids = torch.tensor([list(prompt)])
        clock = Clock()
        settings = {"do_sample": False, "max_new_tokens": tokens, "streamer": clock}
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return out[0, len(prompt) :].tolist(), clock.times[1:]


class Clock:
    """What transformers calls with the prompt, and then with each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class CTranslate2(Runner):
    def __init__(self, files: Files, kind: str, threads: int) -> None:
        import ctranslate2

        self.model = ctranslate2.Generator(
            str(files.ctranslate2), device="cpu", compute_type=kind, inter_threads=1, intra_threads=threads
        )

    def generate(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
        times: list[float] = []
        (found,) = self.model.generate_batch(
            [[token_text(id_) for id_ in prompt]],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=lambda step: times.append(time.perf_counter()),  # gives nothing back: go on
        )
        return list(found.sequences_ids[0]), times


class LlamaCpp(Runner):
    def __init__(self, files: Files, kind: str, threads: int) -> None:
        import llama_cpp

        silence(llama_cpp)
        self.lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(files.gguf(kind)).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp can't load {files.gguf(kind)}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = read_config(files)["n_positions"]
        params.n_batch = params.n_ctx
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = read_config(files)["vocab_size"]

    def _feed(self, ids: Sequence[int]) -> int:
        """Add ids; the likeliest next."""
        import numpy as np

        tokens = (self.lib.llama_token * len(ids))(*ids)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def generate(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        made, times = [self._feed(prompt)], [time.perf_counter()]
        while len(made) < tokens:
            made.append(self._feed(made[-1:]))
            times.append(time.perf_counter())
        return made, times


RUNNERS = {"gptcli": Gptcli, "transformers": Transformers, "ctranslate2": CTranslate2, "llama_cpp": LlamaCpp}


def child(name: str, options: argparse.Namespace) -> None:
    """Load, say so, then answer each line on stdin. Answers are JSON lines on stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints does not get between
    module, kind = PEERS[name]
    runner = RUNNERS[module](Files(options.work), kind, options.threads)
    answers.write("{}\n")
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "decode":
            made, seconds = runner.decode(asked["prompt"], asked["tokens"])
            answer: dict[str, Any] = {"made": made, "seconds": seconds}
        elif asked["do"] == "prefill":
            answer = {"seconds": runner.prefill(asked["prompt"])}
        else:
            assert isinstance(runner, Gptcli)
            answer = {"margins": runner.margins(asked["prompt"], asked["made"])}
        answers.write(json.dumps(answer) + "\n")


# --- writing the model in each form ---


def token_text(id_: int) -> str:
    return f"t{id_}"


def read_config(files: Files) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((files.folder / "config.json").read_text())
    return config


def write_folder(model: str, files: Files) -> None:
    """A folder in float32 with a vocabulary of numbers, from a preset's shape or from another folder."""
    from gptcli.core.build import open_model
    from gptcli.core.checkpoint import save_folder
    from gptcli.core.runtime import DTYPES
    from gptcli.spec.presets import NAMES
    from gptcli.text.tokenizer import Tokenizer

    if model in NAMES:
        with random_folder(model) as folder:
            shutil.copytree(folder, files.folder)
    else:
        opened = open_model(
            Path(model), Tokenizer.from_folder(ROOT / "weights" / "fable"), device="cpu", dtype="float32"
        )
        save_folder(opened.transformer, files.folder, dtype=DTYPES["float32"])


def write_tokenizer(files: Files) -> None:
    """What CTranslate2's converter reads the vocabulary from."""
    from tokenizers import Tokenizer, models

    vocabulary = {token_text(id_): id_ for id_ in range(read_config(files)["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token=token_text(0))).save(str(files.folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
        f"{name}_token": token_text(0) for name in ("bos", "eos", "unk")
    }
    (files.folder / "tokenizer_config.json").write_text(json.dumps(told))


def write_ctranslate2(files: Files) -> None:
    from ctranslate2.converters import TransformersConverter

    write_tokenizer(files)
    TransformersConverter(str(files.folder)).convert(str(files.ctranslate2), force=True)


def write_gguf(files: Files, kinds: Sequence[str]) -> None:
    """The folder as GGUF in float32, and what llama.cpp makes of that in other types."""
    import llama_cpp

    from gptcli.core import gguf
    from gptcli.core.build import open_weights

    gguf.write_gguf(open_weights(files.folder), files.gguf("f32"), kind="f32", name="random")
    silence(llama_cpp)
    types = {
        "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }
    for kind in set(kinds) & types.keys():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = types[kind], 2
        names = (str(files.gguf(each)).encode() for each in ("f32", kind))
        if llama_cpp.llama_model_quantize(*names, params):
            raise SystemExit(f"llama.cpp could not write {kind}")


def silence(llama_cpp: Any) -> None:
    """llama.cpp says a lot; only errors are let through."""
    global _quiet
    errors = 4

    @llama_cpp.llama_log_callback
    def say(level: int, text: bytes, _: Any) -> None:
        if level == errors:
            sys.stderr.write(text.decode(errors="replace"))

    _quiet = say  # or it would be collected while it is still called
    llama_cpp.llama_log_set(say, None)


_quiet: Any = None


# --- the parent, which measures them in turn ---


class Peer:
    """A child process that only runs while it is asked something."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--child", name, "--work", str(options.work)]
        command += ["--threads", str(options.threads)]
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env = {**os.environ, **quiet, "OMP_NUM_THREADS": str(options.threads)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def warm_up(self) -> None:
        """Wait until it is loaded. Raises EOFError if it died."""
        self._answer()
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, **asked: Any) -> dict[str, Any]:
        """What it answers."""
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("the process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running(name: str, options: argparse.Namespace) -> Iterator[Peer]:
    """A peer that is gone afterwards, stopped or not."""
    peer = Peer(name, options)
    try:
        yield peer
    finally:
        peer.process.kill()
        peer.process.wait()


def main() -> None:
    options = parse()
    if options.child:
        return child(options.child, options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stopped child outlives this
    missing = {name: INSTALL[name] for name in INSTALL if find_spec(name) is None}
    if find_spec("gguf") is None:
        missing["llama_cpp"] = INSTALL["llama_cpp"]
    wanted = [name for name in options.only if PEERS[name][0] not in missing]
    with ExitStack() as stack:
        if options.work is None:
            options.work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = Files(options.work)
        prepare(options, files, wanted)
        config = read_config(files)
        long = min(options.long, config["n_positions"] - options.tokens)
        prompts = {length: numbers(length, config["vocab_size"]) for length in (options.prompt, long)}
        peers: dict[str, Peer] = {}
        failed: list[str] = []
        for name in wanted:
            print(f"loading: {name}", file=sys.stderr)
            peer = stack.enter_context(running(name, options))
            try:
                peer.warm_up()
                peers[name] = peer
            except EOFError:
                failed.append(name)
        agreed = check(peers, prompts[options.prompt], options.tokens)
        rates: dict[str, dict[str, list[float]]] = {name: {} for name in peers}

        def measure(name: str) -> float:
            for column, value in measured(peers[name], prompts, options.tokens).items():
                rates[name].setdefault(column, []).append(value)
            return 0.0

        in_turn({name: (lambda name=name: measure(name)) for name in peers}, options.rounds)
    show(options, config, rates, agreed, failed, missing)


def prepare(options: argparse.Namespace, files: Files, wanted: Sequence[str]) -> None:
    """Write what is not yet there."""
    modules = {PEERS[name][0] for name in wanted}
    if not files.folder.is_dir():
        print("writing the model", file=sys.stderr)
        write_folder(options.model, files)
    if "ctranslate2" in modules and not files.ctranslate2.is_dir():
        write_ctranslate2(files)
    kinds = [PEERS[name][1] for name in wanted if PEERS[name][0] == "llama_cpp"]
    if not all(files.gguf(kind).is_file() for kind in kinds):
        write_gguf(files, kinds)


def numbers(length: int, vocab_size: int) -> list[int]:
    """Ids of a prompt, the same ones for all."""
    return [1 + place * 7919 % (vocab_size - 1) for place in range(length)]


def measured(peer: Peer, prompts: dict[int, list[int]], tokens: int) -> dict[str, float]:
    """Tokens a second of one round."""
    rates = {}
    for length, prompt in prompts.items():
        seconds = peer.ask(do="decode", prompt=prompt, tokens=tokens)["seconds"]
        rates[f"decode {length} + {tokens}"] = (tokens - 1) / seconds
    long = max(prompts)
    rates[f"prefill {long}"] = long / peer.ask(do="prefill", prompt=prompts[long])["seconds"]
    return rates


def check(peers: dict[str, Peer], prompt: list[int], tokens: int) -> dict[str, int]:
    """How many tokens each float32 peer chose as gptcli does. Ends the run where one chooses another without a tie."""
    agreed: dict[str, int] = {}
    if REFERENCE not in peers:
        return agreed
    ours = peers[REFERENCE].ask(do="decode", prompt=prompt, tokens=tokens)["made"]
    margins = peers[REFERENCE].ask(do="margins", prompt=prompt, made=ours)["margins"]
    assert len(ours) == tokens
    for name, peer in peers.items():
        if PEERS[name][1] not in ("float32", "f32") or name == REFERENCE:
            continue
        theirs = peer.ask(do="decode", prompt=prompt, tokens=tokens)["made"]
        assert len(theirs) == tokens, name
        same = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), tokens)
        if same < tokens and margins[same] > CLOSE:
            raise SystemExit(
                f"{name} does not do the same work: token {same} is {theirs[same]}, and gptcli's {ours[same]} "
                f"leads by {margins[same]:.4f}"
            )
        agreed[name] = same
    return agreed


def show(
    options: argparse.Namespace,
    config: dict[str, Any],
    rates: dict[str, dict[str, list[float]]],
    agreed: dict[str, int],
    failed: list[str],
    missing: dict[str, str],
) -> None:
    medians = {name: {c: summary(v)["median"] for c, v in columns.items()} for name, columns in rates.items()}
    columns = list(next(iter(medians.values()), {}))
    rows = {"tokens/s": "   ".join(f"{column:>24}" for column in columns)}
    for name, found in rates.items():
        cells = [summary(found[column]) for column in columns]
        rows[name] = "   ".join(f"{c['median']:8.1f} ({c['least']:.1f}-{c['most']:.1f})".rjust(24) for c in cells)
    ratios = {
        f"{ours} / {theirs}": {column: medians[ours][column] / medians[theirs][column] for column in columns}
        for ours, theirs in PAIRS
        if ours in medians and theirs in medians
    }
    for name, ratio in ratios.items():
        rows[name] = "   ".join(f"{ratio[column]:22.2f} x" for column in columns)
    for name, same in agreed.items():
        tie = "" if same == options.tokens else ", then two were equally likely"
        rows[f"{name} chose"] = f"the same {same} tokens{tie}"
    if failed:
        rows["failed, not compared"] = ", ".join(failed)
    for name, line in missing.items():
        rows[f"{name} is not installed"] = line
    rows["load"] = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    shape = f"{config['n_layer']} layers, width {config['n_embd']}, vocabulary {config['vocab_size']:,}"
    title = f"peers, {options.model}: {shape}, {options.threads} threads"
    result = {
        "model": options.model,
        "threads": options.threads,
        "tokens_per_second": {n: {c: summary(v) for c, v in found.items()} for n, found in rates.items()},
        "ratios": ratios,
        "agreed_tokens": agreed,
        "failed": failed,
        "missing": missing,
        "rounds": options.rounds,
        "load": os.getloadavg(),
    }
    report(title, rows, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="a preset, or a GPT-2 folder")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--long", type=int, default=768, help="the long prompt")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--work", type=Path, help="where the model's files are kept for the next run")
    parser.add_argument("--short", action="store_true", help="one round of 16 tokens")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.rounds, options.tokens = 1, 16
    if options.work and not options.child:
        options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
