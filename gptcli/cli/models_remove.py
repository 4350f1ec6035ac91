"""``gptcli models rm``: give the disk back what a model of the Hub's cache takes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gptcli.cli import options
from gptcli.cli.out import Output, harmless
from gptcli.cli.units import byte_text
from gptcli.errors import NotFoundError, UsageError
from gptcli.spec.library import hub_name, repo_folder, resolve, revision_of


def remove(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(metavar="ID", help="A model in the Hub's cache.", autocompletion=options.model_names),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the Hub's cache.

    All its revisions, or one of them as owner/name@revision; files that another revision shares stay. Other tools lose
    it, too. Models that came with gptcli, and folders of your own, are not touched.
    """
    out: Output = ctx.obj
    hub_id, revision = hub_name(name)
    commit = None
    try:
        found = resolve(name)
    except NotFoundError:
        if revision or not repo_folder(hub_id).is_dir():  # it may be one of which only a part came
            raise
    else:
        if found.source == "shipped":
            raise UsageError(f"{name} came with gptcli and is not removed", "uninstall gptcli, or leave it")
        if found.source == "folder":
            raise UsageError(f"{name} is a folder of your own", f"rm -r {name} removes it")
        hub_id, commit = found.name.partition("@")[0], revision_of(found) if revision else None
    from gptcli.hub.remove import plan_removal

    removal = plan_removal(hub_id, commit)
    what = hub_id if commit is None else f"{hub_id} at {commit[:8]}"
    if not yes:
        if not (sys.stdin.isatty() and out.talks_to_terminal) or out.json:
            raise UsageError(f"removing {what} ({byte_text(removal.bytes)}) has to be agreed to", "add --yes")
        if not typer.confirm(f"Remove {harmless(what)} from the Hub's cache ({byte_text(removal.bytes)})?", err=True):
            raise UsageError("nothing was removed", "answer y to remove it")
    removal.execute()
    if out.json:
        out.record({"name": hub_id, "commits": list(removal.commits), "freed_bytes": removal.bytes})
        return
    out.data(f"removed {harmless(what)}: {byte_text(removal.bytes)}")
