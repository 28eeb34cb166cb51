"""Tests engine options and models' configs: each is refused before a start, or right against float64."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pydantic
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchrl.modules.llm import TransformersWrapper
from transformers import AutoConfig, AutoModelForCausalLM

from tests.engines.helpers import ALIVE, start_in_child
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import RetrieveKL, VLLMReference, VLLMScorer
from vllm_kl.demo.task import make_tokenizer
from vllm_kl.engines import length_dependence as lengths
from vllm_kl.engines import memory, options
from vllm_kl.engines.base import drive
from vllm_kl.engines.start_engine import _defaults, _options_by_model
from vllm_kl.engines.start_failures import explain, with_log
from vllm_kl.errors import EngineError, OptionError
from vllm_kl.plugin import allowed
from vllm_kl.transforms.transformers_scorer import TransformersScorer
from vllm_kl.types import EngineInfo, ScoreRequest

# Names of the table that vLLM 0.32 does not have: of 0.26, 0.28, 0.30 and 0.33.
ONLY_ELSEWHERE = {
    *(
        "calculate_kv_scales",
        "max_long_partial_prefills",
        "max_num_partial_prefills",
        "override_attention_dtype",
    ),
    *("enable_bf16x3_router_gemm", "enable_mamba_fine_grained_prefix_cache"),
    *("monokernel", "sleep_mode_backend", "watchdog_config"),
}

HAS_ATTENTION = SimpleNamespace(is_hybrid=False, is_attention_free=False)


class TestTheTable:
    def test_knows_every_option_of_this_vllm(self):
        """Fails when vLLM has a new option. Read what it does to a prompt's rows, then add it to a table."""
        from vllm import EngineArgs

        known = {field.name for field in dataclasses.fields(EngineArgs)}
        assert known - options.NAMES == set()
        assert options.NAMES - known <= ONLY_ELSEWHERE

    @pytest.mark.parametrize("is_cpu", [True, False])
    def test_says_which_options_have_our_own_default(self, is_cpu):
        # enable_prefix_caching=False is refused, so it stands in another table.
        defaults = _defaults(HAS_ATTENTION, {}, is_cpu=is_cpu).keys() - {"enable_prefix_caching"}
        assert defaults <= options.OURS

    def test_says_one_thing_of_each(self):
        assert len(options.NAMES) == len(options.OURS) + len(options.PASSED_ON) + len(options.REFUSED)

    @pytest.mark.parametrize("name", sorted(options.REFUSED))
    def test_gives_a_reason_and_what_works(self, name):
        why = options.REFUSED[name].why
        assert len(why) > 20
        assert not why.endswith(".")


