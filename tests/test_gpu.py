"""The same promises on an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch

from vllm_kl import VLLMScorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and pip install 'vllm-kl[gpu]'"),
    pytest.mark.timeout(900),
]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_flat_readout_agrees_with_float64(ref_path, ref_oracle, share_prefix):
    prompt = list(range(40))
    sequences = [[*prompt, 7, 8, 9], [*prompt, 7, 8, 10], [*prompt, 3]]
    options = {"dtype": "float32", "max_model_len": 128, "gpu_memory_utilization": 0.2, "enforce_eager": True}
    with VLLMScorer(str(ref_path), share_prefix=share_prefix, **options) as scorer:
        for got, ids in zip(scorer.score(sequences, 40), sequences, strict=True):
            want = torch.tensor(ref_oracle.log_probs(ids)[40:], dtype=torch.float64)
            torch.testing.assert_close(
                got.double(), want, rtol=0, atol=1e-4
            )  # TF32 is off; other kernels than the CPU's
