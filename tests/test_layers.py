"""Who may import whom, proved by walking the imports of gptcli, and by looking at what a command really loads."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from gptcli.cli import COMMANDS, Entry
from tests.conftest import PATIENCE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gptcli"

# Each layer and the layers that it may know.
MAY_KNOW = {
    "errors": set[str](),
    "text": {"errors", "text"},
    "spec": {"errors", "spec"},
    "hub": {"errors", "spec", "hub"},
    "core": {"errors", "text", "spec", "core"},
    "train": {"errors", "text", "spec", "core", "train"},
    "serve": {"errors", "text", "spec", "core", "serve"},
    "cli": {"errors", "text", "spec", "hub", "core", "train", "serve", "cli", "__version__"},
    "__init__": set[str](),
    "__main__": {"cli"},
}
TENSOR_LIBRARIES = {"torch", "numpy", "safetensors"}
HEAVY = {"torch", "numpy", "safetensors", "huggingface_hub", "transformers", "matplotlib", "pydantic"}


class Import(NamedTuple):
    """One imported module; ``where`` is ``module`` (run when the file is loaded), ``body`` or ``typing``."""

    name: str
    where: str


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def imports(tree: ast.AST, package: str = "") -> Iterator[Import]:
    """All imports of a file. ``from a import b`` is ``a.b`` where that is a module, else ``a``."""
    yield from _imports(tree, "module", package)


def _imports(node: ast.AST, where: str, package: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = where
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, where) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - child.level + 1], base]).rstrip(".")
            for alias in child.names:
                whole = f"{base}.{alias.name}"
                yield Import(whole if whole in MODULES or base == "gptcli" else base, where)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = "body"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _imports(ast.Module([statement], []), "typing", package)
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), where, package)
            continue
        yield from _imports(child, inside, package)


def layer(module: str) -> str:
    """``gptcli.core.model`` -> ``core``; the package itself is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def top(name: str) -> str:
    return name.partition(".")[0]


def of_layers(*names: str) -> dict[str, ast.Module]:
    return {module: tree for module, tree in TREES.items() if layer(module) in names}


def ours(module: str) -> set[str]:
    """What a module imports of gptcli, anywhere in the file."""
    return {name.removeprefix("gptcli.") for name, _ in imports(TREES[module], module) if top(name) == "gptcli"}


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    source = """
import a.b, c
from gptcli.core import runtime, build
from gptcli import __version__
if TYPE_CHECKING:
    import d
else:
    import e
try:
    import f
except ImportError:
    pass
class K:
    import g
    def method(self):
        from h import i
async def run():
    import j
"""
    assert list(imports(ast.parse(source))) == [
        Import("a.b", "module"),
        Import("c", "module"),
        Import("gptcli.core.runtime", "module"),
        Import("gptcli.core.build", "module"),
        Import("gptcli.__version__", "module"),
        Import("d", "typing"),
        Import("e", "module"),
        Import("f", "module"),
        Import("g", "module"),
        Import("h", "body"),
        Import("j", "body"),
    ]
    assert "core.checkpoint" in ours("gptcli.core.build")
    assert "core.runner" in ours("gptcli.cli.warm")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_layer_knows_only_the_layers_below(module: str) -> None:
    known = {layer("gptcli." + name) for name in ours(module)}
    assert known <= MAY_KNOW[layer(module)]


def test_the_package_itself_imports_nothing() -> None:
    assert list(imports(TREES["gptcli"])) == []


@pytest.mark.parametrize("module", sorted(of_layers("core", "train")))
def test_core_and_train_do_not_talk(module: str) -> None:
    names = {top(name) for name, _ in imports(TREES[module], module)}
    assert not names & {"typer", "click", "rich"}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Name):
            assert node.id != "print", f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert node.attr not in ("stdout", "stderr", "exit", "argv"), f"line {node.lineno}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(of_layers("cli", "__main__"))))
def test_only_the_command_line_exits(module: str) -> None:
    raised = {
        ast.unparse(node.exc).partition("(")[0]
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Raise) and node.exc is not None
    }
    called = {ast.unparse(node.func) for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)}
    assert "SystemExit" not in raised
    assert not called & {"sys.exit", "exit", "quit", "os._exit", "os.abort"}


@pytest.mark.parametrize("module", sorted(set(of_layers("core", "train")) - {"gptcli.core.runtime"}))
def test_only_runtime_reads_the_environment(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "environb", "getenv", "expandvars"), f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "environb", "getenv"}, f"line {node.lineno}"


