"""transformers works from the repository root, where a folder named `kernels` lies.

Hugging Face publishes a package of that name, and transformers looks for it; a folder on sys.path
must not be taken for it.
"""

import subprocess
import sys
from pathlib import Path

from tests.checkpoint.samples import save_hf

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
from pathlib import Path
assert Path(sys.path[0] or ".").resolve() == Path.cwd(), sys.path
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(tuple(model(torch.arange(8)[None]).logits.shape))
"""


def test_a_model_loads_from_the_root(tmp_path):
    save_hf(tmp_path / "hf")
    assert (ROOT / "kernels").is_dir()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "hf")]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == "(1, 8, 53)"
