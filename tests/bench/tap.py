"""What the view inside costs who does not look: the model without a tap beside a model that has none at all.

    python tests/bench/tap.py [--model weights/fable] [--tokens 64] [--rounds 9]

The twin is ``core/model.py`` itself with every ``if tap:`` taken out of its source. Compared are the graphs that
``torch.compile`` captures of both, operation by operation, and the time of a decode step, in turn. What a tap costs
who does look stands beside them.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import time
import types
from pathlib import Path
from typing import Any

from common import ROOT, in_turn, report, summary

sys.path.insert(0, str(ROOT))


class _Untapped(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> Any:
        if ast.unparse(node.test) == "tap" and not node.orelse:
            return None
        return self.generic_visit(node)


def without_taps(module: types.ModuleType) -> types.ModuleType:
    """The same module, made from its source without what is done for a tap."""
    tree = ast.fix_missing_locations(_Untapped().visit(ast.parse(inspect.getsource(module))))
    assert "tap(" not in ast.unparse(tree)
    twin = types.ModuleType("untapped")
    sys.modules["untapped"] = twin
    exec(compile(tree, "untapped", "exec"), twin.__dict__)
    return twin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "weights" / "fable")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    import torch

    from gptcli.core import model as module
    from gptcli.core.build import open_model
    from gptcli.core.decode import Decoder
    from gptcli.text.tokenizer import Tokenizer

    ours = open_model(options.model, Tokenizer.from_folder(options.model), device="cpu").transformer
    with torch.device("meta"):
        twin = without_taps(module).Transformer(ours.config)
    twin.load_state_dict(ours.state_dict(), assign=True)
    twin.tie()
    twin.eval().requires_grad_(False)
    prompt = torch.arange(32)[None]

    def graph(transformer: Any) -> list[str]:
        """Every operation that is captured, in order; more than one graph would be a break."""
        graphs = []

        def backend(captured: Any, inputs: Any) -> Any:
            graphs.append([f"{node.op} {node.target}" for node in captured.graph.nodes if node.op == "call_function"])
            return captured.forward

        torch._dynamo.reset()
        torch.compile(transformer, backend=backend, fullgraph=True)(prompt)
        assert len(graphs) == 1
        return graphs[0]

    def steps(transformer: Any) -> float:
        decoder = Decoder(transformer)
        token = decoder.prefill(prompt.tolist(), 32 + options.tokens).argmax(-1)
        start = time.perf_counter()
        for _ in range(options.tokens):
            token = decoder.step(token).argmax(-1)
        return options.tokens / (time.perf_counter() - start)

    @torch.inference_mode()
    def looked_at() -> float:
        start = time.perf_counter()
        for _ in range(8):
            ours(prompt, tap=lambda name, value: None)
        looking = time.perf_counter()
        for _ in range(8):
            ours(prompt)
        return (looking - start) / (time.perf_counter() - looking)

    things = {"no tap": lambda: steps(ours), "none in the source": lambda: steps(twin)}
    for measure in things.values():
        measure()
    measured = in_turn(things, options.rounds)
    # After the clock: what has been captured once is called a little slower, ours or not.
    graphs = {name: graph(transformer) for name, transformer in (("ours", ours), ("twin", twin))}
    same = graphs["ours"] == graphs["twin"]
    medians = {name: summary(values)["median"] for name, values in measured.items()}
    cost = summary([looked_at() for _ in range(options.rounds)])["median"]
    ratio = medians["no tap"] / medians["none in the source"]
    count = len(graphs["ours"])
    rows = {
        "compiled graph": f"{'the same' if same else 'DIFFERENT'} {count} operations, no break",
        **{name: f"{value:8.1f} tokens/s" for name, value in medians.items()},
        "ratio": f"{ratio:.3f}",
        "a forward of 32 tokens with a tap": f"{cost:.2f} x the time",
    }
    result = {"same_graph": same, "operations": count, "ratio": ratio, "tapped_cost": cost}
    report(f"tap, {options.model.name}", rows, result | {"tokens_per_second": measured})
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
