"""Tools of TorchRL answer in a dialog: their words are not the policy's, and have no KL."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torchrl.envs.llm.transforms import (
    ExecuteToolsInOrder,
    MCPToolTransform,
    PythonInterpreter,
    SimpleToolTransform,
    ToolRegistry,
    XMLBlockParser,
)
from torchrl.modules.llm import vLLMWrapper
from vllm.sampling_params import StructuredOutputsParams

from tests.collectors import NUM_ENVS, check_kl, collect
from vllm_kl import RetrieveKL

# vLLM 0.32's use of xgrammar; structured outputs make the policy's engine score again.
pytestmark = [
    pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::vllm_kl.diagnostics.MismatchWarning"),
]
SERVER = Path(__file__).with_name("tool_server.py")


class Add:
    """A tool of ``ExecuteToolsInOrder``."""

    name, schema_in, schema_out = "add", {}, {}

    def __call__(self, a, b, **_):
        return {"sum": a + b}


# How a tool is made, what the policy says to call it, and what the tool says.
TOOLS = {
    "python": (PythonInterpreter, "```python\nprint(6 * 7)\n```", "executed successfully:\n42"),
    "simple": (
        lambda: SimpleToolTransform({"add": lambda a, b: a + b}),
        '<tool>add\n{"a": 40, "b": 2}</tool>',
        "Tool add executed successfully:\n42",
    ),
    "in order": (
        lambda: ExecuteToolsInOrder(ToolRegistry([Add()]), XMLBlockParser()),
        '<tool name="add">{"a": 40, "b": 2}</tool>',
        '"sum": 42',
    ),
    "mcp": (
        lambda: MCPToolTransform({"numbers": {"command": sys.executable, "args": [str(SERVER)]}}),
        '<tool>numbers.add\n{"a": 40, "b": 2}</tool>',
        "Tool numbers.add executed successfully:\n[TextContent(",
    ),
}


@pytest.fixture
def run(make_env, policy_llm, tokenizer, make_reference, policy_oracle, ref_oracle):
    """Run dialogs of two turns whose policy says one of the words; check them, and return what counts.

    Returns the texts of each sample inside the mask, and outside.
    """

    def run(tool, words, *, pad_output=False, kl_is_last=True):
        kl = RetrieveKL("from_collector", make_reference(pad_output=pad_output), coeff=0.1)
        env = make_env(max_steps=2)
        for transform in (tool, kl) if kl_is_last else (kl, tool):
            env = env.append_transform(transform)

        def policy():
            kwargs = {"generate_kwargs": {"max_new_tokens": 60, "temperature": 1.0}, "pad_output": pad_output}
            wrapper = vLLMWrapper(policy_llm, tokenizer=tokenizer, input_mode="history", **kwargs)
            wrapper.sampling_params.structured_outputs = StructuredOutputsParams(choice=words)
            return wrapper

        inside, outside = [], []
        for data in collect(env, policy, turns=2 * NUM_ENVS):
            check_kl(data, policy_oracle, ref_oracle, coeff=0.1)  # 0.0 before the policy's last answer
            keys = [("tokens", "full"), ("masks", "all_attention_mask"), ("next", "kl_mask")]
            for ids, real, mask in zip(*(data.get(key, as_list=True) for key in keys), strict=True):
                inside.append(tokenizer.decode(ids[mask]).removesuffix("<|im_end|>"))
                outside.append(tokenizer.decode(ids[real & ~mask]))
        return inside, outside

    return run


@pytest.mark.parametrize("name", TOOLS)
def test_the_words_of_a_tool_have_no_kl_and_are_not_in_the_mask(run, name):
    make_tool, call, answer = TOOLS[name]
    tool = make_tool()
    inside, outside = run(tool, [call])
    if name == "mcp":
        tool.close()
    assert inside == [call] * (2 * NUM_ENVS)
    assert [text.count(answer) for text in outside] == [0] * NUM_ENVS + [1] * NUM_ENVS  # of the first turn


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
@pytest.mark.parametrize("kl_is_last", [True, False], ids=["after the tool", "before the tool"])
def test_the_order_of_tool_and_kl_does_not_matter(run, kl_is_last, pad_output):
    """Some dialogs call, and others do not: TorchRL fills up their histories with empty messages."""
    make_tool, call, answer = TOOLS["simple"]
    inside, outside = run(make_tool(), [call, "no"], pad_output=pad_output, kl_is_last=kl_is_last)
    assert set(inside) <= {call, "no"}
    assert sum(text.count(answer) for text in outside) == inside[:NUM_ENVS].count(call)
