"""The meter: phases, counts, energy by each kind of counter, totals over a run and its resumes."""

import json
import math
import time

import pytest
import torch

from fastalign.train import energy, meter, strict_json
from fastalign.train.meter import Meter

CPU = torch.device("cpu")


class Clock:
    """Time and a counter of joules that move when told to."""

    source = "a test's"

    def __init__(self, monkeypatch):
        self.now, self.used = 100.0, 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(energy, "find", lambda device: self)
        monkeypatch.setattr(meter, "measured_peak", lambda device, dtype: (1000.0, "a test's"))

    def joules(self):
        return self.used

    def stop(self):
        pass

    def work(self, seconds, watts=0.0):
        self.now += seconds
        self.used += watts * seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def started():
    made = Meter(CPU, torch.float32)
    made.start()
    return made


def test_a_step_by_phase(clock):
    run = started()
    with run.phase("generate"):
        clock.work(2.0, watts=100.0)
        run.count(60, flops=400.0)
    clock.work(1.0, watts=10.0)
    with run.phase("update"):
        clock.work(1.0, watts=300.0)
        run.count(trained=20, flops=600.0)
    found = run.metrics()
    assert found.pop("memory_gib") > 0.05
    assert found == {
        "tokens": 60,
        "tokens_per_s": 15.0,
        "tokens_per_s/trained": 5.0,
        "flops": 1000.0,
        "flops_per_s": 250.0,
        "utilisation": 0.25,
        "time/generate": 2.0,
        "time/update": 1.0,
        "joules": 510.0,
        "joules/generate": 200.0,
        "joules/update": 300.0,
    }


def test_the_next_step_begins_at_nothing(clock):
    run = started()
    for _ in range(2):
        with run.phase("update"):
            clock.work(2.0, watts=5.0)
            run.count(10, trained=10, flops=4.0)
        found = run.metrics()
        assert (found["tokens"], found["flops"], found["joules"]) == (10, 4.0, 10.0)
        assert found["time/update"] == 2.0 and found["tokens_per_s"] == 5.0
    total = run.summary()["total"]
    assert (total["tokens"], total["flops"], total["joules"]) == (20, 8.0, 20.0)


def test_what_only_measures_or_saves_is_no_part_of_a_step(clock):
    run = started()
    for outside in meter.OUTSIDE:
        with run.phase(outside):
            clock.work(50.0, watts=9.0)
            run.count(1000, flops=1e6)
    with run.phase("update"):
        clock.work(2.0)
        run.count(10)
    found = run.metrics()
    assert (found["tokens"], found["tokens_per_s"], found["joules"]) == (10, 5.0, 0.0)
    assert not any("evaluate" in key or "checkpoint" in key for key in found)
    assert run.summary()["phases"]["evaluate"]["joules"] == 450.0
    assert run.summary()["total"]["seconds"] == 152.0


def test_a_phase_within_a_phase_belongs_to_the_outer_one(clock):
    run = started()
    with run.phase("evaluate"):
        clock.work(1.0)
        with run.phase("generate"):
            clock.work(2.0)
            run.count(5)
        clock.work(4.0)
    clock.work(8.0)
    phases = run.summary()["phases"]
    run.stop()
    assert phases["evaluate"]["seconds"] == 7.0 and phases["evaluate"]["tokens"] == 5
    assert "generate" not in phases
    assert run.summary()["phases"]["other"]["seconds"] == 8.0


def test_a_phase_that_raises_is_closed(clock):
    run = started()
    with pytest.raises(ZeroDivisionError), run.phase("update"):
        clock.work(3.0)
        raise ZeroDivisionError
    with run.phase("score"):
        clock.work(1.0)
    phases = run.summary()["phases"]
    assert phases["update"]["seconds"] == 3.0 and phases["score"]["seconds"] == 1.0


def test_totals_add_up_over_a_resume(clock):
    first = started()
    with first.phase("update"):
        clock.work(3.0, watts=2.0)
        first.count(7, trained=5, flops=11.0)
    kept = json.loads(json.dumps(first.state_dict()))
    with first.phase("update"):
        clock.work(1000.0)  # done again after the resume
    second = started()
    with second.phase("reference"):
        clock.work(2.0)  # before it knows where it goes on
    second.load_state_dict(kept)
    with second.phase("update"):
        clock.work(4.0, watts=1.0)
        second.count(1, trained=1, flops=2.0)
    found = second.summary()
    assert found["resumes"] == 1
    expected = {"seconds": 7.0, "joules": 10.0, "flops": 13.0, "tokens": 8, "trained": 6}
    assert found["phases"]["update"] | expected == found["phases"]["update"]
    assert found["phases"]["reference"]["seconds"] == 2.0
    assert second.seconds() == 3.0 + 2.0 + 4.0
    clock.work(1.0)
    assert second.seconds() == 10.0
    # Of the step, which was stopped in its middle, and not of the run.
    assert second.metrics()["tokens"] == 8
    assert second.metrics()["tokens"] == 0


