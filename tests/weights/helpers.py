"""Helpers of the tests that load new weights into live engines."""

from __future__ import annotations

from safetensors.torch import load_file
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from vllm_kl import VLLMScorer

IDS = list(range(5, 80))  # more than two blocks, so that the prefix cache keeps some
NORM = "model.norm.weight"


def scorer_on(engine):
    return engine if isinstance(engine, VLLMScorer) else VLLMScorer(engine)


def model_of(llm):
    """Return vLLM's model in an engine that runs in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def error_of(engine, oracle, *, share_prefix=True):
    """Return the largest distance of the log-probs of ``IDS`` from an oracle's, in nats."""
    scorer = scorer_on(engine)
    scorer.share_prefix = share_prefix
    return float((scorer.score([IDS])[0].double() - oracle).abs().max())


def generated(llm, n=8):
    """Generate n tokens after ``IDS``; return their ids, their log-probs and vLLM's output."""
    params = SamplingParams(max_tokens=n, temperature=0.0, logprobs=0, ignore_eos=True)
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=IDS)], params, use_tqdm=False)
    (sample,) = output.outputs
    return list(sample.token_ids), [next(iter(entry.values())).logprob for entry in sample.logprobs], output


def tensors_in(folder):
    """Return the tensors of a checkpoint's safetensors files by name."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