@pytest.fixture
def no_engine(monkeypatch):
    """Fails where a process is started."""

    def refuse(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr("vllm_kl.engines.process.subprocess.Popen", refuse)


@pytest.mark.usefixtures("no_engine")
class TestRefusedBeforeAnEngineIsStarted:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"data_parallel_size": 2},
                "(?s)data_parallel_size=2 is refused: .*one VLLMScorer per device.*tensor_parallel_size",
            ),
            ({"data_parallel_size": "2"}, "data_parallel_size='2' is refused"),
            ({"data_parallel_rank": 0}, "data_parallel_rank=0 is refused"),
            ({"nnodes": 2}, "nnodes=2 is refused: .*one machine"),
            (
                {"distributed_executor_backend": "ray"},
                "(?s)distributed_executor_backend='ray' is refused: .*'mp'",
            ),
            (
                {"kv_sharing_fast_prefill": True},
                "kv_sharing_fast_prefill=True is refused: .*only the last row of a prompt",
            ),
            (
                {"kv_transfer_config": {"kv_connector": "x"}},
                "kv_transfer_config=.* is refused: a KV connector",
            ),
            ({"kv_offloading_size": 4.0}, "kv_offloading_size=4.0 is refused: a KV connector"),
            ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2 is refused"),
            (
                {"logprobs_mode": "processed_logits"},
                "logprobs_mode='processed_logits' is refused: .*temperature=",
            ),
            ({"logits_processors": ["a:B"]}, "logits_processors=.* is refused"),
            ({"pooler_config": {"pooling_type": "MEAN"}}, "pooler_config=.* is refused: .*readout="),
            (
                {"speculative_config": {"method": "ngram"}},
                "speculative_config=.* is refused: .*do not speculate",
            ),
            ({"mm_encoder_only": True}, "mm_encoder_only=True is refused"),
            ({"runner": "generate"}, "runner='generate' is refused: .*pass readout="),
            (
                {"enable_prefix_caching": False},
                "enable_prefix_caching=False is refused: .*share_prefix=False",
            ),
            ({"max_modl_len": 64}, "unknown engine option 'max_modl_len'.*Did you mean max_model_len"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_an_option_that_cannot_work(self, ref_path, given, message):
        with pytest.raises(OptionError, match=message):
            VLLMScorer(ref_path, **given)

    def test_data_parallel_ranks_in_the_environment(self, ref_path, monkeypatch):
        monkeypatch.setenv("VLLM_DP_SIZE", "2")
        with pytest.raises(OptionError, match="(?s)VLLM_DP_SIZE=2: .*one VLLMScorer per device"):
            VLLMScorer(ref_path)

    def test_a_path_that_does_not_exist(self, ref_path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for model in (tmp_path / "no", str(tmp_path / "no"), "./no", "../no/where", Path("no")):
            with pytest.raises(OptionError, match="model .*no.* does not exist: there is no such folder"):
                VLLMScorer(model)
        with pytest.raises(OptionError, match=f"does not exist.* has {ref_path.name}"):
            VLLMScorer(ref_path.parent / "refrence")

    def test_a_folder_that_is_no_checkpoint(self, ref_path, tmp_path):
        with pytest.raises(OptionError, match=r"has no config\.json"):
            VLLMScorer(tmp_path)
        (tmp_path / "config.json").write_text((ref_path / "config.json").read_text())
        with pytest.raises(OptionError, match="has a config but no weights"):
            VLLMScorer(tmp_path)
        (tmp_path / "model-1.safetensors").write_bytes(b"")
        (tmp_path / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
        )
        with pytest.raises(OptionError, match=r"lacks 1 of 2 weights files, model-2\.safetensors first"):
            VLLMScorer(tmp_path)

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("config.json", '{"a": ', "is not valid JSON"),
            ("config.json", "[1]", "holds no JSON object: expected {...}, got list"),
            ("config.json", "{}", "names no model_type"),
            ("model.safetensors.index.json", "{", "is not valid JSON"),
            ("model.safetensors.index.json", "{}", "has no weight_map"),
        ],
    )
    def test_a_checkpoint_whose_files_cannot_be_read(self, ref_path, tmp_path, file, text, message):
        shutil.copytree(ref_path, tmp_path, dirs_exist_ok=True)
        (tmp_path / file).write_text(text)
        with pytest.raises(OptionError, match=f"{file}' {message}"):
            VLLMScorer(tmp_path)

    def test_a_function_that_the_engines_process_cannot_have(self, ref_path, monkeypatch):
        with pytest.raises(
            OptionError, match="hf_overrides=<function .* cannot be pickled .*Define it at the top"
        ):
            VLLMScorer(ref_path, hf_overrides=lambda config: config)
        monkeypatch.setattr(truth, "__module__", "__main__")
        with pytest.raises(
            OptionError, match="hf_overrides=<function .* defined in the script itself|cannot be pickled"
        ):
            VLLMScorer(ref_path, hf_overrides=truth)

    def test_an_adapter_in_place_of_a_model(self, lora_paths):
        with pytest.raises(
            OptionError, match="is a LoRA adapter: pass the folder of its base model.*lora_request="
        ):
            VLLMScorer(lora_paths[0])


class TestValues:
    """pydantic decides what a value means. A value that changes nothing is not passed to vLLM."""

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("data_parallel_size", (1, 1.0, "1", True)),
            ("nnodes", (1, 1.0, "1")),
            ("kv_sharing_fast_prefill", (False, 0, "false", "off")),
            ("kv_transfer_config", ({},)),
            ("kv_offloading_size", (0, 0.0)),
            ("logits_processors", ([], ())),
            ("logprobs_mode", ("raw_logprobs",)),
            ("runner", ("auto",)),
        ],
    )
    def test_what_leaves_vllm_as_it_is_is_not_passed_on(self, name, values):
        for value in (None, *values):
            assert options.check_options({name: value, "dtype": "float32"}, {}) == {"dtype": "float32"}

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("enable_prefix_caching", (False, 0, "false")),
            ("kv_sharing_fast_prefill", (True, 1, "yes")),
            ("data_parallel_size", (2, 2.0, "2")),
            ("data_parallel_rank", (0,)),
        ],
    )
    def test_what_is_refused_is_refused_in_every_spelling(self, name, values):
        for value in values:
            with pytest.raises(OptionError, match=f"engine option {name}={value!r} is refused"):
                options.check_options({name: value}, {})

    def test_every_default_of_vllms_is_let_through(self):
        from vllm import EngineArgs

        for field in dataclasses.fields(EngineArgs):
            if field.name != "model" and (default := getattr(EngineArgs, field.name, None)) is not None:
                options.check_options({field.name: default}, {})

    def test_none_is_not_given(self):
        given = {
            "seed": None,
            "tensor_parallel_size": None,
            "enable_prefix_caching": None,
            "max_model_len": "64",
        }
        assert options.check_options(given, {}) == {"max_model_len": 64}

    @pytest.mark.parametrize(
        ("name", "value"),
        [("tensor_parallel_size", "two"), ("max_num_batched_tokens", "4k"), ("max_model_len", 0.5)],
    )
    def test_what_is_counted_here_must_be_a_whole_number(self, name, value):
        with pytest.raises(OptionError, match=f"engine option {name}={value!r} must be a whole number"):
            options.check_options({name: value}, {})

    @pytest.mark.parametrize(
        ("name", "value", "off"),
        [
            ("VLLM_DP_SIZE", "2", "1"),
            ("VLLM_DP_RANK", "1", "0"),
            ("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random", ""),
        ],
    )
    def test_variables_that_vllm_reads_are_options_too(self, name, value, off):
        options.check_options({}, {name: off})
        with pytest.raises(OptionError, match=f"(?s)the environment sets {name}={value}: .*Unset it"):
            options.check_options({}, {name: value})


