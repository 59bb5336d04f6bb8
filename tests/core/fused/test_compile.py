"""The fused kernels, compiled for each architecture without a GPU: nothing spills, and tiles use the units they were made for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernels

pytest.importorskip("triton", reason="Triton is not installed")

KIB = 1 << 10
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB}  # CUDA C++ Programming Guide, technical specifications
UNITS = {"sm_80": "mma_sync", "sm_90": "wgmma", "sm_100": "tcgen05"}
LOADS = {"sm_80": "cp_async", "sm_90": "tma", "sm_100": "tma"}

# Registers are the recipes' affair: nearly all for bf16, the ends of the range for fp32 (stored products are fp32 whatever the operands);
# fp16 differs in one instruction of the product. Each recipe stands somewhere.
ELSEWHERE = {
    "fp16": ("focal", "hinge cap"),
    "fp32": ("poly", "asymmetric dense", "stored asymmetric", "stored asymmetric dense", "stored curricular", "stored 4 centres"),
}
RECIPES: dict[str, tuple[str, ...]] = {
    "bf16": tuple(name for name in kernels.RECIPES if not any(name in names for names in ELSEWHERE.values())),
    "fp16": ("ce", "entropy", *ELSEWHERE["fp16"]),
    "fp32": ("ce", "bias smoothing", "entropy bias cap", "given", "probabilities weights bias cap", "stored", *ELSEWHERE["fp32"]),
}
WIDTHS = (64, 768, 2304, 4096, 4608)  # of models; a run-time argument, so they share their binaries
UNALIGNED = (70,)

every_arch = pytest.mark.parametrize("arch", SHARED)


def built(arch: str, dtype: str, features: tuple[int, ...], recipes: tuple[str, ...], *options: str) -> list[dict]:
    """The binaries, made in a process of their own: this one has Triton's interpreter."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--arch", arch, "--dtype", dtype, "--features", *map(str, features), "--json"]
    run = subprocess.run(
        [*command, *options, "--recipe", *recipes],
        cwd=Path(__file__).parents[3],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode in (0, 1), run.stderr  # 1: something spills, which is for the tests to say
    rows = json.loads(run.stdout.splitlines()[-1])["kernels"]
    assert {row["kernel"] for row in rows} == {"fold", "merge", "gradient", "read_picks", "add_picks"}
    assert {row["arch"] for row in rows} == {arch} and all(row["binary"]["instructions"] for row in rows)
    assert all(row["features"] == list(features) for row in rows)
    return rows


def named(row: dict) -> str:
    return f"{row['recipe']}: {row['kernel']} {row['tile']}"


def check_size(arch: str, rows: list[dict]) -> None:
    """Zero stack, zero spills, no more shared memory than there is."""
    assert {named(row): row["binary"] for row in rows if row["binary"]["stack"] or row["binary"]["spills"]} == {}
    assert {named(row): row["binary"]["shared"] for row in rows if row["binary"]["shared"] > SHARED[arch]} == {}


@every_arch
@pytest.mark.parametrize("dtype", RECIPES)
def test_nothing_spills_and_tiles_use_the_units_of_their_architecture(arch, dtype):
    rows = built(arch, dtype, WIDTHS, RECIPES[dtype])
    check_size(arch, rows)
    tiles = [row for row in rows if row["kernel"] in ("fold", "gradient") and not row["recipe"].startswith("stored")]
    for unit in (UNITS[arch], LOADS[arch]):
        assert [named(row) for row in tiles if not row["binary"][unit]] == []


@every_arch
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_nothing_spills_where_descriptors_cannot_address_the_rows(arch, dtype):
    check_size(arch, built(arch, dtype, UNALIGNED, ("entropy", "two pairs", "given", "probabilities weights bias cap")))


@every_arch
def test_nothing_spills_where_fp32_products_are_plain_arithmetic(arch):
    rows = [row for d in (4096, *UNALIGNED) for row in built(arch, "fp32", (d,), ("ce", "columns", "entropy bias cap"), "--ieee")]
    check_size(arch, rows)
    units = {named(row) for row in rows if any(row["binary"][unit] for unit in UNITS.values())}
    assert units == set()
