"""From the options of ``gptcli train`` to a run: size, model, plan, and the events shown as they come."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptcli.cli.metrics import FILE_NAME
from gptcli.cli.out import Output
from gptcli.cli.train_asked import Asked, Resumed, to_keep
from gptcli.errors import OutputError, UsageError
from gptcli.spec.config import ModelConfig

if TYPE_CHECKING:
    from gptcli.text.tokenizer import Tokenizer
    from gptcli.train.data import Corpus
    from gptcli.train.loop import Plan, Sampler
    from gptcli.train.ranks import Ranks

# The peak learning rate where none is given: from random weights, and for a model that is fine-tuned.
RATES = {"muon": (5e-3, 5e-4), "adamw": (2e-3, 1e-4)}
_SAMPLE_TOKENS = 64
# What a row of fine-tuning is at most, if nobody says: longer ones want memory, and texts as long.
_LONGEST_ROW = 2048


def show_paper_plan(said: Output, asked: Asked) -> None:
    """``--plan``: what training would hold, on cards of a given size or on this machine's own."""
    from gptcli.cli.train_plan import show_plan
    from gptcli.spec.plan import parse_cards, plan_training

    ranks, card_bytes = parse_cards(asked.gpus) if asked.gpus else _own_cards()
    size = _size_on_paper(asked)
    title = asked.preset or asked.init_from or (Path(asked.config).resolve().parent.name if asked.config else "")
    plan = plan_training(
        size,
        ranks=ranks,
        card_bytes=card_bytes,
        batch_tokens=asked.batch_tokens,
        micro_batch_rows=asked.micro_batch,
        optimizer=_optimizer(asked),
        dtype="float32" if asked.dtype == "float32" else "bfloat16",
        parallel="ddp" if asked.parallel == "ddp" else "fsdp" if asked.parallel == "fsdp" else "auto",
        checkpoint_activations=asked.checkpoint_activations,
        context=_row(said, asked, size),
    )
    show_plan(said, plan, title)


def _own_cards() -> tuple[int, int | None]:
    """This machine's GPUs, or its memory."""
    from gptcli.core import runtime

    return runtime.cards()


def _size_on_paper(asked: Asked) -> ModelConfig:
    """The size with the vocabulary that the preset, the file or ``--vocab-size`` says."""
    if asked.init_from:
        from gptcli.spec.config import read_config
        from gptcli.spec.library import resolve

        return read_config(resolve(asked.init_from).folder)
    vocab = asked.vocab_size
    if vocab is None and not (asked.preset or asked.config):
        from gptcli.cli.train_data import files_of_tokenizer

        vocab = _open_tokenizer(files_of_tokenizer(asked.tokenizer)).vocab_size
    return _size(asked, vocab, None)


def go(said: Output, asked: Asked, out: Path, *, resumed: Resumed | None, replacing: bool) -> None:
    """Train as asked, and show it. What ``out`` holds is refused unless it is gone on with, or ``replacing`` it."""
    from gptcli.core import runtime
    from gptcli.train.ranks import join

    if resumed and resumed.done is not None:
        steps = f"{resumed.checkpoint.step:,} steps"
        said.note(f"the run in {out} is complete: {steps}; another can go on from its model with --init-from {out}")
        if said.json:
            said.record(resumed.done)
        else:
            said.data(str(out))
        return
    runtime.set_threads(asked.threads)
    runtime.keep_freed_memory()
    ranks = join(asked.device)
    if ranks.count > 1 and "-" in (*asked.data, *asked.valid):
        raise UsageError("several ranks can't read one standard input", "put the text into a file")
    if ranks.rank:
        said.silence()
    if not resumed:
        _claim(out, replacing, ranks)
    seed = asked.seed if asked.seed is not None else int(ranks.agree(str(runtime.draw_seed()).encode()))
    if asked.seed is None:
        said.note(f"seed {seed}")
        asked = replace(asked, seed=seed)
    _train(said, asked, seed, out, resumed, ranks)
    ranks.leave()


