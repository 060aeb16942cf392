"""Energy meters against fake counter trees of known energy, and the choice among them."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from paretune.errors import BudgetError, MeterError
from paretune.meters import energy
from paretune.meters.clock import Moment
from paretune.meters.estimate import Estimate, Power, profile, profiles
from paretune.meters.gauge import Gauge
from paretune.meters.meter import NoMeter, Together
from paretune.meters.nvml import Nvml
from paretune.meters.rapl import Rapl

RANGE = 262_143_328_850


def zone(root: Path, path: str, name: str, value: int) -> Path:
    folder = root / path
    folder.mkdir(parents=True)
    for file, content in (("name", name), ("energy_uj", value), ("max_energy_range_uj", RANGE)):
        (folder / file).write_text(f"{content}\n")
    return folder / "energy_uj"


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Path]:
    """Two packages, memory, and the zones that overlap with them; powercap links subzones beside their parents."""
    zones = {"0": "package-0", "1": "package-1", "0:0": "core", "0:1": "dram", "2": "psys"}
    return {name: zone(tmp_path, f"intel-rapl:{number}", name, 1000) for number, name in zones.items()}


def test_rapl_adds_packages_and_memory_only(tree: dict[str, Path], tmp_path: Path) -> None:
    meter = Rapl(tmp_path, poll_s=0)
    start = meter.now()
    for name, used_uj in (("package-0", 5_000_000), ("package-1", 7_000_000), ("dram", 2_000_000), ("core", 4_000_000), ("psys", 30_000_000)):
        tree[name].write_text(str(1000 + used_uj))
    reading = meter.between(start, meter.now())
    assert reading.value == pytest.approx(14.0) and not reading.estimate


def test_rapl_wraps_around_and_windows_add_up(tree: dict[str, Path], tmp_path: Path) -> None:
    meter = Rapl(tmp_path, poll_s=0)
    moments = [meter.now()]
    value = 1000
    for _ in range(5):  # 100 kJ a window on a counter that holds 262 kJ: two wraps
        value = (value + 100_000_000_000) % (RANGE + 1)
        tree["package-0"].write_text(str(value))
        moments.append(meter.now())
    parts = [meter.between(a, b) for a, b in zip(moments, moments[1:], strict=False)]
    assert [part.value for part in parts] == pytest.approx([1e5] * 5)
    assert sum(parts).value == pytest.approx(meter.between(moments[0], moments[-1]).value) == pytest.approx(5e5)


def test_rapl_says_how_to_be_allowed(tree: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeterError, match="no RAPL"):
        Rapl(tmp_path / "nothing", poll_s=0)
    plain = Path.read_text

    def refuse(self: Path) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return plain(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(MeterError, match="chmod"):
        Rapl(tmp_path, poll_s=0)


def battery(root: Path, **values: object) -> Path:
    folder = root / "BAT0"
    folder.mkdir(exist_ok=True)
    for name, value in ({"type": "Battery", "status": "Discharging"} | values).items():
        (folder / name).write_text(f"{value}\n")
    return folder


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [
        ({"energy_now": 50_000_000}, {"energy_now": 49_000_000}, 3600.0),  # 1 Wh
        ({"charge_now": 3_000_000, "voltage_now": 3_800_000}, {"charge_now": 2_900_000, "voltage_now": 3_600_000}, 0.1 * 3.7 * 3600),
    ],
)
def test_battery_gauge(tmp_path: Path, before: dict, after: dict, joules: float) -> None:
    (tmp_path / "AC").mkdir()
    (tmp_path / "AC" / "type").write_text("Mains\n")
    battery(tmp_path, **before)
    meter = Gauge(tmp_path)
    start = meter.now()
    battery(tmp_path, **after)
    reading = meter.between(start, meter.now())
    assert reading.value == pytest.approx(joules) and reading.interval == pytest.approx((joules - 36, joules + 36))


def test_battery_gauge_refuses_what_it_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="no battery"):
        Gauge(tmp_path)
    battery(tmp_path, energy_now=50_000_000)
    meter = Gauge(tmp_path)
    start = meter.now()
    assert "longer window" in meter.between(start, meter.now()).reason
    battery(tmp_path, energy_now=40_000_000, status="Charging")
    assert "unplug" in meter.between(start, meter.now()).reason


def test_nvml_reads_millijoules_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter([1_000, 5_000, 12_500])
    fake = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda card: "Card",
        nvmlDeviceGetTotalEnergyConsumption=lambda card: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    meter = Nvml()
    reading = meter.between(meter.now(), meter.now())
    assert reading.value == pytest.approx(7.5) and "Card" in reading.source


def test_together_sums_and_stays_silent_if_one_is(tree: dict[str, Path], tmp_path: Path) -> None:
    rapl = Rapl(tmp_path, poll_s=0)
    both = Together([rapl, rapl])
    start = both.now()
    tree["dram"].write_text(str(1000 + 3_000_000))
    end = both.now()
    assert both.between(start, end).value == pytest.approx(2 * rapl.between(start, end).value)
    assert Together([rapl, NoMeter("card asleep")]).between(start, end).reason == "card asleep"


def moments(wall_s: float, cpu_s: float) -> tuple[Moment, Moment]:
    return Moment(0.0, 0.0, 0.0, 0.0), Moment(wall_s, wall_s, cpu_s, cpu_s)


def test_estimate_is_the_stated_power_by_hand() -> None:
    meter = Estimate(Power.parse("idle=2W, busy=6000mW"), threads=2)
    full = meter.between(*moments(10.0, 20.0))  # both cores busy all the time: 6 W
    assert full.value == pytest.approx(60.0) and full.estimate and full.bounds == pytest.approx((20.0, 180.0))
    assert meter.between(*moments(10.0, 0.0)).value == pytest.approx(20.0)  # idle
    assert meter.between(*moments(10.0, 5.0)).value == pytest.approx(30.0)  # a quarter busy: 2 + 4/4 W
    start, middle, end = Moment(0, 0, 0, 0), Moment(3, 3, 4, 4), Moment(10, 10, 20, 20)
    assert (meter.between(start, middle) + meter.between(middle, end)).bounds == pytest.approx(full.bounds)
    assert meter.describe()["estimate"] and (meter.describe()["idle_w"], meter.describe()["busy_w"]) == (2.0, 6.0)


def test_estimate_ratio_on_one_machine_does_not_depend_on_the_scale() -> None:
    windows = moments(1.0, 2.0), moments(3.0, 5.0)
    ratios = []
    for text in ("idle=2W,busy=6W", "idle=4W,busy=12W"):
        a, b = (Estimate(Power.parse(text), threads=2).between(*window).value for window in windows)
        ratios.append(a / b)
    assert ratios[0] == pytest.approx(ratios[1])


@pytest.mark.parametrize("text", ["2W", "idle=2W", "idle=6W,busy=2W", "idle=2W,busy=6W,scale=0.5", "idle=2W,bsuy=6W", "idle=2W,busy=6W,scale=x"])
def test_powers_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(MeterError):
        Power.parse(text)


def test_power_needs_a_unit_of_power() -> None:
    with pytest.raises(BudgetError, match="unit of power"):
        Power.parse("idle=2J,busy=6W")


def test_profiles_ship_and_own_files_are_read(tmp_path: Path) -> None:
    assert {"laptop", "phone"} <= set(profiles())
    assert all(profile(name).assumption and profile(name).source for name in profiles())
    own = tmp_path / "board.json"
    own.write_text(json.dumps({"idle_w": 1.5, "busy_w": 4.5, "cores": 4, "scale_low": 0.9, "scale_high": 1.1, "source": "my meter"}))
    assert Estimate(profile(own), threads=1).between(*moments(10.0, 40.0)).bounds == pytest.approx((40.5, 49.5))
    own.write_text('{"idle": 1}')
    with pytest.raises(MeterError, match="is not a power profile"):
        profile(own)
    with pytest.raises(MeterError, match="did you mean phone"):
        profile("fone")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without any meter."""

    def none(*_: object, **__: object) -> None:
        raise MeterError("none here")

    for name in ("Rapl", "Gauge", "Nvml"):
        monkeypatch.setattr(energy, name, none)


