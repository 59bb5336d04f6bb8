"""Heads that PEFT has wrapped: the losses, gradients, checkpoints and habits of the dense PEFT model, without its logits."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import bigclass  # noqa: E402
from bigclass.integrations import peft as adapter  # noqa: E402
from tests.support import error  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("error::bigclass.LogitsWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

C, D = 61, 16


class Plain(nn.Module):
    """A body and a head with a bias."""

    def __init__(self, c: int = C, d: int = D, bias: bool = True) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(5, d), nn.Linear(d, c, bias=bias)

    def forward(self, x: Tensor, **options):
        return self.lm_head(torch.tanh(self.body(x)), **options)


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=C, hidden_size=D, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Its head is tied to the embedding."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=C, n_embd=D, n_layer=1, n_head=2, n_positions=16))


MODELS = {"plain": Plain, "llama": llama, "gpt2": gpt2}
TARGETS = {"plain": ["lm_head", "body"], "llama": ["lm_head", "q_proj"], "gpt2": ["lm_head", "c_attn"]}


def wrapped(kind: str, dtype=torch.float64, model: nn.Module | None = None, names: tuple[str, ...] = ("default",), **config) -> nn.Module:
    """A PEFT model in training, its adapters drawn (B = 0 would hide what a gradient of A is made of)."""
    torch.manual_seed(0)
    model = MODELS[kind]() if model is None else model
    config = {"r": 3, "lora_alpha": 4, "target_modules": TARGETS[kind], **config}
    for name in names:
        made = peft.LoraConfig(**config)
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, made)
        else:
            model = peft.get_peft_model(model, made, adapter_name=name)
    model = model.to(dtype).train()
    stir(model)
    return model


def stir(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
            elif "lora_magnitude" in name or "modules_to_save" in name:
                p.mul_(1.0 + 0.2 * torch.rand(p.shape, generator=g))


def head_of(model: nn.Module):
    return model.get_base_model().lm_head if isinstance(model, peft.PeftModel) else model.lm_head


def batch(model: nn.Module, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    y = torch.randint(C, (3, 7), generator=g)
    bare = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return (torch.randn(3, 7, 5, generator=g).to(dtype), y) if isinstance(bare, Plain) else (y, y)


def logits_of(model: nn.Module, x: Tensor):
    out = model(x)
    return getattr(out, "logits", out)


def step(model: nn.Module, x: Tensor, y: Tensor, lazy: bool | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of an unchanged training step, with the same dropout for every model."""
    torch.manual_seed(3)
    model.zero_grad()
    logits = logits_of(model, x)
    assert lazy is None or isinstance(logits, bigclass.LazyLogits) == lazy
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, C), y[:, 1:].reshape(-1))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_step(model: nn.Module, dense: nn.Module, limit: float = 1e-10) -> None:
    """The same loss and the same gradients, of the same parameters; in evaluation the same numbers."""
    for each, mode in ((model, True), (dense, True)):
        each.train(mode)
    x, y = batch(model)
    loss, grads = step(model, x, y, lazy=True)
    exact, expected = step(dense, x, y, lazy=False)
    assert error(loss, exact) < limit and list(grads) == list(expected) and grads
    for name, g in grads.items():
        assert expected[name].any() and error(g, expected[name]) < limit, name
    model.eval(), dense.eval()
    with torch.no_grad():
        assert torch.equal(logits_of(model, x), logits_of(dense, x))
    model.train(), dense.train()


def pair(kind: str = "plain", *, options: dict | None = None, **config) -> tuple[nn.Module, nn.Module]:
    """A converted PEFT model, and the same one dense."""
    dense = wrapped(kind, **config)
    model = copy.deepcopy(dense)
    head = head_of(model)
    assert adapter.adopt(head, **{"engine": "tiled", **(options or {})}) is head and adapter.is_adopted(head)
    assert list(model.state_dict()) == list(dense.state_dict())
    return model, dense


CONFIGS = {
    "lora": {}, "dropout": {"lora_dropout": 0.4}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True}, "trained bias": {"bias": "all"},
}  # fmt: skip
if hasattr(peft.tuners.lora.variants, "MiCALinearVariant"):  # of newer ones
    CONFIGS["mica"] = {"init_lora_weights": "mica"}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_lora_head_trains_as_the_dense_one(kind, config):
    if config.get("lora_bias") and kind != "plain":
        config = {**config, "target_modules": ["lm_head"]}
    model, dense = pair(kind, **config)
    assert isinstance(head_of(model), peft.tuners.lora.layer.Linear)
    check_step(model, dense)


