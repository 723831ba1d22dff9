"""Block sizes small enough that short sequences have many blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.blocks import BackwardBlocks, Block, ForwardBlocks


def small_blocks(chunk: int, splits: int | None = None, **options: Any) -> Callable[..., Any]:
    """Stands in for `pallas_kernels.blocks.choose`: every kernel has blocks of 16 and `options`."""
    block = Block(slots=16, walk=16, own=16, **options)
    forward = ForwardBlocks(chunk=chunk, splits=splits, states=block, outputs=block)
    names = [field.name for field in dataclasses.fields(BackwardBlocks)]
    backward = BackwardBlocks(**dict.fromkeys(names, block))
    return lambda *_: (forward, backward)