def test_the_model_knows_its_parts_and_nothing_else() -> None:
    assert ours("gptcli.core.model") <= {"core.attention", "core.cache", "core.rope", "spec.config", "errors"}
    assert ours("gptcli.core.model") >= {"core.attention", "core.cache", "spec.config"}
    assert ours("gptcli.core.attention") <= {"core.cache", "errors"}


@pytest.mark.parametrize("module", sorted(of_layers("core", "train")))
def test_nothing_is_pickled(module: str) -> None:
    """A pickle runs whatever code it holds; torch's own files are pickles."""
    pickles = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    imported = {name for name, _ in imports(TREES[module], module)}
    assert not imported & {*pickles, "torch.serialization", "torch.distributed.checkpoint"}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            written = ast.unparse(node)
            assert written not in {"torch.load", "torch.save", "np.load", "np.save"}, f"line {node.lineno}"
            assert not written.startswith(("torch.serialization", "dist.checkpoint")), f"line {node.lineno}"
            assert not written.endswith("_object_list"), f"line {node.lineno}"  # how torch.distributed sends pickles
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy"):
            assert not {alias.name for alias in node.names} & {"load", "save"}, f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False", f"line {node.lineno}"


def test_only_build_joins_the_parts_of_a_model() -> None:
    apart = {"core.checkpoint", "core.quantize", "core.parallel", "core.sampling"} & {
        name.removeprefix("gptcli.") for name in MODULES
    }
    assert len(apart) >= 2
    for part in apart:
        assert not ours("gptcli." + part) & apart - {part}
    for part in apart - {"core.sampling"}:
        joining = {module for module in of_layers("core") if part in ours(module)}
        assert joining == {"gptcli.core.build"}, part


def test_torch_is_imported_only_in_core_and_train_and_there_at_the_top() -> None:
    places = {
        module: {where for name, where in imports(tree, module) if top(name) == "torch"}
        for module, tree in TREES.items()
    }
    users = {module for module, where in places.items() if where}
    assert {layer(module) for module in users} == {"core", "train"}
    assert all(places[module] == {"module"} for module in users)


def test_only_the_hub_imports_huggingface_hub_and_only_when_it_is_asked() -> None:
    places = {
        module: {where for name, where in imports(tree, module) if top(name) == "huggingface_hub"}
        for module, tree in TREES.items()
    }
    users = {module for module, where in places.items() if where}
    assert {layer(module) for module in users} == {"hub"}
    assert all(places[module] == {"body"} for module in users)


@pytest.mark.parametrize("module", sorted(of_layers("text", "spec", "errors")))
def test_text_and_spec_know_no_tensors(module: str) -> None:
    assert not {top(name) for name, _ in imports(TREES[module], module)} & {*HEAVY, "rich", "typer"}


@pytest.mark.parametrize("module", sorted(of_layers("cli")))
def test_commands_import_what_is_heavy_inside_their_bodies(module: str) -> None:
    at_load = {name for name, where in imports(TREES[module], module) if where == "module"}
    assert not {top(name) for name in at_load} & {*HEAVY, "tiktoken", "rich"}
    assert not {layer(name) for name in at_load if top(name) == "gptcli"} & {"core", "train", "serve"}


def leaves(entries: Mapping[str, Entry], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Entry]]:
    """Every command and group below, with its path."""
    for name, entry in entries.items():
        yield (*path, name), entry
        if not isinstance(entry.target, str):
            yield from leaves(entry.target, (*path, name))


@pytest.mark.parametrize(
    "path", [path for path, entry in leaves(COMMANDS) if isinstance(entry.target, str)], ids=" ".join
)
def test_summaries_are_the_first_lines_of_docstrings(path: tuple[str, ...]) -> None:
    target = dict(leaves(COMMANDS))[path].target
    assert isinstance(target, str)
    module, _, function = target.partition(":")
    doc = inspect.getdoc(getattr(importlib.import_module(module), function))
    assert doc is not None
    assert dict(leaves(COMMANDS))[path].summary == doc.splitlines()[0]


# Runs command lines in one process and tells which modules each added to those that Typer itself needs, and to those
# that were named.
PROBE = """
import importlib, json, sys
import typer, typer.core, typer.main
for name in sys.argv[2:]:
    importlib.import_module(name)
seen = set(sys.modules)
from gptcli.cli import main
loaded = []
for args in json.loads(sys.argv[1]):
    code = main(args)
    loaded.append([code, sorted(set(sys.modules) - seen)])
    seen |= set(sys.modules)
sys.stdout = sys.__stdout__
print()
print(json.dumps(loaded))
"""


