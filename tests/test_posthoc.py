"""Averages synthesized from snapshots, compared with averages tracked during the run."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fastema
from fastema import errors, posthoc, rules

from .support.damage import damage_header, header_of, replace_header

STEPS, EVERY = 600, 50
WIDTHS = (0.05, 0.10)


class Run:
    """A random walk of weights, with tracked averages and snapshots of a PowerEMA."""

    def __init__(self, folder: Path, **timing: int) -> None:
        generator = np.random.default_rng(7)
        self.folder = folder
        weights = {"w": generator.standard_normal(400), "n": {"b": generator.standard_normal(30)}}
        self.ema = fastema.PowerEMA(weights, WIDTHS, **timing)
        half_life = rules.half_life(20)
        self.tracked = {
            ("sigma_rel", 0.07): fastema.PowerEMA(weights, 0.07, **timing),
            ("sigma_rel", 0.15): fastema.PowerEMA(weights, 0.15, **timing),
            ("half_life", 20.0): fastema.EMA(weights, half_life, zero_debias=True, **timing),
        }
        self.seen: dict[int, dict[tuple[str, float], np.ndarray]] = {}
        for step in range(1, STEPS + 1):
            weights["w"] += generator.standard_normal(400) * 0.1
            weights["n"]["b"] += generator.standard_normal(30) * 0.1
            for one in (self.ema, *self.tracked.values()):
                one.update()
            if step % EVERY == 0:
                posthoc.save_snapshot(self.ema, folder)
                self.seen[step] = {k: one.shadow["w"].copy() for k, one in self.tracked.items()}
        self.spread = float(weights["w"].std())


@pytest.fixture(scope="module", params=[(1, 0), (10, 0), (5, 23)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    every, start = request.param
    return Run(tmp_path_factory.mktemp("snapshots"), update_every=every, start_after=start)


@pytest.mark.parametrize("step", [STEPS, 400])
@pytest.mark.parametrize("kind", [("sigma_rel", 0.07), ("sigma_rel", 0.15), ("half_life", 20.0)])
def test_synthesis_matches_a_tracked_average(run: Run, kind: tuple[str, float], step: int) -> None:
    found = posthoc.synthesize(run.folder, step=step, **dict([kind]))
    error = np.abs(found.tensors["w"] - run.seen[step][kind]).max()
    assert found.error < 0.1
    assert error < 0.01 * run.spread  # relative to the length of the walk
    assert sum(found.coefficients.values()) == pytest.approx(1.0, abs=1e-9)
    steps = {posthoc._parse_snapshot(posthoc.read(path)).step for path in found.coefficients}
    assert max(steps) <= step
    assert step - run.ema.schedule.update_every < found.step <= step


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [None, "bfloat16", "bf16+16"])
def test_synthesis_of_buffers_and_frozen_parts(dtype: str | None, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    model.to(memory_format=torch.channels_last)
    ema = fastema.PowerEMA(model, WIDTHS, shadow_dtype=dtype, frozen="copy")
    tracked = fastema.PowerEMA(model, 0.08)
    for step in range(1, 101):
        model(torch.randn(2, 3, 5, 5))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        ema.update()
        tracked.update()
        if step % 10 == 0:
            posthoc.save_snapshot(ema, tmp_path)
    target = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = posthoc.synthesize(tmp_path, sigma_rel=0.08, into=target)
    error = (target["0.weight"] - tracked.shadow["0.weight"]).abs().max()
    assert error < (0.02 if dtype == "bfloat16" else 0.005)
    assert target["1.num_batches_tracked"] == 100
    assert torch.equal(target["1.running_mean"], model[1].running_mean)
    assert found.tensors["0.weight"].dtype == np.float32
    if dtype == "bf16+16":  # the whole float32 average, not its high half
        path, *_ = posthoc.save_snapshot(ema, tmp_path / "more")
        saved = torch.from_numpy(load_file(path)["0.weight"])
        assert torch.equal(saved.bfloat16(), ema.shadows[0]["0.weight"].contiguous())
        assert not torch.equal(saved, saved.bfloat16().float())


def test_request_beyond_the_snapshots_warns(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, every = run.ema.schedule.start_after, run.ema.schedule.update_every
    newest, step = start + (400 - start) // every * every, 437
    last = start + (step - start) // every * every
    with pytest.warns(UserWarning, match=rf"steps {newest + 1} to {last}; choose step={newest} or"):
        found = posthoc.synthesize(run.folder, sigma_rel=0.05, step=step)
    assert found.error > 0.05
    assert found.step == last
    pytest.importorskip("rich")
    out = tmp_path / "out.safetensors"
    with pytest.warns(UserWarning, match=r"sigma_rel 0\.05, 0\.1\)"):
        found = posthoc.synthesize(run.folder, half_life=1.0, out=out, progress=True)
    assert found.error > 0.05
    assert load_file(out)["w"].tobytes() == found.tensors["w"].tobytes()
    assert "synthesizing" in capsys.readouterr().out
    files = [one.path for one in posthoc.find_snapshots(run.folder)]
    chosen, whole = (posthoc.synthesize(one, sigma_rel=0.12) for one in (files[::-1], run.folder))
    assert chosen.tensors["w"].tobytes() == whole.tensors["w"].tobytes()


def updated_average(average: Callable[..., Any] = fastema.PowerEMA, rule: Any = 0.1) -> Any:
    weights = [np.random.default_rng(0).standard_normal(4)]
    made = average(weights, rule)
    for _ in range(3):
        weights[0] += 1.0
        made.update()
    return made


def test_snapshot_files_agree_while_another_thread_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema = updated_average(rule=WIDTHS)
    want = [one["0"].copy() for one in ema.shadows]
    write = posthoc.write
    threads = []

    def while_another_updates(*given: object, **metadata: str) -> None:
        threads.append(threading.Thread(target=ema.update))
        threads[-1].start()
        threads[-1].join(0.1)  # finishes here if nothing blocks it
        write(*given, **metadata)

    monkeypatch.setattr(posthoc, "write", while_another_updates)
    paths = posthoc.save_snapshot(ema, tmp_path)
    for thread in threads:
        thread.join()
    assert ema.num_updates == 5
    assert all((one["0"] != old).any() for one, old in zip(ema.shadows, want, strict=True))
    for path, one in zip(paths, want, strict=True):
        assert path.name.startswith("step000000003")
        np.testing.assert_array_equal(load_file(path)["0"], one)


@pytest.mark.parametrize("seed", range(150))
def test_malformed_snapshot_is_refused_or_gives_finite_numbers(seed: int, tmp_path: Path) -> None:
    (path,) = posthoc.save_snapshot(updated_average(), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(replace_header(whole, damage_header(header_of(whole), seed)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the profile of the synthesized average")
        for wanted in ({"sigma_rel": 0.07}, {"half_life": 3.0}):
            try:
                found = posthoc.synthesize(tmp_path, **wanted)
            except errors.CheckpointError:
                continue
            assert np.isfinite(found.error)
            assert all(np.isfinite(one).all() for one in found.tensors.values())


REQUESTS: list[tuple[dict[str, float], str]] = [
    ({}, "give one of the two"),
    ({"sigma_rel": 0.1, "half_life": 3.0}, "give one of the two"),
    *(({"sigma_rel": wrong}, "sigma_rel") for wrong in (0.5, 1e-200)),
    *(({"half_life": wrong}, "half_life") for wrong in (-1.0, 1e-310)),
    ({"sigma_rel": 0.1, "step": 60.5}, "whole number"),
    ({"sigma_rel": 0.1, "step": 2}, "first snapshot"),
]


def test_impossible_requests_and_mixed_runs_are_refused(tmp_path: Path) -> None:
    posthoc.save_snapshot(updated_average(), tmp_path)
    for arguments, text in REQUESTS:
        with pytest.raises(errors.ArgumentError, match=text):
            posthoc.synthesize(tmp_path, **arguments)
    with pytest.raises(errors.ArgumentError, match="PowerEMA"):
        posthoc.save_snapshot(updated_average(fastema.EMA), tmp_path / "nowhere")
    paths = []
    for every, size in ((1, 3), (2, 3), (1, 4)):
        ema = fastema.PowerEMA({"w": np.ones(size)}, 0.1, update_every=every)
        with pytest.raises(errors.StateError, match="save a snapshot after the first update"):
            posthoc.save_snapshot(ema, tmp_path)
        ema.update(steps=2 * size - 4)
        paths += posthoc.save_snapshot(ema, tmp_path / f"{every} {size}")
    odd = paths[:2], paths[::2], Path(__file__).parent
    for some, words in zip(odd, ("update_every", "'w' in step0", "no snapshots in "), strict=True):
        with pytest.raises(errors.CheckpointError, match=words):
            posthoc.synthesize(some, sigma_rel=0.12)
