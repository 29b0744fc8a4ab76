"""What a store shows before the first step: each number against its definition on models whose whole vocabulary is known, and the rule."""

import html
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve

from lopd import MemoryStore, ZarrStore, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import ArgumentError, InvalidRecordError, MissingScoresError, NoSuchRowError
from lopd.guards import advise, measure_start
from lopd.guards.start import MAX_WEAK_TAIL
from lopd.guards.watch import MAX_TAIL
from lopd.records import AdvantageSummary, ModelId, SamplingParams, Scores, TopK
from lopd.records.drift import TAIL
from lopd.records.estimates import RolloutSums
from lopd.records.rollouts import policy_column
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout
from lopd.tools.command import main
from lopd.tools.facts import start_rows
from lopd.tools.report import TokenReport, write_run_report

VOCAB, LENGTH = 300, 9
MANIFEST = tiny_manifest(VOCAB)
POLICY = evolve(tiny_provenance(), model=MANIFEST.policy)
NEUTRAL = MANIFEST.sampling


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def support(logprobs, ids, drawn=()):
    """Return a support of these ids, and of some that were drawn, with all that is left as its tail."""
    distinct = np.take_along_axis(logprobs, ids, -1)
    every = np.concatenate([ids, *[d[:, None] for d in drawn]], -1)
    tail = np.clip(1 - np.exp(distinct).sum(-1), 0, 1)
    return TopK(every, np.take_along_axis(logprobs, every, -1), tail, len(drawn))


def most_likely(logprobs, k):
    return np.argsort(-logprobs, -1)[:, :k]


class Known:
    """Rollouts of a policy and a teacher whose distributions are known, two of each prompt; every fourth token does not count."""

    def __init__(self, rollouts=24, distance=0.7, seed=0):
        rng = np.random.default_rng(seed)
        self.policy = [log_softmax(2 * rng.normal(size=(LENGTH, VOCAB))) for _ in range(rollouts)]
        self.teacher = [log_softmax(own + distance * rng.normal(size=own.shape)) for own in self.policy]
        self.on = np.arange(LENGTH) % 4 > 0
        self.rollouts = []
        for i, own in enumerate(self.policy):
            ids = np.array([rng.choice(VOCAB, p=np.exp(p)) for p in own])
            values = {"loss_mask": self.on, "behavior_logprobs": own[np.arange(LENGTH), ids]}
            self.rollouts.append(tiny_rollout(f"p{i // 2:02}/s{i % 2}/g0", ids, **values))

    def sampled(self, of):
        return [logprobs[np.arange(LENGTH), r.response_ids] for r, logprobs in zip(self.rollouts, of, strict=True)]

    def column(self, of, supports=None):
        supports = supports or [None] * len(of)
        return [Scores.of(r, s, top_k=k) for r, s, k in zip(self.rollouts, self.sampled(of), supports, strict=True)]

    def store(self, teacher_k=0, policy_k=0, store=None):
        store = MemoryStore(MANIFEST) if store is None else store
        store.append(self.rollouts)
        for name, of, k, made in (("teacher", self.teacher, teacher_k, tiny_provenance()), ("own", self.policy, policy_k, POLICY)):
            supports = [support(p, most_likely(p, k)) for p in of] if k else None
            store.append_scores(name, evolve(made, top_k=k), self.column(of, supports))
        return store

    def gaps(self):
        pairs = zip(self.sampled(self.teacher), self.sampled(self.policy), strict=True)
        return [(np.float32(t).astype(float) - np.float32(s))[self.on] for t, s in pairs]


@pytest.fixture(scope="module")
def known():
    return Known()


def by_prompt(values):
    """Return the estimate of a mean over tokens from (M,) values of each rollout, two rollouts to a prompt."""
    sums = np.array([float(np.sum(v)) for v in values])
    return RolloutSums(sums, np.array([float(len(v)) for v in values])).pooled(2).per_token()


