"""The hardware and the versions: what a figure is worth nothing without."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
GIB = 1 << 30

PACKAGES = ("torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine, as it goes into the JSON file."""
    machine = {
        "name": hardware_name(device),
        "device": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": _units("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
        "fp16_units": _units("avx512_fp16", "amx_fp16", "fp16_arith"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "runtime": torch.version.cuda or torch.version.hip,
            "driver": _driver(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return machine


def describe_versions() -> dict[str, str | None]:
    """Versions of python and of every package that competes; None where it is not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def hardware_name(device: torch.device) -> str:
    """The name of what computes, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _driver() -> str | None:
    """The GPU driver's version, None where nothing tells."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _field("/proc/meminfo", "MemAvailable")


def _field(path: str, name: str) -> int | None:
    """A `Name:   123 kB` line of a /proc file, in bytes."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cpu_name() -> str:
    capabilities = _cpu_capabilities()
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


def _units(*names: str) -> bool | None:
    """Whether the CPU has any of the named units, None where torch cannot tell."""
    capabilities = _cpu_capabilities()
    if not capabilities:
        return None
    return any(bool(capabilities.get(name)) for name in names)


def _cpu_capabilities() -> dict[str, Any]:
    query = getattr(torch.cpu, "get_capabilities", None)  # not there before torch 2.12
    return dict(query()) if query else {}


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation, as the allocators of training runs do (jemalloc, tcmalloc, CUDA's own).

    By itself it hands blocks above 32 MiB back to the system, whose page faults then outweigh what is measured: on a virtual machine the
    dense loss took twice its time. Returns whether this system has the knobs.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(m_mmap_threshold, 1 << 30) and libc.mallopt(m_trim_threshold, (1 << 31) - 1))
