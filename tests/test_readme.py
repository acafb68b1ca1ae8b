"""What the documents show works: their Python runs, their commands parse, their links lead."""

import re
import shlex
from pathlib import Path

import pytest
from diffusers import DiTPipeline
from typer.main import get_command

import accelkit
from accelkit.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in (ROOT / n for n in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md"))
    if path.is_file()
]


def fences(path, *languages):
    """The fenced blocks of a document in these languages, with the line each begins at."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            yield text[: match.start()].count("\n") + 1, match[2]


def calls(text):
    """The command lines of accelkit in a shell script or a help text, as arguments."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split("#")[0].split("&&"):
            words = [word for word in shlex.split(part) if word != "…"]
            if words[:1] == ["accelkit"]:
                yield words[1:]
            elif "accelkit" in words and words[words.index("accelkit") - 1] == "-m":
                yield words[words.index("accelkit") + 1 :]


def parse(arguments):
    """Parse as the command line does, without running anything."""
    group = get_command(app)
    with group.make_context("accelkit", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        with command.make_context(name, rest, parent=context):
            pass


def script_calls():
    texts = [(p, text) for p in DOCUMENTS for _, text in fences(p, "sh", "bash", "console", "")]
    helps = [(Path(name), c.help) for name, c in get_command(app).commands.items()]
    return [(p.name, a) for p, text in [*texts, *helps] for a in calls(text)]


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(a, id=f"{name}: {' '.join(a)}") for name, a in script_calls()],
)
def test_commands_parse(arguments):
    parse(arguments)


def test_the_parser_would_notice():
    assert len(script_calls()) > 15
    for wrong in (["finetune", "--schedulz", "D4"], ["sample", "-n", "x"], ["fine"], ["convert"]):
        with pytest.raises(Exception, match=r"^(No such|Input should|Missing)"):
            parse(wrong)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=f"{path.name}:{line}")
        for path in DOCUMENTS
        for line, code in fences(path, "python")
    ],
)
def test_python_runs(code, tmp_path, monkeypatch):
    # what the first command leaves; the weights are as they were, which the examples do not see
    pipe = DiTPipeline.from_pretrained(accelkit.builtin())
    accelkit.enable(pipe, "D4")
    accelkit.save(pipe, tmp_path / "runs" / "finetune-D4")
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "__main__"})


def test_the_readme_has_python_to_run():
    assert len(list(fences(ROOT / "README.md", "python"))) >= 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_the_readme_lists_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in get_command(app).commands:
        assert f"`accelkit {name}`" in text