def _train(said: Output, asked: Asked, seed: int, out: Path, resumed: Resumed | None, ranks: Ranks) -> None:
    from gptcli.cli.train_data import fingerprint, read_corpora, tokenizer_digest, tokenizer_files
    from gptcli.core import runtime
    from gptcli.spec.plan import choose_parallel
    from gptcli.train.loop import Plan, train
    from gptcli.train.state import what_differs

    begun = resumed.checkpoint.state["options"] if resumed else {}
    files = _from_rank_0(ranks, lambda: tokenizer_files(said, asked, out, begun.get("tokenizer")))
    words = _open_tokenizer(files)
    start_id = _start_token(asked, words)
    model, size = _model(asked, words, start_id, seed)
    context = _row(said, asked, size)
    if asked.freeze:
        from gptcli.train.freeze import freeze

        said.note(f"{len(freeze(model, asked.freeze))} tensors are left as they are")
    corpora = read_corpora(said, asked, words, files, start_id, size, context)
    # By itself bfloat16, where the device multiplies in it; the weights and the optimizer stay float32.
    dtype = runtime.pick_dtype(asked.dtype, "bfloat16", ranks.device)
    plan = Plan(
        batch_tokens=asked.batch_tokens,
        lr=asked.lr if asked.lr is not None else RATES[asked.optimizer][bool(asked.init_from)],
        weight_decay=asked.weight_decay,
        optimizer=_optimizer(asked),
        context=context,
        steps=_steps(asked, context, corpora[0], ranks.count),
        minutes=asked.minutes,
        eval_every=asked.eval_every,
        save_every=asked.save_every,
        keep=asked.keep,
        seed=seed,
        dtype=dtype,
        save_dtype=runtime.DTYPES[asked.save_dtype],
        mask_documents=asked.mask_documents,
        micro_batch=asked.micro_batch,
        compile=asked.compile,
        checkpoint_activations=asked.checkpoint_activations,
    )
    files["train.toml"] = _train_toml(asked, plan, size).encode(errors="replace")
    told = {**to_keep(asked), "tokenizer": tokenizer_digest(files), "data": fingerprint(corpora[0])}
    _compare(begun, told)
    if resumed and (changed := what_differs(resumed.checkpoint)):
        said.note(f"not to the bit as without a stop: the run began with {', '.join(changed)}")
    kind = asked.parallel
    if kind == "auto":
        kind = choose_parallel(size, ranks.count, runtime.memory_bytes(ranks.device), _optimizer(asked))
    ranks = ranks.share(kind, dtype)
    events = train(
        model if ranks.kind == "fsdp" else model.to(ranks.device),
        corpora[0],
        corpora[1:],
        plan,
        out,
        files,
        sampler=_sampler(asked, words, start_id, out.resolve().name),
        sample_every=asked.sample_every,
        resume=resumed.checkpoint if resumed else None,
        options={**begun, **told},
        ranks=ranks,
    )
    _follow(said, events, out, out / FILE_NAME if resumed else None)


def _optimizer(asked: Asked) -> Literal["muon", "adamw"]:
    return "adamw" if asked.optimizer == "adamw" else "muon"


def _from_rank_0(ranks: Ranks, made: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    """Files that rank 0 makes, on every rank."""
    own = {name: content.decode("latin-1") for name, content in made().items()} if ranks.rank == 0 else {}
    told: dict[str, str] = json.loads(ranks.agree(json.dumps(own).encode()))
    return {name: content.encode("latin-1") for name, content in told.items()}


def _claim(out: Path, replacing: bool, ranks: Ranks) -> None:
    """Refuse a folder that holds a model or a run, unless told to replace it; make it if it is not there."""
    taken = [name for name in ("config.json", FILE_NAME, "model.safetensors", "checkpoints") if (out / name).exists()]
    ranks.wait()  # nobody has written yet
    if taken and not replacing:
        hint = "name another folder, go on with --resume, or replace it with --force"
        raise UsageError(f"{out} already holds {taken[0]}", hint)
    if ranks.rank:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} can't be made: {error.strerror}", "name another folder") from None


