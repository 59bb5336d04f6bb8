"""Optimizers that update a parameter slab of rows by slab of rows, so that a C x D gradient need never exist."""

from bigclass.optim.row_adam import SlabRowAdam
from bigclass.optim.sgd import SlabSGD
from bigclass.optim.slab import SlabOptimizer

__all__ = ["SlabOptimizer", "SlabRowAdam", "SlabSGD"]
