"""What keeps tests of the benchmark short: they ask whether it works, not how fast anything is."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import peers, timing


@pytest.fixture(scope="module")
def short_runs() -> Iterator[None]:
    """Samples last as long as one call, and torch.compile compiles nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SAMPLE_SECONDS", 1e-5)
        patch.setattr(torch, "compile", lambda function, **_: function)
        peers.compiler_reason.cache_clear()
        yield
    peers.compiler_reason.cache_clear()