class TestFailures:
    """What vLLM and pydantic say, as one sentence that names the option."""

    def test_pydantic_names_the_option_and_what_it_may_be(self):
        class Args(pydantic.BaseModel):
            dtype: int | float
            max_num_seqs: int = 1

        with pytest.raises(pydantic.ValidationError) as failed:
            Args(dtype="float33")
        error = explain(failed.value, model="m", options={"dtype": "float33", "max_num_seqs": 1})
        assert isinstance(error, OptionError)
        assert str(error).startswith(
            "engine option dtype='float33' does not work. vLLM failed: dtype: Input should be"
        )
        assert "\n" not in str(error)
        assert "errors.pydantic.dev" not in str(error)

    def test_a_check_of_vllms_names_the_option_in_its_text(self):
        error = explain(
            ValueError("Total number of attention heads (2) must be divisible by tensor parallel size (3)."),
            model="m",
            options={"dtype": "float32", "tensor_parallel_size": 3},
        )
        assert isinstance(error, OptionError)
        assert "engine option tensor_parallel_size=3 does not work" in str(error)

    def test_a_common_word_in_its_text_blames_no_option_but_one_that_it_quotes_does(self):
        given = {"load_format": "auto", "revision": "1", "tokenizer_mode": "slow"}
        error = explain(ValueError("auto tuning on cpu is slow, 1 of 2 failed"), model="m", options=given)
        assert type(error) is EngineError
        error = explain(ValueError("tokens: unknown mode 'slow'"), model="m", options=given)
        assert "engine option tokenizer_mode='slow' does not work" in str(error)

    def test_a_function_that_raises_is_named(self):
        def overrides(config):
            return config.rope_parameters

        with pytest.raises(AttributeError) as raised:
            overrides(SimpleNamespace())
        error = explain(raised.value, model="m", options={"dtype": "float32", "hf_overrides": overrides})
        assert str(error).startswith("engine option hf_overrides=<function")

    def test_a_bare_assertion_says_what_was_asserted(self):
        def load_weights(rows):
            assert rows == 301

        with pytest.raises(AssertionError) as raised:
            load_weights(200)
        raised.value.args = ()  # pytest's own text
        told = str(explain(raised.value, model="m", options={}))
        assert "AssertionError: assert rows == 301 (test_options.py, load_weights)" in told
        assert "its weights do not match its config" in told

    @pytest.mark.parametrize(
        ("raised", "message"),
        [
            (
                OSError("We couldn't connect to 'https://hub'"),
                "it is no folder here, it is not in the hub's cache",
            ),
            (
                ValueError("Model architectures ['X'] are not supported for now"),
                "cannot load the architecture",
            ),
            (MemoryError("CUDA out of memory"), "more memory than there is"),
        ],
    )
    def test_what_is_known_to_have_one_cure_says_it(self, raised, message):
        error = explain(raised, model="some/model", options={})
        assert isinstance(error, EngineError)
        assert f"model 'some/model': {'it is ' if 'neither' in message else ''}" in str(error)
        assert message in str(error)

    def test_the_cause_is_the_workers_not_that_of_who_waited_for_it(self):
        log = (
            "(Worker pid=1) ERROR 11-26 [multiproc_executor.py:1063] AssertionError: heads\n"
            "(EngineCore pid=2) RuntimeError: Worker failed with error 'heads'\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n"
            "AttributeError: 'NoneType' object has no attribute 'cancel'\n"
        )
        told = with_log(
            "vLLM failed: RuntimeError: Engine core initialization failed. See root cause above.", log
        )
        assert told.startswith(
            "AssertionError: heads. vLLM failed: RuntimeError: Engine core initialization failed"
        )
        assert told.endswith(f"The end of its log:\n{log.rstrip()}")
        assert with_log(told, log) == told
        assert with_log("vLLM failed: KeyError: 'x'", "all is well\n").startswith(
            "vLLM failed: KeyError: 'x'. The end of"
        )


