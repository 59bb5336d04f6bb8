"""The demo: that both ways of training agree, that its figures are measured, and that its text is what it says."""

import math
import struct
from dataclasses import replace
from itertools import islice

import pytest
import torch
from rich.console import Console

from bigclass.demo import DemoSettings, data, report, run_demo
from bigclass.demo.memory import peak_extra_bytes, resident_peak
from bigclass.demo.training import Run, prepare_loss_layer

SMALL = DemoSettings(vocab=2000, corpus_bytes=400_000, steps=2, batch=2, context=64, width=32, layers=1, heads=2)
MIB = 2**20

needs_resident_peak = pytest.mark.skipif(resident_peak() is None, reason="this system does not tell the peak of resident memory")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(replace(SMALL, out=tmp_path_factory.mktemp("demo") / "new folder" / "plot.png"))


@pytest.fixture(scope="module")
def corpus():
    return data.read_corpus(SMALL.corpus_bytes)


def test_dense_and_streamed_training_agree(result):
    assert len(result.dense.losses) == len(result.streamed.losses) == SMALL.steps
    assert result.dense.losses[0] == pytest.approx(math.log(SMALL.vocab), rel=0.05)  # nothing is learned yet
    assert result.dense.losses[1] != result.dense.losses[0]
    assert max(result.differences) < 1e-4


@needs_resident_peak
def test_memory_of_both_loss_layers_is_measured(result):
    assert result.dense.loss_layer_bytes is not None
    assert result.streamed.loss_layer_bytes is not None


def test_plot_is_a_png_of_readable_size(result):
    header = result.settings.out.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:])
    assert width >= 1200 and height >= 400


def test_table_shows_figures_and_ratios():
    dense = Run(losses=[7.0, 6.0], seconds=[9.0, 0.5], loss_layer_bytes=800 * MIB)
    streamed = Run(losses=[7.0, 6.001], seconds=[9.0, 0.25], loss_layer_bytes=80 * MIB)
    shown = render(report.Report(SMALL, dense, streamed))
    for expected in ("6.0000", "6.0010", "1.0e-03", "0.500 s", "0.250 s", "0.50 x", "256", "512", "2.00 x", "800 MiB", "80 MiB", "0.10 x"):
        assert expected in shown


def test_memory_that_cannot_be_measured_is_not_guessed(tmp_path):
    unmeasured = report.Report(SMALL, Run([7.0], [1.0]), Run([7.0], [1.0]))
    assert render(unmeasured).count("n/a") == 3
    report.plot(unmeasured, tmp_path / "plot.png")
    assert peak_extra_bytes(prepare_buffers, 1, 1, device="meta") is None


def render(result: report.Report) -> str:
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as captured:
        console.print(report.table(result))
    return captured.get()


def prepare_buffers(scratch: int, returned: int):
    torch.ones(100 * MIB, dtype=torch.uint8)  # a peak before the call, which must neither count nor hide the call's own

    def call():
        buffers = [torch.ones(size * MIB, dtype=torch.uint8) for size in (scratch, returned)]
        return buffers[1:]

    return call


@needs_resident_peak
def test_peak_is_above_inputs_and_returned_tensors():
    assert peak_extra_bytes(prepare_buffers, 64, 32) == pytest.approx(64 * MIB, abs=2 * MIB)


@needs_resident_peak
def test_dense_loss_layer_holds_its_logits_several_times():
    settings = replace(SMALL, vocab=16_384, batch=4, context=256)
    logits = settings.batch * (settings.context - 1) * settings.vocab * 4
    extra = peak_extra_bytes(prepare_loss_layer, "dense", settings)
    assert extra is not None
    assert 1.5 * logits < extra < 4 * logits


def test_corpus_is_the_same_each_time_and_capped(corpus):
    assert corpus == data.read_corpus(SMALL.corpus_bytes)
    assert sum(map(len, corpus)) == SMALL.corpus_bytes
    assert any("def " in text for text in corpus)


def test_vocabulary_has_the_size_asked_for_and_spells_any_text(corpus):
    tokenizer = data.learn_vocabulary(corpus, SMALL.vocab)
    assert tokenizer.get_vocab_size() == SMALL.vocab
    text = "def f(x): return 'naïve ☃'\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_passages_are_drawn_by_the_seed(corpus):
    tokenizer = data.learn_vocabulary(corpus, SMALL.vocab)
    first, again, other = (data.encode(corpus, tokenizer, 1000, seed) for seed in (0, 0, 1))
    assert len(first) == 1000
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize("vocab", [256, 10_000_000])
def test_vocabulary_out_of_reach_is_an_error(corpus, vocab):
    with pytest.raises(ValueError, match=f"vocab.*{vocab}"):
        data.learn_vocabulary(corpus[:1], vocab)


def test_batches_go_through_all_windows_before_any_returns():
    windows = torch.cat(list(islice(data.batches(torch.arange(62), batch=2, context=10, seed=0), 6)))
    assert windows.shape == (12, 10)
    assert sorted(windows[:6, 0].tolist()) == sorted(windows[6:, 0].tolist()) == [0, 10, 20, 30, 40, 50]


def test_text_too_short_for_a_batch_is_an_error():
    with pytest.raises(ValueError, match=r"15 tokens.*2 windows of 10"):
        next(data.batches(torch.arange(15), batch=2, context=10, seed=0))


def test_larger_vocabulary_reads_more_text():
    small, large = (DemoSettings.for_device(torch.device("cpu"), vocab=vocab) for vocab in (32_000, 64_000))
    assert large.vocab == 64_000
    assert large.corpus_bytes > small.corpus_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gets_a_larger_model_and_keeps_what_was_chosen():
    settings = DemoSettings.for_device(torch.device("cuda"), steps=3)
    assert settings.width > DemoSettings().width
    assert settings.steps == 3
