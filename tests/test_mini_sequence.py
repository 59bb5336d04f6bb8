"""Token-wise modules in chunks: the values and gradients of one call, the memory of one chunk, and what must not be chunked."""

from __future__ import annotations

import copy
import io
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigclass
from bigclass.demo.memory import peak_extra_bytes, resident_peak
from tests.support import error, errors

D, H = 16, 40


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x)), with dropout, as language models have it."""

    def __init__(self, d: int = D, h: int = H, p: float = 0.0) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False), nn.Linear(h, d)
        self.act, self.drop = nn.SiLU(), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.act(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """A layer of a residual stream: a norm, something that mixes tokens, a norm, an MLP."""

    def __init__(self, mlp: nn.Module, d: int = D) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(d), nn.LayerNorm(d), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(x).cumsum(-2) / x.shape[-2]
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, *mlps: nn.Module, d: int = D) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = nn.Sequential(*[Block(m, d) for m in mlps]), nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


def plain_mlp(d: int = D, h: int = H) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.LayerNorm(h), nn.Linear(h, d))


def make(kind: Any = Gated, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(**options).to(dtype)


def run(module: nn.Module, x: Tensor, seed: int = 7, **kwargs: Any) -> list[Tensor]:
    """The output, and the gradients of a fixed weighted sum of it by the input and by all parameters."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    y = module(x, **kwargs)
    y.backward(upstream(y))
    return [y.detach(), x.grad, *[p.grad for p in module.parameters() if p.grad is not None]]  # pyright: ignore[reportReturnType]