def model_config(**text):
    """A config for memory: 4 layers with 2 KV heads of size 64 in 16 bits, so 1 KiB per token and layer."""
    return SimpleNamespace(
        is_hybrid=False,
        is_attention_free=False,
        use_mla=False,
        dtype=torch.bfloat16,
        max_model_len=text.pop("max_model_len"),
        revision="main",
        hf_token=None,
        hf_config=SimpleNamespace(quantization_config=text.pop("quantization_config", None)),
        hf_text_config=SimpleNamespace(**{"model_type": "llama", **text}),
        get_num_kv_heads=lambda parallel: 4,
        get_head_size=lambda: 64,
        get_num_layers=lambda parallel: 4,
        get_sliding_window=lambda: text.get("sliding_window"),
    )


BATCHES = {"max_num_batched_tokens": 512}


class TestAttentionOfMla:
    """On a CPU with AMX vLLM chooses AMX_MLA whatever the dtype, and float32 does not start there."""

    @pytest.fixture(autouse=True)
    def amx(self, monkeypatch):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)

    @staticmethod
    def chosen(given=None, *, dtype=torch.float32, use_mla=True, is_cpu=True):
        config = model_config(max_model_len=64)
        config.dtype, config.use_mla, config.architecture = dtype, use_mla, "DeepseekV3ForCausalLM"
        return _options_by_model(config, given or {}, is_cpu=is_cpu).get("attention_backend")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_amx_is_left_where_it_does_not_take_the_dtype(self, dtype, monkeypatch):
        assert self.chosen(dtype=dtype) == "CPU_MLA"
        assert self.chosen({"dtype": "float32"}, dtype=dtype) == "CPU_MLA"
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert self.chosen(dtype=dtype) is None

    def test_everything_else_is_vllms_own_choice(self):
        assert self.chosen(dtype=torch.bfloat16) is None
        assert self.chosen(use_mla=False) is None
        assert self.chosen(is_cpu=False) is None

    @pytest.mark.parametrize("given", [{"attention_backend": "AMX_MLA"}, {"attention_config": {}}])
    def test_what_the_caller_says_is_kept(self, given):
        assert self.chosen(given) is None


class TestNorms:
    """On a CPU an eager engine prefers vLLM's kernels, unless the caller or vLLM's version says otherwise."""

    @staticmethod
    def chosen(given, *, is_cpu=True):
        return _defaults(HAS_ATTENTION, given, is_cpu=is_cpu).get("ir_op_priority")

    def test_an_eager_engine_on_a_cpu_prefers_the_kernels(self):
        assert self.chosen({}) == {"rms_norm": ["vllm_kl_cpu"], "fused_add_rms_norm": ["vllm_kl_cpu"]}
        assert self.chosen({}, is_cpu=False) is None

    @pytest.mark.parametrize("given", [{"enforce_eager": False}, {"kernel_config": {}}])
    def test_another_engine_has_vllms_own_choice(self, given):
        """vLLM refuses a choice beside one in ``kernel_config``."""
        assert self.chosen(given) is None

    def test_an_unknown_vllm_whose_workers_do_not_know_the_name_has_its_own_choice(self, monkeypatch):
        monkeypatch.setattr(allowed, "KNOWN_VLLM", allowed.SpecifierSet("<0.1"))
        assert self.chosen({}) is None