def test_what_is_skipped_is_no_steps(clock):
    run = started()
    with run.phase("reference"):
        clock.work(9.0)
        run.count(3, flops=5.0)
    run.skip()
    with run.phase("update"):
        clock.work(2.0)
        run.count(4, flops=1.0)
    found = run.metrics()
    assert (found["tokens"], found["tokens_per_s"], found["flops"]) == (4, 2.0, 1.0)
    assert "time/reference" not in found
    assert run.summary()["total"]["flops"] == 6.0


def test_where_nothing_counts_joules_they_are_absent(clock, monkeypatch, caplog):
    first = started()
    with first.phase("update"):
        clock.work(1.0, watts=3.0)
    monkeypatch.setattr(energy, "find", lambda device: None)
    run = started()
    with run.phase("update"):
        clock.work(1.0)
        run.count(flops=math.nan)
    assert not any(key.startswith("joules") for key in run.metrics())
    shown = json.loads(strict_json.dumps(run.summary()))
    assert shown["energy"] is None and shown["total"]["joules"] is None
    assert shown["total"]["flops"] is None
    # Part of a run counted is not the run counted.
    run.load_state_dict(first.state_dict())
    with run.phase("update"):
        clock.work(1.0)
    assert math.isnan(run.summary()["total"]["joules"])


# --- counters -----------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class NVML:
    """One GPU; millijoules and milliwatts as told, or none of them."""

    NVMLError = NVMLError

    def __init__(self, millijoules=None, milliwatts=None):
        self.millijoules, self.milliwatts = millijoules, milliwatts
        self.asked = []

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        return "handle"

    def _read(self, value, handle):
        assert handle == "handle"
        if value is None:
            raise NVMLError("not supported")
        return value

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._read(self.millijoules, handle)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._read(self.milliwatts, handle)


def test_the_energy_counter_comes_first():
    nvml = NVML(millijoules=5_000_000, milliwatts=1)
    counter = energy.find_nvml(nvml, "1234-5678")
    assert (
        counter is not None
        and counter.source == "NVML energy counter"
        and nvml.asked == ["GPU-1234-5678"]
    )
    assert counter.joules() == 0.0
    nvml.millijoules += 1500
    assert counter.joules() == 1.5


def test_power_is_integrated_where_there_is_no_counter(monkeypatch):
    """100 W for 2 s, a ramp to 300 W within 1 s, then 300 W for 1 s: 200 + 200 + 300 J."""
    now = [0.0]
    monkeypatch.setattr(energy, "SAMPLE_SECONDS", 3600.0)  # the samples are the test's
    nvml = NVML(milliwatts=100_000)
    counter = energy.IntegratedPower(nvml, "handle", clock=lambda: now[0])
    now[0] = 2.0
    assert counter.joules() == pytest.approx(200.0)
    now[0], nvml.milliwatts = 3.0, 300_000
    assert counter.joules() == pytest.approx(400.0)
    now[0] = 4.0
    assert counter.joules() == pytest.approx(700.0)
    counter.stop()


def test_power_is_sampled_while_nobody_asks(monkeypatch):
    monkeypatch.setattr(energy, "SAMPLE_SECONDS", 0.001)
    reads = []
    nvml = NVML(milliwatts=50_000)
    plain = nvml.nvmlDeviceGetPowerUsage

    def read(handle):
        reads.append(handle)
        return plain(handle)

    monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", read)
    counter = energy.find_nvml(nvml, "MIG-1234")
    assert isinstance(counter, energy.IntegratedPower) and nvml.asked == ["MIG-1234"]
    began = time.monotonic()
    while len(reads) < 5 and time.monotonic() - began < 10:
        time.sleep(0.01)
    assert len(reads) >= 5
    counter.stop()
    assert not counter._thread.is_alive()
    assert 0 < counter.joules() <= 50 * (time.monotonic() - began + 1)


def test_neither_is_none():
    assert energy.find_nvml(NVML(), "1") is None


def test_rapl_wraps_around(tmp_path, monkeypatch):
    for package, now in ((0, 900), (1, 50)):
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{now}\n")
        (folder / "max_energy_range_uj").write_text("1000\n")
    part = tmp_path / "intel-rapl:0:0"  # the cores, counted in their package
    part.mkdir()
    (part / "energy_uj").write_text("7\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    counter = energy.find(CPU)
    assert counter is not None and counter.joules() == 0.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("75\n")
    assert counter.joules() == pytest.approx(225e-6)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    assert energy.find(CPU) is None


# --- the peak -----------------------------------------------------------------------------------


def test_peaks_of_known_gpus(monkeypatch):
    def peak(name, dtype=torch.bfloat16):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        found = meter.known_peak(torch.device("cuda"), dtype)
        return found and found[0]

    assert peak("NVIDIA H200") == peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H200", torch.float32) == 67e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA L40S") == 362e12 and peak("NVIDIA L4") == 121e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("NVIDIA H200 MIG 1g.18gb") is None  # a slice of one
    assert peak("Another GPU") is None
    assert meter.known_peak(CPU, torch.float32) is None


def test_a_measured_peak_is_the_machines_and_draws_nothing_random():
    state = torch.get_rng_state()
    found, source = meter.measured_peak(CPU, torch.float32, seconds=0.0)
    assert 1e8 < found < 1e14 and "1024 x 1024 float32" in source
    assert torch.equal(torch.get_rng_state(), state)
