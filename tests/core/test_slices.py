"""Each rank reads its slices of the files, of every family, and no more of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.core.build import new_part, new_transformer
from gptcli.core.checkpoint import load_weights
from gptcli.errors import UsageError
from gptcli.spec.config import read_config
from gptcli.spec.match import disk_layout, match_folder
from gptcli.spec.split import Share
from tests.conftest import GOLDEN

CPU = torch.device("cpu")
FOLDERS = sorted(file.parent for file in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_slices_are_those_of_the_whole(folder: Path, ranks: int) -> None:
    config = read_config(folder)
    try:
        shares = [Share(config, rank, ranks) for rank in range(ranks)]
    except UsageError:
        assert config.heads % ranks or (config.kv_heads % ranks and ranks % config.kv_heads)
        return
    matched = match_folder(folder, config)
    with torch.device("meta"):
        whole = new_transformer(config)
    every = load_weights(whole, matched, device=CPU, dtype=torch.float32)
    wanted = dict(whole.named_parameters())
    by_turns = {name for entry in disk_layout(config).values() if entry.turns > 1 for name, _ in entry.parts}
    for share in shares:
        part = new_part(share)
        taken = load_weights(part, matched, device=CPU, dtype=torch.float32, share=share)
        found = dict(part.named_parameters())
        assert found.keys() == {tensor.name for tensor, _ in share.tensors()}
        size = 0
        for tensor, slice_ in share.tensors():
            held = wanted[tensor.name]
            if slice_.dim is not None:
                held = held.narrow(slice_.dim, slice_.start, slice_.stop - slice_.start)
            assert torch.equal(found[tensor.name], held), tensor.name
            # Query, key and value by turns lie so close that each is read with the others.
            size += held.numel() * (3 if tensor.name in by_turns else 1)
        stored = every // sum(info.parameters for _, info in matched.values())  # bytes of a number
        assert taken == stored * size
        assert taken < every


def test_a_slice_of_columns_is_memory_of_its_own(tiny_folder: Path) -> None:
    """A view would keep the pages of all others."""
    config = read_config(tiny_folder)
    share = Share(config, 1, 2)
    part = new_part(share)
    load_weights(part, match_folder(tiny_folder, config), device=CPU, dtype=torch.float32, share=share)
    for name in ("attention.output", "mlp.down"):
        weight = part.blocks[0].get_submodule(name).get_parameter("weight")
        assert weight.is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes
