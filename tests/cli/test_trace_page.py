"""The page and the picture of a prediction: the trace's own numbers, nothing loaded, and no text that does harm."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gptcli.cli import trace_window
from gptcli.cli.trace_page import in_script, write_html, write_svg
from gptcli.cli.trace_window import Window, one_line
from gptcli.cli.trace_words import degrees, number, percent, title, words
from gptcli.core.build import Model, open_model
from gptcli.core.generate import prompt_ids
from gptcli.core.predict import probabilities
from gptcli.core.trace import Trace, trace
from gptcli.errors import OutputError
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import PATIENCE

PROMPT = "Once upon a time there was"
HOSTILE = "</script><b>&\"'\x1b[1m\x00<!--{data}--><!--\u202e]]>"
_VOID = {"meta", "link", "br", "img", "input", "hr"}
Traces = Callable[..., list[Trace]]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def traces(model: Model) -> Traces:
    def run(
        prompt: str = PROMPT, count: int = 3, patterns: range = range(2), top: int = 10, temperature: float = 0.9
    ) -> list[Trace]:
        ids, made = prompt_ids(model, prompt), []
        for _ in range(count):
            made.append(trace(model, ids, temperature=temperature, seed=3, top=top, patterns=patterns))
            ids = [*ids, made[-1].drawn.id]
        return made

    return run


class Page(HTMLParser):
    """A page as elements: tags with attributes, the text that is read, scripts by themselves, tables as widths."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.tables: list[list[int]] = []
        self.cells: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in _VOID and tag != "path":
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("td", "th"):
            self.tables[-1][-1] += int(found.get("colspan") or 1)
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.cells[-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def html(tmp_path: Path, made: list[Trace], prompt: str = PROMPT) -> str:
    write_html(made[0], made[1:], prompt, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def svg(tmp_path: Path, made: list[Trace], prompt: str = PROMPT) -> ElementTree.Element:
    write_svg(made[0], made[1:], prompt, tmp_path / "page.svg")
    return ElementTree.fromstring((tmp_path / "page.svg").read_bytes())


def test_the_data_of_the_page_is_the_trace(tmp_path: Path, traces: Traces) -> None:
    made = traces()
    first = made[0]
    data = Page(html(tmp_path, made)).data
    assert data["prompt"] == PROMPT
    assert [token["id"] for token in data["tokens"]] == first.ids
    assert len(data["stages"]) == len(first.stages) > 20
    for told, stage in zip(data["stages"], first.stages, strict=True):
        assert told["summary"] == json.loads(json.dumps(stage.summary))
        assert (told["name"], told["symbols"], told["shape"]) == (stage.name, stage.symbols, list(stage.shape))
        assert told["dtype"] == stage.dtype
    for layer in range(2):
        for head in range(4):
            pattern = first.pattern(layer, head)
            for place, row in enumerate(data["patterns"][str(layer)][head]):
                assert [weight / 1000 for weight in row] == pytest.approx(pattern[place][: place + 1], abs=0.00051)
    assert [[one["id"] for one in row] for row in data["lens"]] == [[one.id for one in row] for row in first.lens()]
    assert [one["draw"]["id"] for one in data["later"]] == [one.drawn.id for one in made[1:]]


def test_the_histogram_of_logits_gives_softmax_at_any_temperature(tmp_path: Path, traces: Traces) -> None:
    from math import exp

    first = traces(count=1, top=5)[0]
    logits = Page(html(tmp_path, [first])).data["logits"]
    assert sum(logits["others"]) == 300 - 5
    for temperature in (0.3, 1.0, 2.0):
        top = logits["listed"][0]
        rest = sum(
            count * exp(-(place + 0.5) * logits["bin"] / temperature) for place, count in enumerate(logits["others"])
        )
        total = sum(exp((logit - top) / temperature) for logit in logits["listed"]) + rest
        exact = probabilities(first.logits, temperature)
        for one in first.next.top:
            assert exp((one.logit - top) / temperature) / total == pytest.approx(exact[one.id].item(), rel=0.01)
        assert exp((logits["drawn"] - top) / temperature) / total == pytest.approx(
            exact[first.drawn.id].item(), rel=0.01
        )


def test_every_stage_is_told_with_its_name_symbols_shape_dtype_and_words(tmp_path: Path, traces: Traces) -> None:
    first = traces(count=1)[0]
    page = Page(html(tmp_path, [first]))
    read = page.text
    for stage in first.stages:
        shape = " × ".join(f"{size:,}" for size in stage.shape)
        assert f"{title(stage.kind)}{stage.symbols} = {shape} · {stage.dtype}{words(stage, first)}" in read, stage.name


def test_without_its_script_the_page_holds_the_numbers(tmp_path: Path, traces: Traces) -> None:
    made = traces()
    first = made[0]
    page = Page(html(tmp_path, made))
    assert Page(html(tmp_path, made)).tables == page.tables
    for one in (*first.next.top, *made[1].next.top[:5]):
        assert f"{one.logit:.2f}".replace("-", "−") in page.cells
        assert percent(one.probability) in page.cells
    for layer in range(2):
        pattern = first.stage(f"blocks.{layer}.pattern").summary["heads"]
        assert {f"Head {head['head']}" for head in pattern} <= set(page.cells)
        assert {number(head["norm"]) for head in pattern} <= set(page.cells)
        assert {f"{head['entropy_bits']:.2f}" for head in pattern} <= set(page.cells)
        block = first.stage(f"blocks.{layer}").summary
        assert {number(norm) for norm in block["norms"]} <= set(page.cells)
        assert {degrees(turned) for turned in block["turned_degrees"]} <= set(page.cells)
        assert {number(value).replace("-", "−") for value in block["vector"]} <= set(page.cells)
        hidden = first.stage(f"blocks.{layer}.hidden").summary
        assert {str(one["neuron"]) for one in hidden["neurons"]} <= set(page.cells)
        strongest = max(pattern, key=lambda head: head["norm"])["head"]
        weights = [round(1000 * weight) for weight in first.pattern(layer, strongest)[-1]]
        shown = [str((weight + 5) // 10) for weight in weights]
        assert any(page.cells[place : place + len(shown)] == shown for place in range(len(page.cells)))
    columns = first.streams[0][:, :8].tolist()
    assert {number(value).replace("-", "−") for vector in columns for value in vector} <= set(page.cells)
    assert all(str(id_) in page.text for id_ in first.ids)


def test_tables_are_whole_and_ids_are_there_once(tmp_path: Path, traces: Traces) -> None:
    page = Page(html(tmp_path, traces()))
    assert len(page.tables) > 10
    for table in page.tables:
        assert len(set(table)) == 1, table
    ids = Counter(found["id"] for _, found in page.tags if "id" in found)
    assert set(ids.values()) == {1}
    links = {found["href"] or "" for tag, found in page.tags if tag == "a"}
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)
    labels = [found["aria-labelledby"] for _, found in page.tags if "aria-labelledby" in found]
    assert labels
    assert set(labels) <= set(ids)


@pytest.mark.parametrize("prompt", [PROMPT, HOSTILE])
def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path, traces: Traces, prompt: str) -> None:
    source = html(tmp_path, traces(prompt), prompt)
    page = Page(source)
    for tag, found in page.tags:
        assert not {"src", "srcset", "action", "data", "poster", "ping", "background"} & set(found), tag
        assert not [name for name in found if name.startswith("on")], tag
        assert (found.get("href") or "#").startswith("#") or found["href"] == "data:,"
    assert not {"img", "iframe", "object", "embed", "base", "form", "video", "audio"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|eval\(|innerHTML", source)
    policies = [found["content"] for tag, found in page.tags if tag == "meta" and "http-equiv" in found]
    assert policies
    assert policies[0]
    assert policies[0].startswith("default-src 'none';")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policies[0]
    assert len(page.scripts) == 2


def test_a_hostile_prompt_is_only_text(tmp_path: Path, traces: Traces) -> None:
    source = html(tmp_path, traces(HOSTILE), HOSTILE)
    page = Page(source)
    assert page.data["prompt"] == HOSTILE
    for raw in ("\x1b", "\x00", "\u202e", "<!--{"):
        assert raw not in source
    assert r"\x1b[1m\x00<!--{data}--><!--\u202e]]>" in page.text


def test_json_in_a_script_can_not_end_it() -> None:
    value = {"<!--<script>": ["</script>", "]]>", "\u2028\u2029\x7f", "é\ud800", 0.1]}
    made = in_script(value)
    assert json.loads(made) == value
    assert not re.search("[<>&\x7f-\U0010ffff]", made)


def test_a_long_text_is_shown_by_its_last_tokens_and_says_so(
    tmp_path: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = traces(count=1)[0]
    monkeypatch.setattr(trace_window, "MOST_TOKENS", 4)
    early = len(first.ids) - 4
    assert early > 2
    page = Page(html(tmp_path, [first]))
    assert page.data["first"] == early
    assert [token["id"] for token in page.data["tokens"]] == first.ids[-4:]
    assert f"Shown are the last 4 tokens; the model read {early} before." in page.text
    for head in range(4):
        for row in page.data["patterns"]["1"][head]:
            assert sum(row) == pytest.approx(1000, abs=4)
        last = page.data["patterns"]["1"][head][-1]
        assert last[0] == pytest.approx(1000 * sum(first.pattern(1, head)[-1][:early]), abs=0.51)
        assert len(last) == 5
    for table in page.tables:
        assert len(set(table)) == 1, table
    told = "".join(svg(tmp_path, [first]).itertext())
    assert f"the last 4 of {len(first.ids)}" in told


def test_blocks_without_a_kept_pattern_have_no_heat_map(tmp_path: Path, traces: Traces) -> None:
    page = Page(html(tmp_path, traces(count=1, patterns=range(1, 2))))
    assert set(page.data["patterns"]) == {"1"}
    assert page.text.count("Attention pattern of") == 1
    assert page.text.count("What each head looks at most") == 2


def test_one_token_and_no_later_prediction_are_enough(tmp_path: Path, traces: Traces) -> None:
    made = traces("", count=1, temperature=0)
    page = Page(html(tmp_path, made, ""))
    assert len(page.data["tokens"]) == 1
    assert "What comes first?" in page.text
    assert "100%" in page.cells
    assert svg(tmp_path, made, "").tag.endswith("svg")


def test_the_same_prediction_gives_the_same_bytes(tmp_path: Path, traces: Traces) -> None:
    assert html(tmp_path, traces()) == html(tmp_path, traces())
    first = (svg(tmp_path, traces()), (tmp_path / "page.svg").read_bytes())[1]
    svg(tmp_path, traces())
    assert (tmp_path / "page.svg").read_bytes() == first


@pytest.mark.parametrize("prompt", [PROMPT, HOSTILE, "zwölf 中文 \U0001f600\t\n\\ x"])
def test_the_picture_is_xml_with_every_token_and_loads_nothing(tmp_path: Path, traces: Traces, prompt: str) -> None:
    made = traces(prompt)
    root = svg(tmp_path, made, prompt)
    name = "{http://www.w3.org/2000/svg}"
    assert {element.tag for element in root.iter()} == {
        name + tag for tag in ("svg", "title", "rect", "text", "path", "circle")
    }
    for element in root.iter():
        assert not [key for key in element.attrib if "href" in key or key.startswith("on") or key == "style"]
        assert not [value for value in element.attrib.values() if "url(" in value or "http" in value]
    texts = [element.text for element in root.iter(name + "text")]
    window = Window(made[0])
    for token in window.tokens:
        assert token.text.replace(" ", "␣") in texts
        assert str(token.id) in texts
    assert window.text(made[0].drawn.id).replace(" ", "␣") in texts
    assert percent(made[0].next.top[0].probability) in texts
    for layer in range(2):
        assert f"Block {layer}" in texts
        turned = made[0].stage(f"blocks.{layer}.attention").summary["turned_degrees"][-1]
        assert f"attention {degrees(turned)}" in texts
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    assert root.attrib["viewBox"] == f"0 0 {width:.0f} {height:.0f}"
    for element in root.iter(name + "text"):
        assert 0 < float(element.attrib["x"]) < width
        assert 0 < float(element.attrib["y"]) < height


@pytest.mark.parametrize("write", [write_html, write_svg])
def test_what_can_not_be_written_is_told_and_leaves_nothing(
    tmp_path: Path, traces: Traces, write: Callable[..., None]
) -> None:
    made = traces(count=1)
    with pytest.raises(OutputError, match="could not be written"):
        write(made[0], [], PROMPT, tmp_path / "nowhere" / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder could not be written"):
        write(made[0], [], PROMPT, tmp_path / "folder")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_a_file_is_replaced_whole_and_can_be_read_by_others(tmp_path: Path, traces: Traces) -> None:
    file = tmp_path / "page.html"
    file.write_text("old")
    other = tmp_path / "other"
    other.touch()
    html(tmp_path, traces(count=1))
    assert file.read_text(encoding="utf-8").endswith("</html>\n")
    assert file.stat().st_mode == other.stat().st_mode
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other", "page.html"]


def test_a_title_is_the_end_of_the_text_on_one_line() -> None:
    assert one_line("a\n  b\tc", 10) == "a b c"
    assert one_line("one two three four five six", 20) == "… four five six"
    assert one_line("x" * 30, 10) == "…" + "x" * 9
    assert one_line("a\x1bb\ud800", 20) == r"a\x1bb\ud800"


def test_the_template_is_part_of_the_package() -> None:
    assert resources.files("gptcli.cli").joinpath("trace_page.html").is_file()


def test_the_page_needs_no_torch_to_be_loaded() -> None:
    code = "import sys, gptcli.cli.trace_page; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent.parent)


# --- In a browser

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(_BROWSER is None, reason="needs Chromium, headless")
_USE = """<script>
const seen = {errors};
try {
  const read = (what) => document.querySelector(what).textContent;
  const cells = (layer) => document.querySelectorAll(`[id="blocks.${layer}"] .pattern tbody td:not(.masked)`);
  const table = (layer) => [...cells(layer)].map((cell) => +cell.textContent);
  seen.looking = read(".asker");
  document.querySelectorAll(".from button")[1].click();
  seen.asker = read(".asker");
  seen.looks = document.querySelector("tr[data-head] .looks").textContent;
  seen.pressed = document.querySelectorAll(".from [aria-pressed=true]").length;
  const key = new KeyboardEvent("keydown", { key: "End", bubbles: true });
  document.querySelectorAll(".from button")[1].dispatchEvent(key);
  seen.again = read(".asker");
  document.querySelector('[data-go="1 2"]').click();
  seen.which = read('[id="blocks.1"] .which');
  seen.heat = table(1);
  const was = read("#bars");
  const knob = document.getElementById("temperature");
  knob.value = 2;
  knob.dispatchEvent(new Event("input"));
  seen.turned = [...document.querySelectorAll("#bars .p")].map((cell) => cell.textContent);
  document.getElementById("back").click();
  seen.back = read("#bars") === was;
} catch (error) { seen.errors.push(String(error)); }
document.documentElement.dataset.seen = JSON.stringify(seen);
</script>"""


def dom(file: Path) -> Page:
    """The page as it stands in a browser once its script has run."""
    assert _BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={file.parent / 'profile'}"]
    done = subprocess.run(
        [_BROWSER, *options, "--dump-dom", file.as_uri()], capture_output=True, timeout=PATIENCE, check=True
    )
    return Page(done.stdout.decode("utf-8"))


@needs_browser
def test_in_a_browser_the_policy_lets_the_own_script_run(tmp_path: Path, traces: Traces) -> None:
    html(tmp_path, traces(HOSTILE, count=1), HOSTILE)
    page = dom(tmp_path / "page.html")
    assert dict(page.tags)["html"].get("class") == "js"


@needs_browser
def test_in_a_browser_tokens_heads_and_temperature_can_be_chosen(tmp_path: Path, traces: Traces) -> None:
    made = traces(count=1)
    source = html(tmp_path, made)
    # The test's own script needs a page without the policy; errors of the page's script are collected from its start.
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    catch = "<script>const errors = []; addEventListener('error', (event) => errors.push(event.message));</script>"
    source = source.replace("<body>", "<body>" + catch).replace("</body>", _USE + "</body>")
    (tmp_path / "used.html").write_text(source, encoding="utf-8")
    page = dom(tmp_path / "used.html")
    seen = json.loads(dict(page.tags)["html"]["data-seen"] or "")
    assert seen["errors"] == []
    window = Window(made[0])
    assert seen["looking"] == seen["again"] == window.tokens[-1].text
    assert seen["asker"] == window.tokens[1].text
    assert seen["pressed"] == 1
    for index, weight in enumerate(window.patterns()[0][0][1]):
        assert f"{window.tokens[index].text} {percent(weight / 1000)}" in seen["looks"]
    assert seen["which"] == "head 2"
    assert seen["heat"] == [(weight + 5) // 10 for row in window.patterns()[1][2] for weight in row]
    exact = probabilities(made[0].logits, 2.0)
    for one, shown in zip(made[0].next.top, seen["turned"], strict=False):
        assert float(shown.rstrip("%")) == pytest.approx(100 * exact[one.id].item(), rel=0.02)
    assert seen["back"]