@settings(max_examples=40)
@given(data=st.data())
def test_adapters_of_any_kind_in_any_order(data):
    """Several active at once, DoRA among them; soft cap and scale, which lie behind everything; merged or disabled."""
    n, c, d = data.draw(st.integers(2, 30)), data.draw(st.integers(3, 90)), data.draw(st.integers(2, 20))
    biased = data.draw(st.booleans(), label="bias")
    names = ("one", "two", "three")[: data.draw(st.integers(1, 3), label="adapters")]
    dense: nn.Module = Plain(c, d, bias=biased)
    for name in names:
        dora = data.draw(st.booleans(), label=f"{name}: dora")
        config = {
            "r": data.draw(st.integers(1, 5)), "lora_alpha": data.draw(st.sampled_from((1, 3, 16))), "use_dora": dora,
            "use_rslora": data.draw(st.booleans()), "lora_bias": not dora and biased and data.draw(st.booleans()),
            "lora_dropout": 0.0 if dora else data.draw(st.sampled_from((0.0, 0.5))), "target_modules": ["lm_head"],
        }  # fmt: skip
        dense = wrapped("plain", model=dense, names=(name,), **config)
    active = data.draw(st.permutations(names))[: data.draw(st.integers(1, len(names)))]
    dense.base_model.set_adapter(active)
    softcap, scale = data.draw(st.sampled_from(((None, None), (2.0, None), (None, 1.7), (3.0, 0.4))), label="maps")
    model = copy.deepcopy(dense)
    adapter.adopt(head_of(model), softcap=softcap, logit_scale=scale, engine=data.draw(st.sampled_from(("dense", "tiled"))))
    state = data.draw(st.sampled_from(("plain", "plain", "merged", "disabled")), label="state")
    for each in (model, dense):
        if state == "merged":
            each.merge_adapter()
        elif state == "disabled":
            each.base_model.disable_adapter_layers()
        head_of(each).base_layer.weight.requires_grad_(True)
    x, y = torch.randn(n, 5, dtype=torch.float64), torch.randint(c, (n,))

    def reference() -> Tensor:
        s = dense(x) * (scale or 1.0)
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    made = []
    for logits in (lambda: model(x), reference):
        torch.manual_seed(5)
        s = logits()
        F.cross_entropy(s, y).backward()
        made.append(s)
    assert isinstance(made[0], bigclass.LazyLogits) and made[0].dtype == made[1].dtype
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert q.grad is None or error(p.grad, q.grad) < 1e-9, name
    model.eval(), dense.eval()
    with torch.no_grad():
        assert error(model(x), reference()) < 1e-12


ORDERS = (("lora bias", "dora"), ("dora", "lora bias"), ("dora", "dora"), ("dora", "dropout", "dora", "lora"))


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_dora_scales_what_came_before_it_and_nothing_after(order):
    dense: nn.Module = Plain()
    for at, kind in enumerate(order):
        dense = wrapped("plain", model=dense, names=(str(at),), **CONFIGS[kind])
    model = copy.deepcopy(dense)
    adapter.adopt(head_of(model), engine="tiled")
    for each in (model, dense):
        each.base_model.set_adapter([str(at) for at in range(len(order))])
    check_step(model, dense)


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}], ids=str)
def test_an_unchanged_causal_lm_with_labels_trains(config):
    """transformers' own loss, of float32 as it casts, under the prompt of a task type."""
    model, dense = pair("llama", task_type="CAUSAL_LM", **config)
    ids, _ = batch(model)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100)
    made = []
    for each in (model, dense):
        torch.manual_seed(3)
        out = each(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        out.loss.backward()
        made.append([out.loss, *[p.grad for p in each.parameters() if p.requires_grad]])
    assert len(made[0]) > 4 and all(error(a, b) < 1e-5 and a.any() for a, b in zip(*made, strict=True))


def test_merged_and_disabled_adapters_are_followed():
    model, dense = pair()
    x, _ = batch(model)
    plain = logits_of(dense, x)
    for each in (model, dense):
        each.merge_adapter()
    assert isinstance(model(x), bigclass.LazyLogits) and error(model(x).materialize(), plain) < 1e-12
    with model.disable_adapter(), dense.disable_adapter():  # takes the merged one out
        bare = model(x)
        assert error(bare.materialize(), dense(x)) < 1e-12 and error(bare.materialize(), plain) > 1e-3
    assert not head_of(model).merged
    check_step(model, dense)


def test_several_adapters_are_added_switched_and_deleted_after_the_conversion():
    model, dense = pair()
    for each in (model, dense):
        each.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], lora_dropout=0.2))
        stir(each.double())
        each.set_adapter("second")
    check_step(model, dense)
    for each in (model, dense):
        each.base_model.set_adapter(["default", "second"])
    check_step(model, dense)
    for each in (model, dense):
        each.delete_adapter("default")
    check_step(model, dense)
    for each in (model, dense):
        each.get_base_model().lm_head.scale_layer(1.5)
    check_step(model, dense)