def assert_estimate(found, values, abs_=1e-6):
    wanted = by_prompt(values)
    assert (found.mean, found.ci95) == pytest.approx((wanted.mean, wanted.ci95), abs=abs_)
    assert (found.clusters, found.values) == (wanted.clusters, wanted.values)


def test_the_overlap_is_the_share_of_common_ids_among_the_k_most_likely(known):
    start = measure_start(known.store(64, 70), ref="own")
    assert set(start.overlap) == {8, 16, 64}
    for k, found in start.overlap.items():
        shares = []
        for theirs, mine in zip(known.teacher, known.policy, strict=True):
            both = zip(most_likely(theirs, k)[known.on], most_likely(mine, k)[known.on], strict=True)
            shares.append([len({*t.tolist()} & {*m.tolist()}) / k for t, m in both])
        assert_estimate(found, shares)
    assert "overlap" not in start.missing


def test_the_mass_outside_is_between_its_ends_and_sampled_tokens_estimate_it(known):
    start = measure_start(known.store(16, 40), ref="own")
    exact, absent = [], []
    for theirs, mine, rollout in zip(known.teacher, known.policy, known.rollouts, strict=True):
        ids = most_likely(theirs, 16)
        exact.append((1 - np.exp(np.take_along_axis(mine, ids, -1)).sum(-1))[known.on])
        absent.append((ids != rollout.response_ids[:, None]).all(-1)[known.on])
    least, most = start.outside
    assert 0.01 < least.mean < by_prompt(exact).mean < most.mean < 1
    assert most.mean - least.mean == pytest.approx(by_prompt([1 - np.exp(np.sort(p)[known.on, -40:]).sum(-1) for p in known.policy]).mean)
    assert_estimate(start.sampled_outside, absent)
    whole = measure_start(known.store(16, VOCAB), ref="own")
    for end in whole.outside:
        assert_estimate(end, exact)


def test_the_reverse_kl_of_buckets_grows_with_the_supports_up_to_that_of_the_whole_vocabulary(known):
    found = [measure_start(known.store(k, k), ref="own") for k in (1, 8, 64, VOCAB)]
    bounds = [start.bucket_kl.mean for start in found]
    exact = [(np.exp(p) * (p - t)).sum(-1)[known.on] for t, p in zip(known.teacher, known.policy, strict=True)]
    assert 0 < bounds[0] < bounds[1] < bounds[2] < bounds[3]
    assert_estimate(found[-1].bucket_kl, exact)
    assert_estimate(found[0].reverse_kl, [-gap for gap in known.gaps()])


def test_the_advantages_are_summarised_over_the_tokens_that_count(known):
    far = Known(rollouts=8, distance=6.0)
    start = measure_start(far.store(), ref="own")
    gaps = np.concatenate(far.gaps())
    sizes = np.sort(np.abs(gaps))[::-1]
    assert start.advantages == AdvantageSummary.of(gaps)
    assert start.sizes == pytest.approx(np.quantile(sizes, (0.5, 0.9, 0.99, 0.999)))
    assert (start.beyond_tail, start.beyond_clip) == (np.mean(sizes > 5), np.mean(sizes > 10))
    assert 0 < start.beyond_clip < start.beyond_tail
    assert start.heaviest == pytest.approx(sizes[: round(sizes.size / 100) or 1].sum() / sizes.sum())
    assert (start.rollouts, start.available, start.tokens, start.floored) == (8, 8, gaps.size, 0)


def test_floored_tokens_are_counted_and_two_equal_columns_have_no_heavy_tokens(known):
    store = MemoryStore(MANIFEST)
    store.append(known.rollouts)
    floored = [np.where(np.arange(LENGTH) == 5, -100.0, -1.0) for _ in known.rollouts]
    store.append_scores("teacher", tiny_provenance(), [Scores.of(r, s) for r, s in zip(known.rollouts, floored, strict=True)])
    assert measure_start(store).floored == len(known.rollouts)
    store.append_scores("own", POLICY, known.column(known.policy))
    store.append_scores("same", tiny_provenance("twin"), known.column(known.policy))
    same = measure_start(store, teacher="same", ref="own")
    assert (same.heaviest, same.reverse_kl.mean, same.verdict) == (0.0, 0.0, "offline")


