"""The problems by name: N rows, C classes, D features."""

from __future__ import annotations

from dataclasses import dataclass, replace

CROSS_ENTROPY = "cross-entropy"
ONE_VS_ALL = ("bce", "asymmetric")
CONTRASTIVE = ("clip", "siglip")

# Rows and features are kept multiples of this when scaled down: real models' are, and some kernels' descriptors demand it.
ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """One problem.

    loss: "cross-entropy", one-vs-all over few labels a row: "bce", "asymmetric" (one_vs_all.py), or of N = C pairs: "clip", "siglip"
        (contrastive.py).
    softcap: logits become softcap * tanh(logits / softcap). k: predict the k best classes of a row, instead of a loss.
    scales: whether `--scale` shrinks it; shapes that exist for one machine class are run as they are.
    """

    name: str
    rows: int
    classes: int
    features: int
    softcap: float | None = None
    k: int | None = None
    scales: bool = False
    loss: str = CROSS_ENTROPY

    @property
    def one_vs_all(self) -> bool:
        return self.loss in ONE_VS_ALL

    @property
    def contrastive(self) -> bool:
        return self.loss in CONTRASTIVE

    def scaled(self, scale: float) -> Shape:
        """The same problem with N, C and D times `scale`. C keeps its raggedness, N and D their alignment."""
        if not self.scales or scale == 1:
            return self

        def aligned(size: int) -> int:
            return max(ALIGNMENT, round(size * scale / ALIGNMENT) * ALIGNMENT)

        return replace(self, rows=aligned(self.rows), classes=max(2, round(self.classes * scale)), features=aligned(self.features))

    @property
    def pass_flops(self) -> int:
        """Floating point operations of one pass, the product of (N, D) with (D, C)."""
        return 2 * self.rows * self.classes * self.features

    def __str__(self) -> str:
        extras = (f", soft cap {self.softcap:g}" if self.softcap else "") + (f", k = {self.k}" if self.k else "")
        extras += f", {self.loss}" if self.loss != CROSS_ENTROPY else ""
        return f"{self.name} ({self.rows} x {self.classes} x {self.features}{extras})"


# Heads of known models, then the sizes the library's own promises are stated at.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gemma2-2b", 8192, 256000, 2304, softcap=30.0, scales=True),
        Shape("llama3-8b", 8192, 128256, 4096, scales=True),
        Shape("qwen2.5-7b", 8192, 152064, 3584, scales=True),
        Shape("phi3.5", 8192, 32064, 3072, scales=True),
        Shape("vit-l-in21k", 4096, 21841, 1024, scales=True),
        Shape("bamboo", 2048, 115217, 768, scales=True),
        Shape("amazon-3m", 1024, 2812281, 768, scales=True),
        Shape("clip-32k", 32768, 32768, 768, scales=True),
        Shape("clip-64k", 65536, 65536, 1024, scales=True),
        Shape("cpu", 2048, 32000, 512),
        Shape("small", 256, 1000, 512),
        Shape("tiny", 32, 100, 64),
        Shape("filter", 4096, 128000, 512),  # what the gradient filter is specified on, with data "popular"
        Shape("topk", 256, 3_000_000, 64, k=5),
        Shape("bce", 512, 131072, 256, loss="bce"),
        Shape("asymmetric", 512, 131072, 256, loss="asymmetric"),
        Shape("clip", 4096, 4096, 512, loss="clip"),
        Shape("siglip", 4096, 4096, 512, loss="siglip"),
    )
}


def parse_shape(text: str) -> Shape:
    """A shape by name, or given as NxCxD (a loss; NxCxD:bce, :asymmetric, NxNxD:clip, :siglip) or NxCxDxK (the K best classes).

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_shape("64x1000x32").classes
        1000
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        sizes, colon, loss = text.partition(":")
        rows, classes, features, *k = (int(size) for size in sizes.split("x"))
        if len(k) > 1 or min(rows, classes, features, *k) < 1 or (colon and (loss not in ONE_VS_ALL + CONTRASTIVE or k)):
            raise ValueError
        if loss in CONTRASTIVE and rows != classes:
            raise ValueError
    except ValueError:
        raise ValueError(f"expected one of {', '.join(SHAPES)}, NxCxD[:LOSS] or NxCxDxK; got {text!r}") from None
    return Shape(text, rows, classes, features, k=k[0] if k else None, loss=loss if colon else CROSS_ENTROPY)
