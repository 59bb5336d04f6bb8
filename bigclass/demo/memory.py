"""Peak memory of one call: above what stood before it, less what it hands back.

    extra = peak during the call - memory before the call - bytes of the tensors it returns

On CUDA the caching allocator knows all three. On a CPU only the kernel knows, through the process's resident high-water mark, so the
call runs in a fresh child process, where nothing else allocates. A high-water mark never falls, and imports or the making of inputs
may have left it above the memory now in use; the call would then hide below it. So the child first allocates a ballast as large as
the mark itself: memory in use is now at the mark, and each further byte raises it.
"""

import ctypes
import multiprocessing
import platform
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

# Does all that must not count (imports, warm-up, inputs) and returns the call to be measured,
# which in turn returns the tensors its caller would keep.
Prepare = Callable[..., Callable[[], Iterable[torch.Tensor]]]


def peak_extra_bytes(prepare: Prepare, *args: object, device: torch.device | str = "cpu") -> int | None:
    """Peak bytes that `prepare(*args)()` needs beyond its inputs and the tensors it returns.

    Args:
        prepare: does all that must not count and returns the call; importable (not a lambda), since a child may have to import it.
        *args: handed to `prepare`; picklable.
        device: where the call allocates. On the CPU it runs in a child process, on CUDA in this one.

    Returns:
        The bytes, or None on a device or system where they cannot be measured.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_extra(prepare(*args), device)
    if device.type != "cpu" or resident_peak() is None:
        return None
    # An executor, not a bare Process: it raises what the child raised, and does not hang if the child is killed for its memory.
    with ProcessPoolExecutor(max_workers=1, mp_context=_fresh_processes()) as executor:
        return executor.submit(_resident_extra, prepare, args, torch.get_num_threads()).result()


def resident_peak() -> int | None:
    """High-water mark of this process's resident memory, in bytes; None where the system does not tell."""
    if sys.platform == "linux":
        # Not getrusage: there a child starts with the mark of the process that spawned it.
        match = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else None
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _fresh_processes() -> BaseContext:
    """Children that have allocated nothing yet. Where there are fork servers one imports this package once for all of them (4 s)."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bigclass"])
    return context


def _resident_extra(prepare: Prepare, args: tuple[object, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    _return_freed_memory()
    call = prepare(*args)
    ballast = torch.ones(_known_peak(), dtype=torch.uint8)  # ones, for pages count only once written
    before = _known_peak()
    returned = _bytes(call())
    extra = _known_peak() - before - returned
    del ballast  # held until here, or the call would reuse its pages
    return max(extra, 0)


def _return_freed_memory() -> None:
    """Have glibc map each tensor on its own and unmap it when freed.

    By itself it keeps freed blocks of up to 32 MiB for reuse, and which of them the call then finds is a matter of luck: the figures
    of one loss layer differed by 60 MiB. Other C libraries have no such knob.
    """
    if platform.libc_ver()[0] == "glibc":
        m_mmap_threshold, smallest_own_map = -3, 64 * 1024
        ctypes.CDLL(None).mallopt(m_mmap_threshold, smallest_own_map)


def _known_peak() -> int:
    peak = resident_peak()
    assert peak is not None, "the parent checked that this system tells the peak"
    return peak


def _cuda_extra(call: Callable[[], Iterable[torch.Tensor]], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    returned = _bytes(call())
    torch.cuda.synchronize(device)
    return max(torch.cuda.max_memory_allocated(device) - before - returned, 0)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
