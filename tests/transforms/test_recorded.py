"""Log-probs that a policy recorded: their distribution, their temperature, and zeros in them."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.envs import Transform
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.modules.llm.policies import Tokens
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests import batches
from tests.collectors import NUM_ENVS, check_kl, collect
from tests.oracle import KL_TOLERANCE
from tests.transforms.helpers import recorded
from vllm_kl import (
    FromCollector,
    KLComputation,
    RetrieveKL,
    RetrieveLogProb,
    VLLMReference,
    VLLMScorer,
    fill_deferred,
)
from vllm_kl.batch.read_tokens import keys_of, read_batch
from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.errors import (
    CollectorError,
    DriftError,
    EngineError,
    MissingLogProbError,
    OptionError,
    ReadoutUnavailableError,
)
from vllm_kl.transforms.recorded_distribution import NEUTRAL, recorded_by
from vllm_kl.transforms.recorded_zeros import doubtful_zeros

# vLLM 0.32's use of xgrammar.
pytestmark = pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")

SOME = list(range(30, 60))


def choice():
    """vLLM writes into it: a new one for each policy."""
    return StructuredOutputsParams(choice=["yes please", "no thank you"])


def log_probs_at(oracle, ids, temperature):
    """Return ``[L - 1]`` float64: log-probs of tokens 1, 2, ... under softmax(logits / temperature)."""
    rows = (oracle.logits(ids)[:-1] / temperature).log_softmax(-1)
    return rows.gather(1, torch.as_tensor(ids)[1:, None])[:, 0]


@pytest.fixture
def make_policy(tokenizer):
    """Make a policy that samples with vLLM's own parameters, those that TorchRL 0.14 leaves out included."""

    def make(llm, **params):
        own = {k: params.pop(k) for k in ("temperature", "top_p", "repetition_penalty") if k in params}
        generate_kwargs = {"max_new_tokens": 10, "temperature": 1.0, "ignore_eos": True, **own}
        policy = vLLMWrapper(llm, tokenizer=tokenizer, input_mode="history", generate_kwargs=generate_kwargs)
        for name, value in params.items():
            setattr(policy.sampling_params, name, value() if callable(value) else value)
        return policy

    return make


@pytest.fixture
def engines(policy_llm, processed_llm):
    return {"raw": policy_llm, "processed": processed_llm}


@pytest.fixture
def run(make_env, engines, make_policy):
    """Collect with a policy on one of the engines; return the batches, our warnings, and the transform."""

    def run(mode, params, reference, *, before=(), turns=2 * NUM_ENVS, wrap=lambda policy: policy, **options):
        transform = RetrieveKL("from_collector", reference, **options)
        env = make_env()
        for other in (*before, transform):
            env = env.append_transform(other)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = collect(env, lambda: wrap(make_policy(engines[mode], **params)), turns=turns)
        return data, [str(w.message) for w in caught if issubclass(w.category, MismatchWarning)], transform

    return run


@pytest.fixture
def equal(engines, tokenizer):
    """Make a reference with the policy's weights, on the other engine: it scores at temperature 1."""

    def make(mode):
        other = engines["processed" if mode == "raw" else "raw"]
        return VLLMReference(VLLMScorer(other), tokenizer)

    return make


def largest(data):
    return max(
        float(row.abs().max()) for batch in data for row in batch.get(("next", "kl_penalty"), as_list=True)
    )


