"""The memory planner: its figures against counted allocations of real models, its formulas against published counts, its searches."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

import bigclass
from bigclass.memory_plan import (
    DEVICES,
    MODELS,
    ModuleShape,
    Ranks,
    Training,
    TransformerShape,
    block_memory,
    head_memory,
    largest_class_count,
    longest_sequence,
    peak_bytes,
    plan_memory,
    saved_bytes,
    shape_of,
)
from bigclass.memory_plan.search import USABLE, head_phases

MIB = 1 << 20
WORKSPACE = 8 * MIB
TOLERANCE = 0.015  # of the counted peak
TOLERANCE_SCORES = 0.04  # the same with scores: what the softmax's backward holds is approximated
TOLERANCE_CHUNKS = 0.03  # the same with mini-sequences: sums over chunks come and go

SMALL = {
    "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 4096, "max_position_embeddings": 2048,
}  # fmt: skip
LLAMA = LlamaConfig(**SMALL)
CONFIGS = {
    "llama": LLAMA,
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "gemma2": Gemma2Config(**SMALL, head_dim=32),
    "gpt2": GPT2Config(
        n_embd=128, n_layer=3, n_head=4, vocab_size=4096, n_positions=2048, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip

ATTENTION = {"flash": "sdpa", "eager": "eager"}

FP32 = Training(dtype=torch.float32, optimizer="adamw", step="loop", workspace=WORKSPACE)


def counted(config, training: Training, tokens: int, batch: int = 1) -> int:
    """The peak of a real step of a real model, trained as `training` says."""

    def prepare():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=training.dtype, attn_implementation=ATTENTION[training.attention]).train()
        if training.recompute == "block":
            with warnings.catch_warnings():  # its name changes in transformers 6
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable()
        if training.head == "streamed":
            bigclass.convert_head(model)
        if training.mlp_chunk:
            bigclass.mini_sequence(model, chunk_tokens=training.mlp_chunk)
        if training.optimizer.startswith("adamw"):
            optimizer = torch.optim.AdamW(model.parameters(), foreach=training.step == "foreach")
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if training.optimizer == "momentum" else 0.0)
        ids = torch.randint(0, config.vocab_size, (batch, tokens))

        def step():
            with bigclass.planning(workspace=training.workspace):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=not training.accumulate)

        return step

    return peak_bytes(prepare)


def assert_planned(config, training: Training, tokens: int, batch: int = 1, tolerance: float = TOLERANCE) -> None:
    found = plan_memory(config, tokens, batch=batch, training=training, device="cpu")
    truth = counted(config, training, tokens, batch)
    assert found.peak == pytest.approx(truth, rel=tolerance), f"counted {truth:,} bytes, planned {found.peak:,}\n{found}"


# --- against counted peaks


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("head", ["dense", "streamed"])
def test_the_peak_of_a_llama_is_as_planned(head, recompute):
    assert_planned(LLAMA, FP32.with_(head=head, recompute=recompute), 768)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("head", ["dense", "streamed"])
def test_the_peak_with_mini_sequences_is_as_planned(head, recompute):
    assert_planned(LLAMA, FP32.with_(head=head, recompute=recompute, mlp_chunk=256), 1536, tolerance=TOLERANCE_CHUNKS)


@pytest.mark.parametrize("name", ["tied", "qwen2", "gpt2"])
@pytest.mark.parametrize(("head", "recompute"), [("dense", "block"), ("streamed", "none")])
def test_the_peak_of_other_families_is_as_planned(name, head, recompute):
    assert_planned(CONFIGS[name], FP32.with_(head=head, recompute=recompute), 512)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_tied_weight_has_three_gradients_for_a_moment(accumulate):
    """The head's, the embedding's and their sum."""
    config = LlamaConfig(**{**SMALL, "num_hidden_layers": 1, "vocab_size": 20000}, tie_word_embeddings=True)
    training = FP32.with_(optimizer="sgd", head="streamed", accumulate=accumulate)
    assert plan_memory(config, 32, training=training, device="cpu").peak_phase.name == "backward of the embedding"
    assert_planned(config, training, 32)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_that_are_kept_are_planned(name):
    assert_planned(CONFIGS[name], FP32.with_(head="streamed", attention="eager"), 384, tolerance=TOLERANCE_SCORES)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd"},
        {"optimizer": "momentum", "head": "streamed"},
        {"step": "foreach", "head": "streamed", "recompute": "block"},
        {"accumulate": True},
        {"accumulate": True, "head": "streamed"},
    ],
    ids=str,
)
def test_optimizers_and_accumulated_gradients_are_planned(changes):
    assert_planned(LLAMA, FP32.with_(**changes), 512)


@pytest.mark.parametrize("head", ["dense", "streamed"])
def test_half_precision_is_planned(head):
    """Norms then copy their input in fp32, dense logits are there in both types, a streamed dw is fp32 until the backward."""
    training = Training(dtype=torch.bfloat16, optimizer="adamw-plain", step="loop", workspace=WORKSPACE, head=head)
    assert_planned(LlamaConfig(**{**SMALL, "num_hidden_layers": 2}), training, 384)


def test_a_batch_counts_as_its_tokens():
    assert_planned(LLAMA, FP32.with_(head="dense"), 128, batch=4)
    one, four = plan_memory(LLAMA, 512, training=FP32), plan_memory(LLAMA, 128, batch=4, training=FP32)
    assert one.peak == four.peak


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("gradients", ["forward", "recompute"])
def test_a_streamed_head_of_its_own_is_as_planned(gradients, ignored):
    n, c, d = 1024, 6000, 256
    training = FP32.with_(head="streamed", head_gradients=gradients)

    def prepare():
        x, w, y = torch.randn(n, d, requires_grad=True), torch.randn(c, d, requires_grad=True), torch.randint(0, c, (n,))
        if ignored:
            y[-1] = -100

        def step():
            x.grad = w.grad = None
            with bigclass.planning(workspace=WORKSPACE, gradients=gradients):
                bigclass.linear_cross_entropy(x, w, y).backward()

        return step

    head = head_memory(n, c, d, training, masked=ignored, device="cpu")
    assert head.plan is not None and head.plan.gradients == gradients
    beside = 4 * d * (n + c) + 8 * n
    assert head.peak + head.idle + beside == pytest.approx(peak_bytes(prepare), rel=0.02)


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("head", ["dense", "streamed"])
def test_a_head_alone_is_planned_with_its_optimizer(head, update):
    """What `largest_class_count` searches over."""
    if update == "backward" and head == "dense":
        with pytest.raises(bigclass.ArgumentError, match="update: 'backward' takes a streamed head"):
            largest_class_count(8, 8, 1e9, training=FP32, update=update)
        return
    n, c, d = 512, 20000, 128

    def prepare():
        x, w, y = torch.randn(n, d, requires_grad=True), nn.Parameter(torch.randn(c, d)), torch.randint(0, c, (n,))
        slabs = bigclass.optim.SlabRowAdam([w], lr=0.01)
        optimizer = slabs if update == "backward" else torch.optim.AdamW([w], foreach=False)

        def step():
            x.grad = None
            with bigclass.planning(workspace=WORKSPACE):
                if head == "dense":
                    nn.functional.cross_entropy(nn.functional.linear(x, w), y).backward()
                else:
                    bigclass.linear_cross_entropy(x, w, y, update=slabs if update == "backward" else None).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    phases = head_phases(n, c, d, FP32.with_(head=head), in_backward=update == "backward", device="cpu")
    assert max(phase.total for phase in phases) == pytest.approx(peak_bytes(prepare), rel=TOLERANCE)


def test_a_module_that_is_only_counted_is_planned_with_what_its_rows_keep():
    rows, width, classes = 512, 64, 6000

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, width), nn.ReLU(), nn.Linear(width, classes))

    body = model()[:-1]
    shape = shape_of(model(), row_bytes=saved_bytes(body, torch.zeros(8, 32)) // 8)
    assert shape == ModuleShape(
        name="Sequential", parameters=32 * 256 + 256 + 256 * width + width + width * classes + classes, hidden=width, classes=classes,
        largest=256 * width, row_bytes=4 * (32 + 256 + width),
    )  # fmt: skip

    def prepare():
        net, x, y = model(), torch.randn(rows, 32), torch.randint(0, classes, (rows,))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        def step():
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    planned = plan_memory(shape, 1, batch=rows, training=FP32.with_(optimizer="momentum"), device="cpu").peak
    assert planned == pytest.approx(peak_bytes(prepare), rel=TOLERANCE)


def test_counted_peaks_see_inside_operators_and_only_the_last_step():
    """The temporaries of an operator written in C++ count; what an earlier step had does not."""
    sizes = iter((1 << 22, 1 << 20))

    def prepare():
        return lambda: torch.softmax(torch.zeros(next(sizes)), 0).sum().item()

    counted_ = peak_bytes(prepare)
    assert 2 * 4 << 20 <= counted_ < (2 * 4 << 20) + 1024


# --- against published counts


PUBLISHED = {
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.2-1b": 1_235_814_400, "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984, "gpt2": 124_439_808,
}  # fmt: skip


def test_every_named_model_has_its_published_number_of_parameters():
    assert {name: shape.parameters for name, shape in MODELS.items()} == PUBLISHED


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_and_its_model_have_the_same_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    from_config, from_model = shape_of(CONFIGS[name]), shape_of(model)
    assert isinstance(from_config, TransformerShape)
    assert from_config.parameters == from_model.parameters == sum(p.numel() for p in model.parameters())
    assert from_config.block_parameters == from_model.block_parameters


def test_a_llama_shape_of_a_configuration_is_the_named_one():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    assert replace(shape_of(config), name="llama3-8b") == MODELS["llama3-8b"]


# --- against the papers


def test_adamw_takes_sixteen_bytes_a_parameter_and_sharding_divides_them():
    """ZeRO, figure 1: 7.5 B parameters over 64 ranks take 120 GB, 31.4, 16.6 and 1.9."""
    shape = ModuleShape(parameters=7_500_000_000, hidden=1, classes=1)
    for stage, gigabytes in enumerate((120.0, 31.4, 16.6, 1.9)):
        plan = plan_memory(shape, 1, training=Training(), ranks=Ranks(data=64, shard=stage))
        assert plan.phases[-1].total / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_gpt_block_keeps_what_the_paper_says():
    """Korthikanti et al., section 4.1: 34 sbh bytes and the scores. Without two dropout masks (sbh each) and with flash attention 32 sbh,
    and what LayerNorms and the softmax have for each token."""
    shape = TransformerShape(
        layers=1, hidden=64, intermediate=256, heads=4, kv_heads=4, head_dim=16, classes=2, norm="layer", gated=False, mlp_tensors=2
    )
    tokens = 100
    block = block_memory(shape, tokens, tokens, Training(), Ranks())
    statistics = tokens * (2 * 8 + 4 * shape.heads)
    assert block.shared_input
    assert block.input + block.kept + block.mlp == 32 * tokens * shape.hidden + statistics


# --- over ranks


def test_a_sequence_over_ranks_takes_what_its_part_takes():
    """Activations of S tokens over W ranks are those of S / W tokens (and attention's output twice); states are sharded over all."""
    training = Training(recompute="block", head="streamed", mlp_chunk=4096)
    alone = plan_memory("llama3-8b", 16384, training=training)
    spread = plan_memory("llama3-8b", 8 * 16384, training=training, ranks=Ranks(sequence=8, shard=3))
    assert spread.tokens == alone.tokens
    assert spread.part("optimizer") == -(-alone.part("optimizer") // 8)
    head = spread.phases[0].parts, alone.phases[0].parts
    assert head[0]["activations"] == head[1]["activations"]


def test_keys_are_repeated_for_ranks_beyond_them_and_rings_begin_beyond_the_heads():
    shape, tokens = MODELS["llama3-8b"], 1000
    kept = {w: block_memory(shape, tokens, w * tokens, Training(), Ranks(sequence=w)).kept for w in (1, 8, 32, 64)}
    assert kept[8] - kept[1] == 2 * tokens * shape.queries  # the output once more
    assert kept[32] - kept[8] == 2 * 2 * tokens * (shape.queries - shape.keys)
    assert kept[64] == kept[32]
    assert "rings of 2" in str(plan_memory(shape, 64 * tokens, ranks=Ranks(sequence=64, shard=3)))


def test_classes_over_ranks_divide_the_dense_head_and_gather_features():
    one = plan_memory("gemma2-2b", 1024, training=Training(head="dense"), ranks=Ranks(data=8))
    eight = plan_memory("gemma2-2b", 1024, training=Training(head="dense"), ranks=Ranks(data=8, classes=8))
    logits = 14 * 1024 * 256000  # rows of eight ranks, an eighth of the classes: as many
    assert one.phases[0].parts["head"] == eight.phases[0].parts["head"] == logits
    gathered = eight.phases[0].parts["activations"] - one.phases[0].parts["activations"]
    assert gathered == 7 * 2 * 1024 * 2304
    assert eight.phases[0].parts["weights"] < one.phases[0].parts["weights"]


# --- searches


WAYS = {
    "dense": Training(),
    "recompute": Training(recompute="block"),
    "mini-sequence": Training(recompute="block", mlp_chunk=4096),
    "streamed": Training(recompute="block", mlp_chunk=4096, head="streamed"),
}


@pytest.mark.parametrize("ranks", [1, 8, 256])
def test_each_saving_makes_the_longest_sequence_no_shorter_and_it_is_the_longest(ranks):
    spread, memory = Ranks(sequence=ranks, shard=3), DEVICES["141 GB"]
    before = 0
    for training in WAYS.values():
        found = longest_sequence("gemma2-2b", memory, training=training, ranks=spread)
        assert found >= before > -1 and found % (128 * ranks) == 0
        assert plan_memory("gemma2-2b", found, training=training, ranks=spread).peak <= USABLE * memory
        assert plan_memory("gemma2-2b", found + 128 * ranks, training=training, ranks=spread).peak > USABLE * memory
        before = found
    assert before > 4 * longest_sequence("gemma2-2b", memory, training=WAYS["dense"], ranks=spread)


def test_no_sequence_fits_where_states_do_not():
    assert longest_sequence("llama3-70b", DEVICES["80 GB"]) == 0


def test_the_largest_class_count_is_the_largest():
    memory, rows, features = 1e9, 1024, 256
    for training, update in (
        (Training(head="dense"), "step"),
        (Training(head="streamed"), "step"),
        (Training(head="streamed"), "backward"),
    ):
        found = largest_class_count(rows, features, memory, training=training, update=update)

        def peak(classes: int, training: Training = training, update: str = update) -> int:
            return max(p.total for p in head_phases(rows, classes, features, training, in_backward=update == "backward"))

        assert peak(found) <= USABLE * memory < peak(found + max(found // 1000, 1))


def test_class_counts_grow_with_savings_and_ranks():
    def most(head: str, ranks: int = 1, update: str = "step") -> int:
        return largest_class_count(8192, 1024, DEVICES["80 GB"], training=Training(head=head), ranks=ranks, update=update)

    assert most("dense") < most("streamed") < most("streamed", update="backward")
    for head in ("dense", "streamed"):
        assert 7 * most(head) < most(head, 8) < most(head, 64)
    assert largest_class_count(8192, 1024, DEVICES["80 GB"], other=1e12) == 0


# --- what is refused, what is shown


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: plan_memory("llama9", 1024), "model: expected one of llama3-8b"),
        (lambda: plan_memory(3, 1024), "model: expected a name"),
        (lambda: plan_memory(nn.ReLU(), 1024), "model: expected a module with a linear classifier"),
        (lambda: plan_memory("gpt2", 0), "sequence: expected a whole number of at least 1, got 0"),
        (lambda: plan_memory("gpt2", 4, batch=-1), "batch: expected a whole number of at least 1, got -1"),
        (lambda: plan_memory("gpt2", 4, ranks=Ranks(sequence=8)), "sequence: expected at least a token for each of 8 ranks, got 4"),
        (lambda: Training(optimizer="lion"), "optimizer: expected one of"),
        (lambda: Training(head="sparse"), "head: expected one of"),
        (lambda: Training(mlp_chunk=0), "mlp_chunk: expected a whole number of at least 1, got 0"),
        (lambda: Training(dtype=torch.int8), "dtype: expected one of"),
        (lambda: Ranks(shard=4), "shard: expected a stage of ZeRO, 0 to 3, got 4"),
        (lambda: Ranks(data=4, classes=3), "classes: expected a divisor of the 4 ranks"),
        (lambda: longest_sequence("gpt2", -1.0), "memory: expected a number of bytes above 0, got -1.0"),
        (lambda: longest_sequence("gpt2", 1e9, usable=2.0), "usable: expected a share above 0 and at most 1, got 2.0"),
        (lambda: largest_class_count(8, 8, 1e9, update="never"), "update: expected one of"),
        (lambda: largest_class_count(8, 8, 1e9, update="backward", ranks=2), "update: 'backward' takes a streamed head on one rank"),
        (lambda: largest_class_count(0, 8, 1e9), "rows: expected a whole number of at least 1, got 0"),
        (lambda: peak_bytes(lambda: lambda: None, device="mps"), "device: expected a CPU or CUDA device"),
    ],
)
def test_bad_arguments_are_named(call, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        call()


def test_a_plan_shows_its_parts_its_phases_and_why():
    plan = bigclass.plan_memory("llama3-8b", 65536, training=Training(head="streamed"), ranks=Ranks(sequence=8, shard=3))
    shown = str(plan)
    for text in (
        "8,192 tokens a device",
        "weights",
        "optimizer",
        "activations",
        "mlp",
        "head",
        "at the head",
        "ZeRO 3",
        "Ulysses",
        "workspace",
    ):
        assert text in shown
    assert plan.peak == sum(plan.part(name) for name in plan.peak_phase.parts) == max(phase.total for phase in plan.phases)


def test_a_plan_is_the_same_with_and_without_a_gpu(monkeypatch):
    """A plan for a GPU does not depend on what this machine has."""
    from bigclass.core.engines import support

    here = plan_memory("gemma2-2b", 8192, training=Training(head="streamed")).peak
    monkeypatch.setattr(support, "TRITON_IS_THERE", not support.TRITON_IS_THERE)
    assert plan_memory("gemma2-2b", 8192, training=Training(head="streamed")).peak == here