def modules_of(*commands: list[str], beyond: Sequence[str] = ()) -> dict[str, set[str]]:
    """The modules that each command line adds, run one after the other in a fresh process, to those ``beyond``."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(commands), *beyond],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert [code for code, _ in loaded] == [0] * len(commands), done.stderr.decode()
    return {" ".join(args): set(names) for args, (_, names) in zip(commands, loaded, strict=True)}


def test_help_loads_nothing_heavy() -> None:
    paths = [list(path) for path, _ in leaves(COMMANDS)]
    loaded = modules_of(["--help"], *([*path, "--help"] for path in paths))
    assert "gptcli.cli.generate" in loaded["generate --help"]
    for command, names in loaded.items():
        assert not {top(name) for name in names} & {*HEAVY, "tiktoken", "rich", "tokenizers"}, command
        assert not {layer(name) for name in names if name.startswith("gptcli.")} & {"core", "train", "serve"}, command
    assert not {name for name in loaded["--help"] if name.startswith("gptcli.") and layer(name) != "cli"} - {
        "gptcli.errors"
    }


def test_paper_and_text_commands_load_no_torch(tiny_folder: Path) -> None:
    loaded = modules_of(
        ["count-params", "gpt3"],
        ["count-params", str(tiny_folder), "--json"],
        ["count-params", "gpt3", "--memory", "--flops", "--gpus", "8x80GB"],
        ["count-params", "gpt3", "--plan", "--gpus", "8x141GB"],
        ["generate", "-m", "gpt3", "--plan", "--gpus", "8x141GB"],
        ["count-params", str(tiny_folder), "--by", "tensor", "--format", "csv"],
        ["count-params", "--diff", "gpt2", str(tiny_folder)],
        ["count-params", str(tiny_folder), "--check", str(tiny_folder)],
        ["models", "list"],
        ["models", "show", str(tiny_folder)],
        ["tokenize", "-m", str(tiny_folder), "Once upon a time"],
        ["tokenize", "-m", str(tiny_folder), "--count", "--json", "Once upon a time"],
        ["tokenize", "-m", str(tiny_folder), "--split", "2", "Once upon a time"],
        ["models", "verify", str(tiny_folder)],
        ["train", "--plan", "--preset", "gpt3", "--gpus", "8x141GB"],
        ["train", "--plan", "--init-from", str(tiny_folder), "--gpus", "8x141GB", "--json"],
        ["train", "--plan", "--tokenizer", str(tiny_folder), "--gpus", "1x80GB", "--json"],
    )
    for command, names in loaded.items():
        assert not {top(name) for name in names} & {*HEAVY, "tokenizers"}, command
        assert not {layer(name) for name in names if name.startswith("gptcli.")} & {"core", "train", "serve"}, command
    assert "tiktoken" not in loaded["count-params gpt3"]
    assert any(top(name) == "tiktoken" for names in loaded.values() for name in names)


def test_a_cold_answer_loads_torch_and_little_else(tiny_folder: Path) -> None:
    """What starts with ``import torch``, whose second or two nobody can take away, adds next to nothing to it."""
    (names,) = modules_of(["generate", "x", "-n", "1", "-m", str(tiny_folder)], beyond=["torch"]).values()
    needed = {"gptcli", "tiktoken", "tiktoken_ext", "typer", "safetensors"}
    others = {name for name in names if top(name) not in needed | sys.stdlib_module_names}
    assert not {name for name in others if top(name) != "torch"}
    assert len(others) <= 3, others
    asked = {layer(name) for name in names if name.startswith("gptcli.")}
    assert asked == {"cli", "core", "errors", "serve", "spec", "text"}
    assert {name for name in names if name.startswith("gptcli.serve.")} == {"gptcli.serve.place"}  # is a model warm?


def test_asking_a_warm_model_takes_little_to_import() -> None:
    """TLS, mail headers and OpenSSL's hashes would take longer to load than the model to answer."""
    asks = ["gptcli.cli", "gptcli.cli.complete", "gptcli.cli.opening", "gptcli.serve.client"]
    code = f"import importlib, sys\nfor name in {asks}: importlib.import_module(name)\nprint(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, timeout=PATIENCE, check=True
    )
    names = set(done.stdout.decode().split())
    assert "gptcli.serve.wire" in names
    assert not names & {"http", "http.client", "ssl", "email", "hashlib", "_hashlib", "tempfile", "asyncio", "pydantic"}
    assert not {top(name) for name in names} & {*HEAVY, "tiktoken", "rich"}
