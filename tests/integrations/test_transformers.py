"""`convert_head` on transformers models: what stays, what streams, what is refused."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import (  # noqa: E402
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

import bigclass  # noqa: E402
from bigclass.demo.memory import peak_extra_bytes, resident_peak  # noqa: E402
from bigclass.integrations.transformers import head_options, lm_kl_div, lm_loss, loss_only  # noqa: E402
from tests.support import error  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::bigclass.LogitsWarning")

V, D, T = 97, 16, 7


def llama(vocab: int = V, width: int = D, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=8192, **sizes, **options)).train()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=32, **none)).train()


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    sizes = dict(hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2 * D)
    return BertForMaskedLM(BertConfig(vocab_size=V, **sizes, **none)).train()


def modernbert() -> ModernBertForMaskedLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2 * D)
    return ModernBertForMaskedLM(ModernBertConfig(vocab_size=V, pad_token_id=0, **sizes)).train()


def tokens(seed: int = 0, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Ids and labels, a third of these ignored."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (rows, T), generator=g)
    return ids, ids.masked_fill(torch.rand(rows, T, generator=g) < 0.3, -100)


# --- the loss


def dense_loss(logits: Tensor, target: Tensor, shift: int, count, smoothing: float, z: float) -> Tensor:
    """The definition, row by row of a float64 log-softmax."""
    logits = logits.reshape(-1, V)
    target = (F.pad(target, (0, 1), value=-100)[..., 1:] if shift else target).reshape(-1)
    rows = F.cross_entropy(logits, target, ignore_index=-100, label_smoothing=smoothing, reduction="none")
    rows = torch.where(target == -100, 0.0, rows + z * logits.logsumexp(-1) ** 2)
    return rows.sum() / ((target != -100).sum() if count is None else count)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99), kind=st.sampled_from(["causal", "shifted before", "masked"]), counted=st.sampled_from([None, 5, "tensor"]),
    smoothing=st.sampled_from([0.0, 0.1]), z=st.sampled_from([0.0, 1e-2]), engine=st.sampled_from(["auto", "tiled", "dense"]),
)  # fmt: skip
def test_the_loss_function_streams_what_the_trainer_passes(seed, kind, counted, smoothing, z, engine):
    model = (modernbert() if kind == "masked" else gpt2()).double()
    ids, labels = tokens(seed)
    count = torch.tensor(7) if counted == "tensor" else counted
    extra = {} if count is None else {"num_items_in_batch": count}
    given_labels = {"labels": labels}
    if kind == "shifted before":
        given_labels["shift_labels"] = torch.roll(labels, -1, 1)
    target, shift = (given_labels["shift_labels"], 0) if "shift_labels" in given_labels else (labels, 0 if kind == "masked" else 1)
    dense = dense_loss(model(input_ids=ids).logits, target, shift, count, smoothing, z)
    dense.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    bigclass.convert_head(model, engine=engine, label_smoothing=smoothing, z_loss=z)
    out = model(input_ids=ids, **given_labels, **extra)
    out.loss.backward()
    assert error(out.loss, dense) < 1e-10  # (transformers' own rounds float64 logits to fp32)
    whole = torch.stack([g.norm() for g in expected]).norm()
    for p, g in zip(model.parameters(), expected, strict=True):
        assert float((p.grad - g).norm()) < 1e-9 * max(float(g.norm()), 1e-3 * float(whole))


def test_the_masked_loss_takes_no_moved_labels():
    """As transformers' own, which leaves shift_labels among the rest of its arguments."""
    model, (ids, labels) = bigclass.convert_head(modernbert()), tokens()
    logits = model(input_ids=ids).logits
    loss = model.loss_function(logits, labels, V, shift_labels=ids.roll(1, 1))
    assert error(loss, model.loss_function(logits.materialize(), labels, V, shift_labels=ids.roll(1, 1))) < 1e-6


def test_a_loss_of_real_logits_is_the_original_one():
    model, (ids, labels) = llama(), tokens()
    expected = model.eval()(input_ids=ids, labels=labels).loss
    out = bigclass.convert_head(model)(input_ids=ids, labels=labels)
    assert isinstance(out.logits, Tensor)
    assert torch.equal(out.loss, expected)