def _open_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of these files; the model folder is not touched before there is a model to put in."""
    import tempfile

    from gptcli.text.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return Tokenizer.from_folder(Path(folder))


def _start_token(asked: Asked, tokenizer: Tokenizer) -> int:
    """The token that stands before each document: ``<|endoftext|>``, or what starts a text of the model to fine-tune.

    A model that names no such token has one that ends a text, which then does for both, as in OPT.
    """
    from gptcli.spec.config import read_config
    from gptcli.spec.library import resolve
    from gptcli.train.documents import SEPARATOR

    if SEPARATOR in tokenizer.special_tokens:
        return tokenizer.special_tokens[SEPARATOR]
    if not asked.init_from:
        raise UsageError(f"the tokenizer has no {SEPARATOR}", "train one with --vocab-size")
    config = read_config(resolve(asked.init_from).folder)
    named = [tokenizer.start_id, config.bos_id, *config.eos_ids]
    found = next((id_ for id_ in named if id_ is not None), None)
    if found is None:
        message = f"{asked.init_from} has no {SEPARATOR}, and names no token that starts or ends a text"
        raise UsageError(message, "name one in its config.json: bos_token_id or eos_token_id")
    return found


def _model(asked: Asked, words: Tokenizer, start_id: int, seed: int) -> tuple[Any, ModelConfig]:
    """The model to train, in float32 on the CPU: random, or the one to fine-tune."""
    if not asked.init_from:
        from gptcli.core.build import random_model

        size = _size(asked, words.vocab_size, start_id)
        return random_model(size, seed), size
    from gptcli.core.build import learnable, open_model
    from gptcli.spec.library import resolve

    found = resolve(asked.init_from)
    opened = open_model(found.folder, words, name=found.name, device="cpu", dtype="float32")
    return learnable(opened.transformer), opened.config


def _size(asked: Asked, vocab_size: int | None, start_id: int | None) -> ModelConfig:
    """The size to train: from one preset or file, or its four numbers; with a vocabulary, or the preset's own."""
    from gptcli.spec.config import read_config
    from gptcli.spec.presets import read_preset

    if asked.preset or asked.config:
        base = read_preset(asked.preset) if asked.preset else read_config(Path(asked.config or ""))
    else:
        layers, width, context = asked.layers or 6, asked.width or 256, asked.context or 512
        heads = asked.heads or max(1, width // 64)
        if width % heads:
            raise UsageError(f"a width of {width} does not divide into {heads} heads", "change --width or --heads")
        base = ModelConfig("gpt2", 1, context, layers, width, heads, heads, width // heads, 4 * width)
    if vocab_size is not None:
        base = replace(base, vocab_size=vocab_size)
    if start_id is not None:
        base = replace(base, bos_id=start_id, eos_ids=(start_id,))
    return replace(base, dtype=None)


def _row(said: Output, asked: Asked, size: ModelConfig) -> int:
    """Tokens a row of training: the model's context, or as much of it as ``--context`` says.

    Without being told, a row of a model that is fine-tuned is no longer than ``_LONGEST_ROW``.
    """
    if not asked.init_from:
        return size.context
    if asked.context is None:
        if size.context > _LONGEST_ROW:
            said.note(f"rows of {_LONGEST_ROW:,} tokens, of the model's {size.context:,}: --context says otherwise")
        return min(size.context, _LONGEST_ROW)
    if asked.context > size.context:
        message = f"--context {asked.context:,} is beyond the {size.context:,} tokens that {asked.init_from} can see"
        raise UsageError(message, f"give at most {size.context}")
    return asked.context


def _steps(asked: Asked, context: int, corpus: Corpus, ranks: int) -> int | None:
    if asked.minutes is not None or asked.steps is not None:
        return asked.steps
    batch = max(1, round(asked.batch_tokens / context / ranks)) * ranks * context
    epochs = 1.0 if asked.epochs is None else asked.epochs
    wanted = asked.tokens if asked.tokens is not None else epochs * len(corpus.tokens)
    return max(1, round(wanted / batch))


def _train_toml(asked: Asked, plan: Plan, size: ModelConfig) -> str:
    """What was asked for, so that it can be read and asked for again."""
    lines = []
    for name, value in {**asdict(asked), **asdict(plan), **size.to_dict(), "context": plan.context}.items():
        if name in ("dtype", "save_dtype"):
            value = str(getattr(plan, name)).removeprefix("torch.")
        if value is not None and name != "gpus":
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML writes it, which knows no null: what is none in a table is left out, in a list it is 0."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(0 if item is None else item) for item in value)}]"
    # TOML's strings are JSON's, but for surrogates and DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _compare(begun: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Refuse to go on with other data than a run began with."""
    changes = {
        "tokenizer": ("the tokenizer", "bring back the model that it comes from"),
        "data": ("the text", "bring back the files as they were"),
    }
    for name, (what, hint) in changes.items():
        if name in begun and begun[name] != told[name]:
            raise UsageError(f"{what} is not what it was when the run began", f"{hint}, or start anew with --force")


def _sampler(asked: Asked, words: Tokenizer, start_id: int, name: str) -> Sampler | None:
    """Continues ``--sample-prompt`` with the model as it is."""
    if asked.sample_every == 0:
        return None
    from gptcli.core.build import Model
    from gptcli.core.generate import generate
    from gptcli.core.requests import Request
    from gptcli.core.settings import Sampling

    seed = asked.seed or 0

    def sample(transformer: Any, step: int) -> dict[str, Any]:
        weight = transformer.embedding.weight
        model = Model(name, transformer.config, transformer, words, weight.device, weight.dtype)
        prompt = words.encode(asked.sample_prompt) or [start_id]
        room = max(1, min(_SAMPLE_TOKENS, transformer.config.context - len(prompt)))
        request = Request(prompt[-transformer.config.context + room :], seed, max_tokens=room)
        training = transformer.training
        transformer.eval()
        text = "".join(part.text for part in generate(model, [request], Sampling(temperature=0.8)))
        transformer.train(training)
        return {"prompt": asked.sample_prompt, "text": text, "seed": seed}

    return sample


def _follow(said: Output, events: Iterator[dict[str, Any]], out: Path, history: Path | None) -> None:
    """Show the events as they come."""
    from gptcli.cli.metrics import read_events
    from gptcli.cli.train_view import TrainView

    view = TrainView(said, out, read_events(history) if history and history.exists() else ())
    try:
        with view:
            try:
                for event in events:
                    view.show(event)
            except KeyboardInterrupt:
                # If it struck here and not in the loop, the loop has yet to hear of it, and saves.
                with contextlib.suppress(KeyboardInterrupt, StopIteration):
                    view.show(events.throw(KeyboardInterrupt()))  # type: ignore[attr-defined]
                raise
    except KeyboardInterrupt:  # the summary is out already
        said.note(
            f"stopped; what was learnt so far is in {out}: --resume goes on"
            if view.saved
            else "stopped before the first step"
        )
        raise
