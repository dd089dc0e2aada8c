"""What gets installed: the wheel holds the library and works alone, in an empty folder."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sparsevlm, torch
from PIL import Image
assert __PLACE__ in sparsevlm.__file__
model, processor = sparsevlm.load("mini")
inputs = processor(text="what digit is red ?", images=Image.new("RGB", (168, 168)))
with sparsevlm.build("sparsevlm", budget=64)(model) as trace:
    model(**inputs)
print(trace.prefills[0].stages[0].tokens_in)
"""


@pytest.mark.slow
def test_the_wheel_is_the_library_alone_and_works_in_an_empty_folder(tmp_path):
    source = tmp_path / "source"  # a build folder that an earlier build left in the repository would go into the wheel
    shutil.copytree(ROOT / "sparsevlm", source / "sparsevlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(tmp_path / "installed")
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sparsevlm"}
    assert not [name for name in names if name.startswith("sparsevlm/mini/training")]
    assert not [name for name in names if name.endswith("entry_points.txt")]
    program = PROGRAM.replace("__PLACE__", repr(str(tmp_path)))
    empty = tmp_path / "empty"
    empty.mkdir()
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=empty,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[576]"
