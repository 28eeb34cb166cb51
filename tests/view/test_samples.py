"""Scored samples: the file, what it refuses, and what a batch becomes."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict, lazy_stack

from tests import batches, oracle
from tests.oracle import KL_TOLERANCE
from vllm_kl import RetrieveKL, Sample, read_samples, samples_from_batch, write_samples
from vllm_kl.errors import InputError, MissingLogProbError, OptionError
from vllm_kl.view.samples import with_texts

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
        path = written(
            tmp_path / "s.jsonl", {**ENTRY, "group": 3, "reward": None}, b"", {**ENTRY, "kl": [9, 8]}
        )
        first, second = read_samples(path)
        assert first == Sample(**ENTRY)
        assert (first.mask, first.kl) == ([False, True, True], [0.5, -1.0])
        assert (first.tokens, first.reward, first.ref_version) == (None, None, None)
        assert second.kl == [9, 8]

    def test_several_spans_and_no_scored_token_are_ordinary(self, tmp_path):
        spans = {**ENTRY, "token_ids": [1, 2, 3, 4], "mask": [False, True, False, True]}
        none = {"token_ids": [1], "log_probs": [], "ref_log_probs": []}
        first, second = read_samples(written(tmp_path / "s.jsonl", spans, none))
        assert first.mask == [False, True, False, True]
        assert (second.mask, second.kl) == ([False], [])

    def test_everything_comes_back(self, tmp_path):
        full = Sample(
            **{**ENTRY, "token_ids": [5, 6, 7, 8]},
            mask=[False, True, False, True],
            kl=[0.1, 0.2],
            tokens=["a", "</script>", "\ud800\n", ""],
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
            ({**ENTRY, "mask": [True, False, False]}, r"mask: keeps token 0, which has no log-prob"),
            (
                {**ENTRY, "mask": [False, False, True]},
                r"mask: keeps 1 tokens, expected 2, one per value of log_probs",
            ),
            ({**ENTRY, "mask": [0, 1, 1]}, r"mask: value 0 is 0, expected true or false"),
            ({**ENTRY, "token_ids": [5]}, r"log_probs: got 2 values, expected at most 0"),
            (
                {**ENTRY, "token_ids": [5, 6]},
                r"log_probs: got 2 values, expected at most 1: one per token id, without the first",
            ),
            (
                {**ENTRY, "token_ids": [5, 6, 2**31]},
                r"token_ids: value 2 is 2147483648, expected an integer of at least 0 and below",
            ),
            (
                {**ENTRY, "log_probs": [5.0, -1.0]},
                r"log_probs: value 0 is 5\.0, expected a finite number .*, at most 0 \(0\.001",
            ),
            (
                {**ENTRY, "ref_log_probs": [-1.0, 0.002]},
                r"ref_log_probs: value 1 is 0\.002, expected a finite number .*, at most 0",
            ),
            (
                {**ENTRY, "log_probs": [-1.0, -1e308]},
                r"log_probs: value 1 is -1e\+308, expected .* float32's range",
            ),
            (
                {**ENTRY, "log_probs": [-1.0, -(10**400)]},
                r"log_probs: value 1 is -1000.*, expected .* float32's range",
            ),
            ({**ENTRY, "kl": [1e308, -1e308]}, r"kl: value 0 is 1e\+308, expected .* float32's range"),
            ({**ENTRY, "reward": 10**400}, r"reward: got 1000.*, expected .* float32's range"),
            (
                {**ENTRY, "token_ids": [5, 6, -1]},
                r"token_ids: value 2 is -1, expected an integer of at least 0",
            ),
            ({**ENTRY, "token_ids": [5, 6, 7.0]}, r"token_ids: value 2 is 7\.0, expected an integer"),
            ({**ENTRY, "token_ids": "567"}, r"token_ids: got '567', expected a list"),
            (
                {**ENTRY, "log_probs": [-1.0, math.nan]},
                r"log_probs: value 1 is nan, expected a finite number",
            ),
            (
                {**ENTRY, "ref_log_probs": [-math.inf, -1.0]},
                r"ref_log_probs: value 0 is -inf, expected a finite number",
            ),
            ({**ENTRY, "kl": [None, 0.0]}, r"kl: value 0 is None, expected a finite number"),
            ({**ENTRY, "reward": "good"}, r"reward: got 'good', expected a finite number"),
            ({**ENTRY, "policy_version": 1.5}, r"policy_version: got 1\.5, expected an integer or a text"),
            ({"token_ids": [5]}, r"log_probs is missing; the line has token_ids"),
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
        with pytest.raises(
            InputError, match=r"s\.jsonl: holds no samples, expected one JSON object per line"
        ):
            read_samples(written(tmp_path / "s.jsonl", b"  "))
        with pytest.raises(FileNotFoundError):
            read_samples(tmp_path / "none.jsonl")

    def test_rounding_above_0_and_the_ends_of_float32_are_ordinary(self):
        end = torch.finfo(torch.float32).max
        sample = Sample(token_ids=[1, 2, 3], log_probs=[1e-3, 0.0], ref_log_probs=[-end, -end], reward=-end)
        assert sample.kl == [end, end]

    @dataclass(frozen=True, kw_only=True)
    class Noted(Sample):
        note: object = None

    @pytest.mark.parametrize("bad", [{1, 2}, math.nan, [[math.inf]]], ids=str)
    def test_a_sample_that_cannot_be_written_leaves_the_file_as_it_was(self, tmp_path, bad):
        write_samples(tmp_path / "s.jsonl", [Sample(**ENTRY)])
        with pytest.raises(
            InputError, match=r"sample 1 cannot be written: .*; expected a Sample whose fields are"
        ):
            write_samples(tmp_path / "s.jsonl", [Sample(**ENTRY, reward=1.0), self.Noted(**ENTRY, note=bad)])
        assert read_samples(tmp_path / "s.jsonl") == [Sample(**ENTRY)]
        assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]

    def test_a_file_is_replaced_through_links_and_keeps_its_mode(self, tmp_path):
        kept = tmp_path / "kept.jsonl"
        kept.write_text("old")
        kept.chmod(0o640)
        (tmp_path / "link.jsonl").symlink_to(kept)
        write_samples(tmp_path / "link.jsonl", [Sample(**ENTRY)])
        assert read_samples(kept) == [Sample(**ENTRY)]
        assert (tmp_path / "link.jsonl").is_symlink()
        assert kept.stat().st_mode & 0o777 == 0o640
        write_samples("/dev/null", [Sample(**ENTRY)])
        assert Path("/dev/null").is_char_device()
        with pytest.raises(FileNotFoundError, match=r"none/s\.jsonl"):
            write_samples(tmp_path / "none" / "s.jsonl", [Sample(**ENTRY)])

    def test_tensors_are_taken_as_lists(self):
        sample = Sample(
            token_ids=torch.tensor([5, 6]), log_probs=torch.tensor([-1.0]), ref_log_probs=torch.tensor([-2.0])
        )
        assert (sample.token_ids, sample.kl) == ([5, 6], [1.0])


class TestTexts:
    def test_each_token_is_decoded_by_itself_where_there_are_no_texts(self, policy_path):
        ids = [22, 220, 198, EOS]
        bare = Sample(token_ids=ids, log_probs=[-1.0], ref_log_probs=[-2.0])
        named = Sample(token_ids=[22], log_probs=[], ref_log_probs=[], tokens=["seven"])
        got = with_texts([bare, named], str(policy_path))
        assert got[0].tokens == ["7", " ", "\n", "<|im_end|>"]
        assert got[1] == named
        with pytest.raises(OptionError, match="would have no effect: every sample has its tokens' texts"):
            with_texts(got, str(policy_path))

    @pytest.mark.parametrize("config", ["{broken", '{"model_type": "no-such-model"}', "[1]"])
    def test_a_tokenizer_that_cannot_be_loaded_is_refused_by_name(self, tmp_path, config):
        for name in ("tokenizer_config.json", "tokenizer.json"):
            (tmp_path / name).write_text(config)
        # Broken: an OSError of its own.
        (tmp_path / "config.json").write_text(config if config != "{broken" else "{}")
        bare = Sample(token_ids=[22, 220], log_probs=[-1.0], ref_log_probs=[-2.0])
        with pytest.raises(
            InputError, match=f"tokenizer '{tmp_path}' cannot be loaded: .*; expected a folder or a name"
        ):
            with_texts([bare], str(tmp_path))


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
            for kl in (
                sample.kl,
                [p - q for p, q in zip(sample.log_probs, sample.ref_log_probs, strict=True)],
            ):
                torch.testing.assert_close(torch.tensor(kl).double(), want, rtol=0, atol=KL_TOLERANCE)

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    @pytest.mark.parametrize("stored", ["ragged ids", "dense ids"])
    def test_every_layout_gives_the_same_samples(
        self, make_gen, make_reference, truth, stored, pad_output, padding_side
    ):
        is_ragged = stored == "ragged ids"
        td = (
            batches.ids_batch(SEQUENCES, PROMPTS)
            if is_ragged
            else batches.dense_batch(SEQUENCES, PROMPTS, PAD)
        )
        gen, ref = make_gen("transformers", pad_output=pad_output), make_reference(pad_output=pad_output)
        td = RetrieveKL(gen, ref, padding_side=padding_side)(td)
        self.check(samples_from_batch(td, padding_side=padding_side), truth)
        if is_ragged and pad_output:
            other = {"left": "right", "right": "left"}[padding_side]
            with pytest.raises(InputError, match=f"values where padding was expected, on the {other}"):
                samples_from_batch(td, padding_side=other)

    def test_under_next_with_texts_rewards_and_versions(
        self, make_gen, make_reference, truth, tokenizer, tmp_path
    ):
        td = batches.ids_batch(SEQUENCES, PROMPTS, extra={"query": ["a", "b", "c", "d"]})
        step = [TensorDict(reward=torch.full((1, 1), 2.0), policy_version=torch.tensor(7)) for _ in SEQUENCES]
        td["next"] = lazy_stack(step)
        td = RetrieveKL(
            make_gen("transformers", pad_output=False), make_reference(pad_output=False), coeff=0.5
        )(td)
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
            [[5, 6, 7]],
            [1],
            assistant=assistant,
            extra={**rows, "kl_mask": [torch.tensor([False, True, False])]},
        )
        assert samples_from_batch(td)[0].kl == [2.0]

    def test_what_is_not_scored_is_refused(self):
        rows = {("log_probs", "full"): [torch.tensor([0.0, math.nan])]}
        td = batches.ids_batch([[5, 6]], [1], extra={("log_probs", "full"): [torch.tensor([0.0, -1.0])]})
        with pytest.raises(InputError, match=r"no \('ref_log_probs', 'full'\) under 'next' or at the root"):
            samples_from_batch(td)
        with pytest.raises(MissingLogProbError, match=r"\('log_probs', 'full'\): sample 0, token 1 of 2"):
            samples_from_batch(batches.ids_batch([[5, 6]], [1], extra=rows))


class TestPaddingSide:
    """Ragged ids with results padded to one width: read from the wrong side they would be shifted."""

    IDS, PROMPTS = [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10]], [3, 3]

    def batch(self, side, *, mask=True, assistant=None, prompts=PROMPTS, span=None):
        """Values that name their token: t is -t under the policy and -2t under the reference."""
        masks = [torch.arange(len(ids)) >= 3 for ids in self.IDS] if span is None else span
        pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)  # noqa: E731
        values = [torch.where(m, -torch.arange(len(m)).float(), 0.0) for m in masks]
        extra = {("log_probs", "full"): pad(values), ("ref_log_probs", "full"): pad([2 * v for v in values])}
        if mask:
            extra["kl_mask"] = pad(masks)
        return batches.ids_batch(self.IDS, prompts, assistant=assistant, extra=extra)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
    def test_the_right_side_gives_every_value_its_token(self, side, mask):
        first, second = samples_from_batch(self.batch(side, mask=mask), padding_side=side)
        assert (first.mask, first.kl) == ([False, False, False, True], [3.0])
        assert (second.mask, second.kl) == ([False] * 3 + [True] * 3, [3.0, 4.0, 5.0])

    def test_a_shifted_mask_that_hides_in_the_zeros_of_the_prompt_is_refused(self):
        # [F F F T] and two of padding, read from the left: [F T F F]. Nothing but the stored prompt or mask
        # tells.
        message = (
            r"kl_mask: sample 0, token 1, read as padded on the left, is True, expected False, as in .*: pass"
        )
        with pytest.raises(InputError, match=message):
            samples_from_batch(self.batch("right"))
        assistant = [[t >= 3 for t in range(len(ids))] for ids in self.IDS]
        with pytest.raises(InputError, match=message):
            samples_from_batch(self.batch("right", prompts=None, assistant=assistant))

    def test_shifted_values_without_a_mask_of_their_own_are_refused(self):
        with pytest.raises(
            InputError,
            match=r"log_probs.*: sample 0, token 1, read as padded on the left, has a value outside",
        ):
            samples_from_batch(self.batch("right", mask=False))

    def test_a_mask_that_keeps_token_0_is_refused(self):
        span = [torch.arange(len(ids)) >= 2 for ids in self.IDS]
        with pytest.raises(
            InputError, match=r"kl_mask: sample 0, read as padded on the left, has a value at token 0"
        ):
            samples_from_batch(self.batch("right", prompts=None, span=span))
        span[1][0] = True  # the longest has no padding
        with pytest.raises(InputError, match=r"kl_mask: sample 1 keeps token 0, which has no log-prob"):
            samples_from_batch(self.batch("right", prompts=None, span=span), padding_side="right")

    def test_a_value_at_token_0_is_refused(self):
        span = [torch.arange(len(ids)) >= 2 for ids in self.IDS]
        with pytest.raises(
            InputError, match=r"log_probs.*: sample 0, read as padded on the left, has a value at token 0"
        ):
            samples_from_batch(self.batch("right", mask=False, span=span))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_mask_of_all_tokens_may_differ_from_that_of_the_assistant(self, side):
        span = [torch.arange(len(ids)) >= 1 for ids in self.IDS]
        first, _ = samples_from_batch(self.batch(side, span=span), padding_side=side)
        assert first.kl == [1.0, 2.0, 3.0]