def test_copies_pickles_and_released_heads():
    model, dense = pair(lora_dropout=0.3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(head_of(other)) is adapter.LoraHead and head_of(other).lora_A["default"] is not head_of(model).lora_A["default"]
        check_step(other, copy.deepcopy(dense))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    dense.load_state_dict(torch.load(file), strict=True)
    head = head_of(model)
    assert adapter.release(head) is head and type(head) is peft.tuners.lora.layer.Linear and type(head.base_layer) is nn.Linear
    assert repr(model) == repr(dense) and set(vars(head.base_layer)) == set(vars(head_of(dense).base_layer))
    x, y = batch(model)
    assert torch.equal(step(model, x, y, lazy=False)[0], step(dense, x, y)[0])


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"target_modules": ["body"], "modules_to_save": ["lm_head"]}], ids=str)
def test_saved_adapters_have_the_same_keys_and_load(config, tmp_path):
    from safetensors.torch import load_file

    model, dense = pair(**config)
    for each, name in ((model, "mine"), (dense, "plain")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.save_pretrained(tmp_path / name)
    mine, plain = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mine", "plain"))
    assert list(mine) == list(plain) and all(torch.equal(mine[k], plain[k]) for k in plain)
    torch.manual_seed(0)
    fresh = Plain().double()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "plain", is_trainable=True, autocast_adapter_dtype=False).double()
    adapter.adopt(head_of(loaded), engine="tiled")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(Plain().double()), tmp_path / "plain", is_trainable=True)
    again.double().load_state_dict(loaded.state_dict(), strict=True)
    check_step(loaded, again)
    loaded.load_adapter(tmp_path / "mine", "again", autocast_adapter_dtype=False)
    loaded.set_adapter("again")
    x, _ = batch(loaded)
    logits = loaded.train()(x)  # loading puts it into evaluation
    assert isinstance(logits, bigclass.LazyLogits) and error(logits.materialize(), again(x)) < 1e-12


def test_a_head_converted_before_peft_is_right_says_so_and_streams_once_adopted():
    torch.manual_seed(0)
    base = Plain().double()
    dense = wrapped("plain", model=copy.deepcopy(base))
    adapter.adopt(base.lm_head, engine="tiled", label_smoothing=0.1, shift=0)
    model = wrapped("plain", model=base)
    x, y = batch(model)
    with pytest.warns(bigclass.LogitsWarning, match="convert_head again after get_peft_model"):
        made = step(model, x, y, lazy=False)
    exact = step(dense, x, y)
    assert error(made[0], exact[0]) < 1e-12
    assert all(error(g, exact[1][name]) < 1e-10 for name, g in made[1].items()) and list(made[1]) == list(exact[1])
    head = adapter.adopt(head_of(model))
    assert (head.base_layer.engine, head.base_layer.label_smoothing, head.base_layer.shift) == ("tiled", 0.1, 0)
    check_step(model, dense)
    for merge in (True, False):
        tuned = copy.deepcopy(model)
        out = tuned.merge_and_unload() if merge else tuned.unload()
        assert type(out.lm_head) is bigclass.LMHead and out.lm_head.engine == "tiled"
        plain = copy.deepcopy(dense).merge_and_unload() if merge else copy.deepcopy(dense).unload()
        logits = out.train()(x)
        assert isinstance(logits, bigclass.LazyLogits) and error(logits.materialize(), plain(x)) < 1e-12