def test_without_meter_or_power_energy_is_none_with_a_reason(bare: None) -> None:
    meter = energy.find()
    reading = meter.between(meter.now(), meter.now())
    assert meter.name == "none" and reading.value is None
    assert "none here" in reading.reason and "paretune measure RUN --power idle=2W,busy=6W" in reading.reason and "phone" in reading.reason


def test_the_best_meter_at_hand_is_taken(bare: None, tree: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy.find(profile="phone", threads=2).name == "estimate"
    assert energy.find(power="idle=2W,busy=6W").estimate
    battery(tmp_path, energy_now=50_000_000)
    monkeypatch.setattr(energy, "Gauge", lambda: Gauge(tmp_path))
    assert energy.find(power="idle=2W,busy=6W", window_s=2.0).name == "estimate"  # the gauge is too coarse for 2 s
    assert energy.find(power="idle=2W,busy=6W", window_s=60.0).name == "battery"
    monkeypatch.setattr(energy, "Rapl", lambda: Rapl(tmp_path, poll_s=0))
    assert energy.find(power="idle=2W,busy=6W").name == "rapl"
    assert energy.find(power="idle=2W,busy=6W", log=tmp_path / "meter.csv").name == "log"


def test_a_stated_cpu_power_says_nothing_of_a_card(bare: None) -> None:
    meter = energy.find(profile="laptop", device="cuda:0")
    assert meter.name == "none" and "says nothing of cuda" in meter.note


def test_two_statements_of_power_are_one_too_many() -> None:
    with pytest.raises(MeterError, match="one of the two"):
        energy.find("idle=2W,busy=6W", "phone")