def test_nothing_to_learn_is_what_it_was():
    model, (ids, labels) = llama(), tokens()
    labels = torch.full_like(labels, -100)
    expected = model(input_ids=ids, labels=labels).loss
    assert torch.equal(bigclass.convert_head(model)(input_ids=ids, labels=labels).loss, expected) or bool(expected.isnan())
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=3).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_lm_loss_of_lazy_logits(reduction):
    model, (ids, labels) = bigclass.convert_head(llama(), engine="tiled").double(), tokens()
    logits = model(input_ids=ids).logits
    loss, stats = lm_loss(logits, labels, reduction=reduction, return_stats=True)
    real = logits.materialize()
    target = F.pad(labels, (0, 1), value=-100)[:, 1:]
    rows = F.cross_entropy(real.reshape(-1, V), target.reshape(-1), reduction="none").reshape(target.shape)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (target != -100).sum()}[reduction]
    assert error(loss, expected) < 1e-10
    assert loss.shape == expected.shape
    assert stats.lse.shape == labels.shape
    assert error(stats.lse, torch.where(target == -100, 0.0, real.logsumexp(-1))) < 1e-10


# --- distillation


def gemma2(width: int) -> Gemma2ForCausalLM:
    torch.manual_seed(1)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=V, pad_token_id=0, head_dim=8, final_logit_softcapping=0.7, **sizes)).train()


@given(
    seed=st.integers(0, 99), kind=st.sampled_from(["forward", "reverse", "jensen_shannon"]), temperature=st.sampled_from([1.0, 2.5]),
    labelled=st.booleans(), stored=st.booleans(), reduction=st.sampled_from(["mean", "sum", "none"]),
)  # fmt: skip
@settings(max_examples=30)
def test_a_student_learns_from_a_teacher_of_another_width_and_soft_cap(seed, kind, temperature, labelled, stored, reduction):
    student = bigclass.convert_head(llama().double(), engine="tiled")
    teacher = bigclass.convert_head(gemma2(24).double(), engine="tiled")
    ids, labels = tokens(seed)
    with torch.no_grad():
        real = teacher.eval()(input_ids=ids).logits
        with loss_only(teacher):
            lazy = teacher(input_ids=ids).logits
    logits = student(input_ids=ids).logits
    assert isinstance(lazy, bigclass.LazyLogits) and isinstance(logits, bigclass.LazyLogits)
    log_q = F.log_softmax(logits.materialize() / temperature, -1)
    log_p = F.log_softmax(real / temperature, -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl = lambda log_a, log_b: (log_a.exp() * (log_a - log_b)).sum(-1)  # noqa: E731
    js = 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))
    rows = temperature**2 * {"forward": kl(log_p, log_q), "reverse": kl(log_q, log_p), "jensen_shannon": js}[kind]
    counts = F.pad(labels, (0, 1), value=-100)[:, 1:] != -100 if labelled else torch.ones_like(labels, dtype=torch.bool)
    rows = torch.where(counts, rows, 0.0)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counts.sum()}[reduction]
    expected.sum().backward()
    want = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    options = {"divergence": kind, "temperature": temperature, "reduction": reduction}
    loss = lm_kl_div(student(input_ids=ids).logits, real if stored else lazy, labels if labelled else None, **options)
    loss.sum().backward()
    assert error(loss, expected) < 1e-9
    whole = torch.stack([g.norm() for g in want]).norm()
    for p, g in zip(student.parameters(), want, strict=True):
        assert float((p.grad - g).norm()) < 1e-9 * max(float(g.norm()), 1e-3 * float(whole))
    assert all(p.grad is None for p in teacher.parameters())


def test_a_stored_teacher_of_16_bits_is_not_rounded_again_by_the_temperature():
    student, (ids, _) = bigclass.convert_head(llama().double(), engine="tiled"), tokens()
    logits = student(input_ids=ids).logits
    stored = (4.0 * torch.randn(logits.shape)).bfloat16()
    got, want = (lm_kl_div(logits, t, temperature=3.0) for t in (stored, stored.double()))
    assert error(got, want) < 1e-12


