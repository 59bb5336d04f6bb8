"""Fresh memory on Linux CPUs, and a work buffer kept between calls.

A tensor's pages come from the kernel one by one, when first written. Where that happens inside a GEMM, or in a parallel fill, the
faults of several threads get in one another's way: 65 MB cost 80 to 100 ms on two cores of an EPYC 9004 (Linux 6), beside 1.1 s for the
whole step. Asking for all pages at once takes 20 ms, for 2 MiB pages 6 ms. Nothing here changes a value; where the kernel
does not know a request (madvise's MADV_POPULATE_WRITE is of Linux 5.14) it is as if it had not been made.

The largest work buffer of a call is kept for the next one (`borrow`, `give_back`), its pages marked free (MADV_FREE, Linux 4.5): the kernel
takes them when memory runs short, and as long as it does not, the next call finds them without a fault. A process holds at
most one such buffer, of at most 256 MiB; elsewhere than on Linux it holds none.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import lru_cache

import torch
from torch import Tensor

_SMALLEST = 4 << 20  # bytes below which a tensor is not worth the calls
_LARGEST = 256 << 20  # bytes above which a buffer is not kept
_PAGE = 4096
_MADV_FREE, _MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 8, 14, 23

_shelf: list[Tensor] = []  # at most one buffer
_lock = threading.RLock()  # a collection inside `borrow` may free a pool, which gives back


@lru_cache(maxsize=1)
def _madvise():
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function


def _advise(t: Tensor, *requests: int) -> bool:
    """Make the requests for the whole pages of t; False as soon as one fails."""
    madvise = _madvise()
    if madvise is None:
        return False
    start = -(-t.data_ptr() // _PAGE) * _PAGE
    length = (t.data_ptr() + t.numel() * t.element_size()) // _PAGE * _PAGE - start
    return all([madvise(start, length, request) == 0 for request in requests])


def _counts(like: Tensor, size: int) -> bool:
    return like.device.type == "cpu" and size >= _SMALLEST and type(like) in (Tensor, torch.nn.Parameter)


def fresh(like: Tensor, shape: torch.Size | int, dtype: torch.dtype, *, zeros: bool = False) -> Tensor:
    """`like.new_empty(shape, dtype)` whose pages are there. zeros: filled with zeros, after that: its pages are then large ones."""
    t = like.new_empty(shape, dtype=dtype)
    if _counts(t, t.numel() * t.element_size()):
        _advise(t, _MADV_HUGEPAGE, _MADV_POPULATE_WRITE)
    return t.zero_() if zeros else t


def borrow(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """At least `count` elements, their content undefined: the kept buffer if it is free and large enough, else a fresh one."""
    size = -(-count * dtype.itemsize // 8) * 8
    if not _counts(like, size):
        return like.new_empty(count, dtype=dtype)
    with _lock:
        if _shelf and _shelf[0].numel() >= size:
            return _shelf.pop().view(dtype)
    return fresh(like, size, torch.uint8).view(dtype)


def give_back(t: Tensor) -> None:
    """End of a loan: nothing may read t, or a view of it, any more. The larger of t and what is kept already stays."""
    size = t.numel() * t.element_size()
    if not _counts(t, size) or size % 8 or size > _LARGEST or not _advise(t, _MADV_FREE):
        return
    t = t.view(torch.uint8)
    with _lock:
        if not _shelf:
            _shelf.append(t)
        elif _shelf[0].numel() < t.numel():
            _shelf[0] = t
