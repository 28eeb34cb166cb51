"""Engines turn token ids into log-probs. ``base`` defines the interface.

make_engine        chooses the engine for what a scorer was given
process            an engine that the scorer owns, in a child process; ``_child`` is the child's main program
replicas           an engine of replicas on Ray Serve, each of which owns a ``process`` engine
http_server        servers of ``vllm-kl serve``, asked over HTTP
start_engine       starts a vLLM engine in the child: defaults, checks, notes
pooling            the ``pooling`` read-out: log-probs come out of the engine as tensors
generate           the ``token_ids`` and ``flat`` read-outs, through ``generate()`` of a live engine
options            which of vLLM's options a caller may give
memory             how much memory the KV cache gets
devices            which GPUs the child sees
length_dependence  models whose log-probs depend on ``max_model_len``
placeholders       token ids that stand for images, videos or audio
start_failures     turns vLLM's start-up errors into this package's errors
wire_format        packs requests and results for the way between processes
"""