def test_candidates_and_drawn_tokens_are_not_the_models_own(known):
    """A column of 10 candidates of the policy, 20 own tokens outside of these and 3 drawn ones keeps 20 most likely tokens of its own."""
    rng = np.random.default_rng(1)
    mixed, mine, exact, shares = [], [], [], []
    for theirs, own in zip(known.teacher, known.policy, strict=True):
        drawn = [rng.integers(0, VOCAB, LENGTH) for _ in range(3)]
        candidates = most_likely(own, 10)
        outside = theirs.copy()
        np.put_along_axis(outside, candidates, -np.inf, -1)
        ids = np.concatenate([candidates, most_likely(outside, 20)], -1)
        mixed.append(support(theirs, ids, drawn))
        mine.append(support(own, most_likely(own, 30), drawn))
        exact.append((1 - np.exp(np.take_along_axis(own, ids, -1)).sum(-1))[known.on])
        both = zip(most_likely(theirs, 16)[known.on], most_likely(own, 16)[known.on], strict=True)
        shares.append([len({*t.tolist()} & {*m.tolist()}) / 16 for t, m in both])
    store = MemoryStore(MANIFEST)
    store.append(known.rollouts)
    store.append_scores("teacher", evolve(tiny_provenance(), top_k=33, candidates=10, drawn=3), known.column(known.teacher, mixed))
    store.append_scores("policy", evolve(POLICY, top_k=33, drawn=3), known.column(known.policy, mine))
    start = measure_start(store)
    assert start.ref == "policy"
    assert set(start.overlap) == {8, 16}
    assert_estimate(start.overlap[16], shares)
    assert start.outside[0].mean < by_prompt(exact).mean < start.outside[1].mean
    assert start.missing["overlap"].endswith("there are 20 in 'teacher' and 30 in 'policy'")


def test_the_reference_is_the_column_of_the_policy_that_tells_most(known):
    assert measure_start(known.store(8, 0)).ref == "behavior"
    assert measure_start(known.store(8, 8)).ref == "own"
    silent = MemoryStore(MANIFEST)
    silent.append([evolve(r, behavior_logprobs=None) for r in known.rollouts])
    for name, of, made in (("teacher", known.teacher, tiny_provenance()), ("own", known.policy, POLICY)):
        silent.append_scores(name, made, known.column(of))
    assert measure_start(silent).ref == "own"
    pilot = MemoryStore(MANIFEST)
    pilot.append([evolve(r, behavior_logprobs=None) for r in known.rollouts])
    pilot.append_scores("teacher", tiny_provenance(), known.column(known.teacher))
    pilot.append_scores("own", POLICY, known.column(known.policy)[1:12:2])
    found = measure_start(pilot, count=12)
    assert (found.ref, found.available) == ("own", 6), "though none of these is among 12 of 24, evenly spaced"


