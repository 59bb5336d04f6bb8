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

ROOT = Path(__file__).parents[3]
KIB = 1 << 10
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB}  # CUDA C++ Programming Guide, technical specifications
UNITS = {"sm_80": "mma_sync", "sm_90": "wgmma", "sm_100": "tcgen05"}
LOADS = {"sm_80": "cp_async", "sm_90": "tma", "sm_100": "tma"}

# Registers are the recipes' affair: nearly all for bf16, the ends of the range for fp32 (stored products are fp32 whatever the operands);
# fp16 differs in one instruction of the product. Each recipe stands somewhere.
ELSEWHERE = {
    "fp16": ("focal", "hinge cap"),
    "fp32": (
        *("poly", "asymmetric dense", "stored bce", "stored siglip", "stored asymmetric", "stored asymmetric dense", "stored curricular"),
        "stored 4 centres",
    ),
}
RECIPES: dict[str, tuple[str, ...]] = {
    "bf16": tuple(name for name in kernels.RECIPES if not any(name in names for names in ELSEWHERE.values())),
    "fp16": ("ce", "entropy", *ELSEWHERE["fp16"]),
    "fp32": (
        *(
            "ce",
            "bias smoothing",
            "entropy bias cap",
            "given",
            "probabilities weights bias cap",
            "stored",
            "contrastive",
            "bce",
            "siglip",
            "curricular",
            "filtered",
        ),
        *ELSEWHERE["fp32"],
    ),
}
WIDTHS = (64, 768, 2304, 4096, 4608)  # of models; a run-time argument, so they share their binaries
UNALIGNED = (70,)  # descriptors cannot address the rows
PLAIN = "--ieee"  # fp32 products by plain arithmetic
AWKWARD = ("filtered", "entropy", "two pairs", "given", "probabilities weights bias cap", "bce", "4 centres", "contrastive 4 picks")
PLAINLY = ("filtered", "columns", "entropy bias cap")
FILTERED = {"zero_picks", "column_norms", "compact", *kernels.PRODUCTS}
KERNELS = {"fold", "merge", "gradient", "read_picks", "add_picks"}
OF_RECIPES = {"filtered": FILTERED, "saved": {"saved_gradient"}, "stored asymmetric": {"drop_picks"}}

# (dtype, features, recipes, options)
Group = tuple[str, tuple[int, ...], tuple[str, ...], tuple[str, ...]]
GROUPS: list[Group] = [
    *[(dtype, WIDTHS, recipes, ()) for dtype, recipes in RECIPES.items()],
    *[(dtype, UNALIGNED, AWKWARD, ()) for dtype in ("bf16", "fp32")],
    *[("fp32", features, PLAINLY, (PLAIN,)) for features in ((4096,), UNALIGNED)],  # last: it sets torch's switch
]


def by_turns(arch: str) -> list[Group]:
    """What of GROUPS is compiled for an architecture whenever tests run. What one dtype shows of a recipe is mostly what another shows:
    where a recipe stands in several, one shows it on this architecture and the next on another."""
    turn = list(SHARED).index(arch)
    chosen: list[Group] = []
    for dtype, features, recipes, options in GROUPS:
        if features == UNALIGNED and not options:
            recipes = tuple(recipes[(turn + (dtype == "fp32")) % 2 :: 2])
        elif features == WIDTHS and dtype == "fp32":
            again = [name for name in recipes if name in RECIPES["bf16"]]
            recipes = tuple(name for name in recipes if name not in again or again.index(name) % len(SHARED) == turn)
        chosen.append((dtype, features, recipes, options))
    return chosen


def left_out(arch: str) -> list[Group]:
    """The rest of GROUPS."""
    rest = [
        (dtype, features, tuple(name for name in recipes if name not in taken[2]), options)
        for (dtype, features, recipes, options), taken in zip(GROUPS, by_turns(arch), strict=True)
    ]
    return [group for group in rest if group[2]]


