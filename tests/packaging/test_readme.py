"""What the README and the pages in docs/ say can be done, can be done."""

import dataclasses
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def named(pages: list[Path], language: str) -> list:
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in pages
        for number, text in enumerate(blocks(page, language), 1)
    ]


def needs_a_run(code: str) -> bool:
    return "load(" in code


RUNNABLE = [block for block in named(PAGES, "python") if not needs_a_run(block.values[0])]


@pytest.mark.parametrize("code", RUNNABLE)
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_what_load_is_said_to_return_is_there():
    from nha_jax.models import LoadedModel

    (code,) = [text for page in PAGES for text in blocks(page, "python") if needs_a_run(text)]
    exec(code.split("\n\n")[0])
    said = set(re.findall(r" \.(\w+)", code))
    assert {"model", "tokenizer"} <= said <= {f.name for f in dataclasses.fields(LoadedModel)}


def commands() -> list[str]:
    lines = "".join(text for page in PAGES for text in blocks(page, "bash")).replace("\\\n", " ")
    inline = [
        code
        for page in PAGES
        for code in re.findall(r"`((?:make|python -m) [^`]+)`", page.read_text())
    ]
    return [line.split("  #")[0].strip() for line in [*lines.splitlines(), *inline]]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {t for line in re.findall(r"^([\w -]+):(?!=)", makefile, re.M) for t in line.split()}
    asked = {
        word
        for command in commands()
        if (match := re.search(r"(?:^|\s)make ((?:[\w-]+(?:\s|$))+)", command))
        for word in match[1].split()
    }
    assert {"pretrain", "test"} <= asked <= targets


def test_files_and_modules_of_the_commands_exist():
    for command in commands():
        for module in re.findall(r"python3? -m ([\w.]+)", command):
            if module.split(".")[0] in ("nha_jax", "pallas_kernels", "train"):
                assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), command
        for config in re.findall(r"configs/[\w./-]+\.yaml", command):
            assert (ROOT / config).is_file(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_the_text_exist(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for path in re.findall(
        r"`((?:nha_jax|pallas_kernels|train|tests|configs|docs)/[\w./-]*)`", text
    ):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
