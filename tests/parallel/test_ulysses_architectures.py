"""Every causal class of the installed transformers under Ulysses: right, or refused with a reason. Never something else.

pytest -m architectures tests/parallel/test_ulysses_architectures.py -s prints the lists.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.engine_support import gradients
from tests.ranks import run_ranks
from tests.support import error

missing = [name for name in ("transformers", "deepspeed") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.architectures,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed"),
]


def every_class(rank: int, world: int) -> dict[str, Any]:
    from tests.integrations.transformers_support import CannotBuild, batch, classes, tiny
    from tests.parallel.test_deepspeed import start_deepspeed

    start_deepspeed(rank, world)
    made: dict[str, Any] = {}
    for model_type, name in classes("causal"):
        try:
            model = tiny(model_type, name)
        except CannotBuild as e:
            made[name] = f"cannot be built: {e}"
            continue
        inputs = batch(model)
        made[name] = compared(model.float(), inputs) if "input_ids" in inputs else "reads no text"
    return made


def compared(model: Any, inputs: dict[str, torch.Tensor]) -> str | tuple[float, float]:
    """Why it is refused, or the errors of loss and gradients: spread over the ranks, against the same model with whole sequences."""
    from bigclass.integrations.transformers import loss_only
    from bigclass.integrations.ulysses import setup_ulysses

    model.eval()  # without dropout
    try:
        parallel = setup_ulysses(model, dist.group.WORLD)
    except (ValueError, TypeError) as e:
        return str(e)
    with loss_only(model):
        with parallel.off():
            whole = model(**inputs, use_cache=False).loss
            whole.backward()
        exact = gradients(model)
        model.zero_grad()
        loss = model(**parallel.shard(inputs)).loss
        loss.backward()
    mine = gradients(model)
    flat = torch.cat([mine.get(name, torch.zeros_like(grad)).flatten() for name, grad in exact.items()])
    dist.all_reduce(flat)
    return error(loss, whole), error(flat / dist.get_world_size(), torch.cat([grad.flatten() for grad in exact.values()]))


def test_every_causal_class_is_right_or_refused():
    made, other = run_ranks(every_class, 2)
    right = {name: found for name, found in made.items() if not isinstance(found, str)}
    assert {name for name, found in other.items() if not isinstance(found, str)} == set(right)
    print(f"right: {', '.join(right)}", *(f"{name}: {found}" for name, found in made.items() if name not in right), sep="\n")
    assert len(right) >= 40
    assert {name: found for name, found in right.items() if max(found) > 1e-5} == {}