def test_a_round_is_measured_by_the_column_of_its_policy_and_several_by_what_each_reported(known):
    store, later = MemoryStore(MANIFEST), ModelId("student", "step-5", "float32")
    store.begin_generation(1, later)
    rounds = [evolve(r, generation=i % 2) for i, r in enumerate(known.rollouts)]
    store.append(rounds)
    own = known.column(known.policy, [support(p, most_likely(p, 8)) for p in known.policy])
    store.append_scores("teacher", tiny_provenance(), known.column(known.teacher))
    for generation, model in enumerate((POLICY.model, later)):
        store.append_scores(policy_column(generation), evolve(POLICY, model=model, top_k=8), own[generation::2])
        start = measure_start(store, rows=np.arange(generation, 24, 2))
        assert (start.ref, start.available) == (policy_column(generation), 12)
        assert_estimate(start.reverse_kl, [value for gap in known.gaps()[generation::2] for value in (-gap, [])])
    start = measure_start(store)
    assert (start.ref, start.available) == ("behavior", 24)
    assert start.missing["overlap"].endswith("of the policy of a round they are in 'policy', which is the `ref` of its rollouts")
    assert measure_start(store, ref="policy").available == 12
    store.append_scores("own", POLICY, known.column(known.policy))
    with pytest.raises(
        InvalidRecordError, match="column 'own' was scored by policy@rev-p, expected the policy that sampled, student@step-5"
    ):
        measure_start(store, ref="own")


def test_a_round_without_log_probs_of_its_policy_is_told_what_gives_them(known):
    silent = MemoryStore(MANIFEST)
    silent.begin_generation(1, ModelId("student", "step-5", "float32"))
    silent.append([evolve(r, generation=i % 2, behavior_logprobs=None) for i, r in enumerate(known.rollouts)])
    silent.append_scores("teacher", tiny_provenance(), known.column(known.teacher))
    own = known.column(known.policy, [support(p, most_likely(p, 8)) for p in known.policy])
    silent.append_scores("policy", evolve(POLICY, top_k=8), own[::2])
    assert measure_start(silent).ref == "policy"
    with pytest.raises(MissingScoresError, match="score the policy into another column and pass `ref=`"):
        measure_start(silent, rows=np.arange(1, 24, 2))


def test_drawn_tokens_alone_are_not_a_support(known):
    store = MemoryStore(MANIFEST)
    store.append(known.rollouts)
    drawn = [
        TopK(r.response_ids[:, None], s[:, None], np.ones(LENGTH), 1)
        for r, s in zip(known.rollouts, known.sampled(known.policy), strict=True)
    ]
    store.append_scores("policy", evolve(POLICY, top_k=1, drawn=1), known.column(known.policy, drawn))
    store.append_scores("teacher", evolve(tiny_provenance(), top_k=1, drawn=1, candidates=0), known.column(known.teacher, drawn))
    start = measure_start(store)
    assert (start.ref, start.overlap, start.outside, start.sampled_outside) == ("policy", {}, None, None)


def test_what_is_missing_is_said_and_not_invented(known):
    start = measure_start(known.store(8, 0))
    assert (start.bucket_kl, start.outside, start.overlap) == (None, None, {})
    assert start.sampled_outside is not None
    assert set(start.missing) == {"bucket_kl", "outside", "overlap"}
    assert start.missing["overlap"] == "needs the most likely tokens (top_k) of both models; they are not stored in 'behavior'"
    bare = measure_start(known.store(0, 0))
    assert bare.sampled_outside is None
    assert bare.missing["sampled_outside"] == "needs the teacher's most likely tokens (top_k); they are not stored in 'teacher'"
    hot = MemoryStore(evolve(MANIFEST, sampling=SamplingParams(max_new_tokens=8, temperature=0.7)))
    hot = measure_start(known.store(8, 0, hot))
    assert hot.sampled_outside is None
    assert hot.missing["reverse_kl"] == "tokens were drawn at temperature 0.7 and top_p 1, so the mean is not that of the policy itself"
    store = known.store(8, 0)
    few = evolve(store.read([0])[0].rollout, rollout_id="hot", sampler_logprobs=store.read([0])[0].rollout.behavior_logprobs)
    store.append([few])
    store.append_scores("teacher", store.columns["teacher"], [evolve(store._scores["teacher"][0], rollout_id="hot")])
    mixed = measure_start(store)
    assert mixed.sampled_outside is None
    assert mixed.missing["sampled_outside"].endswith("tokens of 1 rollouts were not drawn at temperature 1 and top_p 1")


