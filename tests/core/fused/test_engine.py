"""The fused engine in Triton's interpreter: the same contract as the other engines, on the same cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from bigclass.core import LogSumExp, ShiftedMoment
from bigclass.core.engines.support import fused_reason
from tests.core.test_op import cases, check_folds, check_loss

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=30, phases=[Phase.generate])
@given(case=cases(dtypes=DTYPES, most_picks=40), exclude=st.booleans(), seed=st.integers(0, 1000))
def test_folds_picks_and_gradients_are_those_of_the_definition(case, exclude, seed):
    assume(fused_reason(case.stream, (LogSumExp(), ShiftedMoment())) is None)
    check_folds("fused", True, case, exclude, seed)


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@settings(max_examples=15, phases=[Phase.generate])
@given(case=cases(dtypes=DTYPES, most_picks=40), exclude=st.booleans())
def test_a_loss_made_in_the_forward_equals_one_made_from_the_folds(gradients, case, exclude):
    assume(fused_reason(case.stream, (LogSumExp(),)) is None)
    check_loss(("fused", gradients), True, case, exclude)
