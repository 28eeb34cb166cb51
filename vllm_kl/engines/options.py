"""Says for every option of vLLM's ``EngineArgs`` what this package does with it.

    OURS       this package has its own default; the caller's value wins
    PASSED_ON  goes to vLLM unchanged: it changes speed, memory, precision or the source of the weights, or it
               does not matter for prefill
    REFUSED    changes which rows are computed, what the head returns or how many processes there are, or has
               no effect on scoring; each with the reason and the cure

The tables are plain data. The caller's process, which never imports vLLM, reads them, so it refuses a value
that cannot work before it starts an engine. A test compares the names with those of the installed vLLM.

Source: ``EngineArgs``, ``engine/arg_utils.py``, vLLM 0.26, 0.28, 0.30, 0.32 and 0.33.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vllm_kl.errors import OptionError


class Refused(NamedTuple):
    """The reason why an option is refused, and its values that are not refused."""

    why: str
    unless: tuple[Any, ...] = (False,)  # values that change nothing in vLLM, and are not refused
    only: tuple[Any, ...] | None = None  # refuse these values only; None: refuse all but ``unless``


_OURS = """
    attention_backend block_size compilation_config disable_log_stats dtype enable_lora enforce_eager
    hf_overrides ir_op_priority kv_cache_memory_bytes language_model_only lora_target_modules max_lora_rank
    max_model_len max_num_batched_tokens max_num_seqs prefix_cache_retention_interval skip_tokenizer_init
"""

_PASSED_ON = """
    tokenizer tokenizer_mode tokenizer_revision served_model_name hf_config_path trust_remote_code revision
    code_revision hf_token download_dir config_format load_format safetensors_load_strategy
    safetensors_prefetch_num_threads safetensors_prefetch_block_size model_loader_extra_config ignore_patterns
    use_tqdm_on_load pt_load_map_location max_parallel_loading_workers model_impl model_class_overrides
    generation_config override_generation_config

    quantization quantization_config allow_deprecated_quantization kv_cache_dtype kv_cache_dtype_skip_layers
    override_attention_dtype enable_bf16x3_router_gemm seed use_fp64_gumbel

    tensor_parallel_size pipeline_parallel_size decode_context_parallel_size dcp_comm_backend dcp_q_replicate
    dcp_kv_cache_interleave_size cp_kv_cache_interleave_size enable_expert_parallel enable_ep_weight_filter
    enable_hc_sp expert_placement_strategy all2all_backend numa_bind numa_bind_nodes numa_bind_cpus device_ids
    disable_custom_all_reduce distributed_timeout_seconds cpu_distributed_timeout_seconds
    disable_nccl_for_dp_synchronization enable_shm_tensor_arena ray_workers_use_nsight worker_cls
    worker_extension_cls

    gpu_memory_utilization num_gpu_blocks_override prefix_caching_hash_algo prefix_match_unit
    disable_sliding_window disable_cascade_attn disable_hybrid_kv_cache_manager swa_bounded_replay
    kv_events_config kv_cache_metrics kv_cache_metrics_sample offload_backend cpu_offload_gb
    cpu_offload_params offload_group_size offload_num_in_group offload_prefetch_step offload_params
    enable_sleep_mode sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names
    enable_cumem_allocator enable_nccl_comm_suspend

    mamba_config mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_backend
    mamba_ssu_algorithm mamba_cache_philox_rounds enable_mamba_shared_prefix_checkpoint
    enable_mamba_fine_grained_prefix_cache use_replayssm replayssm_buffer_len

    max_num_scheduled_tokens max_num_partial_prefills max_long_partial_prefills long_prefill_token_threshold
    long_prefill_token_threshold_adaptive max_num_active_seqs max_num_queued_reqs max_num_queued_tokens
    enable_chunked_prefill scheduler_reserve_full_isl prefill_schedule_interval watermark scheduling_policy
    scheduler_cls async_scheduling stream_interval max_logprobs

    cudagraph_capture_sizes max_cudagraph_capture_size moe_backend linear_backend
    sparse_indexer_topk_backend attention_config engram_config kernel_config monokernel
    enable_flashinfer_autotune optimization_level performance_mode gdn_prefill_backend kda_prefill_backend
    kda_decode_backend additional_config

    max_loras fully_sharded_loras max_cpu_loras lora_dtype default_mm_loras enable_tower_connector_lora
    specialize_active_lora enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels
    weight_transfer_config

    limit_mm_per_prompt enable_mm_embeds interleave_mm_strings media_io_kwargs mm_processor_kwargs
    mm_processor_cache_gb mm_processor_cache_type mm_hasher_algorithm mm_shm_cache_max_object_size_mb
    mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
    mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin skip_mm_profiling video_pruning_rate
    video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize
    ec_manager_config disable_chunked_mm_input allowed_local_media_path allowed_media_domains
    renderer_num_workers

    structured_outputs_config reasoning_parser reasoning_parser_plugin reasoning_config
    show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces
    per_request_spec_decode_metrics custom_histogram_buckets cudagraph_metrics enable_layerwise_nvtx_tracing
    enable_mfu_metrics enable_logging_iteration_details jit_monitor_mode jit_monitor_verbose
    enable_mm_processor_stats aggregate_engine_logging profiler_config logging_config log_level
    log_config_file shutdown_timeout watchdog_config fail_on_environ_validation tokens_only