class TestMemory:
    @pytest.fixture(autouse=True)
    def one_gib(self, monkeypatch):
        monkeypatch.setattr(memory, "available_bytes", lambda is_cuda: 1 << 30)

    @pytest.fixture
    def folder(self, tmp_path):
        """Of a model with 2,000 bytes of weights."""
        save_file({"a": torch.zeros(1000, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
        return str(tmp_path)

    def test_a_length_whose_kv_does_not_fit_is_refused_with_both_numbers_and_one_that_does(self, folder):
        config = model_config(max_model_len=1_000_000)
        with pytest.raises(OptionError) as refused:
            memory.kv_cache_bytes(folder, config, BATCHES, is_cuda=False)
        assert "max_model_len=1000000, the model's own length, needs 3.8 GiB" in str(refused.value)
        assert "1,024 MiB are available" in str(refused.value)
        fits = int(str(refused.value).split("Pass max_model_len=")[1].split()[0])
        assert 200_000 < fits < 262_144
        config.max_model_len = fits
        got = memory.kv_cache_bytes(folder, config, {**BATCHES, "max_model_len": fits}, is_cuda=False)
        assert fits * 4096 <= got <= 1 << 30

    def test_layers_with_a_window_do_not_count_in_full(self, folder):
        kinds = ["sliding_attention"] * 3 + ["full_attention"]
        config = model_config(max_model_len=600_000, layer_types=kinds, sliding_window=512)
        assert memory.kv_cache_bytes(folder, config, BATCHES, is_cuda=False) <= 1 << 30

    @pytest.mark.parametrize(
        ("text", "given"),
        [
            ({"model_type": "gemma3n_text"}, {}),  # layers share KV
            ({"model_type": "nemotron-nas"}, {}),  # layers without attention
            ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, {}),
            ({}, {"kv_cache_dtype": "turboquant_3bit_nc"}),
        ],
    )
    def test_where_nobody_knows_what_a_token_takes_it_is_left_to_vllm(self, folder, text, given):
        config = model_config(max_model_len=1_000_000, **text)
        assert memory.kv_cache_bytes(folder, config, {**BATCHES, **given}, is_cuda=False) <= 1 << 30

    def test_numbers_of_the_cache_may_be_smaller_than_the_models(self, folder):
        config = model_config(max_model_len=200_000)
        config.dtype = torch.float32
        with pytest.raises(OptionError, match="max_model_len=200000"):
            memory.kv_cache_bytes(folder, config, BATCHES, is_cuda=False)
        options_16_bits = {**BATCHES, "kv_cache_dtype": "bfloat16"}
        assert memory.kv_cache_bytes(folder, config, options_16_bits, is_cuda=False) <= 1 << 30

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_a_checkpoint_whose_config_names_no_dtype_is_asked_itself(self, tmp_path, dtype):
        save_file({"a": torch.zeros(1000, dtype=dtype)}, tmp_path / "model.safetensors")
        config = model_config(max_model_len=1)  # served in bfloat16
        assert memory.stored_dtype(str(tmp_path), config) == dtype
        assert 2000 <= memory._weight_bytes(str(tmp_path), config, {}) < 2100

    def test_weights_that_lie_there_twice_count_once(self, tmp_path):
        for name in ("model-1.safetensors", "consolidated.safetensors"):
            save_file({"a": torch.zeros(1000, dtype=torch.bfloat16)}, tmp_path / name)
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
        assert memory._weight_bytes(str(tmp_path), model_config(max_model_len=1), {}) < 2100

    def test_a_short_model_gets_a_few_batches(self, folder):
        got = memory.kv_cache_bytes(folder, model_config(max_model_len=512), BATCHES, is_cuda=False)
        assert 512 * 4096 < got < 64 << 20

    @pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.float32, 4000), (torch.bfloat16, 2000)])
    def test_weights_that_are_widened_take_what_they_are_served_in(self, folder, dtype, num_bytes):
        config = model_config(max_model_len=1)
        config.dtype = dtype
        assert num_bytes <= memory._weight_bytes(folder, config, {}) < 1.1 * num_bytes

    @pytest.mark.parametrize(
        "given",
        [
            {"tensor_parallel_size": 2},
            {"pipeline_parallel_size": 2},
            {"cpu_offload_gb": 1},
            {"quantization": "fp8"},  # by vLLM, as it loads the weights
        ],
    )
    def test_weights_of_which_a_gpu_holds_a_part_are_not_refused(self, tmp_path, given):
        with (tmp_path / "pytorch_model.bin").open("wb") as file:
            file.truncate(3 << 29)  # 1.5 GiB
        config = model_config(max_model_len=512)
        with pytest.raises(OptionError, match="beside 1.5 GiB of weights. The weights alone fill it"):
            memory.kv_cache_bytes(str(tmp_path), config, BATCHES, is_cuda=True)
        assert memory.kv_cache_bytes(str(tmp_path), config, {**BATCHES, **given}, is_cuda=True) > 512 * 4096

    def test_a_folder_without_weights_leaves_them_all_the_memory_that_the_longest_sequence_does_not_need(
        self, tmp_path, folder
    ):
        config = model_config(max_model_len=512)
        (tmp_path / "empty").mkdir()
        known, unknown = (
            memory.kv_cache_bytes(one, config, BATCHES, is_cuda=True)
            for one in (folder, str(tmp_path / "empty"))
        )
        assert 512 * 4096 < unknown < known


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class TestWeightsOfTheHub:
    """Of a model that is given by its name: 2 GiB of weights, on a GPU with 3 GiB."""

    NAME, REVISION = "an-owner/a-model", "0" * 40
    NUM_BYTES = 2 << 30

    @pytest.fixture(autouse=True)
    def hub(self, tmp_path, monkeypatch):
        monkeypatch.setattr(memory, "available_bytes", lambda is_cuda: 3 << 30)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(memory.HfApi, "model_info", self.answer)
        self.asked, self.info, self.cache = [], ConnectionError("no network"), tmp_path

    def answer(self, *args, **kwargs):
        self.asked.append((args, kwargs))
        if isinstance(self.info, Exception):
            raise self.info
        return self.info

    def config(self):
        config = model_config(max_model_len=100_000)
        config.revision, config.hf_text_config.dtype = self.REVISION, torch.bfloat16
        return config

    def download(self, *names, cache=None, num_bytes=NUM_BYTES // 2, indexed=SHARDS):
        """Put empty files into the cache as huggingface_hub does: one folder for each revision."""
        repository = (cache or self.cache) / f"models--{self.NAME.replace('/', '--')}"
        snapshot = repository / "snapshots" / self.REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / "config.json").write_text("{}")
        if indexed:
            index = {"weight_map": {str(n): name for n, name in enumerate(indexed)}}
            (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in names:
            with (snapshot / name).open("wb") as file:
                file.truncate(num_bytes)

    def weight_bytes(self, **options):
        config = self.config()
        kv_bytes = memory.kv_cache_bytes(self.NAME, config, {**BATCHES, **options}, is_cuda=True)
        found = memory._weight_bytes(self.NAME, config, options)
        assert kv_bytes <= (3 << 30) - (found or 0)
        return found

    def test_that_was_downloaded_is_looked_up_and_nobody_is_asked(self):
        self.download(*SHARDS)
        assert self.weight_bytes() == self.NUM_BYTES
        assert self.asked == []

    def test_that_lies_in_a_download_dir_is_looked_up_there(self, tmp_path):
        self.download()
        self.download(*SHARDS, cache=tmp_path / "elsewhere")
        assert self.weight_bytes(download_dir=str(tmp_path / "elsewhere")) == self.NUM_BYTES
        assert self.asked == []

    def test_of_which_nothing_or_half_was_downloaded_is_known_by_the_hub(self):
        parameters = {"BF16": self.NUM_BYTES // 2 - 8, "F32": 2, "BOOL": 8}
        self.info = SimpleNamespace(safetensors=SimpleNamespace(parameters=parameters), siblings=[])
        assert self.weight_bytes() == self.NUM_BYTES
        self.download(SHARDS[0])
        assert self.weight_bytes() == self.NUM_BYTES
        (name,), asked = self.asked[0]
        assert (name, asked["revision"]) == (self.NAME, self.REVISION)

    def test_that_is_no_safetensors_counts_its_files(self):
        files = {"pytorch_model-1.bin": self.NUM_BYTES, "tf_model.h5": self.NUM_BYTES, "README.md": 5}
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
        self.info = SimpleNamespace(safetensors=None, siblings=siblings)
        assert self.weight_bytes() == self.NUM_BYTES

    def test_without_a_network_is_asked_of_nobody(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert self.weight_bytes() is None
        assert self.asked == []

    @pytest.mark.parametrize(
        "error", [ConnectionError("no network"), huggingface_hub.errors.HFValidationError("s3://")]
    )
    def test_whose_size_nobody_knows_gets_kv_for_its_longest_sequence_and_no_more(self, error):
        self.info = error
        config = self.config()
        assert memory._weight_bytes(self.NAME, config, {}) is None
        got = memory.kv_cache_bytes(self.NAME, config, BATCHES, is_cuda=True)
        longest = memory._roomy_bytes(config, BATCHES, config.max_model_len)
        assert got == longest

    def test_that_leave_no_room_for_one_sequence_are_named(self):
        self.download(*SHARDS)
        config = self.config()
        config.max_model_len = 1_000_000
        with pytest.raises(OptionError, match="1.0 GiB are available beside 2.0 GiB of weights"):
            memory.kv_cache_bytes(self.NAME, config, BATCHES, is_cuda=True)


FACTORS = {
    "short_factor": [round(1 + 0.03 * i, 2) for i in range(16)],
    "long_factor": [round(4 + 0.3 * i, 2) for i in range(16)],
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **FACTORS}
MAMBA = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 1,
    "mamba_chunk_size": 16,
}
MODELS = {
    "phi3": {
        "rope_parameters": LONGROPE,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
    },
    "llama": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 128,
    },
    "falcon_h1": {"head_dim": 32, **MAMBA},
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 16,
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Make a model by its kind; return its folder."""
    home, made = tmp_path_factory.mktemp("models"), {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            sizes = {
                "vocab_size": 301,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 512,
                "tie_word_embeddings": False,
                "bos_token_id": None,
                "pad_token_id": 299,
                "eos_token_id": 300,
            }
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **MODELS[kind]}))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:  # far from uniform
                        parameter.mul_(3)
            made[kind] = home / kind
            model.save_pretrained(made[kind])
        return made[kind]

    return make


def ids_of(seed, length):
    return random.Random(seed).choices(range(300), k=length)


def truth(path, ids):
    """Return log-probs from token 1 on, by a model that has seen no other sequence."""
    return torch.tensor(Oracle(path).log_probs(ids)[1:], dtype=torch.float64)


class TestLengths:
    def test_a_config_tells_where_its_numbers_switch(self, path):
        phi3, llama = (AutoConfig.from_pretrained(path(kind)) for kind in ("phi3", "llama"))
        assert (lengths.switch_length(phi3), lengths.dynamic_length(phi3)) == (64, None)
        assert (lengths.switch_length(llama), lengths.dynamic_length(llama)) == (
            None,
            128,
        )
        assert [lengths.side_of(phi3, n) for n in (64, 65)] == ["short", "long"]
        assert lengths.side_of(llama, 65) is None
        layers = SimpleNamespace(
            rope_parameters={"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}
        )
        assert lengths.switch_length(layers) == 64
        assert lengths.switch_length(SimpleNamespace(model_type="llama4_text")) == 32768

    def test_two_sides_of_a_switch_are_told_apart(self):
        assert "Give both engines the same max_model_len" in lengths.why_two_lengths("short", "long")
        assert "transformers" in lengths.why_two_lengths("row", "long")
        for one, other in (("long", "long"), ("short", "row"), (None, "long"), (None, None)):
            assert lengths.why_two_lengths(one, other) == ""

    def test_sides_of_a_kl_on_two_sides_of_a_switch_are_warned_of(self, path):
        class Engine:
            def __init__(self, side):
                self.info = EngineInfo(readout="flat", vocab_size=301, max_sequence_len=128, length_side=side)
                self.weights = None

            def close(self):
                pass

        policy = TransformersWrapper(
            AutoModelForCausalLM.from_pretrained(path("phi3")), tokenizer=make_tokenizer(), generate=False
        )
        with pytest.warns(
            UserWarning,
            match="above the model's original length(.|\n)*Give both engines the same max_model_len",
        ):
            RetrieveKL(policy, VLLMReference(VLLMScorer(Engine("long")), make_tokenizer()))
        # Warnings are errors here.
        RetrieveKL(policy, VLLMReference(VLLMScorer(Engine("short")), make_tokenizer()))

    @pytest.mark.parametrize("kind", ["phi3", "llama"])
    def test_rows_of_a_transformers_model_do_not_depend_on_their_mates_or_on_earlier_rows(self, path, kind):
        model = AutoModelForCausalLM.from_pretrained(
            path(kind), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        scorer = TransformersScorer(model)
        rows = [ids_of(seed, length) for seed, length in enumerate((40, 200, 128, 150, 64, 150))]
        for batch in (rows, rows[2:5], rows[:1]):
            with torch.no_grad():
                scored = scorer.score([torch.tensor(ids) for ids in batch], [1] * len(batch))
            for got, ids in zip(scored, batch, strict=True):
                torch.testing.assert_close(
                    got.double(), truth(path(kind), ids), rtol=0, atol=LOG_PROB_TOLERANCE
                )


def run_engine(model, given, sequences):
    """Start an engine; return its info, and log-probs with the cache and without it. Runs in the child."""
    given = {"max_num_batched_tokens": 256, "max_num_seqs": 16, "kv_cache_memory_bytes": 32 << 20, **given}
    driver = start_in_child(model, given.pop("readout", "auto"), **given)
    requests = [ScoreRequest(token_ids=np.array(ids, np.int32), start=1) for ids in sequences]
    requests += [ScoreRequest(token_ids=np.array(ids, np.int32), start=len(ids) - 4) for ids in sequences]
    return driver.info, [
        [r.values[:, 0] for r in drive(driver, requests, share_prefix=share)] for share in (True, False)
    ]


def sides_in_one_process(model, max_model_lens):
    """Make engines that generate, one after the other; return their sides and notes. Runs in the child."""
    from vllm import LLM
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    from vllm_kl.engines.generate import GenerateEngine

    _ROPE_DICT.clear()
    found = []
    for max_model_len in max_model_lens:
        given = {"dtype": "float32", "max_model_len": max_model_len, "kv_cache_memory_bytes": 16 << 20}
        ALIVE.append(LLM(model, enforce_eager=True, skip_tokenizer_init=True, **given))
        info = GenerateEngine(ALIVE[-1]).info
        found.append((info.length_side, info.notes[0]))
    return found


@pytest.fixture(scope="module")
def start_engine(child):
    return lambda path, sequences, **given: child(run_engine, str(path), given, sequences)


def assert_right(scored, want):
    for values in scored:
        for got, expected in zip(values, [*want, *[w[-4:] for w in want]], strict=True):
            # A state adds up its rounding over the whole sequence: Mamba 2's is off by 2e-5 in float32, in
            # transformers too.
            torch.testing.assert_close(
                torch.from_numpy(got).double(), expected, rtol=0, atol=8 * LOG_PROB_TOLERANCE
            )


class TestEngines:
    @pytest.mark.parametrize("kind", ["falcon_h1", "mamba2"])
    def test_models_that_keep_a_state_are_right_over_many_blocks_and_say_what_they_share(
        self, start_engine, path, kind
    ):
        prefix = ids_of(1, 150)
        sequences = [prefix + ids_of(2, 20), prefix + ids_of(3, 20), ids_of(4, 230)]
        info, scored = start_engine(path(kind), sequences, dtype="float32", max_model_len=256)
        assert info.readout == "pooling"
        assert any("prefixes are not shared" in note for note in info.notes)
        assert_right(scored, [truth(path(kind), ids) for ids in sequences])

    def test_read_outs_agree_where_the_engines_length_enters_the_numbers(self, start_engine, path):
        short, long = ids_of(5, 40), ids_of(6, 100)
        want = [truth(path("phi3"), short)]
        for readout, longest in (("pooling", 64), ("flat", 63)):
            for given in ({"max_model_len": 64}, {}):  # vLLM's own choice is the original length
                info, scored = start_engine(path("phi3"), [short], dtype="float32", readout=readout, **given)
                assert (info.max_sequence_len, info.length_side) == (longest, "short")
                assert any("at or below the model's original length 64" in note for note in info.notes)
                assert_right(scored, want)
        both = []
        for readout in ("pooling", "flat"):
            info, scored = start_engine(
                path("phi3"), [short, long], dtype="float32", readout=readout, max_model_len=128
            )
            assert (info.max_sequence_len, info.length_side) == (128, "long")
            assert any("differ from those of transformers" in note for note in info.notes)
            both.append(scored[1])
            long_row = torch.from_numpy(scored[1][1]).double()
            torch.testing.assert_close(long_row, truth(path("phi3"), long), rtol=0, atol=LOG_PROB_TOLERANCE)
        for one, other in zip(*both, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=LOG_PROB_TOLERANCE)
        assert np.abs(both[0][0] - want[0].numpy()).max() > 0.01  # the short row, as in a long one

    def test_sequences_end_where_vllm_has_no_positions(self, start_engine, path):
        ids = ids_of(7, 128)
        info, scored = start_engine(path("llama"), [ids], dtype="float32")
        assert info.max_sequence_len == 128
        assert any("'dynamic' RoPE" in note for note in info.notes)
        assert_right(scored, [truth(path("llama"), ids)])
        with pytest.raises(
            OptionError, match="max_model_len=200 does not work with 'dynamic' RoPE.*max_model_len=128"
        ):
            start_engine(path("llama"), [ids], max_model_len=200)

    def test_a_second_engine_in_a_process_says_that_it_has_the_first_ones_factors(
        self, start_engine, path, child
    ):
        sides = child(sides_in_one_process, str(path("phi3")), (64, 128))
        assert [side for side, _ in sides] == ["short", "short"]
        assert "at or below the model's original length" in sides[0][1]
        assert "max_model_len=128, but every position is computed as in a short sequence" in sides[1][1]

    def test_a_backend_that_looks_at_the_longest_sequence_of_a_batch_is_refused(self, start_engine, path):
        with pytest.raises(
            OptionError, match="transformers backend: above 64 tokens .*Pass max_model_len=64"
        ):
            start_engine(path("phi3"), [], model_impl="transformers", max_model_len=128)

    @pytest.mark.parametrize(
        ("kind", "given", "message"),
        [
            (
                "llama",
                {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
                "kv_cache_dtype='bfloat16' does not work on a CPU",
            ),
            (
                "llama",
                {"hf_overrides": {"rope_theta": 500.0}},
                "'rope_theta': 500.0} has no effect: .*rope_theta=10000.0",
            ),
            ("llama", {"max_model_len": 1}, "max_model_len=1 leaves no token to score"),
        ],
    )
    def test_what_would_be_wrong_or_without_effect_for_this_model_is_refused(
        self, start_engine, path, kind, given, message
    ):
        with pytest.raises(OptionError, match=message):
            start_engine(path(kind), [], **given)

    @pytest.mark.parametrize("lost", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight"])
    @pytest.mark.parametrize("readout", ["pooling", "flat"])
    def test_a_checkpoint_that_lacks_weights_is_refused_by_their_name(
        self, start_engine, path, tmp_path, lost, readout
    ):
        """vLLM 0.32 fills such parameters with what was in memory, and says nothing."""
        shutil.copytree(path("llama"), tmp_path, dirs_exist_ok=True)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[lost]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        served = lost.replace("q_proj", "qkv_proj")
        with pytest.raises(
            ValueError, match=f"no weights for {served}: the checkpoint lacks them, or they are NaN"
        ):
            start_engine(tmp_path, [], dtype="float32", readout=readout)

    def test_a_float32_checkpoint_in_16_bits_says_so_whatever_reads_it_out(self, start_engine, path):
        infos = [start_engine(path("llama"), [], readout=readout)[0] for readout in ("pooling", "flat")]
        for info in infos:  # one dtype: of its own accord vLLM takes float16 for one, bfloat16 for the other
            assert any(
                "is float32, and vLLM chose to serve it in bfloat16" in note and "dtype='float32'" in note
                for note in info.notes
            )
