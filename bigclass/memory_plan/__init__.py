"""A planner of training memory, on paper: weights, gradients, optimizer, activations, MLPs and head against sequence, classes and ranks.

Symbols, of one device unless said otherwise (sizes in elements, memory in bytes):

    S, B, N     tokens of a sequence; sequences; N = B S / W tokens of this device
    L, D, I     layers, hidden size, the MLP's intermediate size
    A, K        elements of a token's queries, and of its keys (its values are as many)
    C, P        classes; parameters of the model
    R, W, M     all ranks; those that share a sequence; those that share the head's classes
    e, w, g, o  bytes of an activation's element, of a stored weight, of a gradient, of optimizer states for each parameter

States (ZeRO, arXiv:1910.02054, figure 1; stage 0 is data parallelism, stage 3 what FSDP does):

    weights     w P, or w P / R from stage 3 on; then two blocks' weights are there whole, 2 e P_block, and while in use the head's, e C D
    gradients   g P, or g P / R from stage 2 on; then one block's are there whole
    optimizer   o P, or o P / R from stage 1 on. AdamW in fp32 beside 16-bit weights: o = 12, so w + g + o = 16
    over M      a head whose classes are spread has C / M of them here, and sees the rows of all M ranks

What blocks keep and take is in `blocks` (arXiv:2205.05198, arXiv:2205.14135, arXiv:2407.15892, arXiv:2309.14509), what heads take is in
`heads`.

A step is a row of phases, each with what is alive then; the peak is the largest:

    at the head                     states + L kept + last norm + head (gradients: none yet, or all where they are accumulated)
    in the last block's backward    states + L kept + what one block's backward takes + gradients of the head
    in the first block's backward   states + 1 kept + the same + gradients of all blocks behind it and the head
    backward of the embedding       states + gradients of everything; of a tied weight three
    optimizer                       states + gradients + temporaries of its step

With recompute (arXiv:1604.06174) "kept" is a block's input, and one block is made again for its backward. Phases between the last block and
the first lie between these two, for all terms are linear in the number of blocks left.

Not counted: dropout masks, buffers of communication, the driver's context, memory lost between blocks (`usable` leaves room for these),
and whatever a model keeps that transformers' Llama, Gemma 2, Qwen 2.5, Mistral and GPT-2 do not. Embedding and head are taken to be sharded
as groups of their own.
"""

from bigclass.memory_plan.blocks import BlockMemory, block_memory
from bigclass.memory_plan.heads import HeadMemory, head_memory
from bigclass.memory_plan.measure import peak_bytes, saved_bytes
from bigclass.memory_plan.plan import MemoryPlan, Phase, plan_memory
from bigclass.memory_plan.search import DEVICES, largest_class_count, longest_sequence
from bigclass.memory_plan.settings import OPTIMIZERS, Ranks, Training
from bigclass.memory_plan.shapes import MODELS, ModuleShape, TransformerShape, shape_of

__all__ = [
    "DEVICES",
    "MODELS",
    "OPTIMIZERS",
    "BlockMemory",
    "HeadMemory",
    "MemoryPlan",
    "ModuleShape",
    "Phase",
    "Ranks",
    "Training",
    "TransformerShape",
    "block_memory",
    "head_memory",
    "largest_class_count",
    "longest_sequence",
    "peak_bytes",
    "plan_memory",
    "saved_bytes",
    "shape_of",
]
