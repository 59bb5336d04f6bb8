"""Which engine, which plan, which tiles, how much workspace, and why.

Costs, with 2NCD flops called a pass:

    gradients "forward"     3 passes. Whole rows must be known before their gradients, so logits of `chunk` rows x C classes are kept
                            at once; dw (fp32) is re-read once a chunk. Worth it while a chunk holds enough rows for a GEMM to run well.
    gradients "slabs"       3 passes. Where the loss is a sum over classes of an elementwise term (its row loss is affine in its folds), G
                            of a tile is made with the tile. Classes are the outer loop, as below, and nothing is made twice.
    gradients "saved"       3 to 4 passes. The forward of the fused engine saves logits in 16 bits, of as many classes as the workspace
                            takes, and the backward makes their gradients in place (engines/fused/saved.py); the others' as in "recompute".
    gradients "recompute"   4 passes. Logits exist one tile at a time, in the forward and again in the backward; classes are the outer
                            loop, so dw of a slab is finished before the next begins and needs no fp32 copy of the whole.

A tile is `row_block` x `class_block` logits: big enough for the library's GEMM to run at its rate, small enough for the
elementwise passes to find it in cache (CPU).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from bigclass.core.engines.filter import FILTER_BAND, FILTER_ROWS
from bigclass.core.engines.tail import WAITING
from bigclass.core.errors import ArgumentError
from bigclass.core.folds import PIECE

MIB = 1 << 20

ENGINES = ("auto", "dense", "tiled", "fused")
GRADIENTS = ("auto", "forward", "recompute", "saved")

# A problem whose logits fit here is run dense: below it the tiled engine's fixed cost (about 0.2 ms a call) shows.
# Measured on two cores of an EPYC 9004 with `python -m benchmarks --shapes tiny small cpu`.
DENSE_BYTES = 2 * MIB

# Temporary memory. CPUs: with what a product's threads take (MKL, two of them: 10 MiB) a loss layer stays below 96 MiB. GPUs: enough for
# chunks of full-rate GEMMs at a vocabulary of 128k (by the sizes; not yet measured on one).
DEFAULT_WORKSPACE = {"cpu": 80 * MIB, "other": 1024 * MIB}

# The same with the certified filter, on a CPU: of all passes the one over the kept rows' logits is then what counts, and chunks of 512 rows
# make it at the library's rate (160 rows: 20 % below, on two cores of a Xeon, Sapphire Rapids).
FILTERED_WORKSPACE = 256 * MIB

# Elements of w, and as many of dw and of G, that the filter gathers at once for the kept columns of a block: at most 4 MiB of fp32 each.
GATHERED = 1 << 20

# Rows of a chunk under which its GEMMs lose more than the fourth pass of "recompute" costs.
MIN_CHUNK_ROWS = {"cpu": 128, "other": 1024}

# Elements of a tile. CPU: 11 MiB of fp32, which stay in the last-level cache between the GEMM and the folds (best of 0.5 to 22 Mi elements
# at N=2048, C=32000, D=512 on two cores of an EPYC 9004). GPU: full GEMM rate.
TILE_ELEMENTS = {"cpu": 11 << 18, "other": 1 << 24}
CPU_ROW_BLOCK = 2048

# The same for "slabs": elementwise losses take several temporaries of a tile (`SLAB_BUFFERS` of them are planned for; autograd, for a
# loss without slopes of its own, takes up to 20).
SLAB_TILE = {"cpu": 1 << 19, "other": 1 << 24}
SLAB_BUFFERS = 8

# Tile-sized work buffers of engines/pair.py: p, q, r, b, one for the divergence, t and s where tiles are made again.
PAIR_BUFFERS = 7

# Elements of a slab of G in the fused engine: 4096 classes at 8192 rows, 64 MiB of bf16 (by the traffic of dx; not measured yet).
SLAB_ELEMENTS = 1 << 25

# Flops that a GPU's products make while its memory moves one byte: 790 TFLOP/s in bf16 over 4.3 TB/s, of an H200; those of an A100 and of
# a B200 are within a third of it by their datasheets, and no choice below hangs on that. fp32 products (three of tf32) take six times as
# long.
FLOPS_PER_BYTE = 184
WIDE_PRODUCTS = 6

# Bits of a logit that is saved: its code of 16, and a share of its tile's references. And the bytes of it that are moved beyond the three
# products' own: its code is written by the forward in place of a product's logit, read, and G written.
SAVED_BITS = 17
SAVED_BYTES = 4

# The epilogue of a fold or a gradient, some 15 instructions a logit, in bytes, if nothing hides it (132 multiprocessors that issue 128 at
# 1.7 GHz).
EPILOGUE_BYTES = 2

# Classes are saved in whole blocks of so many, in so many steps from none to all: few, for a compiled graph is made for one of them.
SAVED_CLASSES = 1024
SAVED_STEPS = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user may ask of the planner (`planning` sets it).

    workspace: bytes of temporary memory beyond inputs, outputs and gradients; None: DEFAULT_WORKSPACE.
    gradients: "forward", "recompute", "saved" or "auto". "recompute" also spares what activation checkpointing would pay twice.
    logits_limit: bytes of logits that lazy logits may write out where an operation needs the numbers; None: any, with a warning.
    saved: how many sixteenths of the classes are saved, where that was settled before (between a forward and its backward).
    """

    workspace: int | None = None
    gradients: str = "auto"
    logits_limit: int | None = None
    saved: int | None = None