def upstream(y: Tensor) -> Tensor:
    """A gradient for y, always the same; of no mean zero, or sums of it would be all rounding."""
    return torch.rand(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(y.dtype)


class Calls:
    """How many tokens each call of a module got, and what it returned."""

    def __init__(self, module: nn.Module) -> None:
        self.tokens: list[int] = []
        self.outputs: list[Tensor] = []
        module.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.tokens.append(args[0].numel() // args[0].shape[-1])
        self.outputs.append(output.detach().clone())


# --- values and gradients


@settings(max_examples=50)
@given(
    lead=st.sampled_from([(), (1,), (3,), (2, 1, 3)]).flatmap(lambda few: st.tuples(*map(st.just, few), st.integers(0, 40))),
    tokens=st.integers(1, 70),
    kind=st.sampled_from([Gated, plain_mlp]),
    fp32=st.booleans(),
    transposed=st.booleans(),
)
def test_chunks_compute_what_one_call_does(lead, tokens, kind, fp32, transposed):
    """Chunks that divide the tokens and that do not, of one token, larger than all of them; no tokens at all; any leading axes (38)."""
    module = make(kind)
    x = torch.randn(*lead, D, dtype=torch.float64)
    if transposed:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    expected = run(module, x)
    bigclass.mini_sequence(module, tokens, fp32_gradients=fp32)
    got = run(module, x)
    assert [t.shape for t in got] == [t.shape for t in expected]
    assert max(errors(got, expected)) <= 1e-12


@pytest.mark.parametrize(("tokens", "sizes"), [(64, [50, 50]), (10, [10] * 10), (30, [25] * 4), (99, [50, 50]), (33, [25] * 4)])
def test_every_token_is_in_one_chunk_and_chunks_are_nearly_equal(tokens, sizes):
    """100 tokens; the down projection sees them in the forward, gate and up again in the backward."""
    module = make()
    calls, again = Calls(module.down), Calls(module.gate)
    bigclass.mini_sequence(module, tokens)
    run(module, torch.randn(4, 25, D, dtype=torch.float64))
    assert calls.tokens == sizes, "the last product is not made again"
    assert again.tokens == sizes + sizes[::-1]


def test_a_frozen_input_and_frozen_weights():
    module, x = make(), torch.randn(50, D, dtype=torch.float64)
    expected = run(module, x)
    bigclass.mini_sequence(module, 8)
    (y := module(x)).backward(upstream(y))
    assert max(errors([p.grad for p in module.parameters()], expected[2:])) <= 1e-12  # pyright: ignore[reportArgumentType]
    got = run(module.requires_grad_(False), x)
    assert len(got) == 2
    assert max(errors(got, expected[:2])) <= 1e-12


def test_several_tensors_are_chunked_together_and_the_rest_handed_on():
    class Residual(Gated):
        def forward(self, x: Tensor, residual: Tensor, scale: float = 1.0) -> Tensor:
            return residual + scale * super().forward(x)

    module, x = make(Residual), torch.randn(2, 9, D, dtype=torch.float64)
    expected = run(module, x, residual=x * 2, scale=0.5)
    bigclass.mini_sequence(module, 4)
    assert max(errors(run(module, x, residual=x * 2, scale=0.5), expected)) <= 1e-12
    with pytest.raises(ValueError, match=r"Residual: expected tensors with the same token axes, got shapes .*modules=\[\.\.\.\]"):
        module(x, torch.randn(9, D))


def test_tensors_in_containers_are_refused():
    class Paired(Gated):
        def forward(self, x: Tensor, more: Any = ()) -> Tensor:
            return super().forward(x)

    module, x = bigclass.mini_sequence(make(Paired), 4), torch.randn(9, D, dtype=torch.float64)
    assert module(x, more=[3]).shape == x.shape
    with pytest.raises(TypeError, match="Paired: expected tensors as arguments of their own, got some in a tuple"):
        module(x, (x, x))


def test_two_backwards_and_two_uses_of_one_module():
    module = make()
    x, y = torch.randn(2, 30, D, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        module.zero_grad()
        loss = module(x).square().sum() + module(module(y)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad.clone() for p in module.parameters()]

    expected = gradients()
    for fp32 in (False, True):
        bigclass.mini_sequence(module, 7, fp32_gradients=fp32)
        assert max(errors(gradients(), expected)) <= 1e-12


def test_an_input_changed_in_place_before_the_backward_is_an_error():
    module = bigclass.mini_sequence(make(), 4)
    x = torch.randn(9, D, dtype=torch.float64)
    y = module(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_gradient_reaches_its_parameter_once():
    """Optimizers in the backward step once (40)."""
    module, seen = bigclass.mini_sequence(make(), 3), []
    for name, p in module.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    run(module, torch.randn(20, D, dtype=torch.float64))
    assert sorted(seen) == sorted(name for name, _ in module.named_parameters())


# --- memory


def peak(how: str) -> Any:
    """S=8192, d=256, intermediate 896: forward and backward of one gated MLP, the input's and the weights' gradients included."""
    module = Gated(256, 896)
    if how == "mini_sequence":
        bigclass.mini_sequence(module, 8192 // 16)

    def call(x: Tensor) -> list[Tensor]:
        # the output's gradient is there before, as one from the rest of a model would be
        pieces = x.split(512) if how == "loop without recompute" else [x]
        torch.cat([module(piece) for piece in pieces]).backward(gradient[: x.shape[0]])
        return [x.grad, *[p.grad for p in module.parameters()]]  # pyright: ignore[reportReturnType]

    gradient = torch.randn(8192, 256)
    call(torch.randn(1024, 256, requires_grad=True))
    module.zero_grad()
    return partial(call, torch.randn(8192, 256, requires_grad=True))


@pytest.mark.skipif(resident_peak() is None, reason="this system does not tell a process's peak memory")
def test_the_peak_is_at_most_three_tenths():
    """A loop without recompute reaches about 0.7 (39)."""
    plain, mini, loop = [peak_extra_bytes(peak, how) for how in ("plain", "mini_sequence", "loop without recompute")]
    assert plain is not None and mini is not None and loop is not None
    assert plain >= 8192 * 896 * 4 * 4, "gate, its activation, up and their product are kept"
    assert mini <= 0.30 * plain, f"{mini / plain:.2f}"
    assert loop >= 0.5 * plain, "what this test compares with has changed"


def test_what_is_kept_for_the_backward_is_the_input():
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    module, x = make(), torch.randn(1000, D, dtype=torch.float64, requires_grad=True)
    sizes = []
    for _ in range(2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x)
        sizes.append(sum(kept.values()))
        bigclass.mini_sequence(module, 100)
    assert sizes[0] >= 1000 * (D + 4 * H) * 8
    assert sizes[1] <= 1000 * D * 8 + 64


# --- left alone


def test_no_grad_and_single_chunks_are_left_alone():
    module, x = make(p=0.3), torch.randn(3, 20, D, dtype=torch.float64)
    calls = Calls(module.down)
    expected = run(module.eval(), x)
    bigclass.mini_sequence(module, 16)
    calls.tokens.clear()
    with torch.no_grad():
        assert torch.equal(module(x), expected[0])
    with torch.inference_mode():
        assert torch.equal(module(x), expected[0])
    assert torch.equal(copy.deepcopy(module).requires_grad_(False)(x), expected[0])
    bigclass.mini_sequence(module, 60)
    assert all(map(torch.equal, run(module, x), expected))
    assert calls.tokens == [60] * 3
    with torch.no_grad():
        assert make(p=0.0).train()(x).shape == x.shape


def test_without_dropout_a_training_forward_under_no_grad_is_one_call():
    module = bigclass.mini_sequence(make(), 16)
    calls = Calls(module.down)
    with torch.no_grad():
        module.train()(torch.randn(3, 20, D, dtype=torch.float64))
    assert calls.tokens == [60]


# --- dropout, autocast, dtypes


def by_hand(module: Any, x: Tensor, sizes: list[int], seed: int = 7) -> list[Tensor]:
    """What `run` gives of a module whose forward is a loop over chunks, without recompute."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.module(piece) for piece in x.split(sizes)])

    return run(Loop(), x, seed)


def test_dropout_in_the_backward_is_that_of_the_forward():
    module, x = make(p=0.4).train(), torch.randn(50, D, dtype=torch.float64)
    expected = by_hand(module, x, [17, 17, 16])
    after = torch.rand(3)
    bigclass.mini_sequence(module, 20)
    module.drop = nn.Sequential(nn.Dropout(0.4), nn.Identity())  # dropout is not the last operation, so it is made again
    calls = Calls(module.drop[0])
    got = run(module, x)
    assert torch.equal(torch.rand(3), after), "random numbers go on as after a plain loop"
    assert all(map(torch.equal, got[:1], expected[:1]))
    assert max(errors(got, expected)) <= 1e-12
    assert len(calls.outputs) >= 3
    for again, first in zip(calls.outputs[3:], calls.outputs[2::-1], strict=False):
        assert torch.equal(again, first)


def dropped(x: Tensor, p: float) -> Tensor:
    """Dropout whose masks of chunks are not the pieces of one mask. (On some CPUs they are, on others and on GPUs not.)"""
    mask = torch.rand(x.shape[-1], x.numel() // x.shape[-1], dtype=x.dtype).T.reshape(x.shape) >= p
    return x * mask / (1 - p)


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return dropped(x, self.p) if self.training else x


class DropInside(nn.Module):
    """Dropout between the layers, where its mask is needed for both their gradients."""

    def __init__(self, p: float = 0.4) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(D, H), Dropout(p), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(x).relu()))


class DropByNumber(DropInside):
    """Dropout as a number, which no module tells of."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.activation_dropout = 0.4

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        return self.down(dropped(x, self.activation_dropout) if self.training else x)


@pytest.mark.parametrize("kind", [DropInside, DropByNumber])
@pytest.mark.parametrize("outer", [None, False, True])
def test_dropout_inside_is_exact_under_any_checkpoint_around_it(kind, outer):
    """A reentrant checkpoint runs the forward first under no_grad: its masks must be those of the chunks made later."""
    module, x = make(kind).train(), torch.randn(50, D, dtype=torch.float64)
    expected = by_hand(module, x, [10] * 5)
    bigclass.mini_sequence(module, 10)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x) if outer is None else checkpoint(self.module, x, use_reentrant=outer)  # pyright: ignore[reportReturnType]

    assert max(errors(run(Outer(), x), expected)) <= 1e-12


def test_the_masks_are_those_of_the_forward():
    module = bigclass.mini_sequence(make(DropInside).train(), 10)
    calls = Calls(module.drop)
    run(module, torch.randn(50, D, dtype=torch.float64))
    assert len(calls.outputs) == 10
    assert all(map(torch.equal, calls.outputs[:5], calls.outputs[:4:-1]))
    assert not torch.equal(calls.outputs[0] == 0, calls.outputs[1] == 0)


def test_gradient_caches_draw_the_masks_of_the_chunks():
    """`cached_step` encodes without a graph first, then with one."""
    module, x = make(DropInside).train(), torch.randn(32, D, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        module.zero_grad()
        torch.manual_seed(3)
        loss = bigclass.cached_step(module, x, lambda f: f.square().mean(), chunk_size=32)
        assert torch.isfinite(loss)
        return [loss, *[p.grad.clone() for p in module.parameters()]]

    bigclass.mini_sequence(module, 8)
    torch.manual_seed(3)
    loss = module(x).square().mean()
    expected = [loss, *torch.autograd.grad(loss, list(module.parameters()))]
    assert max(errors(gradients(), expected)) <= 1e-12


@pytest.mark.parametrize("fp32", [False, True])
def test_autocast_is_replayed_and_sums_in_fp32(fp32):
    """fp32 weights, bf16 products: with a weight's bf16 copy shared by all chunks their gradients would be added in bf16 (4, 40)."""
    x, kept = torch.randn(1024, D), []

    def one(tokens: int | None) -> tuple[list[Tensor], list[Tensor]]:
        module = make(dtype=torch.float32)
        exact = run(copy.deepcopy(module).double(), x.double())
        module.down.register_forward_pre_hook(lambda _, args: kept.append(args[0].dtype))
        if tokens is not None:
            bigclass.mini_sequence(module, tokens, fp32_gradients=fp32)
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(inputs)
        y.backward(upstream(y))
        assert y.dtype == torch.bfloat16
        return [y.detach(), inputs.grad, *[p.grad for p in module.parameters()]], exact  # pyright: ignore[reportReturnType]

    plain, chunked = errors(*one(None)), errors(*one(8))
    assert set(kept) == {torch.bfloat16}
    assert all(c <= 1.1 * p for c, p in zip(chunked, plain, strict=True)), (chunked, plain)


def gradient_errors(kind: Any, tokens: int | None, fp32: bool, dtype: torch.dtype, draws: int = 3) -> dict[str, float]:
    """Of each parameter's gradient to float64, pooled over draws."""
    pooled: dict[str, list[float]] = {}
    for seed in range(draws):
        module = make(kind, dtype, seed)
        x = torch.randn(768, D).to(dtype)
        exact = copy.deepcopy(module).double()
        run(exact, x.double())
        if tokens is not None:
            bigclass.mini_sequence(module, tokens, fp32_gradients=fp32)
        run(module, x)
        for (name, p), q in zip(module.named_parameters(), exact.parameters(), strict=True):
            assert p.grad.dtype == dtype
            pooled.setdefault(name, []).append(error(p.grad, q.grad))
    return {name: math.sqrt(sum(e * e for e in es) / draws) for name, es in pooled.items()}


def conv1d_mlp() -> nn.Module:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")

    class Conv1DMlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc, self.c_proj = pytorch_utils.Conv1D(H, D), pytorch_utils.Conv1D(D, H)

        def forward(self, x: Tensor) -> Tensor:
            return self.c_proj(F.gelu(self.c_fc(x)))

    return Conv1DMlp()


class Transposed(nn.Module):
    """A linear layer that multiplies by hand, as some models' do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.up.weight.T + self.up.bias).relu() @ self.down.weight.T + self.down.bias


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Gated, torch.bfloat16), (Gated, torch.float16), (plain_mlp, torch.bfloat16), (conv1d_mlp, torch.bfloat16)]
)
def test_fp32_gradients_err_as_one_accumulation(kind, dtype):
    """96 chunks. Added in the weights' dtype the error grows with their number (4)."""
    single = gradient_errors(kind, None, False, dtype)
    fp32 = gradient_errors(kind, 8, True, dtype)
    plain = gradient_errors(kind, 8, False, dtype)
    for name in single:
        assert fp32[name] <= 1.1 * single[name], f"{name}: {fp32[name]:.1e}, in one {single[name]:.1e}"
    assert max(plain[name] / single[name] for name in single) >= 2, "otherwise this shows nothing"


def test_fp32_gradients_of_weights_that_no_linear_layer_reads():
    """Each chunk's product is rounded by torch; the sum is not."""
    single, fp32, plain = [gradient_errors(Transposed, *how, torch.bfloat16) for how in ((None, False), (8, True), (8, False))]
    assert all(fp32[name] <= 2 * single[name] for name in single)
    assert max(plain[name] / single[name] for name in single) >= 2


# --- modules as they were


def test_nothing_of_the_model_changes_but_one_class_and_that_comes_back():
    model = make(partial(Net, Gated(), plain_mlp()))
    before, keys = {name: type(m) for name, m in model.named_modules()}, list(model.state_dict())
    parameters, attributes = list(model.parameters()), {name: set(vars(m)) for name, m in model.named_modules()}
    text = repr(model)
    assert bigclass.mini_sequence(model, 10) is model
    changed = {name for name, m in model.named_modules() if type(m) is not before[name]}
    assert changed == {"blocks.0.mlp", "blocks.1.mlp"}
    assert all(isinstance(m, before[name]) for name, m in model.named_modules())
    assert list(model.state_dict()) == keys and repr(model) == text
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert bigclass.restore_mini_sequence(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert bigclass.restore_mini_sequence(model) is model


def test_converting_again_changes_the_chunks_and_nests_nothing():
    model, x = make(partial(Net, Gated(), Gated())), torch.randn(40, D, dtype=torch.float64)
    expected = run(model, x)
    calls = [Calls(block.mlp.down) for block in model.blocks]
    bigclass.mini_sequence(model, 20)
    kinds = [type(m) for m in model.modules()]
    bigclass.mini_sequence(model, 10)
    assert [type(m) for m in model.modules()] == kinds
    bigclass.mini_sequence(model, 40, modules=["blocks.1.mlp"])
    assert max(errors(run(model, x), expected)) <= 1e-12
    assert [c.tokens for c in calls] == [[10] * 4, [40]]
    bigclass.restore_mini_sequence(model.blocks[0])
    run(model, x)
    assert calls[0].tokens[4:] == [40]


def test_copies_and_pickles_run_in_chunks_too():
    model, x = bigclass.mini_sequence(make(partial(Net, Gated(), Gated())), 7), torch.randn(20, D, dtype=torch.float64)
    expected = run(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.blocks[0].mlp is not model.blocks[0].mlp
        calls = Calls(other.blocks[0].mlp.down)
        assert all(map(torch.equal, run(other, x), expected))
        assert calls.tokens == [7, 7, 6]
        bigclass.restore_mini_sequence(other)
        assert type(other.blocks[0].mlp) is Gated
    calls = Calls(model.blocks[0].mlp.down)
    run(model, x)
    assert calls.tokens == [7, 7, 6], "the original is not restored with its copies"


def test_hooks_of_the_module_run_once_a_call():
    module, x = bigclass.mini_sequence(make(), 5), torch.randn(20, D, dtype=torch.float64)
    calls, grads = Calls(module), []
    module.register_full_backward_hook(lambda m, into, out: grads.append((into[0].shape, out[0].shape)))
    run(module, x)
    assert calls.tokens == [20]
    assert grads == [((20, D), (20, D))]


def test_a_forward_put_on_the_module_itself_is_refused():
    model = make(partial(Net, Gated()))
    model.blocks[0].mlp.forward = model.blocks[0].mlp.forward
    with pytest.raises(ValueError, match="its forward was assigned on the module itself"):
        bigclass.mini_sequence(model, 5)


@pytest.mark.parametrize(("fp32", "autocast"), [(False, True), (True, False)])
def test_compiled_it_is_one_graph(fp32, autocast):
    """With fp32_gradients several, and fullgraph=True is refused with the reason."""
    dtype = torch.float32 if autocast else torch.bfloat16
    model, x = make(partial(Net, plain_mlp()), dtype), torch.randn(2, 15, D).to(dtype)
    bigclass.mini_sequence(model, 16, fp32_gradients=fp32)

    def gradients(call: Any) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = call(x).float().square().sum()
        loss.backward()
        return [loss, *[p.grad.float() for p in model.parameters()]]

    expected = gradients(model)
    torch._dynamo.reset()
    assert max(errors(gradients(torch.compile(model, backend="aot_eager", fullgraph=not fp32)), expected)) <= 1e-6
    if fp32:
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="fp32_gradients=True of mini_sequence"):
            torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


# --- what is found


def chunked(model: nn.Module) -> set[str]:
    plain = copy.deepcopy(model)
    bigclass.mini_sequence(model, 4)
    return {name for (name, m), n in zip(model.named_modules(), plain.modules(), strict=True) if type(m) is not type(n)}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 2), nn.ModuleList([Gated(), Gated()])

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        return torch.stack([e(x) for e in self.experts], -1).mul(share.unsqueeze(-2)).sum(-1)


class OnTheSide(Gated):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x.sum()


class Pooled(Gated):
    """Mixes tokens behind a weight that starts at zero, as global response norms and spatial gates do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight * x.norm(dim=-2, keepdim=True)


class Ranked(Gated):
    """Mixes tokens by comparing them, which NaN does not show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x[..., :1] >= x[..., :1].nanmedian(-2, keepdim=True).values)


class Thinned(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., ::2, :]


class DropPath(nn.Identity):
    pass


def with_part(part: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), part, nn.Linear(H, D))


MIXING = {
    "batch norm": (partial(with_part, nn.BatchNorm1d(H)), "BatchNorm"),
    "convolution": (partial(with_part, nn.Conv1d(H, H, 1)), "Conv1d"),
    "instance norm": (partial(with_part, nn.InstanceNorm1d(H)), "InstanceNorm"),
    "stochastic depth": (partial(with_part, DropPath()), "DropPath"),
    "dropout of features": (partial(with_part, nn.Dropout1d(0.1)), "Dropout1d"),
    "experts": (Experts, "Experts"),
    "attention": (lambda: nn.TransformerEncoderLayer(D, 2, H).self_attn, "Attention"),
    "auxiliary loss": (OnTheSide, "returns tuple"),
    "behind a zero": (Pooled, "depends on the other tokens"),
    "by comparison": (Ranked, "depends on the other tokens"),
    "no rows": (lambda: nn.Sequential(nn.Linear(D, H), nn.Linear(H, D), nn.Flatten(0, 1)), "Flatten"),
    "every other row": (Thinned, "not a row for each"),
    "nothing linear": (nn.GELU, "no linear layer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXING)
def test_what_mixes_tokens_is_refused_and_passed_over(kind):
    """42."""
    mlp, reason = MIXING[kind]
    model = make(partial(Net, Gated(), mlp()))
    assert chunked(copy.deepcopy(model)) == {"blocks.0.mlp"}
    with pytest.raises(ValueError, match=rf"modules: 'blocks.1.mlp' cannot be run in chunks of tokens: .*({reason})"):
        bigclass.mini_sequence(model, 4, modules=["blocks.0.mlp", "blocks.1.mlp"])
    assert type(model.blocks[0].mlp) is Gated, "nothing is converted where something is refused"
    with pytest.raises(ValueError, match="found none"):
        bigclass.mini_sequence(make(partial(Net, mlp())), 4)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, d: int = D) -> None:
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(d), plain_mlp(tokens)
        self.norm2, self.mlp_channels = nn.LayerNorm(d), plain_mlp(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).mT).mT
        return x + self.mlp_channels(self.norm2(x))


@pytest.mark.parametrize("tokens", [D, D + 3])
def test_a_token_mixing_mlp_is_refused_though_it_is_a_plain_one(tokens):
    """It gets its input transposed: its width tells, or its name."""
    model = nn.Sequential(MixerBlock(tokens), nn.Linear(D, 3)).double()
    assert chunked(copy.deepcopy(model)) == {"0.mlp_channels"}
    with pytest.raises(ValueError, match="mixes tokens"):
        bigclass.mini_sequence(model, 4, modules=["0.mlp_tokens"])


def test_torch_layers_run_their_feed_forward_in_chunks():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, 0.0, batch_first=True), 2, enable_nested_tensor=False).double()
    x = torch.randn(3, 9, D, dtype=torch.float64)
    expected = run(model, x)
    calls = Calls(model.layers[0].linear1)
    assert chunked(model) == {"layers.0", "layers.1"}
    assert max(errors(run(model, x), expected)) <= 1e-12
    assert calls.tokens[:7] == [4] * 6 + [3]
    bigclass.restore_mini_sequence(model)
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


def test_a_list_takes_names_and_modules_that_nothing_would_find():
    model = make(partial(Net, Gated(), Experts()))
    x = torch.randn(20, D, dtype=torch.float64)
    expected = run(model, x)
    calls = Calls(model.blocks[1].mlp.experts[0].down)
    bigclass.mini_sequence(model, 10, modules=["blocks.0.mlp", model.blocks[1].mlp.experts[0]])
    assert max(errors(run(model, x), expected)) <= 1e-12
    assert calls.tokens == [10, 10]


def test_trying_leaves_no_trace():
    model = make(partial(Net, Gated(p=0.2), plain_mlp())).train()
    calls = Calls(model.blocks[0].mlp.down)
    model.blocks[0].mlp.drop.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    bigclass.mini_sequence(model, 5)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls.tokens
    model(torch.randn(4, D, dtype=torch.float64))
    assert calls.tokens == [4]


def test_on_the_meta_device_structure_and_names_decide():
    class Mlp(Gated):
        pass

    with torch.device("meta"):
        model = Net(Mlp(), nn.Sequential(nn.Linear(D, H), nn.Linear(H, D)))
    assert {name for name, m in bigclass.mini_sequence(model, 4).named_modules() if "_mini_sequence" in vars(m)} == {"blocks.0.mlp"}
    with pytest.raises(ValueError, match="its parameters cannot be read here"):
        bigclass.mini_sequence(model, 4, modules=["blocks.1.mlp"])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a module, got int"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: expected at least 1, got 0"),
        ({"chunk_tokens": 2.0}, TypeError, "chunk_tokens: expected a whole number of tokens, got float"),
        ({"chunk_tokens": True}, TypeError, "chunk_tokens: expected a whole number of tokens, got bool"),
        ({"modules": "blocks.0.mlp"}, TypeError, "modules: expected a list of names or modules, got str; put it into a list"),
        ({"modules": ["blocks.7.mlp"]}, ValueError, "modules: expected names of the model's modules, got 'blocks.7.mlp'"),
        ({"modules": [nn.Linear(2, 2)]}, TypeError, "got a module that is not of this model"),
        ({"modules": [3]}, TypeError, "modules: expected names of the model's modules, or these themselves, got int"),
        ({"modules": ["blocks.0.mlp", "blocks.0.mlp.3"]}, ValueError, "got 'blocks.0.mlp.3' inside 'blocks.0.mlp'"),
        ({"group": "dp"}, ValueError, "group: torch.distributed is not initialised"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, kind, message):
    model = Net(plain_mlp())
    given = {"model": model, "chunk_tokens": 4, **arguments}
    with pytest.raises(kind, match=message):
        bigclass.mini_sequence(given.pop("model"), given.pop("chunk_tokens"), **given)
    assert "_mini_sequence" not in vars(model.blocks[0].mlp)
    with pytest.raises(TypeError, match="model: expected a module, got NoneType"):
        bigclass.restore_mini_sequence(None)  # pyright: ignore[reportArgumentType]


def test_a_module_that_returns_something_else_in_training_is_named():
    class Twofold(Gated):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return (y, y) if self.training else y

    module = bigclass.mini_sequence(make(Twofold).eval(), 4)
    with pytest.raises(TypeError, match=r"Twofold: expected one tensor with a row for each of the tokens .* got tuple"):
        module.train()(torch.randn(9, D, dtype=torch.float64))
