"""``gptcli models prepare``: build what makes a model fast here, and check that it computes the same."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import typer

from gptcli.cli import options
from gptcli.cli.caches import native_cache
from gptcli.cli.models import Name
from gptcli.cli.out import Output, harmless
from gptcli.errors import CheckError, ResourceError

if TYPE_CHECKING:
    from gptcli.core.build import Model
    from gptcli.core.native import Comparison, NativeStep


def prepare(
    ctx: typer.Context,
    name: Name = None,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    offline: options.Offline = False,
) -> None:
    """Build once what makes a model fast on this machine.

    It compiles the native step for CPUs, some seconds of a C++ compiler's work (CXX, c++, g++ or clang++), and compares
    it with PyTorch on the model. Whatever fits is used from then on, whichever the model. Exit 6 if they differ.
    """
    out: Output = ctx.obj
    from gptcli.cli.opening import open_for_inference

    loaded = open_for_inference(name or model, out, device="cpu", dtype=dtype, threads=threads)
    from gptcli.core import native, native_build, runtime
    from gptcli.core.stepping import pick_threads

    if reason := native.why_not(loaded.transformer):
        raise ResourceError(f"there is no native step for {loaded.name}: {reason}", "PyTorch's is used")
    library = native_build.build(native_cache())
    threads_used = pick_threads(loaded.transformer, runtime.threads())
    step = native.NativeStep(library, loaded.transformer, threads_used)
    compared = native.compare(step, loaded.transformer)
    step.close()
    if out.json:
        out.record(
            {
                "model": loaded.name,
                "library": str(library.file),
                "compiler": library.compiler,
                "build_seconds": library.seconds,
                "features": library.features,
                "threads": step.threads,
                "device": str(loaded.device),
                "dtype": loaded.dtype_name,
                "packed_bytes": step.packed_bytes,
                "checked_tokens": compared.tokens,
                "difference": compared.difference if math.isfinite(compared.difference) else None,
                "limit": compared.limit,
                "ok": compared.ok,
            }
        )
    else:
        _tell(out, loaded, step, compared)
    if not compared.ok:
        library.file.unlink(missing_ok=True)
        raise CheckError(
            f"the native step differs from PyTorch's by {compared.difference:.2g} of the logits' spread, and rounding "
            f"explains {compared.limit:g}: it was deleted",
            f"PyTorch's step is used; please report the CPU and the compiler, {library.compiler}",
        )


def _tell(out: Output, loaded: Model, step: NativeStep, compared: Comparison) -> None:
    library = step.library
    when = "was there" if library.seconds is None else f"built in {library.seconds:.1f} s"
    facts = {
        "model": f"{loaded.name}, {loaded.dtype_name}: {step.packed_bytes / 1e6:,.1f} MB of packed weights",
        "native step": f"{library.features}; threads: {step.threads}",
        "library": f"{when} by {library.compiler}: {library.file}",
        "check": f"{compared.tokens} tokens, off by {compared.difference:.1g} of the logits' spread "
        f"(rounding explains {compared.limit:g})",
    }
    for label, value in facts.items():
        out.data(f"{out.style(f'{label:<11}', 'bold')} {harmless(value)}")
