"""What the README shows works as shown, and the links of all documents lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_python_examples_run(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "layer" in capsys.readouterr().out


def test_links_lead_somewhere():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md", *ROOT.glob("docs/*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            there = (document.parent / target.partition("#")[0]).exists()
            assert target.startswith("https://") or there, f"{document}: {target}"
