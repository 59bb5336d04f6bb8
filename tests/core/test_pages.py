"""The work buffer kept between calls: never two owners, never visible in a result."""

import sys
import threading

import pytest
import torch

import bigclass
from bigclass.core.engines import pages
from tests.support import error

N, C, D = 512, 8192, 32  # 16 MiB of logits: above the smallest buffer that is kept


@pytest.fixture(autouse=True)
def empty_shelf():
    pages._shelf.clear()
    yield
    pages._shelf.clear()


def problem(seed):
    torch.manual_seed(seed)
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    return x, w, torch.randint(C, (N,))


def step(x, w, y):
    loss = bigclass.linear_cross_entropy(x, w, y, engine="tiled")
    return loss, *torch.autograd.grad(loss, (x, w))


def dense(x, w, y):
    loss = torch.nn.functional.cross_entropy(x.double() @ w.double().t(), y)
    return loss, *torch.autograd.grad(loss, (x, w))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can mark kept pages free")
def test_the_next_call_finds_the_buffer_of_the_last():
    step(*problem(0))
    (kept,) = pages._shelf
    at = kept.data_ptr()
    assert kept.numel() <= bigclass.core.plan.DEFAULT_WORKSPACE["cpu"]
    step(*problem(1))
    assert [t.data_ptr() for t in pages._shelf] == [at]


def test_results_outlive_the_buffer():
    first = step(*problem(0))
    copies = [t.clone() for t in first]
    step(*problem(1))
    with torch.no_grad():
        bigclass.linear_topk(*problem(2)[:2], 3, engine="tiled")
    for t, copy in zip(first, copies, strict=True):
        assert torch.equal(t, copy)


def test_two_borrowers_never_share():
    like = torch.empty(())
    pages.give_back(pages.borrow(like, 2 << 20, torch.float32))
    a, b = pages.borrow(like, 2 << 20, torch.float32), pages.borrow(like, 2 << 20, torch.float32)
    assert a.data_ptr() != b.data_ptr()
    pages.give_back(a)
    pages.give_back(b)
    assert len(pages._shelf) <= 1


def test_threads_get_their_own():
    problems, results = [problem(i) for i in range(4)], {}

    def work(i):
        results[i] = [step(*problems[i]) for _ in range(3)][-1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, p in enumerate(problems):
        for got, want in zip(results[i], dense(*p), strict=True):
            assert error(got, want) < 1e-5


def test_a_kept_buffer_serves_every_dtype_and_kind_of_tensor():
    """A Parameter of odd size first, float64 next."""
    torch.manual_seed(0)
    x, w = torch.nn.Parameter(torch.randn(600, 8)), torch.randn(9001, 8)
    y = torch.randint(9001, (600,))
    bigclass.linear_cross_entropy(x, w, y, engine="tiled").backward()
    wide = bigclass.linear_cross_entropy(x.detach().double(), w.double(), y, engine="tiled")
    assert error(wide, torch.nn.functional.cross_entropy(x.detach().double() @ w.double().t(), y)) < 1e-12
