"""What importing and using the library needs, each proven in a fresh interpreter."""

import hashlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import sparsevlm

OPTIONAL = "hydra omegaconf lmms_eval fvcore pandas sklearn matplotlib datasets torchvision accelerate scipy".split()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_torch_transformers_numpy_and_pillow_are_needed():
    """Without anything else it imports, loads, prunes and generates - from the same pixels as with everything."""
    out = run(f"""
import hashlib, sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # importing it raises, looking for it finds nothing
import sparsevlm
assert not any(name.startswith(("eval", "scripts")) for name in sys.modules)
from PIL import Image
model, processor = sparsevlm.load("mini")
inputs = processor(text="what digit is red ?", images=Image.radial_gradient("L").resize((300, 200)))
with sparsevlm.build("sparsevlm", budget=192)(model) as trace:
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(len(trace.prefills), hashlib.sha256(inputs["pixel_values"].numpy().tobytes()).hexdigest())
""")
    _, processor = sparsevlm.load("mini")
    pixels = processor(text="what", images=Image.radial_gradient("L").resize((300, 200)))["pixel_values"]
    assert out.split() == ["1", hashlib.sha256(pixels.numpy().tobytes()).hexdigest()]


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
