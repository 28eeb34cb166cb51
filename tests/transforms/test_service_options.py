"""How a Ray service is asked for: TorchRL's spellings, and what is refused before Ray is touched."""

from __future__ import annotations

import pytest
import torchrl

from vllm_kl import RetrieveKL
from vllm_kl.errors import OptionError
from vllm_kl.transforms.service_options import service_of


def asked(backend="ray", options=None, *, old=False, name="reference", **resources):
    return service_of(backend, options, old, name, resources)


def test_options_of_the_actor_are_nested_or_flat_as_torchrl_takes_them():
    flat, nested = asked(options={"num_gpus": 1}), asked(options={"actor_options": {"num_gpus": 1}})
    assert flat == nested == asked(num_gpus=1)
    assert flat.given == {"num_gpus": 1}
    both = asked(
        options={"actor_options": {"num_cpus": 2}, "idle_timeout_s": None, "ray_init_config": {"a": 1}}
    )
    assert both.given == {"num_cpus": 2, "idle_timeout_s": None}
    assert both.ray_init_config == {"a": 1}


def test_without_a_service_there_is_none():
    assert asked("direct", name=None) is None
    assert asked(None, name=None) is None


def test_an_enclosing_service_backend_of_torchrl_is_the_default():
    with torchrl.service_backend("ray"):
        assert asked(None).actor_name == "reference"
        assert asked("direct", name=None) is None
    with (
        torchrl.service_backend("process"),
        pytest.raises(OptionError, match="'process' .of an enclosing torchrl.service_backend. is not known"),
    ):
        asked(None)


def test_use_ray_service_is_deprecated_as_torchrl_deprecates_it(make_reference):
    with (
        pytest.warns(FutureWarning, match="use_ray_service is deprecated.*service_backend='ray'") as caught,
        pytest.raises(OptionError, match="holds a running engine and cannot move into a Ray actor"),
    ):
        RetrieveKL("from_collector", make_reference(), use_ray_service=True)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(FutureWarning, match="use_ray_service is deprecated"):
        assert asked(None, old=True, num_gpus=1) == asked("ray", num_gpus=1)
    with pytest.raises(OptionError, match="use_ray_service=True conflicts with service_backend='direct'"):
        asked("direct", old=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "process"}, r"service_backend='process' is not known: .*\('direct'\) .* \('ray'\)"),
        ({"options": {"num_gpu": 1}}, "has no num_gpu. Known: actor_options, idle_timeout_s, .*num_gpus"),
        ({"options": {"actor_options": {"name": "x"}}}, r"(?s)has no name.*is the argument actor_name"),
        (
            {"options": {"actor_options": {"memory": 1}, "memory": 2}},
            "memory inside actor_options and beside",
        ),
        ({"options": {"num_cpus": 1}, "num_cpus": 2}, "num_cpus is given as an argument and in service_back"),
        ({"coef": 1.0}, "unknown argument: coef"),
        ({"options": {"max_restarts": 0, "max_task_retries": 1}}, "max_task_retries has no effect"),
        ({"options": {"idle_timeout_s": 0}}, "idle_timeout_s must be a number of seconds above 0, or None"),
        ({"options": {"idle_timeout_s": 9}, "name": None}, "idle_timeout_s has no effect without actor_name"),
        ({"backend": "direct"}, "without effect unless service_backend='ray': actor_name"),
        ({"backend": None, "name": None, "num_gpus": 1}, "unless service_backend='ray': num_gpus"),
        (
            {"backend": None, "name": None, "options": {"num_gpus": 1}},
            "unless service_backend='ray': num_gpus",
        ),
    ],
)
def test_unknown_options_are_refused_with_the_known_ones(arguments, message):
    with pytest.raises(OptionError, match=message):
        asked(**arguments)
