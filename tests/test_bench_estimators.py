"""The benchmark of estimators: its judges against plain sums and repetitions, and a tiny run."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_estimators
import estimator_states
import estimator_worlds
from estimators import ONLINE, PLAIN, RATIO, estimators, supported, whole


def test_the_online_gradient_is_that_of_the_mean_over_all_rollouts() -> None:
    world = evolve(estimator_worlds.modes(vocabulary=3, count=2), horizon=3)
    models = estimator_worlds.make_models(world, 0, 0.5)
    advantages_SV = models.teacher - models.student
    total_SV = torch.zeros_like(advantages_SV)
    for tokens in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
        state, probability, visited = 0, 1.0, []
        for token in tokens:
            probability *= float(models.student[state, token].exp())
            visited.append((state, token))
            state = int(world.next_SV[state, token])
        for at, token in visited:
            score_V = -models.student[at].exp()
            score_V[token] += 1
            total_SV[at] -= probability * advantages_SV[at, token] * score_V
    torch.testing.assert_close(estimator_worlds.exact(world, models, models.student), total_SV.T)


def test_gradients_of_the_fused_loss_have_no_bias_where_they_claim_so_and_the_known_one_elsewhere() -> None:
    chosen = [*estimators((4,)), whole(16), ONLINE]
    rows = {row["estimator"]: row for row in estimator_worlds.judge(estimator_worlds.modes(), chosen, 0.3, 0, batches=8, rollouts=64)}
    assert max(row["stored_bias_z"] for row in rows.values() if row["unbiased"]) < bench_estimators.LARGEST_Z
    assert abs(rows[ONLINE.name]["bias_z"]) < bench_estimators.LARGEST_Z
    assert min(rows[name]["stored_bias_z"] for name in (PLAIN.name, "teacher's top K, 4", "candidates, 4")) > bench_estimators.LARGEST_Z


@pytest.mark.parametrize("estimator", [PLAIN, RATIO, *supported(4)], ids=lambda estimator: estimator.name)
def test_what_is_drawn_has_the_bias_that_sums_over_the_vocabulary_have(estimator) -> None:
    states, generator = estimator_states.random_states(12, 40, 6, drift=1.0), torch.Generator().manual_seed(0)
    found = estimator_states.Judge(states, 384, 400).judge(estimator, generator)
    assert estimator_states.check_fused(states, estimator, generator) < 1e-5
    if not estimator.support.drawn:
        exact = estimator_states.bias_by_logits(states, estimator)
        assert (exact < 1e-5) == estimator.unbiased
    assert found["bias_z"] < bench_estimators.LARGEST_Z or not estimator.unbiased
    assert found["rmse"] ** 2 == pytest.approx(found["bias"] ** 2 + found["variance"] / 384, rel=0.1, abs=1e-3)


def test_a_tiny_run_writes_its_figures(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_estimators.py", "--quick", "--out", str(tmp_path)])
    bench_estimators.main()
    tables = importlib.import_module("docs_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert len(tables.estimators()) == 2 + len(tables.ESTIMATORS)
    assert (tmp_path / "bench_estimators.png").stat().st_size > 0
    assert "met" in capsys.readouterr().out
