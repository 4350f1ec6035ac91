"""``gptcli models pull``: a model from the Hub into its cache on this machine, with what a person sees meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.out import Output
from gptcli.cli.units import byte_text
from gptcli.errors import NotFoundError, UsageError
from gptcli.spec.library import hub_name, is_hub_id, resolve, shipped_folder

if TYPE_CHECKING:
    from gptcli.hub.pull import Plan

_WORTH_A_BAR = 10_000_000  # bytes; smaller files are gone before they are seen


def pull(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="ID", help="A model on the Hub: owner/name, or gpt2, gpt2-medium, ...")
    ],
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="A branch, a tag or a commit; main by default.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="Only files like this, not the usual ones; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also a model that gptcli can't run.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Hash the files that are here, and get again what is wrong.")
    ] = False,
    offline: options.Offline = False,
) -> None:
    """Get a model from the Hub.

    It comes into the Hub's cache, which other tools share: configuration, tokenizer and safetensors, never a pickle.
    What is there already is not fetched again, and a download that broke off goes on. HF_TOKEN, HF_ENDPOINT, HF_HOME,
    HF_HUB_CACHE and HF_HUB_OFFLINE count. stdout gets the folder.
    """
    out: Output = ctx.obj
    hub_id, behind = hub_name(name)
    if revision and behind and revision != behind:
        raise UsageError(f"{name} and --revision {revision} name different revisions", "give one of them")
    told = get(hub_id, revision or behind, out, include=include or (), force=force, repair=repair, offline=offline)
    if out.json:
        out.record(told)
    else:
        out.data(told["folder"])


def get_if_missing(name: str, *, offline: bool, out: Output) -> None:
    """What ``--pull`` does: get a model from the Hub if its name leads to nothing here."""
    try:
        resolve(name)
    except NotFoundError:
        hub_id, revision = hub_name(name)
        if "/" not in hub_id or not is_hub_id(hub_id):
            raise
        get(hub_id, revision, out, offline=offline)


def get(
    hub_id: str,
    revision: str | None,
    out: Output,
    *,
    include: Sequence[str] = (),
    force: bool = False,
    repair: bool = False,
    offline: bool = False,
) -> dict[str, Any]:
    """Pull a model and talk of it; returns what the JSON says. Raises as ``plan_pull`` and ``run_plan`` do."""
    if "/" not in hub_id and (shipped_folder() / hub_id / "config.json").is_file():
        raise UsageError(f"{hub_id} came with gptcli", f"it is here: gptcli generate -m {hub_id}")
    from gptcli.hub.pull import plan_pull, run_plan
    from gptcli.hub.reach import Hub

    began = time.monotonic()
    hub = Hub(offline=offline)
    plan = plan_pull(hub, hub_id, revision, include=include, force=force, repair=repair)
    commit = plan.listing.commit
    for name in plan.left_out:
        out.warn(f"{name} is a pickle, which can run code: it is left out")
    at = f"{hub_id} at {plan.listing.revision}" + ("" if commit == plan.listing.revision else f" ({commit[:8]})")
    fetched, count = plan.bytes_to_fetch, plan.files_to_fetch
    if count:
        here = plan.bytes - fetched
        known = f"; {byte_text(here)} of {byte_text(plan.bytes)} are here" if here else ""
        out.note(f"{at}: {count} {'file' if count == 1 else 'files'} to get, {byte_text(fetched)}{known}")
        for wanted in plan.files:
            if not wanted.whole:
                out.detail(f"  {wanted.file.name}  {byte_text(wanted.file.size or 0)}")
    with _bar(out, plan) as progress:
        folder = run_plan(hub, plan, progress)
    seconds = time.monotonic() - began
    if count:
        out.note(f"got {byte_text(fetched)} in {seconds:.1f} s")
    else:
        out.note(f"{at} is here, all {len(plan.files)} files of it")
    return {
        "name": hub_id,
        "revision": plan.listing.revision,
        "commit": commit,
        "folder": str(folder),
        "files": [
            {"name": wanted.file.name, "bytes": wanted.file.size, "fetched": not wanted.whole} for wanted in plan.files
        ],
        "bytes": plan.bytes,
        "fetched_bytes": fetched,
        "seconds": seconds,
    }


@contextmanager
def _bar(out: Output, plan: Plan) -> Iterator[Callable[[str, int], None]]:
    """A bar for each file that is coming, and one for all; to a person only."""
    if out.json or out.quiet or not out.talks_to_terminal or not plan.files_to_fetch:
        yield lambda name, count: None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Column

    wide = out.console(stderr=True).width >= 90
    columns = [
        TextColumn("{task.fields[label]}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24 if wide else 8),
        DownloadColumn(table_column=Column(no_wrap=True)),
        *([TransferSpeedColumn(table_column=Column(no_wrap=True))] if wide else []),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
    ]
    longest = 40 if wide else 20
    sizes = {wanted.file.name: wanted for wanted in plan.files if not wanted.whole}
    with out.progress(columns) as shown:
        total = shown.add_task("", label="all", total=plan.bytes, completed=plan.bytes - plan.bytes_to_fetch)
        tasks: dict[str, Any] = {}

        def progress(name: str, count: int) -> None:
            wanted = sizes[name]
            size = wanted.file.size or 0
            if name not in tasks and size >= _WORTH_A_BAR:
                label = name if len(name) <= longest else "…" + name[1 - longest :]
                tasks[name] = shown.add_task("", label=label, total=size, completed=wanted.here)
            shown.advance(total, count)
            if name in tasks:
                shown.advance(tasks[name], count)
                if shown.tasks[shown.task_ids.index(tasks[name])].finished:
                    shown.update(tasks[name], visible=False)

        yield progress
