"""Logits in 16 bits, saved by the forward for the backward.

A fold of log-sum-exps makes e_ij = exp(s_ij - m_it) of every logit anyway, with m_it the largest of row i in its tile t. It is written as

    code_ij = fp16(2^15 e_ij)        N x C x 2 bytes        m_it        N x C / WIDTH x 4 bytes

and the backward reads p_ij = 2^-15 code_ij exp(m_it - LSE_i): no product is made a second time, and no exponential. In place: G_ij, of 16
bits too, is written where code_ij was, and then multiplied where it lies. Of all exact gradients this one moves the fewest bytes a logit,

    write code 2, read it 2, write G 2, read G for two products 4        10; three bare products alone move 6

against 18 where logits are kept in fp32 (written, folded and read again, 4 each, and G), and it needs no fp32 dw: each slab's dw is one
product over all rows. On an H200 (4.3 TB/s) the 4 bytes more take 1 ms of 2^30 logits, 3 % of three passes at D = 4096.

What is lost: relative to e_ij 2^-12 (half an ulp of fp16) down to e_ij = 2^-29, then up to 2^-40 absolutely (of a row that has that much
below its largest logit in the tile). G, p_ij times what reached row i, is rounded to bf16 afterwards, by 2^-9: together 1.01 times that
error. So this is for products in bf16; of fp16's own 2^-12 it would make 1.4 times, of fp32's far more.
The picks leave no trace where the fold excludes them, and so do not spoil m: a row that is sure of its class keeps all others' digits.

Beside the log-sum-exp there may be folds whose slopes do not depend on the logits (label smoothing), and one map whose slope its output
tells (a soft cap from 8 on), but not both: under a map the smallest logits would be needed, too, which have no code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigclass.core.engines.tiles import Span

ALIGNED = 128  # classes: rows of codes are whole tiles wide, so that a last, ragged one can be read and written without a mask


@dataclass(frozen=True)
class Saved:
    """codes: (N, C') fp16, rows ALIGNED. references: (tiles, N) fp32, contiguous. width: classes of a tile."""

    codes: Tensor
    references: Tensor
    width: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], classes: int, width: int) -> Saved:
        """From `saved_shapes` tensors, for the first so many classes."""
        assert ALIGNED % width == 0, f"rows of {ALIGNED} classes are no whole tiles of {width}"
        codes, references = tensors
        return cls(codes[:, :classes], references, width)

    @property
    def classes(self) -> int:
        return self.codes.shape[1]

    @property
    def whole_tiles(self) -> Tensor:
        """codes to the end of the last tile."""
        return self.codes.as_strided((self.codes.shape[0], -(-self.classes // self.width) * self.width), self.codes.stride())

    def rows(self, count: int) -> Saved:
        """The same room for fewer rows."""
        tiles = self.references.shape[0]
        return Saved(self.codes[:count], self.references.view(-1)[: tiles * count].view(tiles, count), self.width)

    def cut(self, c: Span) -> Saved:
        """Classes c, which begin with a tile."""
        assert c.start % self.width == 0, f"saved logits are cut between tiles of {self.width} classes, not at {c.start}"
        return Saved(self.codes[:, c.start : c.stop], self.references[c.start // self.width : -(-c.stop // self.width)], self.width)


def saved_shapes(rows: int, classes: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of codes and references."""
    return (rows, -(-classes // ALIGNED) * ALIGNED), (-(-classes // width), rows)


def empty(like: Tensor, rows: int, classes: int, width: int) -> list[Tensor]:
    """Room for codes and references on like's device."""
    codes, references = saved_shapes(rows, classes, width)
    return [like.new_empty(codes, dtype=torch.float16), like.new_empty(references, dtype=torch.float32)]
