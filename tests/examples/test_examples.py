"""Every example runs as a user would run it, and shows what it promises."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import error

ROOT = Path(__file__).parents[2]
SHARED = {"patches.py"}  # what examples import, and nobody runs
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name not in SHARED)


def run(name: str, *options: str, folder: Path) -> str:
    """What the example prints; it must end well."""
    return run_together([sys.executable, str(ROOT / "examples" / name), *options], folder=folder)[0]


def run_together(*commands: list[str], folder: Path) -> list[str]:
    """What these commands print, side by side; all must end well."""
    # From another folder, with the repository as the only path: nothing may depend on where it is started.
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, cwd=folder, env=environment(), stdout=pipe, stderr=pipe, text=True) for command in commands]
    try:
        made = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, made, strict=True):
        assert process.returncode == 0, errors
    return [printed for printed, _ in made]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}


def test_every_example_has_its_test():
    assert EXAMPLES == [
        "clip.py", "distill.py", "extreme_labels.py", "finetune.py", "frozen_features.py", "long_sequence.py", "margin_verification.py",
        "million_identities.py", "preference.py", "pretrain_fsdp2.py", "timm_patches.py",
    ]  # fmt: skip


def test_frozen_features_learns(tmp_path):
    printed = run("frozen_features.py", "--classes", "2000", "--batch", "512", "--steps", "30", folder=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss +([\d.]+)", printed)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert re.search(r"label among the five largest: [\d.]+%", printed)


def test_extreme_labels_beats_the_most_frequent_ones_tail_included(tmp_path):
    pytest.importorskip("rich")
    options = ("--labels", "3000", "--samples", "4096", "--fresh", "512", "--batch", "128", "--dim", "32", "--evaluations", "2")
    printed = run("extreme_labels.py", *options, folder=tmp_path)
    rows = {name: [float(v) for v in re.findall(r"([\d.]+)%", row)] for name, row in re.findall(r"│ ((?:PS)?P@\d|nDCG@5) (.*)", printed)}
    assert len(rows) == 7
    for frequent, _, final in rows.values():
        assert final > 2 * frequent
    first, second = (float(v) for v in re.search(r"training loss\W+([\d.]+)\W+([\d.]+)", printed).groups())
    assert second < first
    assert re.search(r"Step time, median: [\d.]+ s", printed)
    assert re.search(r"Memory of the loss layer, 128 x 3,000: .*dense 5 MiB by formula", printed)


def test_timm_patches_trains_alike_and_plots(tmp_path):
    for package in ("timm", "sklearn", "rich", "matplotlib"):
        pytest.importorskip(package)
    options = ("--batch", "64", "--steps", "3", "--out", "new folder/plot.png")
    printed = run("timm_patches.py", *options, folder=tmp_path)
    dense, streamed = (float(loss) for loss in re.search(r"final training loss\W+([\d.]+)\W+([\d.]+)", printed).groups())
    assert streamed == pytest.approx(dense, rel=1e-3)
    assert float(re.search(r"largest difference of the losses\W+([\d.e+-]+)", printed).group(1)) < 1e-3 * dense
    header = (tmp_path / "new folder" / "plot.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:])
    assert width >= 1200 and height >= 400


def test_margin_verification_learns_what_it_never_saw(tmp_path):
    for package in ("sklearn", "rich"):
        pytest.importorskip(package)
    options = ("--stride", "16", "--steps", "40", "--batch", "128", "--features", "64")
    printed = run("margin_verification.py", *options, folder=tmp_path)
    names = "before training", "softmax", "cosines, no margin", "arcface, margin 0.3"
    found = [re.search(rf"{re.escape(name)}\W+([\d.]+)% \+- [\d.]+%\W+([\d.]+)%\W+([\d.]+)%", printed) for name in names]
    untrained, *trained = (float(row.group(1)) for row in found)
    assert min(trained) > max(untrained, 50.0)
    assert re.search(r"By accuracy arcface, margin 0.3 is (better than|worse than|not told apart from) softmax", printed)
    assert re.search(r"128 x 10,000,000 logits take 4.8 GiB", printed)


def test_margin_verification_takes_three_margins_and_subcentres(tmp_path):
    for package in ("sklearn", "rich"):
        pytest.importorskip(package)
    small = ("--stride", "24", "--steps", "2", "--batch", "32", "--features", "16")
    printed = run(
        "margin_verification.py", *small, "--kind", "combined", "--margin", "1", "0.2", "0.1", "--subcenters", "2", folder=tmp_path
    )
    assert "combined, margin (1.0, 0.2, 0.1)" in printed


def test_preference_prefers_what_it_is_shown_and_writes_what_is_rewarded(tmp_path):
    options = ("--pretraining", "60", "--steps", "12", "--batch", "24", "--vocab", "2048")
    printed = run("preference.py", *options, folder=tmp_path)
    margins = [float(margin) for margin in re.findall(r"reward margin +([+-][\d.]+)", printed)]
    right = [float(share) for share in re.findall(r"right +([\d.]+)%", printed)]
    assert len(margins) == 7 and margins[0] == 0.0 and margins[-1] > 0.3
    assert right[0] == 50.0 and right[-1] > 75.0
    shares = [float(share) for share in re.findall(r"lines that parse +([\d.]+)%", printed)]
    assert len(shares) == 6 and max(shares[3:]) > shares[0]
    assert re.search(r"logits of a batch of pairs, 768 x 2,048, would be 6 MiB", printed)


def test_clip_names_captions_it_never_saw_and_plots(tmp_path):
    for package in ("open_clip", "sklearn", "rich", "matplotlib"):
        pytest.importorskip(package)
    options = ("--steps", "50", "--batch", "128", "--chunk", "48", "--plot", "new folder/plot.png", "--largest", "1024")
    printed = run("clip.py", *options, folder=tmp_path)
    found = re.findall(r"│ (.+?) +│ +([\d.]+)% │ +([\d.]+)% │ +([\d.]+)% │", printed)
    chance, untrained, trained = ({name: float(row[i]) for name, *row in found} for i in range(3))
    assert len(found) == 7
    five = "... among the five likeliest"
    assert trained[five] > 3 * max(chance[five], untrained[five])
    assert trained["... its place"] > 70 and trained["... its first colour"] > 60
    assert re.search(r"│ +1,024 │ +[\d,]+ MiB │ +[\d,]+ MiB │ +[\d.]+ s │ +[\d.]+ s │", printed)
    assert (tmp_path / "new folder" / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_finetune_adapts_streamed_as_dense_whole_and_by_lora(tmp_path):
    for package in ("transformers", "accelerate", "tokenizers", "peft"):
        pytest.importorskip(package)
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--lora", "--vocab", "3000", "--text", "200000", "--width", "32"]
    command += ["--first", "16", "--steps", "16", "--context", "32"]
    streamed, dense = run_together(command, [*command, "--dense"], folder=tmp_path)
    told = []
    for printed in (streamed, dense):
        losses = [[float(v) for v in line.split()] for line in re.findall(r"training loss (.+)", printed)]
        perplexities = re.findall(r"perplexity of unseen prose: ([\d,.]+) before, ([\d,.]+) after", printed)
        told.append((losses, [[float(v.replace(",", "")) for v in pair] for pair in perplexities]))
    for one, other in zip(*told, strict=True):
        assert len(one) == len(other) == 2  # the first training, and LoRA
        assert one == [pytest.approx(stage, rel=2e-3) for stage in other]
    (untrained, base), (same, adapted) = told[0][1]
    assert adapted < same == base < 0.95 * untrained  # the base is hardly trained here, so adapters on it do little
    assert re.search(r"LoRA: [\d,]+ parameters are trained", streamed)
    assert streamed.count("one matrix of a batch's dense logits 3 MiB") == 2


def test_pretraining_on_two_ranks_and_resumed_on_one_is_that_of_one_process(tmp_path):
    """Pitfall 41: tokens lie unevenly over ranks, and in the second step rank 1 has none."""
    pytest.importorskip("transformers")
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    g = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (16, 24), generator=g)
    labels = ids.masked_fill(torch.rand(16, 24, generator=g) < torch.rand(16, 1, generator=g), -100)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    labels[order[[5, 7]]] = -100  # samples of the second step: 4 and 6 of rank 0, 5 and 7 of rank 1
    torch.save({"input_ids": ids, "labels": labels}, tmp_path / "data.pt")

    script = str(ROOT / "examples" / "pretrain_fsdp2.py")
    options = ["--device", "cpu", "--dtype", "float32", "--data", "data.pt", "--vocab", "300", "--width", "32", "--layers", "2", "--tie"]
    options += ["--context", "24", "--steps", "6", "--warmup", "2", "--rate", "0.01", "--z-loss", "0.001"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run_together(
        [sys.executable, script, *options, "--batch", "2", "--figures", "one.json", "--checkpoints", "one"],
        [*launch, script, *options, "--until", "3", "--figures", "two.json", "--checkpoints", "two"],
        folder=tmp_path,
    )
    assert "parameters on 2 ranks, from step 0" in printed[1]
    resumed = run("pretrain_fsdp2.py", *options, "--batch", "2", "--figures", "two.json", "--checkpoints", "two", folder=tmp_path)
    assert "parameters on 1 ranks, from step 3" in resumed
    assert re.search(r"step +6  loss +[\d.]+  norm +[\d.]+  rate [\de.-]+  [\d,]+ tokens/s", resumed)

    one, two = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("one.json", "two.json"))
    for name in ("step", "loss", "norm", "rate", "predicted"):
        assert [made[name] for made in two] == pytest.approx([made[name] for made in one], rel=1e-5)
    weights = []
    for name in ("one", "two"):
        dcp_to_torch_save(tmp_path / name / "step-00000006", tmp_path / f"{name}.pt")
        weights.append(torch.load(tmp_path / f"{name}.pt", weights_only=False)["model"])
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert error(weights[1][name], weight) < 1e-5


def test_a_missing_package_is_named_with_its_command(tmp_path):
    """sitecustomize, which Python imports at its start, hides timm from the example."""
    hiding = "import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda n, *rest: None if n == 'timm' else find(n, *rest)\n"
    (tmp_path / "sitecustomize.py").write_text(hiding)
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    command = [sys.executable, str(ROOT / "examples" / "timm_patches.py")]
    done = subprocess.run(command, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.strip() == "This example needs timm, not installed here: run pip install 'bigclass[examples]'"


def test_distill_teaches_both_students(tmp_path):
    for package in ("transformers", "tokenizers"):
        pytest.importorskip(package)
    options = (
        "--vocab",
        "2000",
        "--context",
        "64",
        "--teacher-steps",
        "60",
        "--steps",
        "30",
        "--stored",
        "16",
        "--divergence",
        "jensen_shannon",
    )
    printed = run("distill.py", *options, folder=tmp_path)
    found = dict(re.findall(r"(teacher|student, [a-z_0-9 ]+?) +[\d.]+ M parameters +perplexity +([\d.]+)", printed))
    assert list(found) == ["teacher", "student, tokens alone", "student, jensen_shannon divergence", "student, 16 stored tokens"]
    # all far below chance, which is the vocabulary's 2000; the teacher, which read more, is the best
    assert max(float(v) for v in found.values()) < 1000.0
    assert float(found["teacher"]) == min(float(v) for v in found.values())


@pytest.mark.parametrize("rate", ("1.0", "0.2"))
def test_a_head_over_two_ranks_tells_strangers_apart(tmp_path, rate):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--identities", "20001", "--steps", "30", "--batch", "64", "--rate", rate]
    (printed,) = run_together([*launch, str(ROOT / "examples" / "million_identities.py"), *options], folder=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss +([\d.]+)", printed)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    before, after = (float(share) for share in re.findall(r"([\d.]+)%", printed))
    assert after > before + 5.0
    assert "20,001 identities on 2 ranks: 10,001 classes" in printed