def test_evenly_spaced_rollouts_are_read_and_no_more(known):
    store = known.store(8, 8)
    start = measure_start(store, count=5)
    assert (start.rollouts, start.available) == (5, 24)
    ends = measure_start(store, count=2, ref="own")
    assert_estimate(ends.reverse_kl, [-known.gaps()[0], [], -known.gaps()[23], []])
    one = measure_start(store, rows=np.array([3]))
    assert (one.rollouts, one.reverse_kl.ci95) == (1, math.inf)


def test_what_a_source_and_a_scorer_keep_is_measured(llama, near_teacher, tokenizer, prompts):
    """Against columns that keep the whole vocabulary of 96."""
    source = HFSource(llama, tokenizer, SamplingParams(max_new_tokens=6, samples_per_prompt=2, candidates=16, drawn=2))
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, HFScorer(near_teacher, tokenizer, top_k=16, candidates=4, drawn=2))
    for column, model in (("whole", near_teacher), ("own", llama)):
        score_rollouts(store, HFScorer(model, tokenizer, top_k=96), column=column)
    start, whole = measure_start(store), measure_start(store, teacher="whole", ref="own")
    assert start.ref == "policy"
    assert {k: e.mean for k, e in start.overlap.items()} == pytest.approx({k: whole.overlap[k].mean for k in (8, 16)})
    assert 0 < start.bucket_kl.mean < whole.bucket_kl.mean
    assert start.reverse_kl.mean == pytest.approx(whole.reverse_kl.mean, abs=1e-4)
    assert 0 < start.outside[0].mean <= start.outside[1].mean < 1


@pytest.mark.parametrize(
    ("tail", "verdict", "ratio"),
    [
        (0.0, "offline", False),
        (0.02, "offline", False),
        (0.021, "offline", True),
        (0.04, "offline", True),
        (0.041, "more SFT first", False),
    ],
)
def test_the_rule(tail, verdict, ratio):
    found, reason = advise(tail)
    assert found == verdict
    assert ("without a ratio" in reason) == ratio


def test_the_verdict_is_that_of_the_rule_on_the_reported_numbers(known):
    for start in (measure_start(known.store(64, 64), ref="own"), measure_start(Known(8, distance=6.0).store())):
        assert (start.verdict, start.reason) == advise(start.advantages.tail)


def test_what_cannot_be_measured_is_one_clear_error(known):
    store = known.store()
    with pytest.raises(MissingScoresError, match="column 'nobody' is absent, expected one of"):
        measure_start(store, teacher="nobody")
    with pytest.raises(MissingScoresError, match="0 of 24 rollouts have scores in both 'teacher' and 'nobody'"):
        measure_start(store, ref="nobody")
    with pytest.raises(InvalidRecordError, match=r"column 'teacher' was scored by teacher@rev-teacher.*expected the policy that sampled"):
        measure_start(store, ref="teacher")
    bare = MemoryStore(MANIFEST)
    bare.append([evolve(r, behavior_logprobs=None) for r in known.rollouts])
    bare.append_scores("teacher", tiny_provenance(), known.column(known.teacher))
    with pytest.raises(MissingScoresError, match=r"'teacher' and 'behavior', .*; sample with an engine that .* and pass `ref=`\.$"):
        measure_start(bare)
    with pytest.raises(InvalidRecordError, match="it has 0 rollouts"):
        measure_start(MemoryStore(MANIFEST))
    with pytest.raises(NoSuchRowError):
        measure_start(store, rows=np.array([24]))
    with pytest.raises(InvalidRecordError, match="count is 0"):
        measure_start(store, count=0)
    for wrong in ({"teacher": ["teacher"]}, {"ref": 5}):
        with pytest.raises(ArgumentError, match="expected a str; pass its name"):
            measure_start(store, **wrong)
    for wrong in (math.nan, 1.5, -0.1, "low"):
        with pytest.raises(InvalidRecordError, match=r"Start: .* expected a"):
            advise(wrong)
    masked = MemoryStore(MANIFEST)
    masked.append([tiny_rollout("r", loss_mask=[False] * 3, behavior_logprobs=[-1.0] * 3)])
    masked.append_scores("teacher", tiny_provenance(), [Scores.of(masked.read([0])[0].rollout, [-1.0] * 3)])
    with pytest.raises(InvalidRecordError, match="0 tokens count in the 1 rollouts"):
        measure_start(masked)