def test_bad_arguments_of_lm_kl_div():
    student, (ids, labels) = bigclass.convert_head(llama()), tokens()
    logits = student(input_ids=ids).logits
    taught = logits.materialize().detach()
    with pytest.raises(TypeError, match="logits: expected the lazy logits"):
        lm_kl_div(taught, taught)
    with pytest.raises(TypeError, match="teacher_logits: expected lazy logits or a tensor"):
        lm_kl_div(logits, taught.tolist())
    with pytest.raises(TypeError, match=r"teacher_logits: expected a floating-point tensor, got torch\.int64"):
        lm_kl_div(logits, taught.long())
    with pytest.raises(ValueError, match=r"teacher_logits: expected the student's shape \(2, 7, 97\), got \(2, 7, 90\).*padded"):
        lm_kl_div(logits, taught[..., :90])
    with pytest.raises(ValueError, match="temperature: expected a finite number greater than 0"):
        lm_kl_div(logits, taught, temperature=0.0)
    with pytest.raises(ValueError, match=r"labels: expected a label for each of the positions \(2, 7\), got \(2, 3\)"):
        lm_kl_div(logits, taught, labels[:, :3])
    assert float(lm_kl_div(logits[..., :90], taught[..., :90]).detach()) < 1e-10


# --- what stays


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_parameters_keys_ties_and_hooks_stay(make):
    model = make()
    head, before = model.get_output_embeddings(), dict(model.named_parameters())
    tied = model.get_input_embeddings().weight is head.weight
    seen = []
    head.register_forward_hook(lambda *_: seen.append(1))
    ids, labels = tokens()
    bigclass.convert_head(model)
    model(input_ids=ids, labels=labels).loss.backward()
    assert model.get_output_embeddings() is head
    assert all(p is before[name] for name, p in model.named_parameters())
    assert (model.get_input_embeddings().weight is head.weight) == tied == (make is not llama)
    assert seen == [1]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save_pretrained"])
def test_copies_of_a_converted_model(way, tmp_path):
    model, (ids, labels) = bigclass.convert_head(llama(), engine="tiled", z_loss=1e-3), tokens()
    expected = model(input_ids=ids, labels=labels).loss
    if way == "save_pretrained":
        model.save_pretrained(tmp_path)
        copied = LlamaForCausalLM.from_pretrained(tmp_path).train()
        assert type(copied.lm_head) is nn.Linear
        bigclass.convert_head(copied, engine="tiled", z_loss=1e-3)
    else:
        copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    out = copied(input_ids=ids, labels=labels)
    assert isinstance(out.logits, bigclass.LazyLogits)
    assert torch.equal(out.loss, expected)
    copied.resize_token_embeddings(V + 5)  # the copy's own head, not the original's
    assert model.lm_head.weight.shape[0] == V
    assert bigclass.restore_head(copied).lm_head.__class__ is nn.Linear


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_resized_head_stays_converted(make):
    model = bigclass.convert_head(make(), engine="tiled")
    model.resize_token_embeddings(V + 11)
    ids, labels = tokens()
    labels[0, -1] = V + 10
    out = model(input_ids=ids, labels=labels)
    assert isinstance(out.logits, bigclass.LazyLogits)
    assert out.logits.shape[-1] == V + 11
    out.loss.backward()
    bigclass.restore_head(model)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert error(out.loss, model(input_ids=ids, labels=labels).loss) < 1e-6


def test_converting_again_changes_the_options_and_undoing_leaves_nothing():
    model = llama()
    before = set(model.__dict__)
    bigclass.convert_head(model, engine="tiled", z_loss=0.1)
    bigclass.convert_head(model, engine="dense")
    assert (model.lm_head.engine, model.loss_function.z_loss) == ("dense", 0.0)
    bigclass.restore_head(bigclass.restore_head(model))
    assert set(model.__dict__) == before
    assert not isinstance(model.loss_function, bigclass.integrations.transformers.StreamedLoss)


def test_a_loss_function_of_the_users_own_is_left_alone():
    model, (ids, labels) = llama(), tokens()

    def own(logits, labels, vocab_size, **_):
        return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), reduction="sum")

    model.loss_function = own
    expected = model(input_ids=ids, labels=labels).loss
    out = bigclass.convert_head(model)(input_ids=ids, labels=labels)
    assert isinstance(out.logits, bigclass.LazyLogits)  # and it streams
    assert error(out.loss, expected) < 1e-6
    assert model.loss_function is own
    assert bigclass.restore_head(model).loss_function is own


def test_a_loss_function_set_after_the_conversion_stays():
    model = bigclass.convert_head(llama())

    def own(logits, labels, vocab_size, **_):
        return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))

    model.loss_function = own
    assert bigclass.restore_head(model).loss_function is own
    assert bigclass.convert_head(bigclass.convert_head(model)).loss_function is own
    assert type(bigclass.restore_head(model).lm_head) is nn.Linear and model.loss_function is own


# --- evaluation


