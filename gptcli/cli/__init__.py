"""The gptcli program: the table of commands, loaded when named; the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from gptcli import __version__
from gptcli.cli.out import Output
from gptcli.cli.values import take_plainly
from gptcli.errors import ExitCode, GptcliError, OutputError, ResourceError, UsageError


class Entry(NamedTuple):
    """A command: its line in the list, and ``module:function`` or the commands below it."""

    summary: str
    target: str | Mapping[str, Entry]


COMMANDS: dict[str, Entry] = {
    "generate": Entry("Continue a text, streaming.", "gptcli.cli.generate:generate"),
    "chat": Entry("Talk with a model.", "gptcli.cli.chat:chat"),
    "predict": Entry("Show what may come next, as bars.", "gptcli.cli.predict:predict"),
    "complete": Entry("Suggest short continuations for a cursor.", "gptcli.cli.complete:complete"),
    "edit": Entry("Write a line or a text, with ghost text from the model.", "gptcli.cli.edit:edit"),
    "shell-init": Entry("Print what lets a shell's line ask a warm model.", "gptcli.cli.shell_init:shell_init"),
    "score": Entry("Show how surprising each token of a text is.", "gptcli.cli.score:score"),
    "embed": Entry("Turn texts into vectors, or explore the embedding table.", "gptcli.cli.embed:embed"),
    "trace": Entry("Follow one prediction through the model.", "gptcli.cli.trace:trace"),
    "tokenize": Entry("See, count, cut and split the tokens of a text.", "gptcli.cli.tokenize:tokenize"),
    "count-params": Entry("Report a model's parameters, matrix by matrix.", "gptcli.cli.count_params:count_params"),
    "train": Entry("Train a model on text, or fine-tune one.", "gptcli.cli.train:train"),
    "plot": Entry("Draw or compare the curves of training runs.", "gptcli.cli.plot:plot"),
    "serve": Entry("Keep a model warm for all commands, and serve OpenAI's API.", "gptcli.cli.serve:serve"),
    "models": Entry(
        "See which models are here; get, check and prepare them.",
        {
            "list": Entry("List the models on this machine.", "gptcli.cli.models:list_models"),
            "show": Entry("Show one model: its card, shape, size and files.", "gptcli.cli.models:show_model"),
            "pull": Entry("Get a model from the Hub.", "gptcli.cli.models_pull:pull"),
            "rm": Entry("Remove a model from the Hub's cache.", "gptcli.cli.models_remove:remove"),
            "verify": Entry("Check a model's files against its hashes and headers.", "gptcli.cli.models:verify_model"),
            "prepare": Entry(
                "Build once what makes a model fast on this machine.", "gptcli.cli.models_prepare:prepare"
            ),
            "export": Entry("Write a model for other programs.", "gptcli.cli.models_export:export"),
        },
    ),
    "bench": Entry("Measure this machine with a model.", "gptcli.cli.bench:bench"),
}

_SETTINGS: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
_COMPLETING = "_GPTCLI_COMPLETE"  # the variable by which a shell asks for completions
_HELP = "help"  # is no command, but is understood as one
_NAMES = {"help_option_names": ["-h", "--help"]}
# Each line as it stands (that is what \b says), so that a command is never broken over two.
_EPILOG = """\b
Completion in your shell: gptcli --install-completion
Options can also be set by GPTCLI_MODEL=... and the like, or in config.toml.
"""
_WIDEST_NAME = 30  # of an option in help; beyond it, what it does stands below


class _ReaderGoneError(Exception):
    """Whoever read our standard output has closed it: ``| head -1``."""


class LeafCommand(TyperCommand):
    """One command: its own options, the options of every command, and ``GPTCLI_<OPTION>`` for each setting."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._passed_over: list[str] = []  # variables that are for other commands
        own = {param.name for param in self.params}
        self._fetching = _fetching_params(own)
        for place, beside in enumerate(self.params):
            if self._fetching and beside.name in ("offline", "init_from"):
                for param in self._fetching:
                    param.rich_help_panel = getattr(beside, "rich_help_panel", None)
                place += beside.name != "offline"
                self.params[place:place] = self._fetching
                break
        self._common = [param for param in _common_params() if param.name not in own]
        self.params += self._common
        from gptcli.cli.options import complete_value
        from gptcli.cli.settings import is_setting, variable_of

        params: list[Any] = self.params  # they have attributes that their declared type lacks
        for param in params:
            take_plainly(param)
            if _COMPLETING in os.environ:
                complete_value(param)
            if param.param_type_name == "option" and is_setting(param):
                param.envvar = variable_of(param)
                param.show_envvar = False
                if param.multiple:
                    param.split_envvar_value = lambda value: [value]  # one value, spaces and all
            elif param.param_type_name == "argument":
                param.display_type = lambda ctx: ""  # "list[str]" tells nobody anything

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from gptcli.cli.settings import is_for_another

        params: list[Any] = self.params
        for param in params:
            if (value := os.environ.get(param.envvar or "")) and is_for_another(self, param, value):
                self._passed_over.append(param.envvar)
                param.envvar = None
        return super().parse_args(ctx, args)

    def get_help_option(self, ctx: Any) -> Any:
        return _without_pydantic(super().get_help_option(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options under the headings that they name (``rich_help_panel``), those without one last."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        rest: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                heading = (
                    "Arguments" if param.param_type_name == "argument" else getattr(param, "rich_help_panel", None)
                )
                (sections.setdefault(heading, []) if heading else rest).append(record)
        grouped = len(sections) > 1
        sections["Every command" if grouped else "Options"] = rest
        names = [name for rows in sections.values() for name, _ in rows]
        column = min(_WIDEST_NAME, max(map(len, names))) if grouped else 0
        for heading, rows in sections.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl([(name.ljust(column), text) for name, text in rows])

    def invoke(self, ctx: Any) -> Any:
        from gptcli.cli.options import stronger

        # A flag goes before the environment, also where the two are different options for the same thing.
        typed = stronger(ctx, "format", "json_")
        if typed == "format":
            ctx.params["json_"] = False
        elif typed == "json_":
            ctx.params["format"] = None
        common = {param.name: ctx.params.pop(param.name) for param in self._common}
        if "format" not in common:  # the command has formats of its own, and checks them itself
            common.update(format=ctx.params["format"], formats=None)
        out = ctx.find_object(Output)
        out.configure(**common)
        for variable in self._passed_over:
            out.detail(f"{variable} is for another command")
        try:
            if self._fetching:
                _pull(ctx, [param.name for param in self._fetching])
            return super().invoke(ctx)
        except BrokenPipeError:  # Typer would exit with 1
            raise _ReaderGoneError from None


class LazyGroup(TyperGroup):
    """A group that knows its commands' summaries, and imports a command's file only when the command is named."""

    entries: Mapping[str, Entry] = COMMANDS

    def get_help_option(self, ctx: Any) -> Any:
        return _without_pydantic(super().get_help_option(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.entries:
            return None
        if cmd_name not in self.commands:
            self.commands[cmd_name] = _load(cmd_name, self.entries[cmd_name])
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if ctx.resilient_parsing:  # what is still being typed is no error
            args = args[1:] if args[:1] == [_HELP] else args
            if not args:
                return None, None, []
        elif args and args[0] not in self.entries and not args[0].startswith("-"):
            from gptcli.cli.wrong_use import nearest

            raise UsageError(f"there is no command {args[0]!r}", nearest(args, self.entries, ctx.command_path))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in self.entries.items()])


def _without_pydantic(help_option: Any) -> Any:
    """Without a default of its own, Typer imports pydantic to check that None is None."""
    if help_option is not None:
        help_option.default = False
    return help_option


def _load(name: str, entry: Entry) -> Any:
    if not isinstance(entry.target, str):
        group = _group(name, entry.target)
        app = typer.Typer(name=name, cls=group, no_args_is_help=True, help=entry.summary, **_SETTINGS)
        app.callback(context_settings=_NAMES)(lambda: None)
        command = typer.main.get_command(app)
        command.name = name
        return command
    module, _, function = entry.target.partition(":")
    app = typer.Typer(**_SETTINGS)
    app.command(name, cls=LeafCommand, context_settings=_NAMES)(getattr(importlib.import_module(module), function))
    return typer.main.get_command(app)


def leaves(name: str, entry: Entry) -> list[Any]:
    """The commands that a table's entry stands for: itself, or those below it."""
    if isinstance(entry.target, str):
        return [_load(name, entry)]
    return [_load(below, inner) for below, inner in entry.target.items()]


def _group(name: str, entries: Mapping[str, Entry]) -> type[LazyGroup]:
    return type("LazyGroup", (LazyGroup,), {"entries": entries, "__doc__": name})


def _common_params() -> list[Any]:
    from gptcli.cli import options

    return _params_of(options.common)


# Options whose value is a MODEL, in commands that take --pull; of train's --tokenizer only the tokenizer is used.
_MODELS = ("model", "name", "draft_model", "init_from", "tokenizer")


def _fetching_params(own: Set[str]) -> list[Any]:
    """``--pull`` for a command that takes a model and has none of its own, and ``--offline``."""
    if "pull" in own or not ("init_from" in own or {"model", "offline"} <= own):
        return []
    from gptcli.cli import options

    return [param for param in _params_of(options.fetching) if param.name not in own]


def _pull(ctx: Any, added: Sequence[str]) -> None:
    """Act on ``--pull``, and take the options that the command does not know out of its way."""
    from gptcli.cli.options import refuse_offline

    refuse_offline(ctx, "pull")
    pull, offline = ctx.params["pull"], ctx.params["offline"]
    for name in added:
        del ctx.params[name]
    names = [name for option in _MODELS if (name := ctx.params.get(option)) not in (None, "none")]  # none: no draft
    if pull and names:
        from gptcli.cli.models_pull import get_if_missing

        for name in names:
            get_if_missing(name, offline=offline, out=ctx.find_object(Output))


def _params_of(function: Any) -> list[Any]:
    app = typer.Typer(**_SETTINGS)
    app.command()(function)
    return list(typer.main.get_command(app).params)


def make_app(*, completion: bool) -> typer.Typer:
    """The program; with ``completion`` Typer's two options for it, whose types are slow to import, are there."""
    app = typer.Typer(name="gptcli", cls=LazyGroup, no_args_is_help=True, **{**_SETTINGS, "add_completion": completion})

    @app.callback(
        context_settings=_NAMES,
        help="A GPT for the terminal: it continues text, counts parameters, and works in pipes.",
        epilog=_EPILOG,
    )
    def root(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=_show_version, help="Show the version."
        ),
    ) -> None:
        pass

    return app


