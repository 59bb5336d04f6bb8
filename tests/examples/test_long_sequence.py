"""The long-sequence example, launched as a user would launch it, on two processes and on one."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
import torch

from tests.examples.test_examples import ROOT, run_together

missing = [name for name in ("transformers", "deepspeed") if importlib.util.find_spec(name) is None]
SMALL = ("--device", "cpu", "--context", "1023", "--steps", "2", "--width", "64", "--layers", "2", "--chunk", "100", "--recompute")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")
def test_a_spread_sequence_has_the_loss_of_one_process_and_less_memory(tmp_path):
    """Two ranks share 1,023 tokens, so one of them has a token that counts nowhere."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (printed,) = run_together([*launch, str(ROOT / "examples" / "long_sequence.py"), *SMALL], folder=tmp_path)
    rows = re.findall(r"^ +\d +([\d.]+) +([\d.]+) +[\d.e+-]+$", printed, re.MULTILINE)
    assert len(rows) == 2
    for dense, streamed in rows:
        assert float(streamed) == pytest.approx(float(dense), rel=2e-6)
    (dense_peak,) = re.findall(r"on one process, dense: ([\d,]+) MiB", printed)
    peaks = re.search(r"on each of 2 ranks: ([\d, ]+) MiB", printed).group(1).split(", ")  # type: ignore[union-attr]
    assert len(peaks) == 2
    assert all(0 <= int(peak) < 0.7 * int(dense_peak) for peak in peaks)
