"""The documents say what the program does: exit codes, JSON fields, commands and their output."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptcli.cli.caches import native_cache
from gptcli.cli.train_run import RATES
from gptcli.errors import ExitCode, UnsupportedError
from gptcli.serve.limits import Limits
from gptcli.spec.config import from_hf
from gptcli.text.transcript import SCENE
from tests.conftest import PATIENCE, ROOT, Gptcli
from tests.hub.standin import StandIn

REFERENCE = (ROOT / "docs" / "reference.md").read_text()
README = (ROOT / "README.md").read_text()

_VARIABLES = {"HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HTTPS_PROXY", "NO_PROXY"}


def documented(section: str) -> set[str]:
    """The names in the first column of a section's table."""
    part = re.split(rf"\n###+ {re.escape(section)}\n", REFERENCE)[1].split("\n#")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def objects(output: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


def test_the_families_are_those_that_are_read() -> None:
    with pytest.raises(UnsupportedError) as caught:
        from_hf({"model_type": "none"})
    assert documented("Families") == {"model_type", *caught.value.hint.removeprefix("it reads: ").split(", ")}


@pytest.mark.parametrize("text", [REFERENCE, README], ids=["reference", "README"])
def test_exit_codes_are_the_enum(text: str) -> None:
    rows = re.findall(r"^\| (\d+) \| (?:([A-Z_]+) \| )?", text, flags=re.MULTILINE)
    assert {int(code) for code, _ in rows} == {int(code) for code in ExitCode}
    assert all(ExitCode(int(code)).name == name for code, name in rows if name)


def test_generate_fields(gptcli: Gptcli, tiny_folder: Path) -> None:
    done = gptcli(
        "generate",
        "x",
        "-m",
        str(tiny_folder),
        "-n",
        "2",
        "--json",
        "--num-samples",
        "2",
        "--logprobs",
        "1",
        "--draft-model",
        str(tiny_folder),
    )
    first = objects(done.stdout)[0]
    assert documented("generate") == set(first)
    assert set(first["usage"]) == {"prompt_tokens", "completion_tokens"}
    part = REFERENCE.split("\n### generate\n")[1].split("\n### ")[0]
    (row,) = re.findall(r"^\| `timing` \| (.*) \|$", part, flags=re.MULTILINE)
    assert set(first["timing"]) == set(re.findall(r"`([a-z_]+)`", row))
    assert set(first["logprobs"][0]) == {"id", "text", "logprob", "top"}


def test_chat_fields(gptcli: Gptcli) -> None:
    (told,) = objects(gptcli("chat", "x", "-n", "2", "--json", "--show-prompt").stdout)
    assert documented("chat") == set(told)
    part = REFERENCE.split("\n### chat\n")[1].split("\n### ")[0]
    assert {name for value in (told["usage"], told["timing"]) for name in value} <= set(
        re.findall(r"`([a-z_]+)`", part)
    )
    assert SCENE in part


def test_predict_fields(gptcli: Gptcli, tiny_folder: Path) -> None:
    common = ("predict", "x", "-m", str(tiny_folder), "--json")
    runs = [(), ("-t", "1,2"), ("--choose", "a", "--lines")]
    plain, several, chosen = (objects(gptcli(*common, *more).stdout)[0] for more in runs)
    assert documented("predict") == plain.keys() | several.keys() | chosen.keys()
    assert set(several["temperatures"][0]) == plain.keys() - (several.keys() & chosen.keys())
    part = REFERENCE.split("\n### predict\n")[1]
    for field, value in (("top", plain["top"][0]), ("choices", chosen["choices"][0])):
        (row,) = re.findall(rf"^\| `{field}` \| (.*) \|$", part, flags=re.MULTILINE)
        assert set(value) <= set(re.findall(r"`([a-z_]+)`", row))


def test_score_fields(gptcli: Gptcli, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a b")
    common = ("score", "--json", "-m", str(tiny_folder), "-f", str(tmp_path / "a"), "c")
    values = [value for more in ([], ["--lines"]) for value in objects(gptcli(*common, *more).stdout)]
    assert documented("score") == {name for value in values for name in value}
    assert set(values[0]["tokens"][0]) == {"id", "text", "bits"}  # type: ignore[index]


def test_embed_fields(gptcli: Gptcli, tiny_folder: Path, tmp_path: Path) -> None:
    common = ("embed", "--json", "-m", str(tiny_folder))
    runs = [
        ("a b", "c"),
        (" the", "--nearest", "2"),
        ("--expression", '" the" - "a"'),
        ("--direction", '" the" - "a"', "b"),
        ("a b", "c", "--similarity"),
        ("a", "b", "c", "--plot", "--table", "embedding"),
        ("a b", "--output", str(tmp_path / "out.npy")),
    ]
    found = [objects(gptcli(*common, *run).stdout)[0] for run in runs]
    assert documented("embed") == {name for value in found for name in value}
    assert set(found[0]) == {"model", "pool", "layer", "dimensions", "items", "device", "dtype", "quantize"}
    assert set(found[1]) == {"model", "table", "expression", "excluded", "nearest", "device", "dtype", "quantize"}
    inner = {name for value in found for key in ("items", "nearest", "words") for name in value.get(key, [{}])[0]}
    assert inner == {"text", "tokens", "vector", "x", "y", "id", "cosine", "projection"}


def test_trace_fields(gptcli: Gptcli, tiny_folder: Path) -> None:
    done = gptcli("trace", "a b", "-m", str(tiny_folder), "--json", "--lens", "--attention", "-n", "2")
    (told,) = objects(done.stdout)
    assert documented("trace") == set(told)
    part = REFERENCE.split("\n### trace\n")[1].split("\n### ")[0]
    rows = {name: row for row in part.splitlines() for name in re.findall(r"^\| `([a-z_]+)`", row)}
    inner: dict[str, object] = {"stages": told["stages"], "lens": told["lens"], "then": told["then"]}  # lists
    for name, value in [*((name, told[name]) for name in ("next", "drawn", "attention")), *inner.items()]:
        first = value[0] if isinstance(value, list) else value
        assert isinstance(first, dict)
        assert set(first) <= set(re.findall(r"`([a-z_]+)`", rows[name])), name
    stages = told["stages"]
    assert isinstance(stages, list)
    kinds = {re.sub(r"^blocks\.\d+", "blocks.N", stage["name"]) for stage in stages}
    for kind in kinds:
        assert f"`{kind}`" in part or f"`.{kind.rpartition('.')[2]}`" in part, kind


def test_complete_fields(gptcli: Gptcli, tiny_folder: Path) -> None:
    (told,) = objects(gptcli("complete", "a", "-m", str(tiny_folder), "--json").stdout)
    assert documented("complete") == set(told)


def test_shell_init_fields(gptcli: Gptcli, tiny_folder: Path) -> None:
    (told,) = objects(gptcli("shell-init", "zsh", "-m", str(tiny_folder), "--json").stdout)
    assert set(told) == documented("shell-init")


def test_tokenize_fields(gptcli: Gptcli, tiny_folder: Path) -> None:
    common = ("tokenize", "--json", "-m", str(tiny_folder))
    runs = [("a b",), ("a b", "--count"), ("a b", "--truncate", "1"), ("a b", "--split", "1"), ("65", "--decode")]
    seen = {name for run in runs for value in objects(gptcli(*common, *run).stdout) for name in value}
    assert documented("tokenize") == seen


def names_in(value: object) -> set[str]:
    """The names of the fields of an object, and of the objects in it."""
    if isinstance(value, list):
        return set().union(*map(names_in, value))
    return set(value).union(*map(names_in, value.values())) if isinstance(value, dict) else set()


def test_count_params_fields(gptcli: Gptcli, tiny_folder: Path) -> None:
    common = ("count-params", "--json")
    views = [(), ("--by", "layer"), ("--by", "tensor"), ("--memory", "--flops", "--gpus", "8x80GB")]
    shown = [objects(gptcli(*common, "gpt3", *view).stdout)[0] for view in views]
    assert (shown[0]["matrices"], shown[0]["matrix_parameters"]) == (27938, 175181291520)
    assert documented("count-params") == {name for value in shown for name in value}
    assert documented("count-params --flops") == names_in(shown[-1]["flops"])
    told = set(re.findall(r"`([a-z_]+)`", REFERENCE))
    assert {name for value in shown for key in value if key != "config" for name in names_in(value[key])} <= told


def test_count_params_compares_fields(gptcli: Gptcli, tiny_folder: Path) -> None:
    (two,) = objects(gptcli("count-params", "--diff", "gpt2", "gpt3", "--by", "layer", "--json").stdout)
    assert documented("count-params --diff A B") == set(two)
    (held,) = objects(gptcli("count-params", "gpt2", "--check", str(tiny_folder), "--json").stdout)
    assert documented("count-params MODEL --check FILE") == set(held)
    told = set(re.findall(r"`([a-z_]+)`", REFERENCE.split("\n#### count-params --diff A B\n")[1].split("\n### ")[0]))
    assert names_in([two, held]) <= told


def test_models_and_train_fields_are_named(gptcli: Gptcli, tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king. " * 50 + "<|endoftext|>" + "He was happy. " * 50)
    shape = ["--layers", "1", "--width", "16", "--context", "16", "--batch-tokens", "32", "--steps", "2"]
    tokenizer = ["--tokenizer", str(tiny_folder), "--valid", str(text)]
    trained = gptcli("train", str(text), "-o", str(tmp_path / "out"), *shape, *tokenizer, "--json", "--seed", "1")
    events = objects(trained.stdout)
    assert [event["event"] for event in events] == ["start", "step", "step", "eval", "sample", "save", "done"]
    shown = objects(gptcli("models", "show", str(tiny_folder), "--json").stdout)
    verified = objects(gptcli("models", "verify", str(tiny_folder), "--json").stdout)
    part = REFERENCE.split("\n### models\n")[1]
    plan = objects(gptcli("train", "--plan", "--preset", "gpt3", "--gpus", "8x141GB", "--json").stdout)[0]
    assert isinstance(plan["rank"], dict)
    names = {name for value in [*shown, *verified, plan, plan["rank"]] for name in value}
    assert names <= set(re.findall(r"`([a-z_]+)`", part))
    for event in events:
        (row,) = re.findall(rf"^\| `{event['event']}` \| (.*) \|$", part, flags=re.MULTILINE)
        values = {"none", "ddp", "fsdp"}  # of `parallel`
        assert set(re.findall(r"`([a-z_]+)`", row)) - values == set(event) - {"event", "step", "tokens"}


def test_prepare_fields(gptcli: Gptcli, tiny_folder: Path, built: Path) -> None:
    shutil.copytree(built, native_cache())
    prepared = objects(gptcli("models", "prepare", str(tiny_folder), "--json").stdout)[0]
    told = REFERENCE.split("\n`prepare`: ")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", told)) == set(prepared)


def test_export_fields(gptcli: Gptcli, tiny_folder: Path, tmp_path: Path) -> None:
    done = gptcli("models", "export", str(tiny_folder), "--to", "hf", "-o", str(tmp_path / "out"), "--json")
    (exported,) = objects(done.stdout)
    told = REFERENCE.split("\n`export`: ")[1].split("\n\n")[0]
    values = {"hf", "gguf", "name"}
    assert set(re.findall(r"`([a-z_]+)`", told)) - values == set(exported)


def test_the_limits_of_the_api_are_told() -> None:
    """Beside the options that change them."""
    part = REFERENCE.split("\n## The HTTP API\n")[1].split("\n| route")[0]
    limits = Limits()
    for name, value in (
        ("rows", limits.rows),
        ("waiting", limits.waiting),
        ("prefix-memory MB", limits.prefix_bytes >> 20),
    ):
        assert f"`--{name}` ({value})" in part
    fixed = (limits.choices, limits.stops, limits.biases, limits.inputs, limits.requests)
    assert {f"{number:,}" for number in fixed} <= set(re.findall(r"\d[\d,]*", part))
    for option in ("--api-key", "--cors"):
        assert f"`{option} " in part


def test_bench_fields(gptcli: Gptcli, tiny_folder: Path) -> None:
    done = gptcli("bench", "-m", str(tiny_folder), "--json", "--rounds", "1", "--tokens", "4", "--threads", "1")
    told = json.loads(done.stdout)
    part = REFERENCE.split("\n### bench\n")[1].split("\n### ")[0]
    of_all, of_figures = ({*re.findall(r"`([a-z_]+)`", text)} for text in part.split("\n| field of a figure"))
    firsts = " ".join(re.findall(r"^\| (`.*?) \|", part, flags=re.MULTILINE))
    rows = set(re.findall(r"`([a-z_]+)`", firsts))
    figures = {name for figure in told["figures"] for name in figure}
    assert rows == set(told) | figures
    assert set(told["machine"]) | set(told["versions"]) <= of_all
    assert {figure["part"] for figure in told["figures"]} <= of_figures


def test_the_highest_learning_rates_are_told() -> None:
    told = re.search(
        r"Without `--lr` the highest is (\S+) with Muon and (\S+)\s+with AdamW; .* (\S+) and (\S+)\.", REFERENCE
    )
    assert told is not None
    assert tuple(map(float, told.groups())) == tuple(
        rates[kind] for kind in (0, 1) for rates in (RATES["muon"], RATES["adamw"])
    )


def console_commands(text: str) -> list[tuple[str, str]]:
    """The commands of the ``console`` blocks, each with the output shown under it."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command = command[:-1] + more
            found.append((command, output))
    return found


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = f"{shlex.quote(sys.executable)} -m gptcli"
    whole = f'set -e -o pipefail\ngptcli() {{ {program} "$@"; }}\n{script}'
    return subprocess.run(
        ["bash", "-c", whole],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=3 * PATIENCE,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(("command", "output"), console_commands(README))
def test_the_tour_is_executed(command: str, output: str, tmp_path: Path) -> None:
    """Each command ends well; what it shows is what the README shows, but for text that depends on the arithmetic."""
    done = run_script(command, tmp_path)
    assert done.returncode == 0, done.stderr
    if "generate" in command:
        assert done.stdout.strip()
    elif output.strip():
        assert done.stdout.rstrip().splitlines() == output.rstrip().splitlines()


def shell_blocks(text: str) -> list[str]:
    """The ``sh`` blocks of gptcli's commands; those that install are what .ci/run begins with."""
    return [block for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) if "pip install" not in block]


def test_pull_fields(gptcli: Gptcli, hub: StandIn, tiny_folder: Path) -> None:
    hub.add("owner/tiny", tiny_folder)
    (pulled,) = objects(gptcli("models", "pull", "owner/tiny", "--json").stdout)
    assert documented("models pull ID") - _VARIABLES == set(pulled)
    (removed,) = objects(gptcli("models", "rm", "owner/tiny", "--yes", "--json").stdout)
    told = set(re.findall(r"`([a-z_]+)`", REFERENCE.split("\n#### models pull ID\n")[1].split("\n### ")[0]))
    assert names_in([pulled, removed]) <= told


@pytest.mark.parametrize("block", shell_blocks(README))
def test_the_examples_are_executed(
    block: str, tmp_path: Path, tiny_folder: Path, request: pytest.FixtureRequest
) -> None:
    """In a folder that holds the files which they name, and with little patience for training."""
    if "-e gpt2" in block and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("needs tiktoken's vocabularies in TIKTOKEN_CACHE_DIR")
    story = "Once upon a time there was a king who had a daughter. " * 200
    for name in ("draft.txt", "long.txt", "texts/a.txt", "texts/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(story if name != "draft.txt" else "The king had a daughter.")
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n{"prompt": "The cat", "seed": 3}\n')
    chat = [{"role": "user", "content": "Who was there?"}, {"role": "assistant", "content": "A king."}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 50)
    shutil.copytree(tiny_folder, tmp_path / "path" / "to" / "folder")
    quick = block.replace("--minutes 30", "--steps 1 --layers 1 --width 16 --context 32 --batch-tokens 64")
    assert quick == block or "train" in block
    if "models pull" in block:
        hub: StandIn = request.getfixturevalue("hub")
        for name in ("openai-community/gpt2", "distilbert/distilgpt2"):
            hub.add(name, tiny_folder)
    done = run_script(quick.replace("--vocab-size 4096", "--vocab-size 300"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_readme_has_the_help(gptcli: Gptcli) -> None:
    """The list of commands in the README, and what stands below it, are the program's."""
    shown = gptcli("--help").stdout.decode()
    listed = shown.split("Commands:\n")[1].rstrip()
    assert f"```text\n{listed}\n```" in README
