"""Converted transformers models in the Trainer, in accelerate and plain loops: the training of the unconverted model, streamed."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

for package in ("transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed")

import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import bigclass  # noqa: E402
from bigclass.demo.memory import peak_extra_bytes, resident_peak  # noqa: E402
from bigclass.integrations.transformers import (  # noqa: E402
    MemoryCallback,
    StreamedTrainer,
    output_head,
    perplexity,
    token_losses,
)  # fmt: skip
from tests.ranks import run_ranks  # noqa: E402
from tests.support import error  # noqa: E402

C = 301
STEPS = 4
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_logits_are_written_out() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", bigclass.LogitsWarning)
        yield


def llama(vocab: int = C) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=C, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def converted(model: Any) -> Any:
    return bigclass.convert_head(model, engine="tiled")


def as_it_is(model: Any) -> Any:
    return model


def texts(count: int) -> list[dict[str, Tensor]]:
    """Sequences of 3 to 16 tokens, the first third masked; of every fifth all."""
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        length = int(torch.randint(3, 17, (1,), generator=g))
        ids = torch.randint(C, (length,), generator=g)
        labels = ids.clone()
        labels[: length if i % 5 == 0 else length // 3] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pad = lambda name, value: nn.utils.rnn.pad_sequence([row[name] for row in rows], True, value)  # noqa: E731
    ids = pad("input_ids", -1)
    return {"input_ids": ids.clamp(min=0), "labels": pad("labels", -100), "attention_mask": (ids >= 0).long()}


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=4, gradient_accumulation_steps=4,
        max_steps=STEPS, logging_steps=1, learning_rate=0.5, optim="sgd", report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    return TrainingArguments(**settings | options)


def curve(trainer: Trainer) -> Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dtype=torch.float64)


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def trained(folder: Any, model: Any, kind: type[Trainer] = Trainer, **options: Any) -> tuple[Tensor, Tensor, float]:
    """Losses of the steps, how far the parameters went, and the loss of evaluation."""
    before = parameters(model)
    trainer = kind(model, arguments(folder, **options), train_dataset=texts(32), eval_dataset=texts(9), data_collator=collate)
    trainer.train()
    return curve(trainer), parameters(model) - before, trainer.evaluate()["eval_loss"]


def prepared(case: str) -> Any:
    model = llama()
    if case == "gradient checkpointing":
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the name is changing
    return model


CASES: dict[str, dict[str, Any]] = {
    "gradient accumulation": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "gradient checkpointing": {},
}


@pytest.mark.parametrize("kind", [Trainer, StreamedTrainer])
@pytest.mark.parametrize("case", CASES)
def test_the_trainer_trains_and_evaluates_as_without_the_conversion(tmp_path, case, kind):
    """Sequences of different lengths, partly and wholly masked; pitfall 20 (the loss is scaled after the head)."""
    losses, moved, evaluated = trained(tmp_path, converted(prepared(case)), kind, **CASES[case])
    expected = trained(tmp_path, prepared(case), **CASES[case])
    assert error(losses, expected[0]) < 1e-6
    assert error(moved, expected[1]) < 1e-4
    assert evaluated == pytest.approx(expected[2], rel=1e-6)


def test_the_trainer_compiles_a_converted_model(tmp_path):
    """Its memory is told, without batches, which nobody sees."""
    model = converted(llama())
    before = parameters(model)
    options = {"max_steps": 2, "gradient_accumulation_steps": 1}
    trainer = Trainer(
        model, arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **options), train_dataset=texts(32)[1:5] * 2,
        data_collator=collate, callbacks=[MemoryCallback()],
    )  # fmt: skip
    trainer.train()
    plain = llama()
    other = Trainer(plain, arguments(tmp_path, **options), train_dataset=texts(32)[1:5] * 2, data_collator=collate)
    other.train()
    assert error(curve(trainer), curve(other)) < 1e-6
    assert error(parameters(model) - before, parameters(plain) - before) < 1e-4
    assert "dense_logits_mib" not in trainer.state.log_history[0]


def test_bfloat16_under_autocast_is_as_near_to_float64_as_without_the_conversion(tmp_path):
    exact = trained(tmp_path, llama().double())
    dense = trained(tmp_path, llama(), bf16=True)
    losses, moved, evaluated = trained(tmp_path, converted(llama()), bf16=True)
    assert error(losses, exact[0]) < 1e-3
    assert error(moved, exact[1]) < 1.2 * error(dense[1], exact[1])
    assert evaluated == pytest.approx(exact[2], rel=1e-3)


class Heads:
    """What a model's output head returned, each time."""

    def __init__(self, model: Any) -> None:
        self.made: list[type] = []
        output_head(model).register_forward_hook(lambda head, args, out: self.made.append(type(out)))


