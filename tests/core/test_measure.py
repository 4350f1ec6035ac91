"""What is behind ``gptcli bench``: limits, weights that a step reads, the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptcli.core import measure
from gptcli.core.build import random_model
from gptcli.core.measure import Figure, Machine, weight_bytes
from gptcli.core.runtime import DTYPES
from gptcli.spec.config import ModelConfig
from gptcli.spec.params import count_params

CONFIG = ModelConfig("gpt2", 50, 16, 2, 8, 2, 2, 4, 32)


def test_the_limit_is_the_slower_of_memory_and_arithmetic() -> None:
    machine = Machine(bytes_per_second=10.0, flops_per_second=1000.0, flops_dtype="float32")
    figure = Figure("decode", {}, (3.0, 1.0, 2.0), tokens=6, moved_bytes=20.0, flops=1000.0)
    assert figure.summary() == (2.0, 1.0, 3.0)
    assert figure.limit(machine) == (2.0, "memory")
    assert replace(figure, flops=5000.0).limit(machine) == (5.0, "arithmetic")
    assert replace(figure, compared_seconds=0.5, compared="its like").limit(machine) == (0.5, "its like")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_reads_all_weights_but_the_tables_that_are_looked_up(tied: bool, dtype: str) -> None:
    config = replace(CONFIG, tied=tied)
    model = random_model(config, 0).to(DTYPES[dtype])
    if tied:
        model.tie()
    looked_up = 16 * 8 if tied else 16 * 8 + 50 * 8
    assert weight_bytes(model) == (count_params(config).total_stored - looked_up) * DTYPES[dtype].itemsize


def test_what_a_buffer_holds_counts_as_well() -> None:
    """Quantized matrices are no parameters."""
    model = random_model(CONFIG, 0)
    before = weight_bytes(model)
    model.blocks[0].register_buffer("scale", torch.ones(10))
    assert weight_bytes(model) == before + 40


def test_the_machine_is_measured() -> None:
    found = measure.measure_machine(torch.device("cpu"), torch.float32)
    assert found.flops_dtype == "float32"
    assert 1e8 < found.bytes_per_second < 1e14
    assert 1e8 < found.flops_per_second < 1e16
    better = found.better_of(Machine(1e15, 1.0, "float32"))
    assert better == Machine(1e15, found.flops_per_second, "float32")