def _asking_for_help(args: list[str]) -> list[str]:
    """``help`` in the place of a command as ``--help`` behind the command that follows; any other line as it is."""
    place = 1 if args and args[0] in COMMANDS and not isinstance(COMMANDS[args[0]].target, str) else 0
    if args[place : place + 1] != [_HELP]:
        return args
    names = takewhile(lambda word: not word.startswith("-"), args[place + 1 :])
    return [*args[:place], *names, "--help"]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gptcli {__version__}")
        raise typer.Exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name); returns the exit code and raises nothing."""
    args = _asking_for_help(list(sys.argv[1:] if argv is None else argv))
    completion = any("-completion" in arg for arg in args[:1]) or _COMPLETING in os.environ
    out = Output.standard(json=_wants(args, "--format", "json") or "--json" in _ours(args))
    out.color = next((choice for choice in ("never", "always") if _wants(args, "--color", choice)), "auto")
    try:
        from gptcli.cli.settings import read_settings

        command = typer.main.get_command(make_app(completion=completion))
        settings: dict[str, Any] = {"obj": out, "default_map": read_settings(args)}
        result = command.main(args, prog_name="gptcli", standalone_mode=False, **settings)
        if result == ExitCode.INTERRUPTED:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
        out.close()
        return int(result or 0)
    except KeyboardInterrupt:
        out.interrupted()
        return ExitCode.INTERRUPTED
    except BaseException as error:
        if os.environ.get("GPTCLI_DEBUG") == "1" and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
        if isinstance(error, typer.TyperException) and "RANK" in os.environ:
            from gptcli.cli import ranks

            if ranks.follows(args):
                ranks.let_the_first_speak()
                return ExitCode.USAGE
        return _report(error, out, args)


def _report(error: BaseException, out: Output, args: Sequence[str]) -> int:
    """Say what an exception means, once, and give its exit code."""
    if isinstance(error, BrokenPipeError | _ReaderGoneError):
        out.abandon()
        return ExitCode.OK
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else ExitCode.FAULT
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(str(getattr(error, "message", "")), err=True)
        return ExitCode.USAGE
    known = _as_gptcli_error(error, args)
    out.error(known)
    if isinstance(error, OSError):
        out.abandon()  # or the interpreter would try stdout once more, and complain
    return known.exit_code


def _as_gptcli_error(error: BaseException, args: Sequence[str]) -> GptcliError:
    if isinstance(error, GptcliError):
        return error
    if isinstance(error, typer.Abort):
        return UsageError("given up", "run it again")
    if isinstance(error, typer.TyperException):  # wrong options and values
        from gptcli.cli.wrong_use import hint

        message = error.format_message()
        return UsageError(message[:1].lower() + message[1:].rstrip("."), hint(error, args))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _allocation_failed(error):
        return ResourceError("there is not enough memory", "use a smaller model, a smaller batch, or --dtype bfloat16")
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        return OutputError(f"the system refused: {what}", "check the path, its permissions and the room on the disk")
    return GptcliError(
        f"a fault of gptcli: {type(error).__name__}: {error}".rstrip(": "),
        "run it again with GPTCLI_DEBUG=1 and report what it prints",
    )


def _allocation_failed(error: BaseException) -> bool:
    """PyTorch's CPU allocator raises a plain RuntimeError."""
    said = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said)


def _ours(args: Sequence[str]) -> Sequence[str]:
    return args[: args.index("--")] if "--" in args else args


def _wants(args: Sequence[str], name: str, value: str) -> bool:
    """Whether an option has a value: needed before the options are parsed, since errors in them obey it, too."""
    ours = _ours(args)
    return f"{name}={value}" in ours or (name, value) in pairwise(ours)
