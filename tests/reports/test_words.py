"""The words: commands that the shell and the parser read back, short names, and sentences that say what is known."""

from __future__ import annotations

import shlex

from pareto.synthetic import RECIPES, record, records

from paretune.pareto.front import Front
from paretune.reports import words


def test_the_command_holds_the_recipe_as_one_word_and_names_the_data() -> None:
    parts = shlex.split(words.command(record("lora(r=8) | merge", 2)))
    assert parts == ["paretune", "run", "lora(r=8) | merge", "--task", "stdlib-topics", "--backbone", "minilm", "--seed", "2"]
    build = {"source": "my reviews.csv", "text": "review", "label": "stars; rm", "split": None, "then": [["subset", 500, 0]]}
    parts = shlex.split(words.command(record("full") | {"task_definition": {"build": build}}))
    assert parts[3] == "my reviews.csv" and parts[parts.index("--label") + 1] == "stars; rm"
    assert parts[parts.index("--max-train") + 1] == "500" and "--split" not in parts


def test_the_command_repeats_the_schedule_that_flags_filled_in() -> None:
    resolved = 'lora(r=8, alpha=16) + schedule(lr=0.0005, epochs=1.5, batch=32, dtype="bf16") | merge'
    parts = shlex.split(words.command(record("lora(r=8) | merge") | {"resolved": resolved}))
    assert [parts[parts.index(f"--{flag}") + 1] for flag in ("epochs", "lr", "batch", "dtype")] == ["1.5", "0.0005", "32", "bf16"]
    own = {"recipe": "full + schedule(epochs=1)", "resolved": "full + schedule(epochs=1, lr=3e-5)"}
    assert "--epochs" not in words.command(record("full") | own)
    rates = {"recipe": "head | full", "resolved": "head + schedule(lr=0.01, epochs=2.0) | full + schedule(lr=3e-05, epochs=2.0)"}
    text = words.command(record("full") | rates)
    assert "--epochs 2.0" in text and "--lr" not in text  # each its own rate: the cards', not a flag's


def test_short_names_are_short_and_never_the_same() -> None:
    assert words.short('adapter(form="pfeiffer", size=32) + schedule(epochs=3) | int8') == "adapter(pfeiffer, 32) | int8"
    assert all(len(words.short(recipe * 3)) <= 44 for recipe in RECIPES)
    twins = [record("full"), record("full") | {"id": "other", "recipe_id": "abcd1234"}]
    assert len(set(words.names(Front(twins)))) == 2
    backbones = [record("full"), record("full") | {"id": "other", "backbone": "roberta-base"}]
    assert words.names(Front(backbones)) == ["full · minilm", "full · roberta-base"]


def test_estimates_say_so_on_their_axis_and_only_there() -> None:
    estimated, measured = Front(records(1), "15 Wh"), Front(records(1, estimate=False), "15 Wh")
    assert words.label(estimated, "inferences_per_charge").endswith(", estimated")
    assert "estimated" not in words.label(estimated, "latency_p50_ms") and words.label(estimated, "latency_p50_ms").endswith("(ms)")
    assert "estimated" not in words.label(measured, "inferences_per_charge")
    assert "factor between 0.33 and 3" in words.energy(estimated) and "factor" not in words.energy(measured)
    assert "factor between 0.33 and 3" in words.band(estimated) and words.band(measured) == ""


def test_what_a_phase_found_is_said() -> None:
    facts = {"changed_test_token_share": 0.06884, "dense_below_tokens": 1536}
    many = {f"layer_{i}_outlier_share": i / 100 for i in range(5)}
    phases = [{"spelling": "lora(r=8)"}, {"spelling": "vocabulary(keep=1)", "facts": facts}, {"spelling": "llm_int8", "facts": many}]
    assert words.found({"phases": phases}) == [
        ("vocabulary", "changed test token share 0.0688, dense below tokens 1536"),
        ("llm_int8", "layer 0 outlier share 0, layer 1 outlier share 0.01, layer 2 outlier share 0.02, and 2 more in run.json"),
    ]


def test_the_title_names_battery_and_rate() -> None:
    at_a_rate = Front(records(1), "15 Wh", rate="1/s")
    assert words.title(at_a_rate, "inferences_per_charge") == "Accuracy against inferences on a 15 Wh battery at 1 inference/s"
    assert words.title(Front(records(1), "15 Wh"), "inferences_per_charge").endswith("15 Wh battery, saturated")


def test_the_first_axis_is_latency_where_energy_is_not_known() -> None:
    assert words.first_axis(Front(records(1), "15 Wh")) == "inferences_per_charge"
    assert words.first_axis(Front(records(1, energy=False), "15 Wh")) == "latency_p50_ms"
    assert "nothing here measures energy" in words.energy(Front(records(1, energy=False)))


def test_the_charge_says_what_idling_takes() -> None:
    front = Front(records(1), "15 Wh", rate="1/s")
    net = front.reference.value("net_energy_per_inference_j")
    assert f"takes {2 / (2 + net):.1%}" in words.charging(front)


def test_how_well_measurements_repeat_is_said() -> None:
    runs = records(1)
    for run, width in zip(runs, (0.02, 0.04), strict=False):
        run["cost"]["meter"] |= {"aa_wall": width, "aa_cpu": 0.01, "windows_note": "one window was busy"}
    facts = dict(words.facts(Front(runs)))
    assert "differ by up to 4.0% of time and 1.0% of CPU time" in facts["protocol"]
    assert "one window was busy" in facts["notes"] and "one seed (0); bars are 95 % intervals over test examples (Wilson)" in facts["score"]


def test_energies_of_different_meters_are_called_no_comparison() -> None:
    text = words.energy(Front([record("full"), record("head", estimate=False)]))
    assert "no comparison" in text and "estimated with CPU time" in text and "measured with RAPL" in text


def test_the_command_of_a_named_recipe_repeats_its_schedule() -> None:
    resolved = "choices(n=1) | ia3(x=1) + unlikelihood + length_norm + schedule(lr=0.01, epochs=1.5, batch=32) | int8"
    text = words.command(record("full") | {"recipe": "t_few | int8", "resolved": resolved})
    assert text.startswith("paretune run 't_few | int8' ") and "--epochs 1.5" in text
    phases = ["full + schedule(epochs=2.0)", "keep_layers(k=1)", "full + distill(teacher=@1) + schedule(epochs=2.0)"]
    assert "--epochs 2.0" in words.command(record("full") | {"recipe": "distilbert", "resolved": " | ".join(phases)})
    assert words._expanded('lora(targets="mam") | houlsby') == 'lora(targets="mam") | adapter(form="houlsby")'