def test_evaluation_for_the_loss_alone_streams_in_the_streamed_trainer_only(tmp_path):
    for kind, options, expected in (
        (Trainer, {}, Tensor),
        (StreamedTrainer, {}, bigclass.LazyLogits),
        (StreamedTrainer, {"prediction_loss_only": True, "label_smoothing_factor": 0.1}, bigclass.LazyLogits),
    ):
        model = converted(llama())
        seen = Heads(model)
        trainer = kind(model, arguments(tmp_path, **options), eval_dataset=texts(9), data_collator=collate)
        trainer.evaluate()
        assert set(seen.made) == {expected}
        assert not output_head(model).always_lazy


def test_metrics_get_real_logits(tmp_path):
    def right(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape[-1] == C
        return {"right": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    made = []
    for convert in (converted, as_it_is):
        model = convert(llama())
        trainer = StreamedTrainer(model, arguments(tmp_path), eval_dataset=texts(9), data_collator=collate, compute_metrics=right)
        made.append((trainer.evaluate()["eval_right"], torch.from_numpy(trainer.predict(texts(4)).predictions)))  # type: ignore[arg-type]
    assert made[0][0] == made[1][0]
    assert error(made[0][1], made[1][1]) < 1e-6


def test_a_model_that_is_not_converted_is_refused_where_evaluation_would_stream(tmp_path):
    trainer = StreamedTrainer(llama(), arguments(tmp_path), eval_dataset=texts(9), data_collator=collate)
    with pytest.raises(ValueError, match=r"not converted; bigclass\.convert_head"):
        trainer.evaluate()


def test_data_parallel_is_refused(tmp_path):
    several = arguments(tmp_path)
    several._n_gpu = 2
    with pytest.raises(ValueError, match=r"args: expected one GPU a process, got 2 .*torchrun"):
        StreamedTrainer(converted(llama()), several, data_collator=collate)


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_stands_in_the_logs(tmp_path, bf16):
    model = converted(llama())
    trainer = Trainer(
        model, arguments(tmp_path, bf16=bf16, max_steps=2, num_train_epochs=1), train_dataset=texts(32), data_collator=collate,
        callbacks=[MemoryCallback()],
    )  # fmt: skip
    rows: list[int] = []
    output_head(model).register_forward_hook(lambda head, args, out: rows.append(out.shape[:-1].numel()))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["dense_logits_mib"] for entry in logs] == [max(seen) * C * (2 if bf16 else 4) / MIB for seen in (rows[:4], rows)]
    if resident_peak() is not None:
        assert 100 < logs[0]["peak_memory_mib"] <= logs[1]["peak_memory_mib"] <= resident_peak() / MIB
    assert len(output_head(model)._forward_hooks) == 1  # ours


def test_gpt2_compiles_as_one_graph_with_the_gradients_of_the_dense_model():
    """Pitfall 54: transformers' own loss function logs while it is traced."""
    batch = collate(texts(6))
    made = []
    for model in (torch.compile(converted(gpt2()), backend="aot_eager", fullgraph=True), gpt2()):
        loss = model(**batch).loss
        loss.backward()
        made.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert error(made[0][0], made[1][0]) < 1e-6
    assert error(made[0][1], made[1][1]) < 1e-5


def plain_loop(model: Any) -> None:
    """Three steps of two micro-batches each, every row on its own weight."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rows = texts(12)
    for step in range(3):
        for micro in range(2):
            batch = collate(rows[4 * step + 2 * micro :][:2])
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, :-1].float()
            losses = F.cross_entropy(logits.reshape(-1, C), labels[:, 1:].reshape(-1), reduction="none").view(2, -1)
            (losses.sum(1) @ torch.tensor([0.2, 0.05])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def accelerate_loop(precision: str) -> Callable[[Any], None]:
    def loop(model: Any) -> None:
        AcceleratorState._reset_state(True)  # of another precision, from an earlier run in this process
        accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision=precision, cpu=True)
        loader = torch.utils.data.DataLoader(texts(12), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5), loader)
        for batch in loader:
            with accelerator.accumulate(model):
                batch["labels"][:, -1] = batch["input_ids"][:, -1]  # the mean over no token is NaN
                accelerator.backward(model(**batch).loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        AcceleratorState._reset_state(True)

    return loop


@pytest.mark.parametrize(("loop", "limit"), [(plain_loop, 1e-5), (accelerate_loop("no"), 1e-5), (accelerate_loop("bf16"), 3e-2)])
def test_loops_of_one_s_own_train_as_without_the_conversion(loop, limit):
    moved = []
    for convert in (converted, as_it_is):
        model = convert(llama())
        before = parameters(model)
        loop(model)
        moved.append(parameters(model) - before)
    assert error(*moved) < limit


# --- losses of tokens, perplexity


def dense_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    batch = dict(batch)
    labels = F.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@pytest.mark.parametrize("inference", [False, True])
def test_token_losses_and_perplexity_are_the_dense_ones_and_modes_stay(inference):
    batches = [collate(texts(5)), collate(texts(9)[5:])]
    dense = [dense_losses(llama().double(), batch) for batch in batches]
    counted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    model = converted(llama().double()).train()
    model.model.layers[0].eval()  # a frozen part
    with torch.inference_mode() if inference else torch.enable_grad():
        for batch, expected in zip(batches, dense, strict=True):
            losses = token_losses(model, **batch)
            assert losses.shape == expected.shape and not losses.requires_grad
            assert error(losses, expected) < 1e-6
            assert torch.equal(losses == 0, expected == 0)
        assert perplexity(model, batches) == pytest.approx(math.exp(sum(float(d.sum()) for d in dense) / counted), rel=1e-6)
    assert model.training and model.lm_head.training and not model.model.layers[0].training
    assert not output_head(model).always_lazy


def test_what_attention_does_not_see_is_not_predicted_without_labels():
    model, batch = converted(llama()), collate(texts(5))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = dense_losses(llama(), batch | {"labels": ids.masked_fill(mask == 0, -100)})
    assert error(token_losses(model, ids, attention_mask=mask), expected) < 1e-6
    assert error(token_losses(model, ids), dense_losses(llama(), {"input_ids": ids, "labels": ids})) < 1e-6
    mean = float(dense_losses(llama(), {"input_ids": ids, "labels": ids})[:, :-1].mean())
    assert perplexity(model, [ids]) == pytest.approx(math.exp(mean), rel=1e-6)


def test_masked_and_encoder_decoder_models_score_labels_where_they_stand():
    bert = transformers.BertConfig(vocab_size=C, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    t5 = transformers.T5Config(vocab_size=C, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ids = torch.randint(1, C, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(7) % 3 == 0, -100)
    for model in (transformers.BertForMaskedLM(bert), transformers.T5ForConditionalGeneration(t5)):
        with torch.no_grad():
            expected = model.eval()(input_ids=ids, labels=labels).loss
        losses = token_losses(converted(model), ids, labels)
        assert error(losses.sum() / (labels != -100).sum(), expected) < 1e-6
        assert torch.equal(losses == 0, labels == -100)
        with pytest.raises(ValueError, match="labels: expected"):
            token_losses(model, ids)


def test_a_head_with_adapters_streams_in_evaluation_too(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    made = []
    for convert in (converted, as_it_is):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = convert(peft.get_peft_model(llama(), config))
        kind = StreamedTrainer if convert is converted else Trainer
        seen = Heads(model)
        trainer = kind(model, arguments(tmp_path), train_dataset=texts(32), eval_dataset=texts(9), data_collator=collate)
        trainer.train()
        made.append((curve(trainer), trainer.evaluate()["eval_loss"]))
        assert set(seen.made) == {bigclass.LazyLogits if convert is converted else Tensor}
    assert error(made[0][0], made[1][0]) < 1e-6
    assert made[0][1] == pytest.approx(made[1][1], rel=1e-6)


def test_what_cannot_be_told_is_an_error():
    model = converted(llama())
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(model, [])
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(model, [{"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, -100]])}])
    with pytest.raises(TypeError, match="batches: expected"):
        perplexity(model, [{"labels": torch.tensor([[1, 2]])}])
    with pytest.raises(ValueError, match="not converted"):
        token_losses(llama(), torch.tensor([[1, 2]]))
    alone = converted(transformers.XLNetLMHeadModel(transformers.XLNetConfig(vocab_size=C, d_model=16, n_layer=1, n_head=2, d_inner=16)))
    with pytest.raises(ValueError, match=r"shift: expected 0 or 1, since XLNetLMHeadModel computes its loss by itself"):
        token_losses(alone, torch.tensor([[1, 2]]))
    assert token_losses(alone, torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), shift=0).shape == (1, 2)


def a_perplexity(vocab: int, batch: int, tokens: int):
    """The call to be measured, warmed up on a small vocabulary."""

    def make(vocab: int) -> tuple[Any, Tensor]:
        return bigclass.convert_head(llama(vocab)), torch.randint(vocab, (batch, tokens))

    model, ids = make(C)
    perplexity(model, [ids])
    model, ids = make(vocab)

    def call() -> tuple[()]:
        perplexity(model, [ids])
        return ()

    return call


@pytest.mark.skipif(resident_peak() is None, reason="this system does not tell a process's peak memory")
def test_perplexity_writes_no_logits():
    """They would take 470 MiB, and as much again for their log-softmax."""
    peak = peak_extra_bytes(a_perplexity, 60_000, 8, 256)
    assert peak is not None and peak <= 96 * MIB


# --- two processes


def converted_through_wrappers() -> list[bool]:
    """Compiled inside DistributedDataParallel, and the other way round. (Nothing is compiled before a first call.)"""
    ddp = nn.parallel.DistributedDataParallel
    wrapped = ddp(torch.compile(llama())), torch.compile(ddp(llama()))
    return [isinstance(output_head(converted(model)), bigclass.LMHead) for model in wrapped]


def ddp_gradients(rank: int, world: int, mode: str) -> Tensor:
    """Of the mean over all tokens, on this rank's half of the batch; twice, since a static graph is another one then."""
    model = converted(llama().double())
    whole = nn.parallel.DistributedDataParallel(model, **({} if mode == "default" else {mode: True}))
    batch = collate(texts(8))
    count = (batch["labels"][:, 1:] != -100).sum()
    half = {name: value[4 * rank : 4 * rank + 4] for name, value in batch.items()}
    for _ in range(2):
        model.zero_grad()
        (world * whole(**half, num_items_in_batch=count).loss).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]


MODES = ("default", "static_graph", "find_unused_parameters")


def on_two_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("error", bigclass.LogitsWarning)
    made: dict[str, Any] = {mode: ddp_gradients(rank, world, mode) for mode in MODES}
    made["wrapped"] = converted_through_wrappers()
    # what torchrun would have set; the process group is there already, so nobody listens there
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT="29500")
    made["trainer"] = trained(folder, converted(llama()), StreamedTrainer)
    return made


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    return run_ranks(on_two_ranks, 2, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_make_the_gradients_of_one(ranks, mode):
    """Pitfall 32."""
    model = llama().double()
    model(**collate(texts(8))).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for rank in ranks:
        assert error(rank[mode], expected) < 1e-6


def test_conversion_sees_through_wrappers(ranks):
    assert all(rank["wrapped"] == [True, True] for rank in ranks)


def test_the_trainer_on_two_processes_trains_as_on_one_without_the_conversion(ranks, tmp_path):
    losses, moved, _ = trained(tmp_path, llama(), per_device_train_batch_size=4)
    for rank in ranks:
        assert error(rank["trainer"][0], losses) < 1e-5
        assert error(rank["trainer"][1], moved) < 1e-4
