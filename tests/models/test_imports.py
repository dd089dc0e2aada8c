"""What importing and using the library needs, each proven in a fresh interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

OPTIONAL = "hydra omegaconf lmms_eval fvcore pandas sklearn matplotlib datasets torchvision accelerate scipy".split()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_torch_transformers_numpy_and_pillow_are_needed():
    out = run(f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # importing it raises, looking for it finds nothing
import sparsevlm
assert not any(name.startswith(("eval", "scripts")) for name in sys.modules)
from PIL import Image
model, processor = sparsevlm.load("mini")
inputs = processor(text="what digit is red ?", images=Image.new("RGB", (200, 100)))
with sparsevlm.build("sparsevlm", budget=192)(model) as trace:
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(len(trace.prefills))
""")
    assert out.strip() == "1"


@pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None or not importlib.util.find_spec("torchvision"),
    reason="needs a torchvision beside a CPU-only torch",
)
def test_torchvision_imports_beside_a_cpu_torch():
    run("""
import sparsevlm
from torchvision import transforms
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration
import evaluate
""")