@pytest.mark.parametrize("kind", MODELS)
def test_heads_that_are_trained_whole(kind):
    config = {"target_modules": TARGETS[kind][1:], "modules_to_save": ["lm_head"]}
    model, dense = pair(kind, **config)
    assert type(head_of(model)) is adapter.SavedHead
    check_step(model, dense)
    for each in (model, dense):
        each.add_adapter("second", peft.LoraConfig(r=2, **config))
        each.double().set_adapter("second")
        stir(each)
    assert type(head_of(model).modules_to_save["second"]) is bigclass.LMHead
    check_step(model, dense)
    x, y = batch(model)
    with model.disable_adapter(), dense.disable_adapter():
        torch.manual_seed(3)
        logits = logits_of(model, x)
        torch.manual_seed(3)
        assert isinstance(logits, bigclass.LazyLogits) and torch.equal(logits.materialize(), logits_of(dense, x))
    hidden = torch.randn(2, 7, D, dtype=torch.float64)
    active = head_of(dense).modules_to_save["second"]
    exact = F.cross_entropy(active(hidden)[:, :-1].reshape(-1, C), y[:2, 1:].reshape(-1))
    assert error(head_of(model)(hidden, y[:2]), exact) < 1e-12
    out = copy.deepcopy(model).merge_and_unload()
    assert type(out.lm_head) is bigclass.LMHead
    adapter.release(head_of(model))
    assert type(head_of(model)) is peft.utils.ModulesToSaveWrapper and isinstance(logits_of(model, x), Tensor)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained embedding"])
def test_a_head_tied_to_the_embedding_keeps_its_tie(trained):
    model, dense = pair("gpt2")
    for each in (model, dense):
        weight = each.get_base_model().transformer.wte.weight
        assert head_of(each).base_layer.weight is weight
        weight.requires_grad_(trained)
    check_step(model, dense)


@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"], ["embed_tokens"]], ids=str)
def test_a_tied_head_that_is_saved_is_what_peft_makes_of_it(saved):
    """Two copies, or, told to keep the tie, a new layer around the embedding's."""
    config = {"target_modules": ["q_proj"], "modules_to_save": saved, "ensure_weight_tying": saved == ["embed_tokens"]}
    model, dense = pair("llama", model=llama(True), **config)
    head, embedding = head_of(model), model.get_input_embeddings()
    assert type(head) is adapter.SavedHead
    check_step(model, dense)
    head.update("second", tied_module=embedding)
    made = head.modules_to_save["second"]
    assert type(made) is bigclass.LMHead and made.engine == "tiled" and made.weight is embedding.weight


