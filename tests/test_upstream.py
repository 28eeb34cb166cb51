"""Checks the facts of vLLM, TorchRL and torch that vllm_kl relies on.

A test that fails here names a fact that is no longer true. Read the new version, then change the test and the
modules that its docstring names. Errors of upstream that vllm_kl corrects are described where the correction
is tested: plugin/test_cpu_corrections.py, weights/test_pushes.py, weights/test_adapters.py.
engines/test_options.py compares the engine options.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import inspect
import logging
import mmap
import os
import re
import threading
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchrl
import vllm.envs
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer
from vllm import PoolingParams, SamplingParams

import vllm_kl
from tests.compat import since
from vllm_kl.plugin import taken_engines
from vllm_kl.plugin.load_weights import KEEP_NOTHING
from vllm_kl.transforms.coefficient import Coefficient
from vllm_kl.transforms.postproc import on_leaving
from vllm_kl.transforms.service_options import ACTOR_OPTIONS, OWN_OPTIONS

# A fact is read in the installed package, of whichever version.
pytestmark = pytest.mark.compat


def source(thing):
    return inspect.getsource(inspect.unwrap(thing))


def fields(thing):
    return {field.name for field in dataclasses.fields(thing)}


class TestNamesOfProcesses:
    """taken_engines.py ends processes with their owner; load_weights.py freezes the heap of some."""

    def test_the_core_of_an_engine_is_named_engine_core(self):
        from vllm.v1.engine.utils import CoreEngineProcManager

        assert 'else "EngineCore"' in source(CoreEngineProcManager.__init__)

    def test_its_workers_are_named_vllm_worker(self):
        from vllm.v1.executor.multiproc_executor import WorkerProc

        assert 'name=f"VllmWorker-{rank}"' in source(WorkerProc.make_worker_process)

    def test_a_process_of_another_name_says_that_it_is_not_ended(self, caplog, monkeypatch):
        monkeypatch.setattr("multiprocessing.current_process", lambda: threading.Thread(name="Renamed"))
        # vLLM's logger keeps its lines to itself.
        monkeypatch.setattr(taken_engines, "logger", logging.getLogger("tests"))
        taken_engines._end_with(os.getppid())
        assert "the process Renamed of vLLM is not known" in caplog.text
        caplog.clear()
        taken_engines._end_with(os.getpid())  # an engine in its owner's process
        assert not caplog.text


class TestRequests:
    def test_parameters_carry_what_a_request_of_ours_asks(self):
        """plugin/readout_request.py, plugin/cache_cap.py, engines/pooling.py, engines/generate.py."""
        assert {"task", "skip_reading_prefix_cache", "extra_kwargs"} <= {*PoolingParams.__struct_fields__}
        assert {"extra_args", "skip_reading_prefix_cache", "flat_logprobs"} <= {
            *SamplingParams.__struct_fields__
        }

    @since("0.31", "the read-out token_ids")
    def test_a_request_may_name_the_ids_whose_log_probs_it_wants(self):
        """engines/generate.py: the read-out ``token_ids``."""
        assert {"prompt_logprob_token_ids", "prompt_logprob_start"} <= {*SamplingParams.__struct_fields__}

    def test_the_core_takes_and_returns_requests_with_these_fields(self):
        """engines/pooling.py goes past vLLM's front end."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

        assert {"pooling_output", "prefill_stats"} <= {*EngineCoreOutput.__struct_fields__}
        asked = {"prompt_token_ids", "pooling_params", "arrival_time", "cache_salt", "lora_request"}
        assert asked <= {*EngineCoreRequest.__struct_fields__}

    def test_a_cache_hit_is_bound_by_the_number_of_tokens_that_a_request_claims(self):
        """plugin/cache_cap.py hands a shorter request on."""
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        assert "request.num_tokens - 1" in source(KVCacheManager.get_computed_blocks)

    def test_a_lookup_beside_a_connector_differs_by_a_flag_at_its_end(self):
        """plugin/cache_cap.py answers it with the other lookup's result, and False."""
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        lookup = getattr(KVCacheManager, "get_computed_blocks_for_connector", None)
        if lookup is None:
            pytest.skip("this vLLM has one lookup")
        assert re.search(r"return \*self\.get_computed_blocks\(request.*\), False", source(lookup))

    def test_what_an_interrupted_call_added_is_found_and_aborted(self, policy_llm):
        """engines/generate.py takes back what it added."""
        engine = policy_llm.llm_engine
        engine.add_request("upstream-0", {"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=1))
        assert engine.get_num_unfinished_requests() == 1
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        assert engine.get_num_unfinished_requests() == 0

    @since("0.32", "versions in vLLM's outputs")
    def test_a_completion_tells_the_versions_that_made_it(self):
        """engines/generate.py, transforms/watched_policy.py: the engine itself tells a sample's version."""
        from vllm.outputs import CompletionOutput, WeightVersionSpan

        assert (
            typing.get_type_hints(CompletionOutput, vars(vllm.outputs))["weight_versions"]
            == list[WeightVersionSpan] | None
        )
        assert "version" in fields(WeightVersionSpan)


class TestTheEngine:
    def test_an_engine_in_this_process_has_a_client_without_a_socket(self, policy_llm):
        """weights/live_weights.py watches the others: vLLM waits for ever for a dead process."""
        from vllm.v1.engine.core_client import BackgroundResources, InprocClient, MPClient

        assert type(policy_llm.llm_engine.engine_core) is InprocClient
        assert "self.utility_results" in source(MPClient.__init__)
        assert "self.resources = BackgroundResources" in source(MPClient.__init__)
        assert "engine_dead" in fields(BackgroundResources)

    def test_its_version_is_asked_and_set_by_these_names(self, policy_llm):
        """weights/live_weights.py, weights/loading.py."""
        from vllm.v1.engine.async_llm import AsyncLLM

        engine = policy_llm.llm_engine
        assert (callable(engine.get_weight_version), callable(engine.set_weight_version)) == (True, True)
        assert (callable(AsyncLLM.get_weight_version), callable(AsyncLLM.update_weight_version)) == (
            True,
            True,
        )
        assert {"mode"} <= inspect.signature(AsyncLLM.pause_generation).parameters.keys()
        assert callable(AsyncLLM.resume_generation)
        assert {"errored", "dead_error"} <= {*dir(AsyncLLM)}
        # weights/replica.py, weights/adapters.py.
        for name in ("is_sleeping", "list_loras", "add_lora", "remove_lora", "collective_rpc"):
            assert inspect.iscoroutinefunction(getattr(AsyncLLM, name))
        assert "self.vllm_config = " in source(AsyncLLM.__init__)

    def test_torchrls_replicas_are_actors_that_hold_an_async_llm(self):
        """weights/replicas.py asks the actors; engines/generate.py sends one prompt a call."""
        from torchrl.modules.llm.backends.vllm.vllm_async import AsyncVLLM, _AsyncLLMEngine

        assert "self.engine = AsyncLLMEngine.from_engine_args(" in source(_AsyncLLMEngine.__init__)
        assert "await self.engine.collective_rpc(" in source(_AsyncLLMEngine.collective_rpc_v1)
        assert {"actors", "engine_args"} <= {*re.findall(r"self\.(\w+)\b.* = ", source(AsyncVLLM.__init__))}
        taken = inspect.signature(AsyncVLLM.generate).parameters.keys()
        assert {"prompts", "sampling_params", "lora_request"} <= taken

    def test_the_model_of_an_engine_in_this_process_is_reached(self, policy_llm):
        """engines/length_dependence.py: the RoPE that an engine computes with."""
        executor = policy_llm.llm_engine.model_executor
        assert isinstance(executor.driver_worker.worker.get_model(), torch.nn.Module)

    def test_its_configs_tell_how_it_was_made(self, policy_llm):
        """engines/generate.py refuses engines that record logits, or compute the last row only."""
        config = policy_llm.llm_engine.vllm_config
        assert config.model_config.logprobs_mode == "raw_logprobs"
        assert config.cache_config.kv_sharing_fast_prefill is False
        assert config.load_config.load_format == "auto"
        assert config.lora_config is None
        assert config.use_v2_model_runner in (False, True)

    def test_long_rope_says_which_factors_it_took(self):
        """engines/length_dependence.py compares two sides of a KL by it."""
        from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope as rope

        assert "self.use_long_rope = " in source(rope.Phi3LongRoPEScaledRotaryEmbedding.__init__)


class TestTheModel:
    def test_a_logits_processor_is_called_with_head_and_hidden_states(self):
        """plugin/lm_head.py watches that call."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        wanted = ["lm_head", "hidden_states", "embedding_bias"]
        assert [*inspect.signature(LogitsProcessor.forward).parameters][1:4] == wanted

    def test_lora_wraps_a_logits_processor_in_a_layer_with_a_base_layer(self, policy_llm):
        """plugin/lm_head.py removes the wrapper: it knows one row per request."""
        from vllm.config import set_current_vllm_config
        from vllm.lora.layers import LogitsProcessorWithLoRA
        from vllm.lora.model_manager import LoRAModelManager
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        with set_current_vllm_config(policy_llm.llm_engine.vllm_config):
            processor = LogitsProcessor(10)
        assert (
            LogitsProcessorWithLoRA(processor, 8, torch.float32, torch.device("cpu"), None).base_layer
            is processor
        )
        assert "from_layer_logits_processor(" in source(LoRAModelManager)

    def test_a_pooler_finds_its_rows_by_a_cursor_and_keeps_chunks(self):
        """plugin/pooler.py."""
        from vllm.v1.pool.metadata import PoolingCursor, PoolingMetadata, PoolingStates

        assert {"seq_lens_cpu", "num_scheduled_tokens_cpu"} <= fields(PoolingCursor)
        assert {"prompt_token_ids_cpu", "prompt_lens"} <= fields(PoolingMetadata)
        assert PoolingStates().hidden_states_cache == []

    def test_rotary_embeddings_are_shared_by_one_dict(self, policy_llm):
        """start_engine.py and second_model.py clear it: its key leaves the engine's length out."""
        from vllm.model_executor.layers import rotary_embedding

        assert "_ROPE_DICT[key] = rotary_emb" in source(rotary_embedding.get_rope)
        assert type(rotary_embedding._ROPE_DICT) is dict

    @since("0.32", "attention by AMX for MLA")
    def test_amx_is_chosen_for_mla_of_every_dtype(self):
        """start_engine.py chooses CPU_MLA instead where the dtype is not bfloat16."""
        from vllm.platforms.cpu import CpuPlatform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        assert {"AMX_MLA", "CPU_MLA"} <= AttentionBackendEnum.__members__.keys()
        choice = source(CpuPlatform.get_attn_backend_cls)
        assert "amx_available and selected_backend != AttentionBackendEnum.CPU_MLA" in choice
        assert "dtype" not in choice  # vLLM has mended it when this fails: _amx_cannot_attend can go

    def test_an_operation_takes_its_method_from_its_class_when_it_is_made(self):
        """plugin/cpu_corrections.py gives it the mended one."""
        from vllm.model_executor.custom_op import CustomOp

        assert "self._forward_method = " in source(CustomOp.__init__)

    def test_the_registry_says_which_architecture_it_could_not_import(self):
        """plugin/text_only.py names the package that is missing; engines/start_failures.py a cure."""
        from vllm.model_executor.models.registry import _ModelRegistry

        known = SimpleNamespace(get_supported_archs=lambda: ["Known"])
        for name, words in (
            ("Known", r"Model architectures \['Known'\] failed to be inspected"),
            ("Other", "not supported for now"),
        ):
            with pytest.raises(ValueError, match=words):
                _ModelRegistry._raise_for_unsupported(known, [name])


class TestLoading:
    def test_the_loader_of_files_loads_through_load_weights(self):
        """plugin/missing_weights.py wraps it, and ignores what the model's own ``load_weights`` returns."""
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        assert [*inspect.signature(DefaultModelLoader.load_weights).parameters] == [
            "self",
            "model",
            "model_config",
        ]
        assert "self.load_weights(model, model_config)" in source(BaseModelLoader.load_model)

    def test_a_model_that_returns_nothing_of_what_it_loaded_is_not_checked_by_vllm(self):
        """So plugin/missing_weights.py sees to it by marks."""
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        assert "loaded_weights is not None" in source(DefaultModelLoader.load_weights)

    @since("0.31", "experts that tell their padding")
    def test_experts_say_how_much_of_a_parameter_is_padding(self):
        """plugin/missing_weights.py would take padding for weights that are missing."""
        from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as experts

        assert "w13_weight.weight_loader_numel = " in source(experts.UnquantizedFusedMoEMethod.create_weights)

    def test_layers_register_in_these_places_of_a_config(self):
        """plugin/second_model.py gives a second model its own: it would take the places of the first."""
        from vllm.config import CompilationConfig, LoadConfig, ModelConfig

        places = {
            "static_forward_context",
            "static_all_moe_layers",
            "enabled_custom_ops",
            "disabled_custom_ops",
        }
        assert places <= fields(CompilationConfig)
        assert {"load_format", "model_loader_extra_config", "device"} <= fields(LoadConfig)
        assert {"model", "model_weights", "revision"} <= fields(ModelConfig)

    @pytest.mark.parametrize("module", ["gpu_worker.Worker", "cpu_worker.CPUWorker"])
    def test_workers_are_loaded_into_by_these_methods(self, module):
        """plugin/load_weights.py notes what others load through them."""
        name, _, worker = module.partition(".")
        pytest.importorskip(f"vllm.v1.worker.{name}", exc_type=ImportError)
        worker = getattr(__import__(f"vllm.v1.worker.{name}", fromlist=[worker]), worker)
        assert callable(worker.reload_weights)
        assert callable(worker.start_weight_update)

    def test_a_reload_takes_a_folder_by_this_name(self):
        """plugin/load_weights.py passes it on."""
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        wanted = {"weights_iterator", "weights_path", "is_checkpoint_format"}
        assert wanted <= inspect.signature(GPUModelRunner.reload_weights).parameters.keys()

    def test_a_kv_cache_hangs_at_its_layer_by_this_name(self):
        """plugin/adopt_weights.py leaves it where it is."""
        from vllm.model_executor.layers.attention import Attention

        assert "self.kv_cache" in source(Attention.__init__)


class TestKVConnectors:
    """plugin/load_weights.py refuses those that keep KV and cannot drop it."""

    def test_of_those_that_cannot_drop_kv_all_are_known(self):
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

        keep = {"ExampleConnector", "LMCacheConnectorV1", "FlexKVConnectorV1", "HF3FSKVConnector"}
        keep |= {"LMCacheMPConnector", "HiSparseConnector"}
        cannot_drop = set()
        for name, load in KVConnectorFactory._registry.items():
            with contextlib.suppress(ImportError):  # of a library that is not installed
                connector = load()
                assert connector.__module__.startswith("vllm."), name
                if connector.reset_cache is KVConnectorBase_V1.reset_cache:
                    cannot_drop.add(connector.__name__)
        assert {"ExampleConnector", "DecodeBenchConnector"} <= cannot_drop
        assert cannot_drop <= keep | set(KEEP_NOTHING)
        assert keep.isdisjoint(KEEP_NOTHING)


@since("0.28", "a sender with a state of its own")
class TestTheSenderOfNCCL:
    """weights/nccl.py drives vLLM's sender; plugin/receive_weights.py receives what it sends."""

    @pytest.fixture
    def sender(self):
        from vllm.distributed.weight_transfer import nccl_engine

        return nccl_engine

    def test_the_trainers_side_is_made_and_told_to_send_like_this(self, sender):
        engine = sender.NCCLTrainerWeightTransferEngine
        assert {"rank", "master_address", "master_port", "world_size", "packed"} <= fields(
            sender.NCCLTrainerInitInfo
        )
        assert list(inspect.signature(engine.trainer_init).parameters) == ["init_info", "client", "source"]
        assert list(inspect.signature(engine.send_weights).parameters) == ["self"]
        assert "source = self.source\n" in source(engine.send_weights)
        assert fields(sender.NCCLWeightTransferUpdateInfo) == {"names", "dtype_names", "shapes"}

    def test_the_workers_are_asked_in_a_thread_while_the_trainer_broadcasts(self, sender):
        code = source(sender.NCCLTrainerWeightTransferEngine.send_weights)
        asked = code.index("exe.submit(self.client.update_weights, asdict(update_info))")
        assert asked < code.rindex("self._broadcast(source, meta)") < code.index("exe.shutdown(wait=False)")

    def test_without_packing_there_is_one_broadcast_a_tensor_in_the_sources_order(self, sender):
        code = source(sender.NCCLTrainerWeightTransferEngine._broadcast)
        assert "pairs = self._checked_iter(source, meta)" in code
        assert "stream = torch.cuda.current_stream()" in code
        assert "self.model_update_group.broadcast(send, src=0, stream=stream)" in code

    def test_a_source_of_a_module_reads_its_named_parameters_only(self, sender):
        from vllm.distributed.weight_transfer.base import ModuleSource

        used = set(re.findall(r"self\._module\.(\w+)", source(ModuleSource)))
        assert used == {"named_parameters"}

    def test_our_client_has_every_method_of_the_protocol(self, sender):
        from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

        from vllm_kl.weights.nccl import _Client

        wanted = {name for name in vars(VLLMWeightSyncClient) if not name.startswith("_")}
        assert wanted
        assert wanted <= set(dir(_Client))

    def test_a_worker_joins_by_these_fields_and_gets_its_rank(self, sender):
        from vllm.distributed.weight_transfer import nccl_common

        wanted = {"master_address", "master_port", "rank_offset", "world_size"}
        assert wanted <= fields(nccl_common.NCCLWeightTransferInitInfo)
        join = nccl_common.worker_init_process_group
        assert list(inspect.signature(join).parameters) == ["init_info", "parallel_config"]

    def test_a_disabled_communicator_broadcasts_nothing_and_destroy_aborts(self, sender):
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        code = source(PyNcclCommunicator.broadcast)
        assert list(inspect.signature(PyNcclCommunicator.broadcast).parameters) == [
            "self", "tensor", "src", "stream",
        ]  # fmt: skip
        assert "if self.disabled:\n            return\n" in code
        assert "ncclCommAbort" in source(PyNcclCommunicator.destroy)

    def test_the_loader_of_files_takes_its_weights_from_this_method(self):
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        call = "model.load_weights(self.get_all_weights(model_config, model))"
        assert call in source(DefaultModelLoader.load_weights)

    def test_transformers_gives_tensors_their_names_in_files_by_this_function(self):
        import transformers

        call = "state_dict = revert_weight_conversion(model_to_save, state_dict)"
        assert call in source(transformers.PreTrainedModel.save_pretrained)


class TestTheEnvironment:
    def test_plugins_are_found_in_this_group(self):
        """pyproject.toml, doctor.py."""
        from vllm.plugins import DEFAULT_PLUGINS_GROUP

        assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"

    def test_vllm_reads_these_variables(self):
        """engines/process.py, local.py and options.py, plugin/__init__.py and doctor.py set or read them."""
        package = Path(vllm_kl.__file__).parent
        used = {
            name
            for file in package.rglob("*.py")
            for name in re.findall(r"\bVLLM_[A-Z0-9_]+", file.read_text())
            if not name.startswith("VLLM_KL_")  # our own
        }
        assert {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_PLUGINS"} <= used
        by_workers = {"VLLM_DIST_IDENT"}  # what workers on a CPU set for themselves
        assert used - by_workers <= vllm.envs.environment_variables.keys()
        assert used >= by_workers

    def test_workers_on_a_cpu_name_their_shared_memory_by_this_variable(self):
        """plugin/taken_engines.py removes the names."""
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

        source = inspect.getsource(_CPUSHMDistributed)
        assert 'os.environ["VLLM_DIST_IDENT"]' in source
        assert '-cpushm"' in source

    def test_nobind_is_how_a_cpu_engine_is_told_to_take_all_cores(self):
        """engines/process.py, where workers share a small machine."""
        from vllm.utils import ompmultiprocessing

        assert 'vllm_mask == "nobind"' in source(ompmultiprocessing)

    def test_torch_and_onednn_read_these_variables(self):
        """engines/process.py and engines/devices.py set them. vLLM's CPU build has a oneDNN of its own."""
        assert '"TORCH_COMPILE_DISABLE"' in source(torch._dynamo.config)
        assert '"PYTORCH_NVML_BASED_CUDA_CHECK"' in source(torch.cuda)
        library = Path(torch.__file__).parent / "lib" / "libc10.so"
        assert b"THP_MEM_ALLOC_ENABLE" in library.read_bytes()
        of_vllm = [*Path(vllm.__file__).parent.glob("_C*.so")]
        for library in (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", *of_vllm):
            with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
                assert content.find(b"PRIMITIVE_CACHE_CAPACITY") > 0, library

    def test_mkl_is_one_whose_first_calls_may_be_wrong(self):
        """mkl.py can go when PyTorch's wheels have MKL 2025."""
        library = ctypes.CDLL(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
        if not hasattr(library, "MKL_Get_Version_String"):
            pytest.skip("this PyTorch has no MKL")
        told = ctypes.create_string_buffer(200)
        library.MKL_Get_Version_String(told, len(told))
        assert int(re.search(rb"Version (\d{4})", told.value)[1]) < 2025, told.value


class TestRay:
    def test_an_actor_takes_these_options(self):
        """transforms/service_options.py passes them on; the rest is decided by the service itself."""
        ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
        with pytest.raises(ValueError, match="Invalid option keyword nothing for actors") as caught:
            ray.remote(type("Actor", (), {})).options(nothing=1)
        known = set(str(caught.value).partition("Valid ones are")[2].split("'")[1::2])
        own = {"name", "namespace", "lifetime", "get_if_exists", "concurrency_groups"}
        tuning = {"enable_task_events", "enable_tensor_transport", "allow_out_of_order_execution"}
        assert {name for name in known if not name.startswith("_")} - own - tuning == {*ACTOR_OPTIONS}
        assert not known & {*OWN_OPTIONS}

    def test_an_error_of_a_dead_actor_tells_why_in_its_last_line(self):
        """transforms/ray_scorer.py quotes it, and knows the error of a lost factory."""
        ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
        built = source(ray.exceptions.ActorDiedError.__init__)
        assert "error_msg_lines.append(cause.error_message)" in built
        assert hasattr(ray.exceptions, "OwnerDiedError")

    def test_ray_data_maps_whole_blocks_with_options_of_actors(self):
        """offline/pipeline.py: on GPUs the public method refuses whole blocks, and warns of max_restarts."""
        data = pytest.importorskip("ray.data", reason="pip install 'vllm-kl[ray]'")
        taken = inspect.signature(data.Dataset.map_batches_internal).parameters
        assert {"batch_size", "batch_format", "compute", "num_gpus", "runtime_env"} <= taken.keys()
        assert "ray_remote_args" in taken
        assert "You must provide `batch_size`" in source(data.Dataset.map_batches)
        assert "target_max_block_size" in fields(data.DataContext)


class TestTorchRL:
    def test_losses_leave_out_tokens_whose_recorded_log_prob_is_nan(self):
        """mask_recorded.py relies on it, since TorchRL 0.14.1."""
        from torchrl.objectives.llm import GRPOLoss

        assert "dist.mask & torch.isfinite(prev_log_prob)" in source(GRPOLoss._log_weight)

    @pytest.mark.parametrize("name", ["SFTLoss", "DistillationLoss"])
    def test_losses_of_histories_read_the_masks_at_these_keys(self, name):
        """tokens_transform.py writes them."""
        import torchrl.objectives.llm

        text = source(getattr(torchrl.objectives.llm, name))
        assert '("masks", "all_assistant_mask"), as_list=True' in text
        assert '("masks", "all_attention_mask"), as_list=True' in text

    def test_services_are_asked_for_in_these_words(self):
        """transforms/service_options.py: when use_ray_service goes upstream, it goes here."""
        from torchrl._comm.backends import _get_service_backend
        from torchrl._utils import _RayServiceMetaClass

        call = source(_RayServiceMetaClass.__call__)
        assert "use_ray_service is deprecated and will be removed in v0.16" in call
        assert "FutureWarning" in call
        assert 'options.get("actor_options", options)' in call
        with torchrl.service_backend("ray"):
            assert _get_service_backend() == "ray"

    def test_a_wrapper_reaches_its_engine_through_these_methods(self):
        """transforms/watched_policy.py watches them, choose_scorer.py and lora_wrapper.py call them."""
        from torchrl.modules.llm import vLLMWrapper

        assert all(
            callable(getattr(vLLMWrapper, f"_from_vllm_generate_{mode}"))
            for mode in ("history", "text", "tokens")
        )
        assert source(vLLMWrapper).count("= self._call_generate(") == 4

    def test_what_postproc_returns_is_the_batch_that_leaves_a_collector(self):
        """transforms/postproc.py hooks in there, to check batches and to fill in deferred KLs."""
        from torchrl.collectors.llm import LLMCollector

        class Fake:
            postproc = staticmethod(lambda batch: [*batch, "seen"])

            def __getattr__(self, name):  # whatever else it looks at is off
                return None

        assert LLMCollector._postproc(Fake(), ["batch"])[:2] == ["batch", "seen"]

    def test_a_collector_without_a_postproc_is_told_of_once(self, caplog):
        class Renamed:
            pass

        for collector in (Renamed(), Renamed(), None):
            assert not on_leaving(collector, print)
        assert caplog.text.count("a Renamed has no postproc, so its batches are not checked") == 1

    def test_a_started_collector_runs_in_a_thread_of_this_name(self):
        """weights/collector_errors.py tells a trainer what ended it."""
        from torchrl.collectors.llm import LLMCollector

        start = source(LLMCollector.start)
        assert "self._thread = threading.Thread(" in start
        assert "self._run_iterator" in start

    def test_a_collector_keeps_its_tracker_of_versions_under_this_name(self):
        """transforms/pusher.py sets its version."""
        from torchrl.collectors.llm import LLMCollector
        from torchrl.envs.llm.transforms import PolicyVersion

        assert "self.policy_version_tracker = track_policy_version" in source(LLMCollector.__init__)
        assert PolicyVersion().version == 0

    def test_a_controller_divides_by_its_coefficient_and_changes_its_sign(self):
        """transforms/coefficient.py gives it the KL's share of the reward: its target is in nats."""
        from torchrl.data import AdaptiveKLController

        for nats, factor in (
            (6.0, 1.0),
            (6.6, 1 + 0.1 * 4 / 10),
            (60.0, 1 + 0.2 * 4 / 10),
            (0.1, 1 - 0.2 * 4 / 10),
        ):
            controller = AdaptiveKLController(init_kl_coef=0.1, target=6.0, horizon=10)
            Coefficient(controller).observe(torch.full((4,), nats))
            np.testing.assert_allclose(float(controller.coef), 0.1 * factor, rtol=1e-6)

    def test_a_replay_buffer_hands_whole_batches_to_inverse_transforms(self):
        """transforms/next_transform.py lets them through."""
        from torchrl.envs.transforms import transforms

        assert "_inv_call" in source(transforms.Transform.inv)

    def test_a_replay_buffer_samples_the_stored_samples_themselves(self):
        """transforms/next_transform.py copies them. Where this fails, it need not."""
        buffer = ReplayBuffer(storage=LazyStackStorage(1), batch_size=1)
        buffer.append_transform(lambda td: td.set("written", torch.ones(1)))
        buffer.extend(lazy_stack([TensorDict(stored=torch.ones(1))]))
        buffer.sample()
        assert "written" in buffer._storage[0].keys()

    def test_a_pool_does_not_tell_its_envs_the_collector_and_has_them_under_these_names(self):
        """transforms/pools.py tells them."""
        from torchrl.envs import SerialEnv
        from torchrl.envs.async_envs import ThreadingAsyncEnvPool

        assert not {"register_collector"} & {*vars(SerialEnv), *vars(ThreadingAsyncEnvPool)}
        assert "self._envs.append(env" in source(SerialEnv._start_workers)
        assert "self.envs = [" in source(ThreadingAsyncEnvPool._setup)

    def test_an_updater_counts_after_it_was_called(self):
        """transforms/pusher.py sets one version less, where the collector counts another itself."""
        from torchrl.collectors.llm import LLMCollector

        update = source(LLMCollector.update_policy_weights_)
        assert "increment_version()" in update


class TestRayServe:
    """vllm_kl/engines/replicas/ runs on it."""

    def test_a_deployment_keeps_its_version_only_by_this_argument(self):
        """Service.keep: with another version Serve starts all replicas anew."""
        serve = pytest.importorskip("ray.serve", reason="pip install 'vllm-kl[ray]'")
        from ray.serve._private.client import ServeControllerClient

        deployment = serve.deployment(name="replica")(Deployed).options(version="1", _internal=True)
        assert deployment.options(user_config={"a": 1}).version == "1"
        sends = source(ServeControllerClient.deploy_applications)
        assert "version=deployment._version or get_random_string()" in sends

    def test_a_router_has_these_names(self):
        """PromptRouter."""
        pytest.importorskip("ray.serve", reason="pip install 'vllm-kl[ray]'")
        from ray.serve.request_router import RequestRouter

        assert {"app_name", "choose_replicas", "initialize_state", "replica_queue_len_cache"} <= set(
            vars(RequestRouter)
        )
        assert "update_replicas" in vars(RequestRouter)
        waits = source(RequestRouter._choose_replicas_with_backoff)
        assert "not pending_request.routing_context.should_backoff" in waits
        one_request = source(RequestRouter._fulfill_next_pending_request)
        assert "_get_pending_request_matching_internal_request_id" in one_request


class Deployed:
    """A class for a deployment."""