# One for the process. A ContextVar would be tidier, but torch.compile cannot trace one; this global it guards on.
_settings = Settings()


def settings() -> Settings:
    """The planner's settings in force."""
    return _settings


@contextmanager
def planning(*, workspace: int | None = None, gradients: str | None = None, logits_limit: int | None = None) -> Iterator[Settings]:
    """Change what the planner may use, within a `with` block (for the whole process).

    A backward uses the settings that its forward ran under. (A forward that activation checkpointing runs again runs under those of that
    time: put the backward into the block, too.)

    Args:
        workspace: bytes of temporary memory the engines may take (default: 80 MiB on a CPU, 1 GiB elsewhere). Smaller works too, slower.
            On Linux CPUs the largest buffer stays with the process for the next call, marked for the kernel to take when memory is short.
        gradients: "forward" (3 passes of GEMM flops; gradients are made with the loss), "recompute" (4 passes, least memory;
            also right under activation checkpointing, which would pay for the forward's gradients twice), "saved" (the fused engine, in
            bf16: logits of as many classes as fit the workspace are saved in 16 bits for the backward; elsewhere as "recompute") or "auto".
        logits_limit: bytes of logits above which lazy logits raise where they would write themselves out (default: they warn). 0: always.

    Raises:
        ValueError: for a workspace below 1 MiB, a negative limit or an unknown `gradients`.

    Example:
        >>> with bigclass.planning(workspace=16 << 20):
        ...     loss = bigclass.linear_cross_entropy(x, w, y)
    """
    global _settings
    before = new = _settings
    if workspace is not None:
        if workspace < MIB:
            raise ArgumentError(f"workspace: expected at least {MIB} bytes (1 MiB), got {workspace}")
        new = replace(new, workspace=int(workspace))
    if gradients is not None:
        if gradients not in GRADIENTS:
            raise ArgumentError(f"gradients: expected one of {GRADIENTS}, got {gradients!r}")
        new = replace(new, gradients=gradients)
    if logits_limit is not None:
        if logits_limit < 0:
            raise ArgumentError(f"logits_limit: expected a number of bytes >= 0, got {logits_limit}")
        new = replace(new, logits_limit=int(logits_limit))
    _settings = new
    try:
        yield new
    finally:
        _settings = before


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done. Printing it says why.

    engine: "dense", "tiled" or "fused". gradients: "none", "forward", "slabs", "saved" or "recompute".
    saved: classes whose logits the forward saves ("saved" only, else 0); saved_block: so many of them are multiplied at once, in place.
    chunk: rows whose logits over all classes are kept at once ("forward" only, else 0).
    row_block x class_block: a tile. workspace: bytes of temporary memory (where logits are saved, a compiled graph takes a slab of G
    beside them: it may not use them up). why: a sentence for each choice.
    Of the tiled engine's filter: gathered: kept columns that are multiplied at once; waiting: blocks whose tails are added together.
    """

    engine: str
    gradients: str
    chunk: int
    row_block: int
    class_block: int
    workspace: int
    why: tuple[str, ...] = ()
    gathered: int = 0
    waiting: int = 0
    saved: int = 0
    saved_block: int = 0

    def __str__(self) -> str:
        passes = {"none": "1", "forward": "3", "slabs": "3", "saved": "3 to 4", "recompute": "4"}[self.gradients]
        lines = [
            f"engine     {self.engine}",
            f"gradients  {self.gradients} ({passes} pass{'' if passes == '1' else 'es'} of 2NCD flops)",
            f"tiles      {self.row_block} rows x {self.class_block} classes" + (f", chunks of {self.chunk} rows" if self.chunk else ""),
            f"workspace  {self.workspace / MIB:.1f} MiB",
        ]
        return "\n".join(lines + [f"  - {reason}" for reason in self.why])


@dataclass(frozen=True, slots=True)
class Work:
    """What the planner has to know of a problem.

    n, c, d: rows, classes, features. scalar: is the loss a sum over rows (so that gradients can be made in the forward)?
    affine: is it also affine in what its folds are (so that gradients wait for no whole row)?
    grad: are gradients needed? half: are operands of a 16-bit type? wide: are sums in fp64? buffers: tile-sized work buffers.
    device: the device's type. not_fused: why the fused engine cannot take it; None: it can.
    For that engine: narrow: are products of a 16-bit type (not if one operand is wide)? masked: are rows left out? cast: is an operand
    cast for its product? laid_out: bytes of N x C tensors that it copies, for their classes do not lie side by side.
    group: adjacent classes that no cut may part (`Fold.group`). filtered: does the certified filter act on gradients?
    saves: can its gradients be made from logits in 16 bits? direct: can a product round dw to the weight's type itself?
    frozen: does no weight of a pair get a gradient?
    """

    n: int
    c: int
    d: int
    device: str = "cpu"
    scalar: bool = True
    affine: bool = False
    grad: bool = True
    half: bool = False
    wide: bool = False
    buffers: int = 1
    not_fused: str | None = None
    narrow: bool = False
    masked: bool = False
    cast: bool = False
    laid_out: int = 0
    group: int = 1
    filtered: bool = False
    saves: bool = False
    direct: bool = False
    frozen: bool = False

    def of(self, table: dict[str, int]) -> int:
        """This device's entry of a table."""
        return table["cpu" if self.device == "cpu" else "other"]

    @property
    def item(self) -> int:
        return 8 if self.wide else 4