def test_trained_tokens_of_a_tied_head_stream():
    """PEFT's own forward copies the weight with the tokens' rows replaced."""
    model, dense = pair("llama", model=llama(True), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 17, 60]})
    head = head_of(model)
    assert type(head) is adapter.TokensHead
    with torch.no_grad():
        for each in (model, dense):
            delta = head_of(each).token_adapter.trainable_tokens_delta["default"]
            delta.add_(0.1 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(7)))
    x, y = batch(model)
    (loss, grads), (exact, expected) = step(model, x, y, lazy=True), step(dense, x, y, lazy=False)
    assert error(loss, exact) < 1e-12 and list(grads) == list(expected) and any("trainable_tokens" in name for name in grads)
    assert all(error(g, expected[name]) < 1e-10 for name, g in grads.items())
    with torch.no_grad():
        assert torch.equal(logits_of(model.eval(), x), logits_of(dense.eval(), x))
    hidden = torch.randn(2, 7, D, dtype=torch.float64)
    s = head_of(dense)(hidden)
    assert error(head.train()(hidden, y[:2]), F.cross_entropy(s[:, :-1].reshape(-1, C), y[:2, 1:].reshape(-1))) < 1e-12
    assert torch.equal(head.predict(hidden, 3)[1], s.topk(3)[1])
    adapter.release(head)
    assert type(head) is peft.utils.TrainableTokensWrapper


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.4}], ids=str)
def test_the_explicit_form_is_a_forward_with_the_heads_own_options(config):
    options = {"softcap": 3.0, "logit_scale": 1.5, "label_smoothing": 0.1, "ignore_index": 5, "z_loss": 0.01}
    model, dense = pair(options=options, **config)
    head, plain = head_of(model), head_of(dense)
    hidden, y = torch.randn(2, 7, D, dtype=torch.float64), torch.randint(C, (2, 7))
    seen = []
    head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    head.register_forward_hook(lambda module, args, out: seen.append("after"))
    for shift in (None, 0, 2):
        torch.manual_seed(4)
        loss, stats = head(hidden, y, shift=shift, reduction="none", return_stats=True)
        torch.manual_seed(4)
        k = 1 if shift is None else shift
        s = 3.0 * torch.tanh(plain(hidden) * 1.5 / 3.0)[:, : 7 - k].reshape(-1, C)
        t = y[:, k:].reshape(-1)
        exact = F.cross_entropy(s, t, reduction="none", label_smoothing=0.1, ignore_index=5) + 0.01 * s.logsumexp(1).square() * (t != 5)
        assert error(loss, exact.view(2, 7 - k)) < 1e-12 and stats.lse.shape == loss.shape
    assert seen == ["before", "after"] * 3
    model.eval(), dense.eval()
    s = 3.0 * torch.tanh(plain(hidden) * 1.5 / 3.0)
    values, classes = head.predict(hidden, 4)
    assert torch.equal(classes, s.topk(4)[1]) and error(values, s.topk(4)[0]) < 1e-12 and not values.requires_grad
    assert error(head.loss(hidden, y), head(hidden, y)) == 0.0 and error(head(hidden), s) < 1e-12


def test_real_logits_where_lazy_ones_are_not_wanted():
    model, dense = pair(options={"lazy": False}, use_dora=True)
    x, y = batch(model)
    assert torch.equal(step(model, x, y, lazy=False)[0], step(dense, x, y)[0])
    model, dense = pair()
    assert torch.equal(torch.func.functional_call(model.eval(), {}, (x,)), dense.eval()(x))
    with torch.no_grad():
        assert torch.equal(model.train()(x), dense.train()(x))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_is_no_worse_than_dense(dtype, config):
    """autocast over fp32, and a bf16 model with PEFT's fp32 adapters: errors against float64, pooled over draws."""
    autocast = dtype == torch.float32
    pooled: dict[str, list[Tensor]] = {}
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        dense = wrapped("plain", torch.float32, model=Plain(300, 48), target_modules=["lm_head"], **config)
        head = head_of(dense)
        head.base_layer.to(dtype)
        for p in head.parameters():  # what float64 is to be right about
            p.data = p.data.to(dtype).to(p.dtype)
        hidden, y = (2.0 * torch.randn(64, 48, generator=g)).to(dtype), torch.randint(300, (64,), generator=g)
        models = [copy.deepcopy(head).double(), copy.deepcopy(head), adapter.adopt(copy.deepcopy(head), engine="tiled")]
        made = []
        for layer in models:
            torch.manual_seed(seed)
            x = hidden.to(layer.weight.dtype).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and layer is not models[0]):
                loss = F.cross_entropy(layer(x).float() if layer is not models[0] else layer(x), y)
            loss.backward()
            grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
            made.append({"loss": loss.detach(), "x": x.grad, **grads})
        for name in made[0]:
            errs = torch.tensor([error(m[name], made[0][name]) ** 2 for m in made[1:]])
            pooled.setdefault(name, []).append(errs)
            assert made[2][name].dtype == made[1][name].dtype and made[2][name].any()
    for name, errs in pooled.items():
        plain, mine = torch.stack(errs).sum(0).sqrt()
        assert mine <= 1.1 * plain + 4 * 2**-24, (name, float(mine), float(plain))


class Quantised(nn.Linear):
    """Stands for the linear layers of quantisation libraries."""