# --- what the tools show --------------------------------------------------------------------------------------------------------------


def test_the_doctor_shows_each_start_and_what_is_missing(known, tmp_path, capsys):
    store = known.store(16, 16, ZarrStore.create(str(tmp_path / "s.zarr"), MANIFEST))
    assert main(["info", str(tmp_path / "s.zarr"), "--sample", "20"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    start = measure_start(store, count=20)
    for said in (
        "Before the first step, teacher - own",
        f"{start.verdict}: ",
        str(start.overlap[16]),
        f"{start.outside[0].mean:.4f} to {start.outside[1].mean:.4f}",
        "overlap@64 not measured: needs k of the model's own most likely tokens in both columns; there are 16 in 'teacher' and 16 in 'own'",
        "20 of 24, evenly spaced",
    ):
        assert said in shown, said
    assert main(["info", str(tmp_path / "s.zarr"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["starts"]["teacher"]
    whole = measure_start(store)
    assert (printed["verdict"], printed["overlap"]["16"]["mean"]) == (whole.verdict, whole.overlap[16].mean)


def test_the_doctor_says_why_nothing_is_known_and_writes_json_without_infinities(known, tmp_path, capsys):
    store = ZarrStore.create(str(tmp_path / "s.zarr"), MANIFEST)
    store.append([evolve(known.rollouts[0], behavior_logprobs=None)])
    store.append_scores("teacher", tiny_provenance(), known.column(known.teacher)[:1])
    assert main(["info", str(tmp_path / "s.zarr")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Before the first step, teacher: not known: " in shown
    assert "0 of 1 rollouts have scores in both 'teacher' and 'behavior'" in shown
    store.append_scores("own", POLICY, known.column(known.policy)[:1])
    assert main(["info", str(tmp_path / "s.zarr"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["starts"]["teacher"]["reverse_kl"]["ci95"] is None
    assert main(["info", str(tmp_path / "s.zarr")]) == 0
    assert "one draw has no interval" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_page_states_the_rule_as_it_is():
    page = (Path(__file__).parents[1] / "docs" / "choose.md").read_text()
    assert f"| more SFT first | more than {MAX_WEAK_TAIL * 100:g} % of the advantages are below {TAIL:g} nats |" in page
    assert f"more than {MAX_TAIL * 100:g} % of the advantages below {TAIL:g} nats" in page


def test_the_run_report_shows_the_start_or_why_it_is_not_known(known, tmp_path):
    store = known.store(16, 16)
    store.append_scores("other", evolve(tiny_provenance(), model=ModelId("other", "r", "float32")), known.column(known.policy))
    path = tmp_path / "run.html"
    write_run_report(path, store)
    text = html.unescape(path.read_text())
    start = measure_start(store)
    assert f"<dd>{start.overlap[8]}</dd>" in text
    assert f'<dd class="value good">{start.verdict}</dd>' in text
    assert "overlap@64</dt><dd>not measured: needs k" in text
    write_run_report(path, store, report=TokenReport(sample=2))
    assert set(start_rows(start)) <= set(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", html.unescape(path.read_text()))), "that of `lopd info`"
    write_run_report(path, store, report=TokenReport("teacher", "other"))
    text = html.unescape(path.read_text())
    assert "column 'other' was scored by other@r, expected the policy that sampled" in text
    assert 'id="start"' not in text
