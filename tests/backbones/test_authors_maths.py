"""The zoo's models against the published maths written down a second time, on the authors' names."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.checkpoints import create_model
from zoo.measure import build

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_state", GOLDEN / "state.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

FILES = {"van_b0": GOLDEN / "van" / "van_b0.json", "ravlt_tiny": GOLDEN / "ravlt" / "RAVLT_T.json"}


@pytest.mark.parametrize("name", FILES)
@torch.inference_mode()
def test_same_logits(name):
    """Of one state dict, in the authors' names, at their size and at an odd one."""
    meta = golden.read_meta(FILES[name])
    state = {key: torch.from_numpy(array) for key, array in golden.make_state(meta).items()}
    theirs = build(f"{HERE / 'authors_maths.py'}:{name}").eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith(("num_batches_tracked", "angle")) for key in missing)
    assert [(key, list(tensor.shape)) for key, tensor in sorted(theirs.state_dict().items())] == sorted(
        (key, shape) for key, shape, _ in meta["state_dict"]
    )
    ours = create_model(name, checkpoint=state).eval()
    tolerance = 5 * meta["checks"]["fp32_vs_fp64_max_abs"]
    for shape in (meta["input"]["shape"], (1, 3, 97, 131)):
        normal = np.random.Generator(np.random.PCG64(0)).standard_normal(shape)
        picture = torch.from_numpy(normal.astype(np.float32))
        np.testing.assert_allclose(ours(picture), theirs(picture), rtol=0, atol=tolerance)
    assert theirs(picture).std() > 0.1