"""

OURS = frozenset(_OURS.split())
PASSED_ON = frozenset(_PASSED_ON.split())

_ONE_ENGINE = (
    "a scorer drives one engine, and vLLM would wait for ever for the other data-parallel ranks.\nMake one "
    "VLLMScorer per device or process, and give each a part of the sequences. For one model on several "
    "devices, pass tensor_parallel_size"
)
_ONE_MACHINE = (
    "an owned engine runs on one machine, and would wait for the other nodes for ever. Make one VLLMScorer "
    "on each machine"
)
_CONNECTOR = (
    "a KV connector's hits may reach past the rows that must be scored, so a scorer never uses them, and its "
    "copies would only cost.\nLeave it out; share_prefix=True shares the KV of common prefixes"
)
_GENERATES = "it changes how vLLM generates tokens, and a scorer generates none. Leave it out"
_RETURNS = "it has no effect, because a scorer returns log-probs only. Leave it out"
_EXPERTS_MOVE = (
    "vLLM would move experts between processes while the engine runs, so vllm_kl could not check the "
    "weights. Leave it out"
)

REFUSED: dict[str, Refused] = {
    "model": Refused("the model is the first argument of VLLMScorer", unless=()),
    "runner": Refused("the read-out decides it: pass readout= instead", unless=("auto",)),
    "convert": Refused("the read-out decides it: pass readout= instead", unless=("auto",)),
    "model_weights": Refused(
        "vLLM sets it for a model in object storage: pass the address as the model", unless=("",)
    ),
    "enable_prefix_caching": Refused(  # True is the default, where a model can share prefixes
        "share_prefix would have no effect. Pass share_prefix=False instead", only=(False,)
    ),
    # Which rows are computed.
    "kv_sharing_fast_prefill": Refused(
        "layers that share KV would compute only the last row of a prompt, and all other log-probs would be "
        "wrong. Leave it out"
    ),
    "kv_transfer_config": Refused(_CONNECTOR),
    "kv_offloading_size": Refused(_CONNECTOR, unless=(0,)),
    "kv_offloading_backend": Refused(_CONNECTOR, unless=("native",)),
    "ec_transfer_config": Refused(
        "it moves the outputs of vision encoders between engines, and a scorer has none. Leave it out"
    ),
    "prefill_context_parallel_size": Refused(
        "it splits the rows of a prompt among processes, and the read-out needs all rows in one process. Use "
        "tensor_parallel_size",
        unless=(1,),
    ),
    "enable_prompt_embeds": Refused("a scorer sends token ids, never embeddings. Leave it out"),
    "mm_encoder_only": Refused(
        "vLLM would not load the language model, which computes the log-probs. Leave it out"
    ),
    "diffusion_config": Refused(
        "in a diffusion model a token has no log-prob given the earlier tokens. Leave it out"
    ),
    # What the head returns.
    "logprobs_mode": Refused(
        "a scorer returns the log-probs of the model's own distribution. Pass temperature= if tokens were "
        "sampled at another temperature than 1",
        unless=("raw_logprobs",),
    ),
    "logits_processors": Refused(
        "they change sampled tokens only, never the log-probs of a prompt. Leave it out", unless=([],)
    ),
    "pooler_config": Refused("the read-out is the engine's pooler. Pass readout= to choose another"),
    "calculate_kv_scales": Refused(
        "the first batch would decide the scales of the KV cache, and so change every later log-prob. Use a "
        "checkpoint that has scales"
    ),
    "enable_mamba_cache_stochastic_rounding": Refused(
        "it rounds states at random, so equal calls would give different log-probs. Leave it out"
    ),
    # How many processes there are.
    "data_parallel_size": Refused(_ONE_ENGINE, unless=(1,)),
    "data_parallel_rank": Refused(_ONE_ENGINE, unless=()),
    "data_parallel_start_rank": Refused(_ONE_ENGINE, unless=()),
    "data_parallel_size_local": Refused(_ONE_ENGINE, unless=(1,)),
    "data_parallel_address": Refused(_ONE_ENGINE, unless=()),
    "data_parallel_rpc_port": Refused(_ONE_ENGINE, unless=()),
    "data_parallel_hybrid_lb": Refused(_ONE_ENGINE),
    "data_parallel_external_lb": Refused(_ONE_ENGINE),
    "data_parallel_multi_port_external_lb": Refused(_ONE_ENGINE),
    "data_parallel_backend": Refused(_ONE_ENGINE, unless=("mp",)),
    "dp_sync_interval": Refused(_ONE_ENGINE, unless=(16,)),
    "enable_dbo": Refused(f"only data-parallel engines make micro-batches; {_ONE_ENGINE}"),
    "ubatch_size": Refused(f"only data-parallel engines make micro-batches; {_ONE_ENGINE}", unless=(0, 1)),
    "dbo_decode_token_threshold": Refused(_ONE_ENGINE, unless=(32,)),
    "dbo_prefill_token_threshold": Refused(_ONE_ENGINE, unless=(512,)),
    "enable_elastic_ep": Refused(_ONE_ENGINE),
    "elastic_ep_max_dp_size": Refused(_ONE_ENGINE, unless=(0, 1)),
    "_api_process_count": Refused("an owned engine has no API server. Leave it out", unless=(1,)),
    "_api_process_rank": Refused("an owned engine has no API server. Leave it out", unless=(0,)),
    "nnodes": Refused(_ONE_MACHINE, unless=(1,)),
    "node_rank": Refused(_ONE_MACHINE, unless=(0,)),
    "master_addr": Refused(_ONE_MACHINE, unless=("127.0.0.1", "localhost")),
    "master_port": Refused(_ONE_MACHINE, unless=(29501,)),
    "distributed_executor_backend": Refused(
        "an owned engine starts its own workers, which find vllm_kl through their environment; workers of "
        "Ray and torchrun do not.\nLeave it out, or use 'mp'. RetrieveKL(..., service_backend='ray') runs a "
        "whole scorer in a Ray actor",
        only=("ray", "external_launcher"),
    ),
    "enable_eplb": Refused(_EXPERTS_MOVE),
    "eplb_config": Refused(_EXPERTS_MOVE),
    "fault_tolerance_config": Refused(f"it is for data-parallel engines: {_ONE_ENGINE}"),
    "enable_fault_tolerance": Refused(f"it is for data-parallel engines: {_ONE_ENGINE}"),
    # No effect on scoring.
    "speculative_config": Refused(f"vLLM's pooling engines do not speculate, and {_GENERATES}"),
    "spec_method": Refused(_GENERATES),
    "spec_model": Refused(_GENERATES),
    "spec_tokens": Refused(_GENERATES, unless=(0,)),
    "watermark_config": Refused(_GENERATES),
    "enable_trace_replay": Refused(_GENERATES),
    "enable_batch_sharded_sampling": Refused(_GENERATES),
    "return_sampling_mask": Refused(_RETURNS),
    "enable_return_routed_experts": Refused(_RETURNS),
    "aux_output_config": Refused(_RETURNS),
    "io_processor_plugin": Refused(_RETURNS, unless=("",)),
}

NAMES = OURS | PASSED_ON | REFUSED.keys()


# Environment variables of vLLM that are refused.
ENVIRONMENT: dict[str, Refused] = {
    # vLLM reads these sizes and ranks if data_parallel_size is 1.
    "VLLM_DP_SIZE": Refused(_ONE_ENGINE, unless=(1,)),
    "VLLM_DP_RANK": Refused(_ONE_ENGINE, unless=(0,)),
    "VLLM_DP_RANK_LOCAL": Refused(_ONE_ENGINE, unless=(0,)),
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": Refused(
        "vLLM would choose experts at random, not by the model", unless=()
    ),
}

# Options that this package computes with, as ints.
_INTS = frozenset({"max_model_len", "max_num_batched_tokens", "max_num_seqs", "kv_cache_memory_bytes"})
_SIZES = frozenset({"tensor_parallel_size", "pipeline_parallel_size"})
_INTS |= _SIZES


def check_options(options: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the options for vLLM; refuse those that cannot work, before an engine is started.

    Options that change nothing are left out: None, and those of :data:`REFUSED` with a value that is not
    refused. :func:`check_names` checks names that are not in the tables.

    Raises:
        OptionError: an option or an environment variable is refused, or an option is not a whole number.
    """
    for name, refused in ENVIRONMENT.items():
        value = environment.get(name, "").strip()
        if value and not _is_among(value, refused.unless):
            raise OptionError(f"the environment sets {name}={value}: {refused.why}. Unset it")
    given = {name: value for name, value in options.items() if value is not None and not _is_off(name, value)}
    return {name: _int(name, value) if name in _INTS else value for name, value in given.items()}


