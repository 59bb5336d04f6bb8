"""What a custom op needs around it: autocast off, autograd on for a moment, and clear refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_ONLY_DENSE = "; pass engine='dense' (plain autograd, which materialises the logits)"


def autocast_off(device: torch.device) -> AbstractContextManager:
    """Engines choose the dtype of every product themselves."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Plain autograd inside a custom op, whose kernels run below autograd's dispatch keys: take the exclusion back for a moment."""
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradXPU", "AutogradMPS", "AutogradOther", "AutogradFunctionality", "ADInplaceOrView"):
        found = getattr(torch._C.DispatchKey, key, None)
        if found is not None:
            exclude = exclude.remove(found)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def refuse_create_graph() -> None:
    """Raise in a backward that is itself recorded: its result would carry no graph, and a penalty on it no gradient."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("bigclass: double backward (create_graph=True) is not supported by the streaming engines" + _ONLY_DENSE)


def in_transform() -> bool:
    """Are we inside a torch.func transform?"""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def refuse_transforms(tensors: Sequence[Tensor]) -> None:
    """Raise under torch.func transforms and forward-mode AD, which would lose the op's gradient."""
    if torch.compiler.is_compiling():
        return
    if in_transform():
        raise RuntimeError(
            "bigclass: torch.func transforms (grad, vmap, jvp, ...) are not supported by the streaming engines" + _ONLY_DENSE
        )
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("bigclass: forward-mode AD is not supported by the streaming engines" + _ONLY_DENSE)
