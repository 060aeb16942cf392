"""The study: proposals follow from seed and answers, kill -9 leaves no zombie, limits reach the sampler."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from paretune.errors import Incompatible, StoreError
from paretune.searches import study as studies
from paretune.searches.space import read
from paretune.searches.study import Study

SPACE = read("lora(r=[1..64 log], targets={attention, ffn})")


def opened(folder: Path, sampler: str = "random", **more: object) -> Study:
    return Study(f"sqlite:///{folder}/study.db", better=["higher", "lower"], sampler=sampler, **more)


def answered(study: Study, n: int) -> list[str]:
    """The recipes of n proposals, each answered with values that follow from it."""
    found = []
    for _ in range(n):
        proposal = study.propose(SPACE.draw)
        study.answer(proposal.number, [proposal.params["lora.r"] / 64, 1.0 + ("ffn" in proposal.recipe)])
        found.append(proposal.recipe)
    return found


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_study_that_is_opened_again_proposes_what_it_would_have(tmp_path, monkeypatch, sampler):
    monkeypatch.setattr(studies, "STARTUP", 3)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = answered(opened(tmp_path / "a", sampler, seed=5), 7)  # past the draws by chance
    first = answered(opened(tmp_path / "b", sampler, seed=5), 4)
    assert first + answered(opened(tmp_path / "b", sampler, seed=5), 3) == whole
    assert len(set(whole)) > 4


def test_another_seed_is_another_search():
    one, other = (Study(None, better=["higher", "lower"], sampler="random", seed=seed) for seed in (1, 2))
    assert answered(one, 4) != answered(other, 4)


def test_kill_9_leaves_a_zombie_that_is_buried_and_changes_no_later_draw(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    whole = answered(opened(tmp_path / "whole", seed=3), 5)
    before = answered(opened(tmp_path / "killed", seed=3), 2)
    pid = os.fork()
    if not pid:
        try:
            opened(tmp_path / "killed", seed=3).propose(SPACE.draw)
            (tmp_path / "proposed").touch()
            time.sleep(60)
        finally:
            os._exit(0)
    while not (tmp_path / "proposed").exists():
        time.sleep(0.01)
    study = opened(tmp_path / "killed", seed=3)
    assert study.bury() == 0  # its process is at work
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    started = time.monotonic()
    assert study.bury() == 1 and study.bury() == 0
    assert time.monotonic() - started < 5  # no lock is left that is waited for
    assert before + answered(study, 3) == whole


def test_a_draw_that_is_no_recipe_is_answered_as_failed():
    study = Study(None, better=["higher", "lower"], sampler="random")

    def draw(suggest):
        suggest.suggest_int("x", low=1, high=3)
        raise Incompatible("no")

    with pytest.raises(Incompatible):
        study.propose(draw)
    assert [t.state.name for t in study.study.trials] == ["FAIL"]


def test_what_is_fixed_is_drawn_so():
    study = Study(None, better=["higher", "lower"], sampler="random")
    assert study.propose(SPACE.draw, fixed={"lora.r": 7, "lora.targets": "ffn"}).recipe == 'lora(r=7, targets="ffn")'


def test_limits_are_what_the_sampler_is_told(tmp_path):
    study = opened(tmp_path)
    proposal = study.propose(SPACE.draw)
    study.answer(proposal.number, [0.5, 1.0], limits={"stored_mb": 0.25, "latency_p50_ms": 0.0})
    (trial,) = study.study.trials
    assert trial.system_attrs == {"constraints:stored_mb": 0.25, "constraints:latency_p50_ms": 0.0}


def test_a_gaussian_process_proposes_until_there_are_many_answers(monkeypatch):
    monkeypatch.setattr(studies, "FEW", 2), monkeypatch.setattr(studies, "STARTUP", 2), monkeypatch.setattr(studies, "MOST_GP", 5)
    made, itself = [], studies.surrogate.best
    monkeypatch.setattr(studies.surrogate, "best", lambda *args, **more: made.append(len(args[1])) or itself(*args, **more))
    study = Study(None, better=["higher", "lower"])
    assert len(set(answered(study, 6)[:5])) == 5 and made == [2, 3, 4]  # two by chance, three new ones by the model, then the other estimator
    study.propose(SPACE.draw, fixed={"lora.r": 7, "lora.targets": "ffn"})
    assert len(made) == 3  # nothing was open



def test_what_would_not_survive_a_kill_is_refused(tmp_path):
    with pytest.raises(StoreError, match="survives a killed process"):
        Study("memory", better=["higher", "lower"], sampler="random")
    with pytest.raises(StoreError, match="cannot be opened"):
        Study(f"sqlite:///{tmp_path}/not/there/study.db", better=["higher", "lower"], sampler="random")
    (tmp_path / "torn.db").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        Study(f"sqlite:///{tmp_path}/torn.db", better=["higher", "lower"], sampler="random")


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(StoreError, match=r"paretune\[search\]"):
        opened(tmp_path)
