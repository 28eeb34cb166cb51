"""Pushes into an ``AsyncLLM``, from its event loop and from another thread."""

from __future__ import annotations

import asyncio

import pytest

from tests import tiny
from tests.oracle import Oracle
from tests.weights.helpers import IDS
from vllm_kl.errors import WeightsError
from vllm_kl.weights.push import push_weights, push_weights_async


@pytest.mark.timeout(300)
def test_an_async_engine_finishes_what_it_generates_and_then_serves_the_new_weights(folders, states):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

    params = SamplingParams(max_tokens=64, temperature=0.0, logprobs=0, ignore_eos=True)

    async def generate(engine, name):
        async for output in engine.generate(TokensPrompt(prompt_token_ids=IDS), params, name):
            last = output
        (sample,) = last.outputs
        return (
            list(sample.token_ids),
            [next(iter(e.values())).logprob for e in sample.logprobs],
            [span.version for span in sample.weight_versions],
        )

    async def run():
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(folders[0]), enforce_eager=True, disable_log_stats=True, **tiny.ENGINE_OPTIONS
            )
        )
        try:
            with pytest.raises(WeightsError, match="await push_weights_async"):
                push_weights(engine, states[1])
            before = asyncio.create_task(generate(engine, "before"))
            await asyncio.sleep(0.2)
            with pytest.raises(WeightsError, match="would block the event loop"):
                push_weights(engine, states[1])
            pushed = asyncio.create_task(push_weights_async(engine, states[1]))
            assert await pushed == 1
            assert before.done()
            between = await generate(engine, "after")
            # From another thread, as a trainer would.
            assert await asyncio.to_thread(push_weights, engine, states[2]) == 2
            last = await generate(engine, "last")
            rpc = engine.collective_rpc

            async def cancel(*args):
                push.cancel()
                return await rpc(*args)

            engine.collective_rpc = cancel
            push = asyncio.create_task(push_weights_async(engine, states[1]))
            with pytest.raises(asyncio.CancelledError):
                await push
            engine.collective_rpc = rpc
            cancelled = await generate(engine, "cancelled")
            both = [push_weights_async(engine, states[which]) for which in (0, 1)]
            assert sorted(await asyncio.gather(*both)) == [4, 5]
            return [before.result(), between, last, cancelled]
        finally:
            engine.shutdown()

    for (which, version), (response, log_probs, versions) in zip(
        [(0, "default"), (1, "1"), (2, "2"), (1, "3")], asyncio.run(run()), strict=True
    ):
        truth = Oracle(folders[which]).log_probs(IDS + response)[len(IDS) :]
        assert log_probs == pytest.approx(truth, abs=2e-5)
        assert versions == [version]
