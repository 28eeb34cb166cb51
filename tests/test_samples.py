"""Scored samples: the file, what it refuses, and what a batch becomes."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from tensordict import TensorDict, lazy_stack

from tests import batches, oracle
from tests.oracle import KL_TOLERANCE
from vllm_kl import RetrieveKL, Sample, read_samples, samples_from_batch, write_samples
from vllm_kl.errors import InputError, MissingLogProbError, OptionError
from vllm_kl.samples import with_texts

PAD, EOS = 256, 258
SEQUENCES = [[5, EOS, 9, PAD, 7, EOS], [EOS, 2, 3], [PAD, PAD, 4, 8, EOS, 16, 23], [11, 12]]
PROMPTS = [2, 2, 3, 2]  # the last response is empty
KEEP = [[t >= p for t in range(len(s))] for s, p in zip(SEQUENCES, PROMPTS, strict=True)]
ENTRY = {"token_ids": [5, 6, 7], "log_probs": [-1.0, -2.0], "ref_log_probs": [-1.5, -1.0]}


def written(path, *lines):
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


class TestFile:
    def test_what_is_left_out_has_its_default_and_other_fields_are_not_read(self, tmp_path):
        path = written(tmp_path / "s.jsonl", {**ENTRY, "group": 3, "reward": None}, b"", {**ENTRY, "kl": [9, 8]})
        first, second = read_samples(path)
        assert first == Sample(**ENTRY)
        assert (first.mask, first.kl) == ([False, True, True], [0.5, -1.0])
        assert (first.tokens, first.reward, first.ref_version) == (None, None, None)
        assert second.kl == [9, 8]

    def test_several_spans_and_no_scored_token_are_ordinary(self, tmp_path):
        spans = {**ENTRY, "token_ids": [1, 2, 3, 4], "mask": [True, False, False, True]}
        none = {"token_ids": [1], "log_probs": [], "ref_log_probs": []}
        first, second = read_samples(written(tmp_path / "s.jsonl", spans, none))
        assert first.mask == [True, False, False, True]
        assert (second.mask, second.kl) == ([False], [])

    def test_everything_comes_back(self, tmp_path):
        full = Sample(
            **ENTRY,
            mask=[True, False, True],
            kl=[0.1, 0.2],
            tokens=["a", "</script>", "\ud800\n"],
            query="q",
            response="r",
            reward=0.5,
            policy_version="b7e1",
            ref_version=2,
        )
        write_samples(tmp_path / "s.jsonl", [full, Sample(**ENTRY)])
        assert read_samples(tmp_path / "s.jsonl") == [full, Sample(**ENTRY)]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                {**ENTRY, "ref_log_probs": [-1.0]},
                r"ref_log_probs: got 1 values, expected 2, one per value of log_probs",
            ),
            ({**ENTRY, "kl": [0.0] * 3}, r"kl: got 3 values, expected 2"),
            ({**ENTRY, "tokens": ["a"]}, r"tokens: got 1 values, expected 3, one per token id"),
            ({**ENTRY, "mask": [True, True]}, r"mask: got 2 values, expected 3"),
            ({**ENTRY, "mask": [True, False, False]}, r"mask: keeps 1 tokens, expected 2, one per value of log_probs"),
            ({**ENTRY, "mask": [0, 1, 1]}, r"mask: value 0 is 0, expected true or false"),
            ({**ENTRY, "token_ids": [5]}, r"log_probs: got 2 values, expected at most 1"),
            ({**ENTRY, "token_ids": [5, 6, -1]}, r"token_ids: value 2 is -1, expected an integer of at least 0"),
            ({**ENTRY, "token_ids": [5, 6, 7.0]}, r"token_ids: value 2 is 7\.0, expected an integer"),
            ({**ENTRY, "token_ids": "567"}, r"token_ids: got '567', expected a list"),
            ({**ENTRY, "log_probs": [-1.0, math.nan]}, r"log_probs: value 1 is nan, expected a finite number"),
            (
                {**ENTRY, "ref_log_probs": [-math.inf, -1.0]},
                r"ref_log_probs: value 0 is -inf, expected a finite number",
            ),
            ({**ENTRY, "kl": [None, 0.0]}, r"kl: value 0 is None, expected a finite number"),
            ({**ENTRY, "reward": "good"}, r"reward: got 'good', expected a finite number"),
            ({**ENTRY, "policy_version": 1.5}, r"policy_version: got 1\.5, expected an integer or a text"),
            ({"token_ids": [5]}, r"log_probs is missing; it has token_ids"),
            ({**ENTRY, "log_probs": None}, r"log_probs is missing"),
            ([1, 2], r"got \[1, 2\], expected a JSON object"),
            (b'{"token_ids": [5', r"not JSON: "),
            (b'{"query": "\xff"}', r"not UTF-8 at byte 11"),
            (b"[" * 200_000, r"not JSON: "),
        ],
    )
    def test_a_bad_line_is_named_with_its_field_and_what_was_expected(self, tmp_path, line, message):
        path = written(tmp_path / "s.jsonl", ENTRY, line)
        with pytest.raises(InputError, match=rf"s\.jsonl, line 2: {message}") as caught:
            read_samples(path)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    def test_a_file_without_samples_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"s\.jsonl: holds no samples, expected one JSON object per line"):
            read_samples(written(tmp_path / "s.jsonl", b"  "))
        with pytest.raises(FileNotFoundError):
            read_samples(tmp_path / "none.jsonl")

    def test_tensors_are_taken_as_lists(self):
        sample = Sample(
            token_ids=torch.tensor([5, 6]), log_probs=torch.tensor([-1.0]), ref_log_probs=torch.tensor([-2.0])
        )
        assert (sample.token_ids, sample.kl) == ([5, 6], [1.0])


class TestTexts:
    def test_each_token_is_decoded_by_itself_where_there_are_no_texts(self, policy_path):
        ids = [22, 220, 198, EOS]
        bare = Sample(token_ids=ids, log_probs=[-1.0], ref_log_probs=[-2.0])
        named = Sample(token_ids=[22], log_probs=[-1.0], ref_log_probs=[-2.0], tokens=["seven"])
        got = with_texts([bare, named], str(policy_path))
        assert got[0].tokens == ["7", " ", "\n", "<|im_end|>"]
        assert got[1] == named
        with pytest.raises(OptionError, match="would have no effect: every sample has its tokens' texts"):
            with_texts(got, str(policy_path))


class TestBatch:
    """Scored by the transform, read back: the same values whatever the layout."""

    @pytest.fixture
    def truth(self, policy_oracle, ref_oracle):
        return [oracle.kl(policy_oracle, ref_oracle, s, k) for s, k in zip(SEQUENCES, KEEP, strict=True)]

    def check(self, samples, truth):
        assert [sample.token_ids for sample in samples] == SEQUENCES
        assert [sample.mask for sample in samples] == KEEP
        for sample, want, keep in zip(samples, truth, KEEP, strict=True):
            want = want[torch.tensor(keep)]
            for kl in (sample.kl, [p - q for p, q in zip(sample.log_probs, sample.ref_log_probs, strict=True)]):
                torch.testing.assert_close(torch.tensor(kl).double(), want, rtol=0, atol=KL_TOLERANCE)

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    @pytest.mark.parametrize("stored", ["ragged ids", "dense ids"])
    def test_every_layout_gives_the_same_samples(
        self, make_gen, make_reference, truth, stored, pad_output, padding_side
    ):
        is_ragged = stored == "ragged ids"
        td = batches.ids_batch(SEQUENCES, PROMPTS) if is_ragged else batches.dense_batch(SEQUENCES, PROMPTS, PAD)
        gen, ref = make_gen("transformers", pad_output=pad_output), make_reference(pad_output=pad_output)
        td = RetrieveKL(gen, ref, padding_side=padding_side)(td)
        self.check(samples_from_batch(td, padding_side=padding_side), truth)
        if is_ragged and pad_output:
            other = {"left": "right", "right": "left"}[padding_side]
            with pytest.raises(InputError, match=f"values where padding was expected, on the {other}"):
                samples_from_batch(td, padding_side=other)

    def test_under_next_with_texts_rewards_and_versions(self, make_gen, make_reference, truth, tokenizer, tmp_path):
        td = batches.ids_batch(SEQUENCES, PROMPTS, extra={"query": ["a", "b", "c", "d"]})
        step = [TensorDict(reward=torch.full((1, 1), 2.0), policy_version=torch.tensor(7)) for _ in SEQUENCES]
        td["next"] = lazy_stack(step)
        td = RetrieveKL(make_gen("transformers", pad_output=False), make_reference(pad_output=False), coeff=0.5)(td)
        assert "kl_penalty" not in td.keys()
        samples = samples_from_batch(td.reshape(2, 2), tokenizer, ref_version="base")
        self.check(samples, truth)
        assert [sample.query for sample in samples] == ["a", "b", "c", "d"]
        assert {(sample.policy_version, sample.ref_version) for sample in samples} == {(7, "base")}
        assert samples[0].tokens == [tokenizer.decode([t]) for t in SEQUENCES[0]]
        assert samples[0].reward == pytest.approx(2 - 0.5 * sum(samples[0].kl) / 4, abs=1e-5)
        assert samples[3].reward is None  # per token, and none was scored
        write_samples(tmp_path / "s.jsonl", samples)
        assert read_samples(tmp_path / "s.jsonl") == samples

    def test_the_mask_is_that_of_the_kl_before_that_of_the_assistant(self):
        rows = {
            ("log_probs", "full"): [torch.tensor([0.0, -1.0, -2.0])],
            ("ref_log_probs", "full"): [torch.tensor([0.0, -3.0, -2.5])],
        }
        assistant = [[False, False, True]]
        td = batches.ids_batch([[5, 6, 7]], [1], assistant=assistant, extra=rows)
        assert samples_from_batch(td)[0].kl == [0.5]
        td = batches.ids_batch(
            [[5, 6, 7]], [1], assistant=assistant, extra={**rows, "kl_mask": [torch.tensor([False, True, False])]}
        )
        assert samples_from_batch(td)[0].kl == [2.0]

    def test_what_is_not_scored_is_refused(self):
        rows = {("log_probs", "full"): [torch.tensor([0.0, math.nan])]}
        td = batches.ids_batch([[5, 6]], [1], extra={("log_probs", "full"): [torch.tensor([0.0, -1.0])]})
        with pytest.raises(InputError, match=r"no \('ref_log_probs', 'full'\), neither under 'next' nor at the root"):
            samples_from_batch(td)
        with pytest.raises(MissingLogProbError, match=r"\('log_probs', 'full'\): sample 0, token 1 of 2"):
            samples_from_batch(batches.ids_batch([[5, 6]], [1], extra=rows))
