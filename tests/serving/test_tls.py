"""A server with TLS, and a client that trusts its certificate."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from tests import local_ray
from tests.serving.server import serving
from vllm_kl.client import score
from vllm_kl.errors import EngineError

pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [*local_ray.MARKS, pytest.mark.nightly, pytest.mark.timeout(600)]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="apt-get install openssl")
def test_ids_and_log_probs_go_over_tls(ref_path, ref_scorer, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    with serving(ref_path, "--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)) as server:
        assert server.address.startswith("https://")
        with pytest.raises(EngineError, match=r"(?i)certificate"):
            score(server.address, [[5, 6, 7]], retry_s=1.0)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        (found,) = score(server.address, [[5, 6, 7]])
    np.testing.assert_allclose(found, ref_scorer.score([[5, 6, 7]])[0].numpy(), atol=2e-6)
