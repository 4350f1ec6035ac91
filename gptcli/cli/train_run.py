"""From the options of ``gptcli train`` to a run: tokenizer, data, size, model, and what a resumed run was asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.cli.out import Output
from gptcli.errors import CorruptError, OutputError, UsageError
from gptcli.spec.config import ModelConfig

if TYPE_CHECKING:
    from gptcli.text.tokenizer import Tokenizer
    from gptcli.train.data import Corpus
    from gptcli.train.loop import Plan, Sampler
    from gptcli.train.ranks import Ranks
    from gptcli.train.state import Checkpoint

# The peak learning rate where none is given: from random weights, and for a model that is fine-tuned.
_RATES = {"muon": (5e-3, 5e-4), "adamw": (2e-3, 1e-4)}
_SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Asked:
    """The options that shape a run. On resuming, those that are not given again are what they were."""

    data: tuple[str, ...]
    valid: tuple[str, ...]
    field: str
    init_from: str | None
    freeze: tuple[str, ...]
    preset: str | None
    config: str | None
    layers: int | None
    heads: int | None
    width: int | None
    context: int | None
    vocab_size: int | None
    tokenizer: str | None
    steps: int | None
    tokens: int | None
    epochs: float | None
    minutes: float | None
    batch_tokens: int
    optimizer: str
    lr: float | None
    weight_decay: float
    mask_documents: bool
    seed: int | None
    dtype: str
    compile: bool | None
    micro_batch: int | None
    checkpoint_activations: bool | None
    # From here on a resumed run may be asked for something else.
    eval_every: int
    save_every: int
    sample_every: int | None
    sample_prompt: str
    keep: int
    device: str
    save_dtype: str
    threads: int | None
    parallel: str
    gpus: str | None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Asked:
        def plain(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else str(value) if isinstance(value, Path) else value

        values: dict[str, Any] = {field.name: plain(params[field.name]) for field in fields(cls)}
        values |= {name: () for name in _LISTS if values[name] is None}
        return cls(**values)


_LISTS = ("data", "valid", "freeze")
_FIXED = [field.name for field in fields(Asked)][: [field.name for field in fields(Asked)].index("eval_every")]


@dataclass(frozen=True)
class Resumed:
    """The checkpoint to go on from, and what the run is asked now."""

    asked: Asked
    checkpoint: Checkpoint


def read_resumed(said: Output, asked: Asked, out: Path, given: set[str]) -> Resumed | None:
    """The run to go on with, from the last whole checkpoint in ``out``; None, said so, where there is none.

    ``given`` are the options of the command line. Raises UsageError naming those that differ from what the run began
    with.
    """
    from gptcli.train.state import checkpoints

    found = next(checkpoints(out), None)
    if found is None:
        said.note(f"there is no checkpoint in {out}: training starts at step 0")
        return None
    try:
        before = {name: _frozen(value) for name, value in found.state["options"]["asked"].items()}
        changed = [name for name in _FIXED if name in given and getattr(asked, name) != before[name]]
        same = replace(asked, **{name: before[name] for name in _FIXED})
    except (KeyError, TypeError, AttributeError):
        raise CorruptError(f"{found.folder} does not say what it was asked", "start anew with --force") from None
    if changed:
        names = ", ".join("DATA" if name == "data" else f"--{name.replace('_', '-')}" for name in changed)
        raise UsageError(
            f"changed since the run in {out} began: {names}", "resume with the same, or start anew with --force"
        )
    return Resumed(same, found)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def show_paper_plan(said: Output, asked: Asked) -> None:
    """``--plan``: what training would hold, on cards of a given size or on this machine's own."""
    from gptcli.cli.train_plan import show_plan
    from gptcli.spec.plan import parse_cards, plan_training

    ranks, card_bytes = parse_cards(asked.gpus) if asked.gpus else _own_cards()
    size = _size_on_paper(asked)
    title = asked.preset or asked.init_from or (Path(asked.config).parent.name if asked.config else "") or "gpt2"
    plan = plan_training(
        size,
        ranks=ranks,
        card_bytes=card_bytes,
        batch_tokens=asked.batch_tokens,
        micro_batch_rows=asked.micro_batch,
        optimizer="adamw" if asked.optimizer == "adamw" else "muon",
        dtype="float32" if asked.dtype == "float32" else "bfloat16",
        parallel="ddp" if asked.parallel == "ddp" else "fsdp" if asked.parallel == "fsdp" else "auto",
        checkpoint_activations=asked.checkpoint_activations,
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


def go(said: Output, asked: Asked, out: Path, *, resumed: Resumed | None, force: bool) -> None:
    """Train as asked, and show it."""
    from gptcli.core import runtime
    from gptcli.train.ranks import join

    runtime.set_threads(asked.threads)
    runtime.keep_freed_memory()
    ranks = join(asked.device)
    if ranks.rank:
        said.silence()
    if not resumed:
        _claim(out, force, ranks)
    seed = asked.seed if asked.seed is not None else ranks.agree(runtime.draw_seed())
    if asked.seed is None:
        said.note(f"seed {seed}")
        asked = replace(asked, seed=seed)
    with ranks:
        _train(said, asked, seed, out, resumed, ranks)


def _train(said: Output, asked: Asked, seed: int, out: Path, resumed: Resumed | None, ranks: Ranks) -> None:
    from gptcli.cli.train_data import read_corpora, tokenizer_files
    from gptcli.core import runtime
    from gptcli.train.loop import METRICS, Plan, train

    target = ranks.device or runtime.pick_device(asked.device)
    files = tokenizer_files(said, asked, out if resumed else None)
    words = _open_tokenizer(files)
    start_id = _start_token(words)
    model, size = _model(asked, words, start_id, seed)
    corpora = read_corpora(said, asked, words, files, start_id, size)
    # By itself bfloat16, where the device multiplies in it; the weights and the optimizer stay float32.
    kind = runtime.pick_dtype(asked.dtype, "bfloat16", target)
    plan = Plan(
        batch_tokens=asked.batch_tokens,
        lr=asked.lr if asked.lr is not None else _RATES[asked.optimizer][bool(asked.init_from)],
        weight_decay=asked.weight_decay,
        optimizer="adamw" if asked.optimizer == "adamw" else "muon",
        steps=_steps(asked, size.context, corpora[0]),
        minutes=asked.minutes,
        eval_every=asked.eval_every,
        save_every=asked.save_every,
        keep=asked.keep,
        seed=seed,
        dtype=kind,
        save_dtype=runtime.DTYPES[asked.save_dtype],
        mask_documents=asked.mask_documents,
        micro_batch=asked.micro_batch,
        compile=asked.compile,
        checkpoint_activations=asked.checkpoint_activations,
    )
    files["train.toml"] = _train_toml(asked, plan, size).encode()
    if asked.freeze:
        from gptcli.train.freeze import freeze

        said.note(f"{len(freeze(model, asked.freeze))} tensors are left as they are")
    told = {"asked": asdict(asked), "data": _fingerprint(corpora[0])}
    if resumed:
        _check_data(resumed, told["data"])
    events = train(
        model.to(target),
        corpora[0],
        corpora[1:],
        plan,
        out,
        files,
        sampler=_sampler(asked, words, seed, out.resolve().name, ranks),
        sample_every=asked.sample_every,
        resume=resumed.checkpoint if resumed else None,
        options=resumed.checkpoint.state["options"] if resumed else told,
        ranks=ranks,
    )
    _follow(said, events, out, out / METRICS if resumed else None)


def _claim(out: Path, force: bool, ranks: Ranks) -> None:
    """Refuse a folder that holds a model or a run, unless told to replace it."""
    taken = [
        name for name in ("config.json", "metrics.jsonl", "model.safetensors", "checkpoints") if (out / name).exists()
    ]
    ranks.wait()  # nobody has written yet
    if taken and not force:
        hint = "name another folder, go on with --resume, or replace it with --force"
        raise UsageError(f"{out} already holds {taken[0]}", hint)
    if ranks.rank:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoints").exists():
            import shutil

            shutil.rmtree(out / "checkpoints")
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


def _start_token(tokenizer: Tokenizer) -> int:
    from gptcli.train.documents import SEPARATOR

    if SEPARATOR not in tokenizer.special_tokens:
        raise UsageError(f"the tokenizer has no {SEPARATOR}", "train one with --vocab-size")
    return tokenizer.special_tokens[SEPARATOR]


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


def _steps(asked: Asked, context: int, corpus: Corpus) -> int | None:
    if asked.minutes is not None or asked.steps is not None:
        return asked.steps
    batch = max(1, round(asked.batch_tokens / context)) * context
    epochs = 1.0 if asked.epochs is None else asked.epochs
    wanted = asked.tokens if asked.tokens is not None else epochs * len(corpus.tokens)
    return max(1, round(wanted / batch))


def _train_toml(asked: Asked, plan: Plan, size: ModelConfig) -> str:
    """What was asked for, so that it can be read and asked for again."""
    lines = []
    for name, value in {**asdict(asked), **asdict(plan), **size.to_dict()}.items():
        if name in ("dtype", "save_dtype"):
            value = str(getattr(plan, name)).removeprefix("torch.")
        if value is not None and name != "gpus":
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _fingerprint(corpus: Corpus) -> dict[str, Any]:
    """What a resumed run compares, so that it goes on with the same data."""
    digest = hashlib.sha256()
    for start in range(0, len(corpus.tokens), 1 << 24):
        digest.update(corpus.tokens[start : start + (1 << 24)].tobytes())
    return {"tokens": len(corpus.tokens), "sha256": digest.hexdigest()}


def _check_data(resumed: Resumed, data: dict[str, Any]) -> None:
    if resumed.checkpoint.state["options"].get("data") != data:
        raise UsageError(
            "the text is not what it was when the run began",
            "bring back the files as they were, or start anew with --force",
        )


def _sampler(asked: Asked, words: Tokenizer, seed: int, name: str, ranks: Ranks) -> Sampler | None:
    """Continues ``--sample-prompt`` with the model as it is; on one process, where the model is whole."""
    if asked.sample_every == 0 or ranks.count > 1:
        return None
    from gptcli.core.build import Model
    from gptcli.core.generate import Request, generate, start_ids
    from gptcli.core.settings import Sampling

    def sample(transformer: Any, step: int) -> dict[str, Any]:
        weight = transformer.embedding.weight
        model = Model(name, transformer.config, transformer, words, weight.device, weight.dtype)
        prompt = words.encode(asked.sample_prompt) or start_ids(model)
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
        said.note(f"stopped; what was learnt so far is in {out}" if view.saved else "stopped before the first step")
        raise
