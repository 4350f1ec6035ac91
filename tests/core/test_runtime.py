"""Devices, dtypes, threads and seeds, on a machine of any kind: what it has is told to the code under test."""

from __future__ import annotations

import pytest
import torch

from gptcli.core import runtime
from gptcli.errors import ResourceError, UsageError

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("has", "wanted"),
    [({}, "cpu"), ({"mps": True}, "mps"), ({"cuda": 2}, "cuda:0"), ({"cuda": 1, "mps": True}, "cuda:0")],
)
def test_auto_takes_the_best_there_is(monkeypatch: pytest.MonkeyPatch, has: dict[str, int], wanted: str) -> None:
    machine(monkeypatch, **has)  # type: ignore[arg-type]
    assert runtime.pick_device() == runtime.pick_device("auto") == torch.device(wanted)


def test_devices_that_are_there_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=2, mps=True)
    assert runtime.pick_device("cpu").type == "cpu"
    assert runtime.pick_device("mps").type == "mps"
    assert runtime.pick_device("cuda").type == "cuda"
    assert runtime.pick_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    "name", ["gpu", "", "CPU", "cuda:x", "cuda:-1", "cuda:1.5", "cpu:1", "mps:0", "tpu:0", "cpu:", "cuda:", "meta"]
)
def test_an_unknown_device_is_wrong_use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    machine(monkeypatch, cuda=2, mps=True)
    with pytest.raises(UsageError, match="there is no device") as caught:
        runtime.pick_device(name)
    assert repr(name) in caught.value.message
    assert "auto, cpu, cuda" in caught.value.hint


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (8, "cuda:99"), (2, "cuda:2")])
def test_a_cuda_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, count: int, name: str) -> None:
    machine(monkeypatch, cuda=count)
    with pytest.raises(ResourceError, match=f"{name} is not there: {count} CUDA") as caught:
        runtime.pick_device(name)
    assert "--device cpu" in caught.value.hint


def test_mps_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(ResourceError, match="mps is not there"):
        runtime.pick_device("mps")


def test_a_named_device_probes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise AssertionError("probed")

    machine(monkeypatch, cuda=1)
    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert runtime.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("stored", "fast_bf16", "wanted"),
    [
        ("float32", True, torch.float32),
        ("float32", False, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float16", True, torch.float32),
        ("float16", False, torch.float32),
        (None, True, torch.float32),
        ("float64", True, torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, stored: str | None, fast_bf16: bool, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(runtime, "has_cpu_bf16", lambda: fast_bf16)
    assert runtime.pick_dtype("auto", stored, CPU) is wanted


@pytest.mark.parametrize(
    ("stored", "native_bf16", "wanted"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float16", False, torch.float16),
    ],
)
def test_auto_dtype_on_cuda(
    monkeypatch: pytest.MonkeyPatch, stored: str, native_bf16: bool, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native_bf16)
    assert runtime.pick_dtype("auto", stored, CUDA) is wanted


def test_named_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_cpu_bf16", lambda: False)
    assert runtime.pick_dtype("bfloat16", "float32", CPU) is torch.bfloat16  # slow, but asked for
    assert runtime.pick_dtype("float32", "bfloat16", CPU) is torch.float32
    assert runtime.pick_dtype("float16", "float32", CUDA) is torch.float16
    assert runtime.pick_dtype("float16", "float32", MPS) is torch.float16


@pytest.mark.parametrize("stored", ["float16", "float32", None])
def test_float16_on_a_cpu_is_wrong_use(stored: str | None) -> None:
    with pytest.raises(UsageError, match="float16") as caught:
        runtime.pick_dtype("float16", stored, CPU)
    assert "bfloat16 or float32" in caught.value.hint


@pytest.mark.parametrize("name", ["", "int8", "fp32", "float64", "Float32"])
def test_an_unknown_dtype_is_wrong_use(name: str) -> None:
    with pytest.raises(UsageError, match="there is no dtype"):
        runtime.pick_dtype(name, "float32", CPU)


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        runtime.set_threads(2)
        assert torch.get_num_threads() == 2
        runtime.set_threads(None)
        assert torch.get_num_threads() == 2
        for count in (0, -1):
            with pytest.raises(UsageError, match=f"--threads {count}"):
                runtime.set_threads(count)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_drawn_seeds_differ_and_are_below_2_to_the_32() -> None:
    seeds = {runtime.draw_seed() for _ in range(100)}
    assert len(seeds) > 90
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
    ],
)
def test_a_gpu_is_known_by_whole_words_of_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, rate: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert runtime.sheet_flops(torch.device("cuda"), torch.bfloat16) == rate
    assert runtime.sheet_flops(torch.device("cuda"), torch.float32) is None
