"""Arguments that do not go together, out of range or of the wrong kind: exit code 2 and no trace, whatever they are."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from zoo.cli import app

VALUES = [
    "a.png",
    "in",
    "none.png",
    "*.gif",
    "",
    ".",
    "..",
    "\n",
    "\x1b[31m",
    "-1",
    "0",
    "1",
    "1e9",
    "nan",
    "é",
    "9" * 30,
]
OPTIONS = {
    "classify": [
        "--labels",
        "--top-k",
        "--out",
        "--batch-size",
        "--workers",
        "--device",
        "--engine",
        "--json",
        "--amp",
    ],
    "embed": ["--out", "--batch-size", "--device", "--engine", "--shard-rows", "--column", "--workers"],
    "info": ["--size", "--json"],
    "list": ["--json"],
    "convert": ["--model", "--which", "--overwrite"],
    "compare": ["--size", "--out", "--batch-size"],
    "serve": ["--host", "--port", "--queue", "--upload-mib"],
    "chat": ["--image", "--prompt", "--reduce", "--mask", "--max-new-tokens"],
    "nothing": [],
}
ARGUMENTS = st.sampled_from(sorted(OPTIONS)).flatmap(
    lambda name: st.lists(st.sampled_from([*OPTIONS[name], *VALUES]), max_size=6).map(lambda rest: [name, *rest])
)


class Stop(ValueError):
    """In the place of a model, which would take its time."""


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ARGUMENTS)
def test_any_arguments_end_with_a_code(folder, monkeypatch, arguments):
    pytest.importorskip("gradio", reason="zoo serve needs the serve extra")

    def stop(*_, **__):
        raise Stop("stopped before the work")

    for name in ("zoo.cli.Classifier", "zoo.cli.stage_table", "zoo.cli.compare", "zoo.chat.load"):
        monkeypatch.setattr(name, stop)
    monkeypatch.setattr("zoo.cli.run_command", stop)
    monkeypatch.setattr("zoo.serve.command.serve", stop)
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), arguments
    assert result.exit_code in (0, 1, 2), arguments
    assert result.exit_code == 0 or result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "a.png", "--top-k", "0"], "Invalid value for '--top-k'"),
        (["classify", "a.png", "--top-k", "many"], "Invalid value for '--top-k'"),
        (["classify", "a.png", "--colour", "red"], "No such option"),
        (["classify", "a.png", "--out"], "requires an argument"),
        (["embed", "a.png"], "Missing option '--out'"),
        (["detect", "a.png", "--score", "nan"], "score"),
        (["detect", "a.png", "--score", "2"], "Invalid value for '--score'"),
        (["serve", "--port", "70000"], "Invalid value for '--port'"),
        (["convert", "a.png"], "Missing argument"),
        (["convert", "a.png", "b.pth", "--model", "van_b0"], "Checkpoints are written as .safetensors"),
        (["convert", "a.png", "b.safetensors", "--model", "van_b0", "--which", "best"], "not one of 'auto', 'model'"),
        (["info", "van_b0", "--size", "0"], "Invalid value for '--size'"),
        (["classify", "a.png", "--device", "cuda:99999999999999"], "cannot be used here"),
        (["classify", "a.png", "--checkpoint", "hf-hub:x"], "is not of the form hf-hub:owner/repo"),
        (["classify", "a.png", "--checkpoint", "https://host/"], "does not end in a file name"),
        (["classify", "a.png", "--checkpoint", "a.png#sha256=xyz"], "is not 8 to 64 hex digits"),
        (["classify", "a.png", "--checkpoint", "a.png#sha256=00000000"], "it is damaged or was replaced"),
    ],
)
def test_wrong_arguments(folder, zoo, arguments, message):
    assert message in " ".join(zoo(*arguments, code=2).stderr.replace("│", " ").split())