class TestWhatIsRecorded:
    """vLLM's own behaviour. If one fails, read vLLM's samplers and the table in recorded_distribution.py."""

    @pytest.mark.parametrize(
        ("mode", "params", "temperature"),
        [
            ("raw", {}, 1.0),
            ("raw", {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.5}, 1.0),
            ("raw", {"logit_bias": {40: 5.0}, "min_tokens": 4}, 1.0),
            ("raw", {"structured_outputs": choice}, None),
            ("processed", {"top_k": -1, "seed": 3}, 1.0),
            ("processed", {"temperature": 0.0}, 1.0),
            ("processed", {"temperature": 0.5}, 0.5),
            ("processed", {"temperature": 1.7}, 1.7),
            ("processed", {"top_p": 0.5}, None),
            ("processed", {"top_k": 20}, None),
            ("processed", {"min_p": 0.3}, None),
            ("processed", {"repetition_penalty": 1.5}, None),
            ("processed", {"presence_penalty": 1.5}, None),
            ("processed", {"frequency_penalty": -1.5}, None),
            ("processed", {"logit_bias": {40: 5.0}}, None),
            ("processed", {"allowed_token_ids": SOME}, None),
            ("processed", {"bad_words": ["a", "b"]}, None),
            ("processed", {"logit_bias": dict, "extra_args": dict, "bad_words": list}, 1.0),  # empty
            ("processed", {"min_tokens": 8, "_all_stop_token_ids": set(SOME)}, None),
            ("processed", {"temperature": 0.0, "logit_bias": {40: 5.0}}, None),
            ("processed", {"structured_outputs": choice}, None),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
    )
    def test_it_is_told_from_the_engine_and_the_sampling_parameters(
        self, engines, make_policy, policy_oracle, mode, params, temperature
    ):
        policy = make_policy(engines[mode], **params)
        assert recorded_by(policy).temperature == temperature
        prompt = [72, 101, 108, 108, 111, 32]
        prompts = [{"prompt_token_ids": prompt}] * 2
        far = 0.0
        for output in engines[mode].generate(prompts, policy.sampling_params, use_tqdm=False):
            ids = list(output.outputs[0].token_ids)
            got = [entry[t].logprob for entry, t in zip(output.outputs[0].logprobs, ids, strict=True)]
            want = log_probs_at(policy_oracle, prompt + ids, temperature or 1.0)[len(prompt) - 1 :]
            far = max(far, float((torch.tensor(got).double() - want).abs().max()))
        assert far < 1e-5 if temperature else far > 1e-3

    def test_every_sampling_parameter_of_this_vllm_is_known(self):
        """A new parameter counts as one that changes logits. Read it, then add it here or to NEUTRAL."""
        changes = {
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "min_tokens",
            "bad_words",
            "logit_bias",
            "allowed_token_ids",
        }
        changes |= {f"{name}_penalty" for name in ("presence", "frequency", "repetition")}
        changes |= {"structured_outputs", "thinking_token_budget", "watermarking", "extra_args"}
        fields = {name for name in SamplingParams.__struct_fields__ if name[0] != "_"}
        assert fields == changes | (NEUTRAL - {"max_new_tokens"})

    def test_defaults_of_the_checkpoint_are_not_used(self, engines, make_policy, monkeypatch):
        """vLLM takes a generation_config's top_p for requests without parameters; TorchRL's have some."""
        asked = []
        generate = engines["processed"].generate
        monkeypatch.setattr(
            engines["processed"], "generate", lambda *a, **k: asked.append(k) or generate(*a, **k)
        )
        policy = make_policy(engines["processed"], top_p=0.9).get_new_version(
            input_mode="tokens", generate=True
        )
        policy(TensorDict(tokens=Tokens(prompt=torch.tensor([[72, 105]]), batch_size=1), batch_size=1))
        assert asked[0]["sampling_params"] == policy.sampling_params

    def test_an_engines_own_logits_processors_count(self, engines, make_policy, monkeypatch):
        policy = make_policy(engines["processed"])
        monkeypatch.setattr(engines["processed"].llm_engine.model_config, "logits_processors", ["mine:Halve"])
        found = recorded_by(policy)
        assert found.temperature is None
        assert "mine:Halve" in found.why

    @pytest.mark.parametrize(
        ("engine", "params", "temperature"),
        [
            (
                SimpleNamespace(engine_args=SimpleNamespace(logprobs_mode="processed_logprobs")),
                {"temperature": 0.5},
                0.5,
            ),
            (
                SimpleNamespace(engine_args=SimpleNamespace(logprobs_mode="processed_logprobs")),
                {"top_p": 0.5},
                None,
            ),
            (SimpleNamespace(engine_args=SimpleNamespace(logprobs_mode="raw_logits")), {}, None),
            (SimpleNamespace(), {"temperature": 1.0, "max_new_tokens": 5, "top_k": -1}, 1.0),
            (SimpleNamespace(), {"temperature": 0.5}, None),
            (SimpleNamespace(), {"top_p": 0.5}, None),
            (None, {"temperature": 0.5}, None),
        ],
    )
    def test_an_engine_elsewhere_tells_what_it_can(self, engine, params, temperature):
        """A fake: AsyncVLLM needs Ray with a GPU, SGLang a server."""
        assert recorded_by(SimpleNamespace(model=engine, generate_kwargs=params)).temperature == temperature

    def test_an_engine_that_computes_the_last_row_only_is_refused_before_it_ends(self, engines, monkeypatch):
        monkeypatch.setattr(
            engines["raw"].llm_engine.vllm_config.cache_config, "kv_sharing_fast_prefill", True
        )
        with pytest.raises(
            ReadoutUnavailableError, match="kv_sharing_fast_prefill=True: .*Make the engine without"
        ):
            GenerateEngine(engines["raw"], generate=lambda: None)

    def test_what_a_live_engine_refuses_is_an_error_of_ours(self, engines, monkeypatch):
        scorer = VLLMScorer(engines["raw"])
        monkeypatch.setattr(engines["raw"].llm_engine.model_config, "return_sampling_mask", True)
        with pytest.raises(EngineError, match="vLLM refused: .*requires temperature > 0"):
            scorer.score([[5, 6, 7]])

    def test_a_live_engine_of_random_numbers_says_so(self, engines, monkeypatch):
        monkeypatch.setattr(engines["raw"].llm_engine.vllm_config.load_config, "load_format", "dummy")
        assert any(
            "the weights are random numbers" in note for note in GenerateEngine(engines["raw"]).info.notes
        )


NOT_COMPARABLE = [
    (
        "processed",
        {"temperature": 0.5},
        r"softmax\(logits / 0.5\), the reference's of softmax\(logits / 1\).*temperature=0.5",
    ),
    (
        "processed",
        {"top_p": 0.5},
        "not those of softmax.*top_p changed the logits.*top_p=0.5.*processed_logprobs",
    ),
    ("processed", {"repetition_penalty": 1.5}, "repetition_penalty=1.5"),
    ("processed", {"logit_bias": {40: 5.0}}, "logit_bias"),
    ("raw", {"structured_outputs": choice}, "structured_outputs masked the logits .*in any logprobs_mode"),
]
NAMES = [f"{mode}-{'-'.join(params)}" for mode, params, _ in NOT_COMPARABLE]


class TestInACollector:
    @pytest.mark.parametrize(("mode", "params", "message"), NOT_COMPARABLE, ids=NAMES)
    def test_equal_weights_give_zero_and_the_cause_is_said_once(self, run, equal, mode, params, message):
        data, said, _ = run(mode, params, equal(mode))
        assert len(data) == 2
        assert largest(data) < KL_TOLERANCE
        assert len(said) == 1
        assert "scored again" in said[0]
        with pytest.raises(UserWarning, match=message):
            raise UserWarning(said[0])

    @pytest.mark.parametrize(("mode", "params", "message"), NOT_COMPARABLE, ids=NAMES)
    def test_reuse_refuses_and_names_the_cure(self, run, equal, mode, params, message):
        with pytest.raises(
            CollectorError, match=f"(?s)'reuse', but .*{message}.*VLLMReference.*temperature=T.*rescore"
        ):
            run(mode, params, equal(mode), gen_log_probs="reuse")

    @pytest.mark.parametrize(("mode", "params", "message"), NOT_COMPARABLE, ids=NAMES)
    def test_an_audit_finds_it(self, run, equal, mode, params, message):
        with pytest.raises(DriftError, match=message):
            run(mode, params, equal(mode), audit=1.0)

    def test_an_audit_that_warns_lets_the_numbers_be_scored_again(self, run, equal):
        data, said, _ = run(
            "processed", {"top_p": 0.5}, equal("processed"), audit=1.0, on_drift="warn", turns=NUM_ENVS
        )
        assert largest(data) < KL_TOLERANCE
        assert any("audit=0" in text for text in said)

    @pytest.mark.parametrize(
        ("mode", "params"),
        [("processed", {}), ("processed", {"temperature": 0.0}), ("raw", {"temperature": 0.5})],
    )
    def test_what_is_comparable_is_reused_in_silence(self, run, equal, monkeypatch, mode, params):
        monkeypatch.setattr(FromCollector, "_score", lambda *_: pytest.fail("asked the policy's engine"))
        data, said, _ = run(mode, params, equal(mode), turns=NUM_ENVS)
        assert largest(data) < KL_TOLERANCE
        assert not said

    @pytest.mark.parametrize("gen_log_probs", ["auto", "reuse"])
    def test_one_temperature_on_both_sides_agrees_with_float64(
        self, run, half, policy_oracle, ref_oracle, gen_log_probs
    ):
        (data,), said, _ = run(
            "processed", {"temperature": 0.5}, half, gen_log_probs=gen_log_probs, turns=NUM_ENVS
        )
        assert not said
        for row in data.unbind(0):
            ids, kept = row["tokens", "full"].tolist(), row["next", "kl_mask"]
            want = log_probs_at(policy_oracle, ids, 0.5) - log_probs_at(ref_oracle, ids, 0.5)
            kl = row["next", "kl_penalty"]
            torch.testing.assert_close(kl[kept].double(), want[kept[1:]], rtol=0, atol=5e-5)

    @pytest.mark.parametrize(
        ("mode", "params", "options"),
        [
            ("raw", {"temperature": 0.5}, {}),  # recorded at 1
            ("processed", {}, {}),
            ("processed", {"temperature": 0.7}, {}),
            ("processed", {"temperature": 0.5}, {"gen_log_probs": "rescore"}),  # the engine scores at 1
            ("processed", {"temperature": 0.5}, {"assistant_only": False}),  # prompts are at 1, or not there
            ("processed", {"temperature": 0.5}, {"audit": 1.0}),  # so is what an audit compares with
        ],
    )
    def test_a_reference_at_a_temperature_that_nobody_can_match_is_refused(
        self, run, half, mode, params, options
    ):
        message = (
            r"at temperature 1 only.*(reference's log-probs|recorded ones) are .*softmax\(logits / 0.5\)"
        )
        with pytest.raises(OptionError, match=message):
            run(mode, params, half, **options)

    @pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
    def test_logits_are_no_log_probs(self, run, engines, make_reference, monkeypatch, mode):
        monkeypatch.setattr(engines["raw"].llm_engine.model_config, "logprobs_mode", mode)
        with pytest.raises(CollectorError, match=f"they are logits, not log-probs: .*logprobs_mode='{mode}'"):
            run("raw", {}, make_reference(), gen_log_probs="reuse")
        with pytest.raises(ReadoutUnavailableError, match="returns logits instead of log-probs"):
            run("raw", {}, make_reference())

    def test_a_policy_inside_another_module_is_asked_as_well(self, run, equal):
        data, said, _ = run(
            "processed", {"top_p": 0.5}, equal("processed"), wrap=TensorDictSequential, turns=NUM_ENVS
        )
        assert largest(data) < KL_TOLERANCE
        assert "top_p=0.5" in said[0]


def test_a_postproc_asks_the_policy_that_it_was_given(make_env, make_policy, engines, equal):
    """Without it nothing is known there: the same batch would have a KL of more than a nat."""
    policy = make_policy(engines["processed"], temperature=0.5)
    transform = RetrieveKL(FromCollector(policy=policy), equal("processed"))
    with pytest.warns(
        MismatchWarning,
        match=r"softmax\(logits / 0.5\), the reference's of softmax\(logits / 1\).*scored again",
    ):
        data = collect(make_env(), lambda: policy, turns=NUM_ENVS, postproc=transform)
    assert largest(data) < KL_TOLERANCE


class PerCall(torch.nn.Module):
    """Gives each call of its wrapper another temperature, which TorchRL 0.14 takes as a keyword."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.in_keys, self.out_keys = policy, policy.in_keys, policy.out_keys

    def forward(self, td):
        return self.policy(td, **CALL)


CALL = {"temperature": 0.5, "max_tokens": 8, "logprobs": 0, "ignore_eos": True}


def with_forward(forward):
    """Return a function that gives a policy a class with this ``forward``."""

    def wrap(policy):
        policy.__class__ = type("Mine", (vLLMWrapper,), {"forward": forward})
        return policy

    return wrap


def anneal(self, td, **kwargs):
    out = vLLMWrapper.forward(self, td, **kwargs)
    self.sampling_params.temperature = 1.0
    return out


class TestWhatWasUsed:
    @pytest.mark.parametrize(
        ("params", "wrap"),
        [
            ({}, PerCall),
            ({}, with_forward(lambda self, td, **_: vLLMWrapper.forward(self, td, **CALL))),
            ({"temperature": 0.5}, with_forward(anneal)),
        ],
        ids=["a module around it", "a subclass", "it anneals after its call"],
    )
    def test_not_what_the_policy_has_is_judged(self, run, equal, params, wrap):
        """At the first step too, where the policy has generated before the transform sees it."""
        data, said, _ = run("processed", params, equal("processed"), wrap=wrap, turns=NUM_ENVS)
        assert largest(data) < KL_TOLERANCE
        assert len(said) == 1
        assert "softmax(logits / 0.5)" in said[0]

    @pytest.mark.parametrize(
        ("mode", "wrap", "num_said"),
        [("processed", PerCall, 1), ("processed", lambda policy: policy, 0), ("raw", PerCall, 0)],
    )
    def test_log_probs_of_a_reference_beside_recorded_ones_of_another_temperature_are_warned_of_once(
        self,
        make_env,
        make_policy,
        engines,
        equal,
        mode,
        wrap,
        num_said,
    ):
        """Whoever subtracts the two would have a KL of a nat a token for equal weights."""
        env = make_env().append_transform(RetrieveLogProb(equal(mode)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            collect(env, lambda: wrap(make_policy(engines[mode])), turns=2 * NUM_ENVS)
        said = [str(w.message) for w in caught if issubclass(w.category, MismatchWarning)]
        assert len(said) == num_said
        assert all(
            "softmax(logits / 0.5)" in text and "VLLMReference(path, temperature=T)" in text for text in said
        )

    def test_recorded_log_probs_that_another_transform_replaces_are_not_warned_of(
        self,
        make_env,
        make_policy,
        engines,
        equal,
        tokenizer,
    ):
        policy = make_policy(engines["processed"], temperature=0.5)
        env = make_env().append_transform(
            RetrieveLogProb(policy.get_new_version(generate=False, return_log_probs=True))
        )
        env = env.append_transform(RetrieveLogProb(equal("processed"))).append_transform(KLComputation())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = collect(env, lambda: policy, turns=NUM_ENVS)
        assert not [w for w in caught if issubclass(w.category, MismatchWarning)]
        assert largest(data) < KL_TOLERANCE

    def test_a_policy_that_generates_by_a_call_of_its_own_is_warned_of_once(self, run, equal):
        """Nobody sees its temperature of 0.5: the wrapper's own call is not made."""

        def forward(self, td, **_):
            self._call_generate = functools.partial(vLLMWrapper._call_generate, self)
            try:
                return vLLMWrapper.forward(self, td, **CALL)
            finally:
                del self._call_generate

        _, said, _ = run("processed", {}, equal("processed"), wrap=with_forward(forward))
        assert len(said) == 1
        assert "the sampling parameters of the recorded log-probs are not known" in said[0]
        assert "logprobs_mode='processed_logprobs'" in said[0]

    def test_a_schedule_of_temperatures_is_warned_of_once(self, make_env, make_policy, engines, equal):
        policy = make_policy(engines["processed"])
        (data,) = collect(make_env(), lambda: policy, turns=NUM_ENVS)
        transform = RetrieveKL(FromCollector(policy=policy), equal("processed"), add_to_reward=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for temperature in (0.5, 0.51, 0.52):
                policy.sampling_params.temperature = temperature
                transform(data.clone())
        assert sum("scored again" in str(w.message) for w in caught) == 1

    @pytest.mark.parametrize("is_seen", [False, True])
    def test_stored_log_probs_of_other_parameters_are_warned_of_once(
        self,
        make_env,
        make_policy,
        engines,
        equal,
        is_seen,
    ):
        policy = make_policy(engines["processed"])
        side = FromCollector(policy=policy) if is_seen else None
        (data,) = collect(make_env(), lambda: policy, turns=NUM_ENVS)
        side = side or FromCollector(policy=policy)
        transform = RetrieveKL(side, equal("processed"), add_to_reward=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                transform(data.clone())
        said = [w for w in caught if "the sampling parameters of the recorded log-probs" in str(w.message)]
        assert len(said) == (0 if is_seen else 1)


class EndToken(Transform):
    """Writes 0.0 as the log-prob of the last token of each sample, as stacks do that add tokens."""

    def _step(self, tensordict, next_tensordict):
        for sample in tensordict.unbind(0):
            sample["log_probs", "full"][-1] = 0.0
        return next_tensordict


class TestZerosInACollector:
    @pytest.mark.parametrize("deferred", [False, True])
    def test_auto_takes_the_engines_log_probs_of_such_samples(
        self, run, make_reference, policy_oracle, ref_oracle, deferred
    ):
        data, said, _ = run("raw", {}, make_reference(), before=[EndToken()], deferred=deferred)
        for batch in data:
            check_kl(batch, policy_oracle, ref_oracle)
        assert len(said) == 1
        assert "is exactly 0.0, a probability of 1, but the policy's engine gives it -" in said[0]

    @pytest.mark.parametrize("deferred", [False, True])
    def test_reuse_refuses_them_by_name(self, run, make_reference, deferred):
        message = (
            r"(?s)sample 0, token \d+ is exactly 0.0.*engine gives it -.* such tokens in 4 samples.*'auto'"
        )
        with pytest.raises(MissingLogProbError, match=message):
            run("raw", {}, make_reference(), before=[EndToken()], gen_log_probs="reuse", deferred=deferred)

    def test_where_nobody_can_be_asked_they_are_refused_when_a_step_is_filled_in(
        self, make_policy, engines, make_reference, request
    ):
        transform = RetrieveKL("from_collector", make_reference(), deferred="buffer")
        env = request.getfixturevalue("make_env")().append_transform(EndToken()).append_transform(transform)
        data = env.rollout(1, make_policy(engines["raw"]), return_contiguous=False)
        with pytest.raises(
            MissingLogProbError, match=r"(?s)env step 0, .* exactly 0.0.*the reference gives it -.*on_zero"
        ):
            fill_deferred(data)

    @pytest.mark.parametrize("gen_log_probs", ["auto", "reuse"])
    def test_a_policy_that_is_sure_is_believed_though_the_reference_is_not(
        self, run, engines, make_reference, ref_oracle, gen_log_probs
    ):
        """Its logits are a thousand times as large: each token that it samples has probability 1."""
        worker = engines["raw"].llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        norm = worker.get_model().model.norm.weight.data
        before = norm.clone()
        try:
            norm.mul_(1000.0)
            (data,), said, _ = run("raw", {}, make_reference(), gen_log_probs=gen_log_probs, turns=NUM_ENVS)
        finally:
            norm.copy_(before)
        assert not said
        for row in data.unbind(0):
            ids, kept = row["tokens", "full"].tolist(), row["next", "kl_mask"]
            want = -log_probs_at(ref_oracle, ids, 1.0)[kept[1:]]
            assert (row["log_probs", "full"][kept] == 0).sum() > 5
            assert want.max() > 1
            torch.testing.assert_close(
                row["next", "kl_penalty"][kept].double(), want, rtol=0, atol=KL_TOLERANCE
            )


class TestZerosInABatch:
    VALUES = (0.0, 0.0, -2.0, 0.0, -1.5)

    def test_a_policy_that_cannot_be_asked_how_it_samples_is_said_once(self, make_reference):
        td, side = recorded(self.VALUES), FromCollector("reuse")
        batch = read_batch(td, keys_of(make_reference()), assistant_only=True)
        # torchrl 0.14's own collector wants specs of a function's output.
        collector = SimpleNamespace(policy=lambda td: td)
        with pytest.warns(
            MismatchWarning, match="nothing is known of how the collector's policy, a function, samples"
        ):
            side.log_probs(batch, td, collector, 1.0)
        assert side.log_probs(batch, td, collector, 1.0).is_recorded

    @pytest.mark.parametrize("mode", ["auto", "reuse"])
    def test_one_that_the_reference_is_not_sure_of_is_refused_by_name(self, make_reference, mode):
        td = recorded(self.VALUES)
        message = (
            r"(?s)sample 0, token 3 is exactly 0.0.*the reference gives it -.*gen_model=.*on_zero='allow'"
        )
        with pytest.raises(MissingLogProbError, match=message):
            RetrieveKL("from_collector", make_reference(), gen_log_probs=mode)(td)
        assert "kl_penalty" not in td.keys()

    def test_it_can_be_allowed_or_only_said(self, make_reference):
        kl = RetrieveKL("from_collector", make_reference(), on_zero="allow")(recorded(self.VALUES))
        td = recorded(self.VALUES)
        with pytest.warns(MismatchWarning, match="token 3 is exactly 0.0"):
            RetrieveKL(FromCollector(on_zero="warn"), make_reference())(td)
        assert torch.equal(kl["kl_penalty"], td["kl_penalty"])
        with pytest.raises(
            OptionError, match="on_zero='never' does not exist; choose one of raise, warn, allow"
        ):
            FromCollector(on_zero="never")
        with pytest.raises(OptionError, match="on_zero has no effect with a gen_model"):
            RetrieveKL(make_reference(), make_reference(), on_zero="warn")

    def test_models_that_are_sure_of_a_text_are_believed(self, policy_model, tokenizer):
        """Both sides are one model whose every answer has a probability of 1 in float32."""
        sure = type(policy_model)(policy_model.config).eval()
        sure.load_state_dict(policy_model.state_dict())
        with torch.no_grad():
            sure.lm_head.weight.mul_(1000.0)
            ids = sure.generate(
                torch.tensor([[72, 105, 32]]), do_sample=False, max_new_tokens=6, eos_token_id=None
            )[0]
            rows = sure(ids[None]).logits[0].log_softmax(-1)
        values = torch.cat([torch.zeros(1), rows[:-1].gather(1, ids[1:, None])[:, 0]])
        assert (values[3:] == 0).all()
        td = batches.ids_batch([ids], [3], extra={("log_probs", "full"): [values]})
        ref = TransformersWrapper(sure, tokenizer=tokenizer, generate=False, log_probs_key="ref_log_probs")
        assert RetrieveKL("from_collector", ref, gen_log_probs="reuse")(td)["kl_penalty"].abs().max() == 0

    def test_a_value_above_zero_is_no_log_prob(self, make_reference):
        with pytest.raises(
            CollectorError, match=r"sample 0, token 4 of 5 is 3.5, which is no log-prob.*raw_logits"
        ):
            RetrieveKL("from_collector", make_reference(), gen_log_probs="reuse")(
                recorded([0.0, 0.0, -2.0, -1.0, 3.5])
            )

    def test_minus_infinity_names_processed_log_probs(self, make_reference):
        with pytest.raises(
            CollectorError, match=r"its value is -inf .*logprobs_mode='processed_logprobs' with top_k"
        ):
            RetrieveKL("from_collector", make_reference(), gen_log_probs="reuse")(
                recorded([0.0, 0.0, -2.0, -1.0, -torch.inf])
            )

    def test_a_long_answer_of_a_sure_policy_is_believed_and_an_end_token_in_it_is_not(self):
        keep, zeros, sure = torch.ones(400, dtype=torch.bool), torch.zeros(400), torch.full((400,), -0.0005)
        assert doubtful_zeros(zeros, sure, keep, [400]) == {}
        sure[-1] = -9.0  # on average -0.02
        assert doubtful_zeros(zeros, sure, keep, [300, 100])[1].tolist() == [99]

    def test_where_no_engine_can_be_asked_at_a_temperature_the_cure_is_another(self, half):
        with pytest.raises(
            MissingLogProbError, match="(?s)cannot be asked about .* / 0.5.*raw_logprobs.*on_zero"
        ) as found:
            RetrieveKL("from_collector", half)(recorded([0.0, 0.0, -2.0, 0.0, -1.5]))
        assert "Append the transform" not in str(found.value)

    def test_rounding_above_zero_is_a_probability_of_1(self, ref_oracle, make_reference):
        """bfloat16 has 0.0625 and the like."""
        kl = RetrieveKL("from_collector", make_reference(), on_zero="allow")(
            recorded([0.0, 0.0, -2.0, 0.0625, -1.0])
        )
        want = -log_probs_at(ref_oracle, range(5, 10), 1.0)[2]
        assert float(kl["kl_penalty"][0, 3]) == pytest.approx(float(want), abs=KL_TOLERANCE)

    def test_zeros_are_believed_token_by_token(self):
        keep = torch.tensor([False, True, True, True, True, True])
        zeros = torch.tensor([0.0, 0.0, 0.0, -1.0, 0.0, 0.0])
        sure = torch.tensor([0.0, -0.04, -0.08, -9.0, -0.12, -0.08])
        assert {i: at.tolist() for i, at in doubtful_zeros(zeros, sure, keep, [3, 3]).items()} == {1: [1]}
        assert doubtful_zeros(zeros, torch.zeros(6), keep, [6]) == {}
        assert doubtful_zeros(zeros, None, keep, [6])[0].tolist() == [1, 2, 4, 5]
        assert doubtful_zeros(zeros, sure, torch.zeros(6, dtype=torch.bool), [6]) == {}