def test_evaluation_has_real_logits_and_loss_only_lazy_ones():
    model, (ids, labels) = bigclass.convert_head(llama()), tokens()
    expected = model.eval()(input_ids=ids, labels=labels)
    assert isinstance(expected.logits, Tensor)
    with torch.no_grad():
        assert isinstance(model.train()(input_ids=ids).logits, Tensor)
        with loss_only(model.eval()):
            out = model(input_ids=ids, labels=labels)
        assert isinstance(out.logits, bigclass.LazyLogits)
        assert error(out.loss, expected.loss) < 1e-6
        with pytest.raises(RuntimeError, match="stop"), loss_only(model):
            raise RuntimeError("stop")
        assert isinstance(model(input_ids=ids).logits, Tensor)


# --- what a model does to its logits, as options


@pytest.mark.parametrize(
    ("cls", "config", "options", "expected"),
    [
        (LlamaForCausalLM, LlamaConfig, {}, {}),
        (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 7.0, "head_dim": 8}, {"softcap": 7.0}),
        (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}, {"logit_scale": 0.25}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}, {"logit_scale": 0.125}),
    ],
    ids=["llama", "gemma2", "cohere", "granite"],
)
def test_head_options_are_what_the_model_does(cls, config, options, expected):
    sizes = dict(hidden_size=D, intermediate_size=2 * D, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = bigclass.convert_head(cls(config(vocab_size=V, pad_token_id=0, **sizes, **options)).train(), engine="tiled")
    model.model.layers[0].eval()  # a frozen part
    found = head_options(model)
    assert found == pytest.approx(expected)
    assert model.training and not model.model.layers[0].training
    ids, labels = tokens()
    hidden = []
    model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    loss = model(input_ids=ids, labels=labels).loss
    head = bigclass.LMHead(D, V, **found)
    head.weight = model.lm_head.weight
    assert error(head(hidden[0], labels), loss) < 1e-6


def test_head_options_refuse_a_class_bias():
    sizes = dict(d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=V)
    model = BartForConditionalGeneration(BartConfig(encoder_ffn_dim=D, decoder_ffn_dim=D, **sizes)).train()
    bigclass.convert_head(model)
    assert head_options(model) == {}
    model.final_logits_bias.fill_(0.5)
    with pytest.raises(ValueError, match="class bias"):
        head_options(model)


def test_head_options_refuse_a_scale_that_is_a_tensor():
    sizes = dict(hidden_size=D, intermediate_size=2 * D, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = bigclass.convert_head(CohereForCausalLM(CohereConfig(vocab_size=V, pad_token_id=0, logit_scale=0.25, **sizes)))
    model.logit_scale = nn.Parameter(torch.tensor(0.25))
    with pytest.raises(ValueError, match="scales its logits by a tensor"):
        head_options(model)


# --- errors


def test_what_cannot_be_converted_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"LlamaModel has no output embeddings.*CCEHead.adopt"):
        bigclass.convert_head(LlamaModel(llama().config))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no output embeddings"):
        bigclass.convert_head(LlamaForSequenceClassification(llama().config))
    model = llama()
    model.lm_head = nn.Sequential(nn.Linear(D, V))
    with pytest.raises(ValueError, match=r"expected an nn.Linear for the output embeddings of LlamaForCausalLM, got torch.nn.*Sequential"):
        bigclass.convert_head(model)

    class Linear8(nn.Linear):
        """Stands in for a quantised layer."""

    model.lm_head = Linear8(D, V)
    with pytest.raises(ValueError, match=r"Linear8, a linear layer that computes something else \(quantised\?\)"):
        bigclass.convert_head(model)
    for codes in (torch.int8, torch.float8_e4m3fn):  # a library that leaves the layer's class as it was
        model.lm_head = nn.Linear(D, V)
        model.lm_head.weight = nn.Parameter(torch.zeros(V, D).to(codes), requires_grad=False)
        with pytest.raises(TypeError, match=r"weight of floating-point numbers of 16 bits or more, got .*modules_to_not_convert"):
            bigclass.convert_head(model)
    model.lm_head = nn.Linear(D, V)
    model.lm_head.weight = nn.Parameter(TwoTensor(torch.zeros(V, D), torch.zeros(V, D)), requires_grad=False)
    TwoTensor.__module__, before = "quantisers", TwoTensor.__module__
    try:
        with pytest.raises(TypeError, match=r"16 bits or more, got quantisers\.TwoTensor of torch\.float32"):
            bigclass.convert_head(model)
    finally:
        TwoTensor.__module__ = before
    assert type(model.lm_head) is nn.Linear
    model.lm_head = nn.utils.parametrizations.weight_norm(nn.Linear(D, V))
    with pytest.raises((TypeError, ValueError), match=r"parametrized|something else"):
        bigclass.convert_head(model)
    with pytest.raises(TypeError, match="neither a transformers nor a timm model"):
        bigclass.convert_head(nn.Linear(D, V))


def test_options_that_a_model_has_no_place_for_are_refused():
    with pytest.raises(TypeError, match=r"unexpected option 'softcap'.*its configuration"):
        bigclass.convert_head(llama(), softcap=3.0)
    with pytest.raises(TypeError, match="unexpected option 'shift'"):
        bigclass.convert_head(llama(), shift=2)
    sizes = dict(d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=V)
    bart = BartForConditionalGeneration(BartConfig(encoder_ffn_dim=D, decoder_ffn_dim=D, **sizes))
    with pytest.raises(ValueError, match=r"z_loss: BartForConditionalGeneration computes its loss by itself.*lm_loss"):
        bigclass.convert_head(bart, z_loss=1e-4)
    assert type(bart.lm_head) is nn.Linear
    with pytest.raises(ValueError, match="engine"):
        bigclass.convert_head(llama(), engine="fast")
    with pytest.raises(ValueError, match=r"label_smoothing: expected a value in \[0, 1\]"):
        bigclass.convert_head(llama(), label_smoothing=1.5)
    with pytest.raises(ValueError, match="not converted"), loss_only(llama()):
        pass


def test_labels_outside_the_vocabulary_raise():
    model, (ids, labels) = bigclass.convert_head(llama()), tokens()
    for wrong in (V, -1):
        labels[0, 3] = wrong
        with pytest.raises(IndexError, match=rf"\[0, {V}\)"):
            model(input_ids=ids, labels=labels)


def test_bad_arguments_of_lm_loss():
    model, (ids, labels) = bigclass.convert_head(llama()), tokens()
    logits = model(input_ids=ids).logits
    with pytest.raises(TypeError, match="logits: expected the lazy logits"):
        lm_loss(logits.materialize(), labels)
    with pytest.raises(TypeError, match="labels: expected a tensor"):
        lm_loss(logits, labels.tolist())
    with pytest.raises(ValueError, match=r"labels: expected a label for each of the positions \(2, 7\), got \(2, 6\)"):
        lm_loss(logits, labels[:, 1:])


def test_an_operation_that_cannot_stay_lazy_is_named_with_its_size():
    model, (ids, _) = bigclass.convert_head(llama()), tokens()
    logits = model(input_ids=ids).logits
    with pytest.warns(bigclass.LogitsWarning, match=r"sigmoid needs the logits themselves: \(2, 7, 97\) torch.float32, 0.0 MiB"):
        logits.sigmoid()
    with bigclass.planning(logits_limit=1000), pytest.raises(ValueError, match=r"softmax.*\(2, 7, 97\).*above the limit"):
        model(input_ids=ids).logits.softmax(-1)


# --- memory


def loss_layer(n: int, vocab: int, width: int):
    """A converted model's head and loss alone: hidden states in, gradients out."""
    ids = torch.randint(vocab, (1, n))

    def run(model, hidden, ids):
        logits = model.lm_head(hidden)
        loss = model.loss_function(logits=logits, labels=ids, vocab_size=logits.shape[-1])
        loss.backward()
        return hidden.grad, model.lm_head.weight.grad

    small = bigclass.convert_head(llama(3000, width), engine="tiled")
    for _ in range(2):
        run(small, torch.randn(1, 64, width, requires_grad=True), torch.randint(3000, (1, 64)))
    model = bigclass.convert_head(llama(vocab, width))
    hidden = torch.randn(1, n, width, requires_grad=True)
    return lambda: run(model, hidden, ids)


@pytest.mark.skipif(resident_peak() is None, reason="this system does not tell a process's peak memory")
@pytest.mark.parametrize(("n", "width"), [(1024, 64), pytest.param(4096, 512, marks=pytest.mark.architectures)])
def test_the_loss_layer_at_a_vocabulary_of_128256_stays_within_96_mib(n, width):
    """Logits alone are 525 MB (2 GB) there, and transformers makes them twice."""
    measured = peak_extra_bytes(loss_layer, n, 128256, width)
    assert measured is not None and measured <= 96 << 20
