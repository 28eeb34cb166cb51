from __future__ import annotations

import socket

import pytest

from vllm_kl.errors import EngineError
from vllm_kl.ray_address import check_address


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_where_something_listens_is_left_to_ray(listener, form):
    check_address(form.format(listener))


@pytest.mark.parametrize("address", [None, "auto", "local", "a-name"])
def test_what_only_ray_knows_is_left_to_ray(monkeypatch, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_address(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:6379", "[::1]:1"),
        *("127.0.0.1:99999", "127.0.0.1:0"),
    ],
)
def test_an_address_where_nothing_listens_is_refused(address):
    with pytest.raises(EngineError, match="no Ray cluster at"):
        check_address(address)


@pytest.mark.parametrize("turns", [1, 10**9])
def test_a_port_that_does_not_exist_is_not_the_one_65536_below_it(listener, turns):
    host, port = listener.split(":")
    with pytest.raises(EngineError, match="no Ray cluster at .*: there is no port"):
        check_address(f"{host}:{int(port) + turns * 2**16}")


@pytest.mark.parametrize("address", [None, "auto"])
def test_the_environments_address_is_checked_where_none_is_given(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(EngineError, match="no Ray cluster at 127.0.0.1:1"):
        check_address(address)
