from __future__ import annotations

import dataclasses

import pytest
import tiny
import work

from paretune import runs
from paretune.errors import Incompatible
from paretune.options import Options, Training
from paretune.pareto import intrinsic


@pytest.fixture
def backbone(tmp_path):
    tiny.model("bert", "base").save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@dataclasses.dataclass
class Scored:
    record: dict


@pytest.mark.parametrize(
    "scores, dims, wanted, tried",
    [
        ({"full": 0.80, "50": 0.5, "100": 0.719, "200": 0.721, "500": 0.9}, (500, 50, 200, 100), 200, [50, 100, 200]),
        ({"full": 0.80, "50": 0.5, "100": 0.719}, (50, 100), None, [50, 100]),
        ({"full": 0.5, "50": 0.45}, (50, 100), 50, [50]),
    ],
)
def test_the_least_d_that_reaches_nine_tenths(scores, dims, wanted, tried, backbone, tmp_path, monkeypatch):
    def made(plan, spelling):
        method = plan.recipe.phases[0][0]
        return Scored({"validation_score": scores[str(getattr(method, "d", "full"))]})

    monkeypatch.setattr(runs, "make", made)
    found = intrinsic.d90(work.text_task(), backbone=backbone, dims=dims, out=tmp_path)
    assert found == intrinsic.Hardness(wanted, scores["full"], {d: scores[str(d)] for d in tried})


def test_it_trains_and_keeps_its_runs(backbone, tmp_path, monkeypatch):
    given = work.text_task(train=48)
    options = Options(Training(epochs=4.0, batch=8, dtype="fp32"))
    how = {"backbone": backbone, "dims": (4, 64), "full": "full + schedule(lr=1e-2)", "recipe": "intrinsic_dimension + schedule(lr=0.05)", "out": tmp_path}
    found = intrinsic.d90(given, **how, options=options)
    assert 0 < found.full <= 1 and set(found.scores) <= {4, 64}
    spelled = sorted(runs.Run.read(path.parent).recipe for path in (tmp_path / "runs").glob("*/run.json"))
    assert len(spelled) == 1 + len(found.scores) and spelled[0] == "full + schedule(lr=0.01)" and spelled[1].startswith("intrinsic_dimension(d=4)")
    monkeypatch.setattr(runs.phases, "walk", None)  # a run that is there is not done again
    assert intrinsic.d90(given, **how, options=options) == found


def test_what_cannot_be_asked_says_so(backbone):
    with pytest.raises(Incompatible, match="has none; write it"):
        intrinsic.d90(work.text_task(), backbone=backbone, recipe="lora")
    perplexity = dataclasses.replace(work.text_task(), metric="perplexity")
    with pytest.raises(Incompatible, match="of perplexity less is better"):
        intrinsic.d90(perplexity, backbone=backbone)


def test_a_share_of_nothing_says_nothing(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make", lambda plan, spelling: Scored({"validation_score": -0.1}))
    with pytest.raises(Incompatible, match="full scored -0.1"):
        intrinsic.d90(work.text_task(), backbone=backbone, out=tmp_path)