def choose_engine(work: Work, engine: str = "auto") -> str:
    """The engine for `engine`="auto" (or the one asked for), as a name."""
    if engine not in ENGINES:
        raise ArgumentError(f"engine: expected one of {ENGINES}, got {engine!r}")
    if engine == "fused" and work.not_fused is not None:
        raise ArgumentError(f"engine: 'fused' cannot run this, for {work.not_fused}; engine='auto' would use {choose_engine(work)!r}")
    if engine != "auto":
        return engine
    if work.n * work.c * work.item <= DENSE_BYTES:
        return "dense"
    return "fused" if work.device == "cuda" and work.not_fused is None else "tiled"


def choose_gradients(work: Work, options: Settings, name: str) -> str:
    """Where the engine `name` makes gradients: "none", "forward", "slabs", "saved" or "recompute"."""
    if not work.grad:
        return "none"
    if options.gradients == "recompute":
        return "recompute"
    if work.scalar and work.affine:
        return "slabs"
    if work.scalar and options.gradients == "forward":
        return "forward"
    saved = saved_classes(work, options, name)
    if not work.scalar or options.gradients == "saved":
        return "saved" if saved else "recompute"
    least = work.of(MIN_CHUNK_ROWS) // (2 if work.filtered else 1)  # of few kept columns "recompute" costs twice as much, not a third more
    fits = _chunk_rows(work, options, name) >= min(work.n, least)
    if name != "fused":
        return "forward" if fits else "recompute"
    if fits and _forward_bytes(work, options) < _backward_bytes(work, saved):
        return "forward"
    return "saved" if saved else "recompute"


