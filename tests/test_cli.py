"""The command line: each command prints what it promises, and bad arguments are told apart from missing packages."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import bigclass
from bigclass import cli, extras


def test_module_runs_as_a_program():
    finished = subprocess.run([sys.executable, "-m", "bigclass", "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "plan", "doctor"):
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


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["plan", "--rows", "0", "--classes", "10", "--features", "4"], "--rows: expected a positive whole number, got 0"),
        (["plan", "--rows", "many", "--classes", "10", "--features", "4"], "--rows"),
        (["plan", "--rows", "8", "--classes", "10", "--features", "4", "--dtype", "int8"], "--dtype"),
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
