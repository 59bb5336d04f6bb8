"""The command line: each command prints what it promises, and bad arguments are told apart from missing packages."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import bigclass
from bigclass import cli, extras
from bigclass.memory_plan import Ranks, Training


def test_module_runs_as_a_program():
    finished = subprocess.run([sys.executable, "-m", "bigclass", "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "plan", "memory", "doctor"):
        assert command in finished.stdout


def test_doctor_names_torch_and_every_optional_package(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    for module in extras.EXTRA_OF:
        assert module in shown


@pytest.mark.parametrize("command", ["plan", "explain"])
def test_plan_prints_what_explain_returns(capsys, command):
    assert cli.main([command, "--rows", "64", "--classes", "1000", "--features", "16", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    explained = bigclass.explain(64, 1000, 16, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert capsys.readouterr().out.strip() == str(explained).strip()


def test_memory_prints_the_plan_and_what_fits(capsys):
    training = Training(head="streamed", recompute="block", mlp_chunk=2048, optimizer="adamw-8bit")
    command = "memory --model gemma2-2b --sequence 65536 --ranks 8 --recompute block --mlp-chunk 2048 --optimizer adamw-8bit"
    assert cli.main([*command.split(), "--device-memory", "24"]) == 0
    shown = capsys.readouterr().out
    ranks = Ranks(sequence=8, shard=3)
    assert shown.startswith(str(bigclass.plan_memory("gemma2-2b", 65536, training=training, ranks=ranks)))
    longest = bigclass.longest_sequence("gemma2-2b", 24e9, training=training, ranks=ranks)
    assert longest > 65536 and "fits 24 GB" in shown
    assert shown.rstrip().endswith(f"as asked for {longest:>37,}".lstrip()) and shown.count(f"{longest:,}") == 2


def test_memory_takes_other_classes_and_no_sharding(capsys):
    options = {"model": "gpt2", "sequence": 512, "classes": 1000, "dtype": "float32", "head": "dense", "zero": 0, "data-ranks": 2}
    assert cli.main(["memory", *[f"--{name}={value}" for name, value in options.items()]]) == 0
    shown = capsys.readouterr().out
    assert f"{124_439_808 - 768 * (50257 - 1000):,} parameters of 16 bytes" in shown and "ZeRO" not in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["plan", "--rows", "0", "--classes", "10", "--features", "4"], "--rows: expected a positive whole number, got 0"),
        (["plan", "--rows", "many", "--classes", "10", "--features", "4"], "--rows"),
        (["plan", "--rows", "8", "--classes", "10", "--features", "4", "--dtype", "int8"], "--dtype"),
        (["memory", "--model", "gpt9", "--sequence", "8"], "--model"),
        (
            ["memory", "--model", "gpt2", "--sequence", "8", "--device-memory", "0"],
            "--device-memory: expected a number of GB above 0, got 0",
        ),
        (["memory", "--model", "gpt2", "--sequence", "8", "--zero", "4"], "--zero"),
        (["demo", "--device", "nonsense"], "--device: expected a torch device"),
        (["demo", "--steps", "-1"], "--steps"),
        ([], "COMMAND"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_missing_packages_name_the_extra(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokenizers" else find_spec(name))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo"])
    assert exit_.value.code == 1
    message = capsys.readouterr().err
    assert "tokenizers" in message and "pip install 'bigclass[demo]'" in message


def test_version_is_found_by_import_name():
    assert extras.version_of("torch") is not None
    assert extras.version_of("no_such_package") is None


def test_what_a_plan_refuses_is_an_error_of_the_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["memory", "--model", "gpt2", "--sequence", "4", "--ranks", "8"])
    assert exit_.value.code == 1
    assert "sequence: expected at least a token for each of 8 ranks, got 4" in capsys.readouterr().err
