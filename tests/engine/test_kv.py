"""The tensors behind the block pool."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import kv
from engine.kv import KVGeometry, KVPool, LayerGeometry, free_memory
from prefixcache.errors import FailedPrecondition, InvalidArgument

WIDE, NARROW = LayerGeometry(2, 8, 8), LayerGeometry(1, 4, 6)
MIXED = KVGeometry((WIDE, NARROW, WIDE), torch.float32)


def test_bytes_count_keys_and_values_of_all_layers() -> None:
    """Layers of different shape and keys wider than values are counted as they are."""
    assert MIXED.bytes_per_token == 4 * (2 * 2 * 16 + 10)
    assert MIXED.bytes_per_block(16) == 16 * MIXED.bytes_per_token
    assert KVGeometry(MIXED.layers, torch.bfloat16).bytes_per_token == MIXED.bytes_per_token // 2


def test_blocks_in_memory() -> None:
    """Whole blocks count; less than one is a mistake that is explained."""
    block = MIXED.bytes_per_block(16)
    assert MIXED.blocks_in(3 * block + 1, 16) == 3
    assert MIXED.blocks_in(block, 16) == 1
    with pytest.raises(InvalidArgument, match=f"does not hold a single block: 16 tokens .* take {block} bytes"):
        MIXED.blocks_in(block - 1, 16)


def test_what_is_written_is_seen_in_place() -> None:
    """Views of adjacent slots show what is written later, in the right layer, without copying."""
    pool = KVPool(MIXED, blocks=6, block_size=4)
    views = pool.views(5, 9)
    for layer, geometry in enumerate(MIXED.layers):
        keys = torch.randn(geometry.kv_heads, 3, geometry.key_dim)
        values = torch.randn(geometry.kv_heads, 3, geometry.value_dim)
        pool.write(layer, torch.tensor([8, 20, 5]), keys, values)
        for (seen, written), whole in zip(
            zip(views[layer], (keys, values), strict=True), (pool.keys[layer], pool.values[layer]), strict=True
        ):
            assert seen.shape == (geometry.kv_heads, 1, 4, written.shape[2])
            assert torch.equal(seen[:, 0, 3], written[:, 0]) and torch.equal(seen[:, 0, 0], written[:, 2])
            assert torch.equal(whole[:, 20], written[:, 1])
            assert seen.data_ptr() == whole[:, 5:].data_ptr()


def test_gathering_copies_any_slots() -> None:
    """In the order asked for, any number of times each; the next call may reuse the memory."""
    pool = KVPool(MIXED, blocks=6, block_size=4)
    for tensor in [*pool.keys, *pool.values]:
        tensor.copy_(torch.randn_like(tensor))
    for slots in ([3, 20, 3, 7], list(range(24)), [5]):
        for layer in range(3):
            keys, values = pool.gather(layer, torch.tensor(slots))
            assert torch.equal(keys, pool.keys[layer][:, slots])
            assert torch.equal(values, pool.values[layer][:, slots])


def test_copying_a_block_copies_its_valid_slots_in_all_layers() -> None:
    """The slots behind them keep what they had."""
    pool = KVPool(MIXED, blocks=6, block_size=4)
    for tensor in [*pool.keys, *pool.values]:
        tensor.copy_(torch.randn_like(tensor))
    before = [tensor.clone() for tensor in [*pool.keys, *pool.values]]
    pool.copy_block(source=4, target=1, tokens=3)
    for tensor, old in zip([*pool.keys, *pool.values], before, strict=True):
        assert torch.equal(tensor[:, 4:7], old[:, 16:19])
        assert torch.equal(tensor[:, 7], old[:, 7])
        assert torch.equal(tensor[:, 8:], old[:, 8:]) and torch.equal(tensor[:, :4], old[:, :4])


def test_too_much_memory_is_explained() -> None:
    """A pool larger than the address space names its size and says what to do."""
    with pytest.raises(FailedPrecondition, match=r"cannot be had on cpu .* give less cache memory"):
        KVPool(MIXED, blocks=2**50, block_size=16)


def test_free_memory_of_this_machine() -> None:
    """More than nothing, less than a petabyte."""
    assert 2**20 < free_memory("cpu") < 2**50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_free_memory_of_the_gpu() -> None:
    """The driver's own figure."""
    assert 0 < free_memory("cuda") <= torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("version", [1, 2])
def test_control_group_limits(tmp_path: Path, version: int) -> None:
    """The limit, less what is used and cannot be dropped; no limit means no answer."""
    if version == 2:
        limit, usage, statistics = (tmp_path / f"memory.{name}" for name in ("max", "current", "stat"))
    else:
        (tmp_path / "memory").mkdir()
        limit, usage, statistics = (
            tmp_path / "memory" / f"memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")
        )
    assert kv._allowed(tmp_path) == []
    limit.write_text("1000\n")
    usage.write_text("700\n")
    statistics.write_text("anon 500\ninactive_file 150\n")
    assert kv._allowed(tmp_path) == [450]
    usage.write_text("5000\n")
    assert kv._allowed(tmp_path) == [0]
    limit.write_text("max\n")
    assert kv._allowed(tmp_path) == []
