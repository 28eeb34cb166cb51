"""Hydra configurations: they have the constructors' arguments, and what they make is right."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from tests import tiny
from tests.transforms.helpers import KEEP, SEQUENCES, assert_rows, recorded_batch, rows
from vllm_kl import RetrieveKL, RetrieveLogProb, VLLMReference
from vllm_kl.errors import OptionError

hydra = pytest.importorskip("hydra", reason="pip install 'vllm-kl[hydra]'")

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.errors import ConfigCompositionException  # noqa: E402
from hydra.utils import instantiate  # noqa: E402

from vllm_kl import configs  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "hydra.md"
CLASSES = {
    configs.RetrieveKLConfig: RetrieveKL,
    configs.RetrieveLogProbConfig: RetrieveLogProb,
    configs.VLLMReferenceConfig: VLLMReference,
}


@pytest.fixture
def composed(tmp_path):
    """Compose the configuration of the page, with changes from the command line."""
    (tmp_path / "config.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.S)[1])

    def compose_with(*changes):
        with initialize_config_dir(str(tmp_path), version_base=None):
            return compose("config", list(changes))

    return compose_with


@pytest.mark.parametrize("config", CLASSES, ids=lambda config: config.__name__)
def test_a_configuration_has_the_constructors_arguments_and_defaults(config):
    assert set(CLASSES) == set(configs.CONFIGS.values())
    told = {field.name: field.default for field in fields(config)}
    made = told.pop("of"), told.pop("_target_"), told.pop("_convert_")
    assert made[0].endswith(CLASSES[config].__name__)
    _, *parameters = inspect.signature(CLASSES[config].__init__).parameters.values()
    assert list(told) == [parameter.name for parameter in parameters]
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            assert told[parameter.name] is MISSING  # an empty dict of its own
        else:
            assert told[parameter.name] == (
                "???" if parameter.default is parameter.empty else parameter.default
            )


def test_the_configuration_of_the_page_makes_a_transform_that_is_right(
    composed, ref_path, policy_oracle, ref_oracle
):
    config = composed(
        f"kl.ref_model.scorer_or_model={ref_path}",
        f"++kl.ref_model.engine_options={{{', '.join(f'{k}: {v}' for k, v in tiny.ENGINE_OPTIONS.items())}}}",
        "kl.extra_estimators=[k3]",
    )
    kl = instantiate(config.kl)
    try:
        assert type(kl) is RetrieveKL
        assert type(kl.ref_model) is VLLMReference
        assert kl.ref_log_probs_full_key == ("next", "ref_log_probs", "full")
        td = kl(recorded_batch(policy_oracle))
        want = [
            policy_oracle.masked(s, keep) - ref_oracle.masked(s, keep)
            for s, keep in zip(SEQUENCES, KEEP, strict=True)
        ]
        assert_rows(rows(td, ("next", "kl_penalty")), want)
        assert kl.metrics["kl_k3_token_mean_nats"] > 0
        retrieve = instantiate(configs.RetrieveLogProbConfig(model=kl.ref_model, assistant_only=False))
        batch = TensorDict(tokens=TensorDict(full=torch.tensor([SEQUENCES[0]])), batch_size=1)
        got = retrieve(batch)["ref_log_probs", "full"][0, 1:]
        torch.testing.assert_close(
            got.double(),
            torch.tensor(ref_oracle.log_probs(SEQUENCES[0])[1:], dtype=torch.float64),
            rtol=0,
            atol=5e-6,
        )
    finally:
        kl.ref_model.close()


def test_what_does_not_exist_is_refused_when_it_is_composed_or_made(composed, tmp_path):
    with pytest.raises(ConfigCompositionException, match="kl.coef"):
        composed("kl.coef=0.1")
    with pytest.raises(ConfigCompositionException):
        composed("kl.assistant_only=perhaps")
    with pytest.raises(Exception, match="does not exist") as refused:
        instantiate(composed(f"kl.ref_model.scorer_or_model={tmp_path}/nowhere").kl)
    assert isinstance(refused.value.__cause__, OptionError)
