"""Memory of one block of a transformer: what it keeps for its backward, and what the backward takes on top.

n tokens of this rank, D hidden, I intermediate, A = heads x head_dim, K = kv_heads x head_dim, e bytes an element; in bytes, for fp32 and
for 16 bits (e = 2), in the order in which tensors are made:

    input        e n D          kept by recompute; else where the norm saves its input as it is
    norm         "rms"          copy of the input in fp32 [16 bits only] 4 n D, normalised e n D, result e n D
                 "gemma"        the same, the normalised one in fp32
                 "layer", "fused"   result e n D (and the input as it is)
    attention    flash: queries, output e n A each; keys, values e n K each; log-sum-exp 4 n heads
                 eager: keys, values repeated for all heads, e n A each; scores n S heads (4 + 2 [16 bits only] + e [soft cap])
    sum          e n D          input of the second norm, as it is or as its copy
    norm         as above
    MLP          gated: gate, its activation, the other half, their product, 4 e n I; GELU of one kernel 2 e n I, written out 5 e n I

Each is a term of Korthikanti et al. (arXiv:2205.05198, section 4.1: 34 sbh without the 5 as^2 b of the scores, which flash attention,
arXiv:2205.14135, does not keep) for LayerNorms, GELU and dropout; here for the modules in use, which keep more: an RMS norm of several
operations in place of one kernel is 4 n D bytes more, a gate 2 e n I.

In the backward, at most one of

    MLP          all of the above, gradients of two of its tensors 2 e n I, of the block's output e n D
    norm         what attention keeps, the norm's tensors, four of n D in fp32 (rms, gemma), or two of e n D
    attention    what attention keeps, gradients of queries, keys, values and output e n (2 A + 2 K), of the block e n D
                 (flash on GPUs sums those of queries in fp32: 4 n A more for 16 bits)

Mini-sequences (arXiv:2407.15892) put m tokens through an MLP at once, and again in the backward: nothing of size I is kept, and of
the work only m tokens' is there, beside the gradients of the MLP's input and output.

Over W ranks of a sequence (Ulysses, arXiv:2309.14509) attention sees all tokens and A/W of the heads: keys and values are repeated to at
least W heads, and its output is there twice, before and after the exchange. Beyond W = heads a ring of such groups passes keys and values
on (arXiv:2405.07719): two pairs of blocks in flight, 4 e n K bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from bigclass.memory_plan.settings import Ranks, Training
from bigclass.memory_plan.shapes import TransformerShape


@dataclass(frozen=True, slots=True)
class NormMemory:
    """A norm's bytes for each element of its input, and for each token. shared: is the input kept as it is (own: that it copies it)?"""

    shared: bool
    own: int
    result: int
    token: int
    work: int


def norm_memory(kind: str, item: int) -> NormMemory:
    """What a norm keeps, by its kind."""
    if kind in ("layer", "fused"):
        return NormMemory(True, 0, item, 8 if kind == "layer" else 4, 2 * item)
    normed = 4 if kind == "gemma" else item
    return NormMemory(item == 4, (0 if item == 4 else 4) + normed, item, 4, 16)


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """Bytes of one block.

    input: of its input. shared_input: does the block keep that itself? kept: by norms and attention, beside the input. mlp: by the MLP.
    chunk: of the MLP's tensors that are made again for one chunk. in_mlp: what the MLP's backward takes on top of all these.
    in_rest: what is there of the block, beside its input, in the backward of its norms and attention (the larger of the two).
    last: kept by the last norm, the head's features among it.
    """

    input: int
    shared_input: bool
    kept: int
    mlp: int
    chunk: int
    in_mlp: int
    in_rest: int
    last: int


def block_memory(
    shape: TransformerShape, tokens: int, sequence: int, training: Training, ranks: Ranks, *, device: str = "cuda"
) -> BlockMemory:
    """The memory of one block.

    Args:
        shape: of the model.
        tokens: n, of this rank. sequence: S, all tokens of a sequence, which attention sees.
        training, ranks: how it is trained, over how many ranks.
        device: "cpu" or "cuda".

    Returns:
        A `BlockMemory`.
    """
    n, d, e = tokens, shape.hidden, training.item
    norm = norm_memory(shape.norm, e)
    eager = training.attention == "eager"
    ulysses = min(ranks.sequence, shape.heads)
    a = shape.queries
    k = a if eager else shape.head_dim * max(shape.kv_heads, min(ulysses, shape.heads))

    whole_norm = n * d * (norm.own + norm.result) + n * norm.token
    between = n * d * e if norm.shared else 0
    of_score = 4 + (2 if training.half else 0) + (e if shape.attention_softcap else 0)
    scores = n * sequence * shape.heads * of_score if eager else 4 * n * shape.heads
    heads = e * n * (2 * a + 2 * k) + scores + (e * n * a if ranks.sequence > 1 else 0)
    # A norm behind attention, or behind the MLP, keeps its input as one of its own, and its result goes into a sum that keeps nothing.
    post = n * d * ((e if norm.shared else 0) + norm.own) + n * norm.token if shape.post_norms else 0
    first = whole_norm + heads + post  # up to the sum
    second = between + whole_norm + post

    m = min(training.mlp_chunk or n, n)
    chunked = m < n
    tensor = e * m * shape.intermediate
    chunk = shape.mlp_tensors * tensor if chunked else 0
    pair = (1 if shape.mlp_tensors < 4 else 2) * tensor
    # Chunks' gradients of the MLP's input gather beside the output's; at the end they are joined.
    in_mlp = max(pair + 2 * e * n * d, 3 * e * n * d - chunk) if chunked else pair + e * n * d

    grown = 2 * 4 * n * sequence * shape.heads if eager else 0  # the gradients of scores behind and before the softmax
    exact = 4 * n * a if training.half and device != "cpu" and not eager else 0
    ring = 4 * e * n * k if ranks.sequence > shape.heads else 0
    exchange = e * n * a if ranks.sequence > 1 else 0
    in_attention = first + e * n * (2 * a + 2 * k) + grown + exact + ring + exchange + e * n * d
    in_norm = first + second - n * d * norm.result + n * d * (norm.work + e)
    return BlockMemory(
        input=e * n * d,
        shared_input=norm.shared,
        kept=first + second,
        mlp=0 if chunked else shape.mlp_tensors * tensor,
        chunk=chunk,
        in_mlp=in_mlp,
        in_rest=max(in_attention, in_norm),
        last=whole_norm + (e * n * d if norm.shared else 0),
    )