def saved_steps(work: Work, options: Settings, name: str) -> int:
    """Of how many sixteenths of the classes the forward saves logits: as many as fit; none where making them again is cheaper.

    The default workspace is then larger by what an fp32 dw would take, which gradients made in the forward need beside it."""
    if name != "fused" or not (work.saves and work.grad):
        return 0
    if options.saved is not None:
        return options.saved
    if options.gradients == "recompute":
        return 0
    n, c = work.n, work.c
    if options.gradients != "saved" and _backward_bytes(work, 0) < _backward_bytes(work, c):
        return 0
    room = _workspace(work, options) * 7 // 8 - n * _fused_row(work)
    if options.workspace is None and not work.frozen:
        room += 4 * c * work.d * work.half
    best = 0
    for step in range(1, SAVED_STEPS + 1):
        some = classes_of(step, c)
        if some > 0 and saved_size(n, some) <= room:
            best = step
    return best


def classes_of(step: int, c: int) -> int:
    """So many sixteenths of c classes, in whole blocks."""
    return c if step == SAVED_STEPS else c * step // SAVED_STEPS // SAVED_CLASSES * SAVED_CLASSES


def saved_classes(work: Work, options: Settings, name: str) -> int:
    """Of how many classes the forward saves logits."""
    return classes_of(saved_steps(work, options, name), work.c)


