"""Help, versions and typing errors are answered at once; each command finds its options when it is asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest

from complora_kernels import functional
from complora_kernels.backends import REGISTRY
from complora_kernels.fewshot.__main__ import main, parse
from complora_kernels.fewshot.commands import COMMANDS, PredictConfig

HEAVY = {"torch", "numpy", "open_clip", "transformers", "scipy", "sklearn", "matplotlib", "PIL", "triton"}

SOURCE = """
import sys
from complora_kernels.fewshot.__main__ import main

code = 0
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("LOADED", *sys.modules)
sys.exit(code)
"""


def answered(*arguments: str) -> tuple[int, str, str, set[str]]:
    """The exit code, what is printed on both streams, and the modules that were imported for it."""
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", SOURCE, *arguments], capture_output=True, text=True, env=environment)
    said, _, loaded = done.stdout.rpartition("LOADED")
    return done.returncode, said, done.stderr, set(loaded.split())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--help",), 0, "pretrain-pictures"),
        (("--version",), 0, f"complora {metadata.version('complora-kernels')}"),
        (("trian",), 2, "trian"),
        ((), 2, "predict"),
        (("predict", "--help"), 0, "--classes"),
        (("export", "--help"), 0, "--merged"),
        (("eval", "adapter", "--dta", "x"), 2, "--dta"),
    ],
)
def test_help_and_typing_errors_import_nothing_heavy(arguments, code, words):
    found, said, complained, loaded = answered(*arguments)
    assert found == code
    assert words in said + complained
    assert "complora_kernels.fewshot.commands" in loaded
    assert not HEAVY & loaded
    assert len(loaded) < 500


def test_versions_are_those_that_are_installed():
    _, said, _, _ = answered("--version")
    assert f"torch {metadata.version('torch')}" in said.splitlines()


def test_the_summary_of_each_command_is_the_first_sentence_of_its_options():
    for name, command in COMMANDS.items():
        documented = " ".join((command.options().__doc__ or "").split())
        assert documented.startswith(command.summary), name
        assert documented == command.summary or documented.startswith(f"{command.summary} "), name


def test_a_command_is_read_alone_as_among_all(monkeypatch):
    command = ["predict", "adapter", "a.png", "b.png", "--top", "3", "--classes", "x", "y", "--csv", "-"]
    config = parse(command)
    assert isinstance(config, PredictConfig)
    assert ([str(path) for path in config.images], config.top, config.classes) == (["a.png", "b.png"], 3, ("x", "y"))
    with pytest.raises(SystemExit) as stop:
        parse(["--tyro-print-completion", "bash"])
    assert not stop.value.code


def test_help_shows_no_none_and_no_empty_defaults(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            parse([command, "--help"])
        said = capsys.readouterr().out
        assert "{None" not in said, command
        assert "(default: )" not in said, command
        assert command != "train" or "--steps INT" in said
    assert parse(["train", "--steps", "None"]).steps is None
    assert parse(["train", "--steps", "7"]).steps == 7
    assert parse(["train", "--subspace-energy", "0.9"]).subspace_energy == 0.9
    with pytest.raises(SystemExit):
        parse(["train", "--steps", "many"])


def test_completion_knows_every_command_and_option(capsys):
    with pytest.raises(SystemExit):
        parse(["--tyro-print-completion", "bash"])
    script = capsys.readouterr().out
    assert all(word in script for word in (*COMMANDS, "--learning-rates", "--merged", "--top"))


def test_the_doctor_checks_a_product_on_each_backend(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPLORA_CACHE", str(tmp_path))
    (tmp_path / "x.matrix").write_bytes(bytes(2**20))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    of_backends = said.partition("backends\n")[2].partition("\n\n")[0].splitlines()
    for (name, backend), line in zip(REGISTRY.items(), of_backends, strict=True):
        assert line.startswith(f"  {name} ")
        reason = backend.unavailable()
        assert f"unavailable: {reason}" in line if reason else "available; y and its gradients are" in line
    assert f"{tmp_path} (1 file, 1 MiB)" in said
    assert re.search(rf"^  torch +{re.escape(metadata.version('torch'))}$", said, re.MULTILINE)
    product = functional.complora_linear
    wrong = lambda *arguments, **options: product(*arguments, **options | {"scaling": 0.6})
    monkeypatch.setattr(functional, "complora_linear", wrong)
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out
    monkeypatch.setattr(functional, "complora_linear", lambda *_, **__: 1 / 0)
    assert main(["doctor"]) == 1
    assert "FAILS: division by zero" in capsys.readouterr().out