def test_other_adapters_and_other_layers_are_refused_with_the_reason():
    def layer(config) -> nn.Module:
        return peft.get_peft_model(Plain(), config).get_base_model().lm_head

    target = {"target_modules": ["lm_head"]}
    refused = {
        r"peft\.tuners\.ia3\.layer\.Linear cannot be streamed: .*not a low-rank product.*exclude_modules": layer(
            peft.IA3Config(**target, feedforward_modules=[])
        ),
        r"peft\.tuners\.loha\.layer\.Linear cannot": layer(peft.LoHaConfig(**target)),
        r"peft\.tuners\.vera\.layer\.Linear cannot": layer(peft.VeraConfig(**target)),
        r"adalora\.layer\.SVDLinear cannot be streamed: a layer of its own kind around torch.*Linear": layer(
            peft.AdaLoraConfig(**target, total_step=9)
        ),
    }
    quantised = Plain()
    quantised.lm_head = Quantised(D, C)
    refused[r"expected an nn\.Linear, got .*Quantised inside peft\.tuners\.lora\.layer\.Linear: .*quantised layer has codes"] = (
        peft.get_peft_model(quantised, peft.LoraConfig(**target)).get_base_model().lm_head
    )
    refused[r"expected an nn\.Linear, got .*Quantised: .*modules_to_save"] = Quantised(D, C)
    refused[r"expected an nn\.Linear, got .*MultiLabelHead: its loss is not cross-entropy"] = bigclass.MultiLabelHead(D, C)
    conv = Plain()
    conv.lm_head = transformers.pytorch_utils.Conv1D(C, D)
    refused[r"keeps its weight \(D, C\) \(fan_in_fan_out"] = (
        peft.get_peft_model(conv, peft.LoraConfig(**target, fan_in_fan_out=True)).get_base_model().lm_head
    )
    for words, head in refused.items():
        before = [type(m) for m in head.modules()]
        with pytest.raises(TypeError, match=words):
            adapter.adopt(head)
        assert [type(m) for m in head.modules()] == before
    with pytest.raises(TypeError, match="unexpected option 'cap'"):
        adapter.adopt(layer(peft.LoraConfig(**target)), cap=3)


def test_adapters_without_a_streamed_form_are_refused_when_they_come():
    for config, words in (
        ({"use_dora": True, "lora_dropout": 0.1}, "adapter 'default' cannot be streamed: it is DoRA with dropout.*lora_dropout=0"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "ALoraLinearVariant, which is more than a low-rank product"),
    ):
        head = head_of(wrapped("llama", **config))
        with pytest.raises(ValueError, match=words):
            adapter.adopt(head)
        assert type(head) is peft.tuners.lora.layer.Linear and type(head.base_layer) is nn.Linear
    model, dense = pair()
    for each in (model, dense):
        each.add_adapter("late", peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, lora_dropout=0.5))
        each.double().set_adapter("late")
    x, _ = batch(model)
    with pytest.raises(ValueError, match="adapter 'late' cannot be streamed: it is DoRA with dropout"):
        model(x)
    assert torch.equal(model.eval()(x), dense.eval()(x))
    head = head_of(pair()[0])
    hidden = torch.randn(3, 7, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"adapter_names: adapters mixed within a batch.*eval"):
        head(hidden, adapter_names=["default"] * 3)
    assert torch.equal(head.eval()(hidden, adapter_names=["default"] * 3), head(hidden))
    with pytest.raises(TypeError, match="unexpected arguments"):
        head.train()(hidden, other=3)
    for part in (head.base_layer, head.lora_A["default"], head.lora_B["default"]):
        hook = part.register_forward_hook(lambda module, args, out: None)
        with pytest.raises(ValueError, match="has hooks, which would not run"):
            head(hidden)
        hook.remove()


def traces_whole(model, *args) -> bool:
    """Is a model one graph? PEFT's DoRA asks for the name of a class's module, which torch 2.14 does not trace."""
    try:
        torch.compile(model, fullgraph=True, backend="eager")(*args)
    except torch._dynamo.exc.Unsupported:
        return False
    finally:
        torch._dynamo.reset()
    return True


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=str)
def test_a_step_compiles_to_one_graph_if_peft_does(config):
    model, dense = pair(**config)
    x, y = batch(model)
    whole = traces_whole(dense, x)
    assert whole or config
    run = torch.compile(lambda x, y: F.cross_entropy(model(x).reshape(-1, C), y.reshape(-1)), fullgraph=whole, backend="aot_eager")
    loss, exact = run(x, y), F.cross_entropy(dense(x).reshape(-1, C), y.reshape(-1))
    assert error(loss, exact) < 1e-12
    loss.backward(), exact.backward()
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert q.grad is None or error(p.grad, q.grad) < 1e-10, name
