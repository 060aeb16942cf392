"""The model card: a header the hub reads, every cost with unit or reason, and names that stay names."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from pareto.synthetic import record

from paretune.meters.cost import MEASURED
from paretune.reports import card

PARSER = MarkdownIt("commonmark").enable("table")


def test_the_header_is_what_the_hub_reads() -> None:
    text = card.render(record("full"), license_id="apache-2.0")
    header = ModelCard(text).data.to_dict()
    assert header["license"] == "apache-2.0" and header["library_name"] == "transformers" and header["metrics"] == ["accuracy"]
    assert "license" not in ModelCard(card.render(record("full"))).data.to_dict()
    assert "not stated by the backbone" in card.render(record("full"))


def test_every_cost_has_a_value_or_a_reason() -> None:
    for energy in (True, False):
        text = card.render(record("lora(r=8) | merge", energy=energy))
        rows = text.split("## Costs")[1].split("\n\n")[1].splitlines()[2:]
        assert len(rows) == len(MEASURED)
        assert sum("not measured" in row for row in rows) == (0 if energy else 3)
    assert "energy per inference, estimated" in card.render(record("full")) and "factor between 0.33 and 3" in card.render(record("full"))


def test_packed_maps_have_their_slow_down_beside_both_baselines_and_the_machine() -> None:
    times = [{"tokens": n, "fp32": 6.1 / n, "fp32_way": "dequantized", "bf16": 6.7 / n, "bf16_way": "dequantized"} for n in (1, 8)]
    found = {"format": "nf4", "shape": [3072, 768], "times": times, "environment": {"cpu": "A processor", "threads": 2, "torch": "2.13"}}
    text = card.render(record("full | nf4") | {"slowdowns": [found]})
    assert "from 768 to 3072 features in `nf4`" in text and "A processor, torch 2.13, 2 threads" in text
    assert "| tokens | beside fp32 | beside bf16 |" in text and "| 1 | 6.1 | 6.7 |\n| 8 | 0.76 | 0.84 |" in text
    assert "packed maps" not in card.render(record("full | merge"))


def test_scores_and_the_command_are_there(tmp_path: Path) -> None:
    run = record("lora(r=8) | merge | int8")
    text = card.save(run, tmp_path).read_text(encoding="utf-8")
    assert f"| test | {run['score']:.3f} | {run['score_low']:.3f} to {run['score_high']:.3f} |" in text
    assert "paretune run 'lora(r=8) | merge | int8' --task stdlib-topics" in text and "`lora(r=8) | merge | int8`" in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_hostile_names_change_no_structure() -> None:
    hostile = "x`` ``` | <script>alert(1)</script>\n# head [a](b)"
    run = record("full") | {"recipe": hostile, "resolved": hostile, "backbone": hostile, "task": hostile, "metric": "a|b"}
    _, header, body = card.render(run).split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == hostile
    rendered, usual = ([token.type for token in PARSER.parse(text)] for text in (body, card.render(record("full")).split("---\n", 2)[2]))
    assert rendered == usual  # the same headings, lists, tables and code, in the same order
    assert "<script>" not in PARSER.render(body) and "<a " not in PARSER.render(body)