def _is_off(name: str, value: Any) -> bool:
    """Whether an option of :data:`REFUSED` has a value that changes nothing; raise for a refused value."""
    if (refused := REFUSED.get(name)) is None:
        return False
    is_refused = (
        _is_among(value, refused.only) if refused.only is not None else not _is_among(value, refused.unless)
    )
    if is_refused and value != {}:
        raise OptionError(f"engine option {name}={_short(value)} is refused: {refused.why}")
    return refused.only is None


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(_as(type(one), value) == one for one in values)


def _int(name: str, value: Any) -> int:
    if (number := _as(int, value)) is None:
        raise OptionError(f"engine option {name}={_short(value)} must be a whole number")
    if name in _SIZES and number < 1:
        raise OptionError(f"engine option {name}={number}: the model is in at least 1 process")
    return number


def _as(kind: type, value: Any) -> Any:
    """Return what pydantic (so vLLM) makes of a value: False of "false", 1 of "1" and 1.0; None: it fails."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return None


def check_names(options: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that do not exist.

    Args:
        options: the names of the caller's options.
        known: the names that exist.

    Raises:
        OptionError: an option does not exist. The message names similar options.
    """
    usable = set(known) - {"model"}
    for name in options:
        if name not in usable:
            close = difflib.get_close_matches(name, usable, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise OptionError(
                f"unknown engine option {name!r}: vLLM's EngineArgs has none of this name.{hint}"
            )


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