def saved_size(rows: int, classes: int) -> int:
    """Bytes of saved logits: whole tiles of classes, and their references."""
    return rows * -(-classes // 128) * 16 * SAVED_BITS


def _pass_bytes(work: Work) -> int:
    """The bytes that a GPU's memory moves while a pass of 2NCD flops is multiplied: what times are compared in."""
    return 2 * work.n * work.c * work.d * (1 if work.narrow else WIDE_PRODUCTS) // FLOPS_PER_BYTE


def _backward_bytes(work: Work, saved: int) -> int:
    """The time of "saved" and "recompute" beyond three passes: what is read and written of the saved, others' fourth pass, epilogues."""
    again = (_pass_bytes(work) + EPILOGUE_BYTES * work.n * work.c) * (work.c - saved) // max(work.c, 1)
    return EPILOGUE_BYTES * work.n * work.c + SAVED_BYTES * work.n * saved + again


def _forward_bytes(work: Work, options: Settings) -> int:
    """The same of "forward": of each logit as "saved", or 12 bytes of fp32 (written, and read twice); each chunk but one reads and writes
    an fp32 dw."""
    chunks = -(-work.n // max(_chunk_rows(work, options, "fused"), 1))
    of_logit = EPILOGUE_BYTES + SAVED_BYTES if work.saves else 12
    return of_logit * work.n * work.c + 8 * work.c * work.d * (chunks - 1) * (not work.frozen)


def _fused_row(work: Work) -> int:
    """Bytes of the fused engine's workspace for each row: x masked or cast, and the fp32 sum of dx."""
    item = 2 if work.narrow else 4
    return work.d * item * (work.masked or work.cast) + work.d * 4 * (work.half and work.grad)


def _chunk_rows(work: Work, options: Settings, name: str) -> int:
    """Rows of logits that fit the workspace beside the tile buffers of the gradient."""
    if name == "fused" and work.saves:
        return _workspace(work, options) * 7 // 8 // max(saved_size(1, work.c) + _fused_row(work), 1)
    tiles = (work.buffers - 1) * min(_tile_elements(work, options), work.n * work.c) * work.item
    spare = tiles + 2 * _cast_bytes(work, options) + _filter_bytes(work, options, work.c, 32)
    fit = max(_workspace(work, options) - spare, 0) // max(work.c * work.item, 1)
    return min(fit, _cast_limit(work, options, 1))


def _tile_elements(work: Work, options: Settings) -> int:
    return max(min(work.of(TILE_ELEMENTS), _workspace(work, options) // (2 * work.item * max(work.buffers, 1))), 1)


def _workspace(work: Work, options: Settings) -> int:
    if options.workspace is not None:
        return options.workspace
    return FILTERED_WORKSPACE if work.filtered and work.device == "cpu" else work.of(DEFAULT_WORKSPACE)


def _filter_buffers(work: Work, options: Settings) -> dict[str, int]:
    """`Plan.gathered` and `Plan.waiting`: about a fifth of the workspace at most, together."""
    if not work.filtered or work.device != "cpu":
        return {"gathered": 0, "waiting": 0}
    share = _workspace(work, options) // (16 * work.item)
    gathered = min(max(min(GATHERED, share) // max(work.d, FILTER_ROWS), 16), max(work.c, 1))
    return {"gathered": gathered, "waiting": min(max(share // max(work.c, 1), 1), WAITING)}


def _filter_bytes(work: Work, options: Settings, classes: int, slabs: int) -> int:
    """What the tiled engine's filter takes beside tiles of so many classes: rows of w and of dw, their columns of G, squares, norms.

    slabs: if these are all classes, in how many tiles; tails wait, then. Else 0."""
    buffers = _filter_buffers(work, options)
    if not buffers["gathered"]:
        return 0
    rows, gathered = min(work.n, FILTER_ROWS), min(buffers["gathered"], classes)
    tails = buffers["waiting"] * (classes + slabs * (rows + 2 * work.d)) if slabs else 0
    return work.item * (gathered * (2 * work.d + rows) + min(PIECE, rows * classes) + 3 * classes + tails)


def _cast_bytes(work: Work, options: Settings) -> int:
    """Most bytes for operands cast to fp32: for a slab of classes (and its fp32 dw, where dw is cast slab by slab), and again for rows."""
    return _workspace(work, options) // 8 if work.half else 0


def _cast_limit(work: Work, options: Settings, copies: int) -> int:
    """Most rows (or classes) to a block whose `copies` fp32 copies keep to `_cast_bytes`."""
    return max(_cast_bytes(work, options) // (copies * max(work.d, 1) * work.item), 1) if work.half else max(work.n, work.c)


def tile_buffers(lone: bool, scalar: bool, maps: int) -> int:
    """Tile-sized work buffers: lone is a single fold that overwrites its tile, over unbent logits."""
    return (1 if lone and scalar else 2 if lone else 3) + maps


def make_plan(work: Work, engine: str = "auto", options: Settings | None = None) -> Plan:
    """The whole plan for a problem. Engines call it inside the op, `explain` outside: the same function, the same answer."""
    options = options or settings()
    n, c = max(work.n, 1), max(work.c, 1)
    name = choose_engine(work, engine)
    gradients = choose_gradients(work, options, name)
    why = []
    size = n * c * work.item
    if name == "dense":
        if engine == "dense":
            why.append("asked for: logits are written out whole and differentiated by autograd")
        else:
            why.append(
                f"{n} x {c} logits are {size / MIB:.2f} MiB, under {DENSE_BYTES / MIB:.0f} MiB: fixed costs rule, so they are written out"
            )
        return Plan("dense", "none" if gradients == "none" else "forward", 0, n, c, size * (3 if work.grad else 2), tuple(why))
    why.append("asked for" if engine != "auto" else f"{n} x {c} logits would be {size / MIB:.0f} MiB: made a tile at a time instead")
    if work.device != "cpu" and name == "tiled" and engine == "auto":
        why.append(f"not the fused engine, for {work.not_fused}")
    if name == "fused":
        return _fused_plan(work, gradients, options, why)
    if gradients == "slabs" or (gradients == "none" and work.affine):
        return _slab_plan(work, gradients, options, why)
    elements = _tile_elements(work, options)
    chunk = 0
    if gradients == "forward":
        fit = max(_chunk_rows(work, options, name), 1)
        chunks = -(-n // fit)
        chunk = -(-n // chunks)  # even chunks: the last one is about as large as the others
        aligned = -(-chunk // 16) * 16
        chunk = aligned if aligned <= min(fit, n) else chunk
        row_block = chunk
        class_block = _even(c, min(elements // chunk, _cast_limit(work, options, 1)), work.group)
        kept = chunk * c * work.item
        why.append(
            f"{chunk} whole rows of logits ({kept / MIB:.1f} MiB) fit the workspace: gradients come with the loss, 3 passes instead of 4"
        )
        if work.half:
            why.append("dw stays fp32 until the upstream gradient arrives (one C x D fp32 buffer)")
        tiles = (work.buffers - 1) * chunk * class_block * work.item
        cast = (chunk + class_block) * work.d * work.item if work.half else 0
        why += _of_filter(work, name)
        spare = _filter_bytes(work, options, c, -(-c // class_block))
        return Plan(
            name, gradients, chunk, row_block, class_block, kept + tiles + cast + spare, tuple(why), **_filter_buffers(work, options)
        )
    row_block = min(n, CPU_ROW_BLOCK) if work.device == "cpu" else n
    row_block = max(min(row_block, elements // min(c, 1024), _cast_limit(work, options, 1)), 1)
    row_block = -(-n // -(-n // row_block))
    copies = 2 if work.grad else 1
    class_block = _even(c, min(elements // row_block, _cast_limit(work, options, copies)), work.group)
    if gradients == "recompute":
        if not work.scalar:
            why.append("the loss is not one sum over rows (or its statistics are wanted), so gradients recompute the tiles: 4 passes")
        elif options.gradients == "recompute":
            why.append("recompute was asked for")
        else:
            fit = _chunk_rows(work, options, name)
            why.append(
                f"only {fit} whole rows of {c} logits fit the workspace: the backward makes tiles again (4 passes, no fp32 copy of dw)"
            )
    else:
        why.append("no gradients wanted: one pass")
    tiles = work.buffers * row_block * class_block * work.item
    cast = 0
    if work.half:
        cast = (row_block + copies * class_block) * work.d * work.item
        if work.grad:
            cast += n * work.d * work.item
            why.append("dx is summed over slabs of classes in one N x D fp32 buffer")
    why += _of_filter(work, name)
    size = tiles + cast + _filter_bytes(work, options, class_block, 0)
    return Plan(name, gradients, 0, row_block, class_block, size, tuple(why), **_filter_buffers(work, options))


def _of_filter(work: Work, name: str) -> list[str]:
    """What an engine makes of a filter, in words."""
    if not work.filtered:
        return []
    if name == "fused":
        return ["the filter's columns are chosen and multiplied by lists on the device (not beside a class scale or a scale that learns)"]
    if work.device != "cpu":
        return ["the filter drops nothing here: how many columns it keeps would have to be read by the host, and waited for"]
    return ["the filter leaves small columns of the gradient out of its two products"]


def _slab_plan(work: Work, gradients: str, options: Settings, why: list[str]) -> Plan:
    """Slabs of classes of the tiled engine for sums over classes, where gradients come with each tile."""
    n, c = max(work.n, 1), max(work.c, 1)
    copies = 3  # fp32 copies of a slab of half-precision weights: for the products, the sum of dw, and what a callback is given
    budget = _workspace(work, options) // (2 * SLAB_BUFFERS * work.item)
    elements = max(min(work.of(SLAB_TILE), budget), 1)
    row_block = min(n, CPU_ROW_BLOCK) if work.device == "cpu" else n
    row_block = max(min(row_block, elements // min(c, 512), _cast_limit(work, options, 1)), 1)
    row_block = -(-n // -(-n // row_block))
    class_block = _even(c, min(elements // row_block, _cast_limit(work, options, copies)))
    if gradients == "none":
        why.append("no gradients wanted: one pass")
    else:
        why.append("a sum over classes: a tile's gradient is made with the tile, a slab of classes is finished before the next, 3 passes")
    size = SLAB_BUFFERS * row_block * class_block * work.item
    if work.half:
        size += (row_block + copies * class_block) * work.d * work.item + n * work.d * work.item
        if gradients == "slabs":
            why.append("dw stays fp32 until the upstream gradient arrives (one C x D fp32 buffer)")
    why += _of_filter(work, "tiled")
    size += _filter_bytes(work, options, class_block, 0)
    return Plan("tiled", gradients, 0, row_block, class_block, size, tuple(why), **_filter_buffers(work, options))


def pair_work(*, maps: int, **described: Any) -> Work:
    """The `Work` of two streams. maps: how many both have. d: the features of both."""
    return Work(**described, buffers=PAIR_BUFFERS + maps, not_fused="a loss of two streams has no Triton form")


def make_pair_plan(work: Work, name: str, options: Settings | None = None) -> Plan:
    """The plan of two streams (engines/pair.py): `chunk` whole rows of both, in tiles of chunk x class_block.

    Gradients come with the loss unless it is no sum, or "recompute" was asked for: made again they would cost both streams once more."""
    options = settings() if options is None else options
    n, c = max(work.n, 1), max(work.c, 1)
    gradients = "none" if not work.grad else "forward" if work.scalar and options.gradients != "recompute" else "recompute"
    why = ["two streams: whole rows of both are kept, for their probabilities need a row's end"]
    tile_room = _workspace(work, options) // 3
    elements = max(min(work.of(TILE_ELEMENTS), tile_room // (work.buffers * work.item)), 1)
    room = max(_workspace(work, options) - elements * work.buffers * work.item - 2 * _cast_bytes(work, options), 0)
    chunk = max(min(room // (2 * c * work.item), n, _cast_limit(work, options, 1)), 1)
    chunk = -(-n // -(-n // chunk))
    class_block = _even(c, min(max(elements // chunk, 1), _cast_limit(work, options, 2)))
    if gradients == "recompute":
        why.append("gradients are made from the rows' statistics, of tiles that are made again")
    elif gradients == "forward":
        why.append(f"gradients come with the loss, {chunk} rows at a time")
        if work.half:
            why.append("dw stays fp32 until the upstream gradient arrives (one C x D fp32 buffer)")
    size = chunk * (2 * c + class_block * work.buffers) * work.item
    size += (chunk + 2 * class_block) * work.d * work.item if work.half else 0
    return Plan(name, gradients, chunk, chunk, class_block, size, tuple(why))


def _fused_plan(work: Work, gradients: str, options: Settings, why: list[str]) -> Plan:
    """Chunks of rows ("forward") or slabs of classes ("recompute") of the fused engine. Its register tiles: engines/fused/launch.py."""
    n, c, d, item = max(work.n, 1), max(work.c, 1), work.d, 2 if work.narrow else 4
    band = min(n, FILTER_BAND)
    spare = 256 * band * item * work.filtered  # the kept columns, of which a block is multiplied whole
    beside, budget = work.laid_out + spare, max(_workspace(work, options) - spare, 0)
    # bytes for each row: x masked or cast, and the fp32 sum of dx; for each class: w cast, and ("recompute") the fp32 sum of dw
    of_row = _fused_row(work)
    of_class = d * item * work.cast
    if work.filtered:  # of a slab of G: its kept columns, their norms and their choice (engines/fused/filtered.py)
        of_class += band * item + -(-n // 128) * 4 + -(-n // FILTER_BAND) * 100
    if gradients == "forward":
        # a slab of G beside the kept logits: as wide as an eighth of the budget
        of_kept = saved_size(1, c) if work.saves else c * 4
        fit = max((budget - budget // 8) // (of_kept + of_row), 1)
        chunk = -(-n // -(-n // min(fit, n)))
        aligned = -(-chunk // 128) * 128
        chunk = aligned if aligned <= min(fit, n) else chunk
        class_block = _even(c, max(budget // 8 // (chunk * item + of_class), 256), work.group)
        if work.saves:  # whole tiles; G is made where they are
            class_block = min(class_block // 256 * 256 or 256, c)
        size = chunk * (of_kept + of_row) + class_block * (chunk * item * (not work.saves) + of_class)
        why.append(f"{chunk} whole rows of logits fit the workspace: gradients come with the loss, 3 passes instead of 4")
        if work.half:
            why.append("dw stays fp32 until the upstream gradient arrives (one C x D fp32 buffer)")
        why += _of_filter(work, "fused")
        return Plan("fused", gradients, chunk, chunk, class_block, size + beside, tuple(why), saved=c if work.saves else 0)
    if gradients == "slabs":
        # logits of a slab in fp32 and its G, for all rows
        class_block = _even(c, max(min(SLAB_ELEMENTS // n, budget // (n * (4 + item) + of_class)), 256))
        size = n * of_row + class_block * (n * (4 + item) + of_class)
        why.append("a sum over classes: gradients come with each slab of classes, 3 passes instead of 4")
        if work.half:
            why.append("dw stays fp32 until the upstream gradient arrives (one C x D fp32 buffer)")
        why += _of_filter(work, "fused")
        return Plan("fused", gradients, 0, n, class_block, size + beside, tuple(why))
    if gradients == "none":
        why.append("no gradients wanted: one pass, logits in registers only")
        class_block = _even(c, max(budget // 2 // (item * d), 256), work.group)  # of a weight that must be cast
        return Plan("fused", gradients, 0, n, class_block, n * (64 + of_row) + class_block * of_class + beside, tuple(why))
    of_class += d * 4 * (work.half and not work.direct)
    if gradients == "saved":
        return _saved_plan(work, options, n * of_row, of_class, beside, budget, why)
    class_block = _even(c, max(min(SLAB_ELEMENTS // n, budget // 2 // (n * item + of_class)), 256), work.group)
    if not work.scalar:
        why.append("the loss is not one sum over rows (or its statistics are wanted), so gradients recompute the logits: 4 passes")
    elif options.gradients == "recompute":
        why.append("recompute was asked for")
    else:
        why.append(f"under {work.of(MIN_CHUNK_ROWS)} whole rows of {c} logits fit the workspace: the backward makes logits again, 4 passes")
    why.append(f"G of {class_block} classes at a time, in the type of the products")
    why += _of_filter(work, "fused")
    size = n * of_row + class_block * (n * item + of_class)
    return Plan("fused", gradients, 0, n, class_block, size + beside, tuple(why))


def _saved_plan(work: Work, options: Settings, of_rows: int, of_class: int, beside: int, budget: int, why: list[str]) -> Plan:
    """The fused engine's slabs where logits are saved. of_rows, of_class: bytes of all rows, and of a class of a slab beside its G."""
    n, c, saved = max(work.n, 1), max(work.c, 1), saved_classes(work, options, "fused")
    room = max(budget // 8, 1)
    block = max(min(SLAB_ELEMENTS // n, room // (n * 2 + of_class)), 256) // 256 * 256  # whole tiles of what is saved
    in_place = max(room // of_class, 256) // 256 * 256 if of_class else c
    in_place = block if work.filtered else in_place
    class_block, saved_block = min(block, c), min(in_place, saved)
    share = "all" if saved == c else f"{saved} of {c}"
    why.append(f"logits of {share} classes are saved in 16 bits ({saved_size(n, saved) / MIB:.0f} MiB): no pass makes them again")
    if saved < c:
        why.append(f"G of the others {class_block} classes at a time, whose logits the backward makes again")
    why += _of_filter(work, "fused")
    slab = class_block * (n * 2 + of_class)
    size = of_rows + saved_size(n, saved) + (max(slab, saved_block * of_class) if saved < c else saved_block * of_class) + beside
    return Plan("fused", "saved", 0, n, class_block, size, tuple(why), saved=saved, saved_block=saved_block)


def _even(total: int, most: int, group: int = 1) -> int:
    """The largest even share of `total` that is at most `most`, in whole groups, rounded up to 64 (of them) where that helps alignment."""
    if group > 1:
        return group * _even(total // group, most // group)
    most = max(min(most, total), 1)
    share = -(-total // -(-total // most))
    aligned = -(-share // 64) * 64
    return aligned if aligned <= most else share