COMPILE = "import json, sys; from benchmarks.kernels import main; [main(arguments) for arguments in json.loads(sys.argv[1])]"


def built(arch: str, groups: list[Group]) -> list[tuple[Group, list[dict]]]:
    """The binaries of each group, all made in one process of their own: this one has Triton's interpreter."""
    commands = [
        ["--arch", arch, "--dtype", dtype, "--features", *map(str, features), "--recipe", *recipes, *options, "--brief", "--json"]
        for dtype, features, recipes, options in groups
    ]
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(commands)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    made = [json.loads(line)["kernels"] for line in run.stdout.splitlines() if line.startswith('{"triton"')]
    for (dtype, features, recipes, _), rows in zip(groups, made, strict=True):
        assert {row["kernel"] for row in rows} == KERNELS.union(*[OF_RECIPES.get(name, ()) for name in recipes])
        assert {row["recipe"] for row in rows} == set(recipes)
        assert {(row["arch"], row["dtype"]) for row in rows} == {(arch, dtype)} and all(row["binary"]["registers"] for row in rows)
        assert all(row["features"] == list(features) for row in rows)
    return list(zip(groups, made, strict=True))


def check(arch: str, groups: list[Group]) -> None:
    """No stack, no more shared memory than there is; matrix units for all products but those of plain fp32 arithmetic."""
    spilt, too_large, without, wrongly = {}, {}, [], []
    for (dtype, features, _, options), rows in built(arch, groups):
        for row in rows:
            name = f"{dtype} {features} {' '.join(options)} {row['recipe']}: {row['kernel']} {row['tile']}"
            binary = row["binary"]
            if binary["stack"]:
                spilt[name] = binary
            if binary["shared"] > SHARED[arch]:
                too_large[name] = binary
            tile = row["kernel"] in (*kernels.COPIES, *kernels.PRODUCTS) and not row["recipe"].startswith("stored")
            if PLAIN in options:
                wrongly += [name for unit in UNITS.values() if binary[unit]]
            elif tile and features == WIDTHS:
                without += [(name, unit) for unit in (UNITS[arch], LOADS[arch]) if not binary[unit]]
    assert (spilt, too_large, without, wrongly) == ({}, {}, [], [])


@pytest.mark.parametrize("arch", SHARED)
def test_nothing_spills_and_tiles_use_the_units_of_their_architecture(arch):
    check(arch, by_turns(arch))


@pytest.mark.architectures
@pytest.mark.parametrize("arch", SHARED)
def test_nothing_spills_in_the_dtypes_whose_turn_it_is_elsewhere(arch):
    check(arch, left_out(arch))


def test_every_recipe_of_every_group_has_its_turn():
    for i, (_, _, recipes, _) in enumerate(GROUPS):
        assert set(recipes) == {name for arch in SHARED for name in by_turns(arch)[i][2]}
    for arch in SHARED:
        awkward = [recipes for _, features, recipes, options in by_turns(arch) if features == UNALIGNED and not options]
        assert sorted(name for recipes in awkward for name in recipes) == sorted(AWKWARD)


def test_what_spills_is_told_and_the_stack_tells_it_too():
    """The tests above look at the stack alone, which needs no disassembly: a tile that is too large has both."""
    code = (
        "import sys; from benchmarks import kernels; from bigclass.core.engines.fused import launch; "
        "launch.IEEE = launch.Config(64, 64, 16, 8, 2, False, registers=64); sys.exit(kernels.main(sys.argv[1:]))"
    )
    command = ["--arch", "sm_90", "--dtype", "fp32", "--features", "4096", "--recipe", "ce", PLAIN, "--json"]
    run = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    rows = {row["kernel"]: row["binary"] for row in json.loads(run.stdout.splitlines()[-1])["kernels"]}
    assert run.returncode == 1 and rows["fold"]["stack"] and rows["fold"]["spills"] and all(row["instructions"] for row in rows.values())
