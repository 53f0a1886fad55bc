"""Averages put together from snapshots, against the same averages tracked during the run."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fastema
from fastema import errors, posthoc
from fastema.rules.posthoc import PowerProfile

pytest.importorskip("safetensors")

STEPS, EVERY = 600, 50
WIDTHS = (0.05, 0.10)


class Run:
    """A random walk of weights with averages of several kinds, and snapshots of two of them."""

    def __init__(self, folder: Path, **options: object) -> None:
        generator = np.random.default_rng(7)
        self.folder = folder
        weights = {"w": generator.standard_normal(400), "n": {"b": generator.standard_normal(30)}}
        self.ema = fastema.PowerEMA(weights, WIDTHS, **options)
        timing = {k: v for k, v in options.items() if k in ("update_every", "start_after")}
        self.tracked = {
            ("sigma_rel", 0.07): fastema.PowerEMA(weights, 0.07, **timing),
            ("sigma_rel", 0.15): fastema.PowerEMA(weights, 0.15, **timing),
            ("half_life", 20.0): fastema.EMA(
                weights, fastema.rules.half_life(20), zero_debias=True, **timing
            ),
        }
        self.seen: dict[int, dict[tuple[str, float], np.ndarray]] = {}
        self.spread = 0.0
        for step in range(1, STEPS + 1):
            weights["w"] += generator.standard_normal(400) * 0.1
            weights["n"]["b"] += generator.standard_normal(30) * 0.1
            for one in (self.ema, *self.tracked.values()):
                one.update()
            if step % EVERY == 0:
                posthoc.save_snapshot(self.ema, folder)
                self.seen[step] = {k: one.shadow["w"].copy() for k, one in self.tracked.items()}
        self.spread = float(weights["w"].std())


@pytest.fixture(
    scope="module", params=[{}, {"update_every": 10}, {"update_every": 5, "start_after": 23}]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    return Run(tmp_path_factory.mktemp("snapshots"), **request.param)


@pytest.mark.parametrize("step", [STEPS, 400])
@pytest.mark.parametrize(
    "target", [{"sigma_rel": 0.07}, {"sigma_rel": 0.15}, {"half_life": 20.0}], ids=str
)
def test_what_was_tracked_is_reconstructed(run: Run, target: dict[str, float], step: int) -> None:
    found = posthoc.synthesize(run.folder, step=step, **target)
    (key,) = target.items()
    error = np.abs(found.tensors["w"] - run.seen[step][key]).max()
    assert found.error < 0.1
    assert error < 0.01 * run.spread  # of a walk over this distance
    assert sum(found.coefficients.values()) == pytest.approx(1.0, abs=1e-9)
    steps = {posthoc._snapshot(posthoc.read(path)).step for path in found.coefficients}
    assert max(steps) <= step
    assert step - run.ema.schedule.update_every < found.step <= step


def test_a_width_that_was_tracked_comes_back(run: Run) -> None:
    found = posthoc.synthesize(run.folder, sigma_rel=0.05)
    assert found.error < 1e-6
    want = run.ema.shadows[0]["w"]
    np.testing.assert_allclose(found.tensors["w"], want, rtol=1e-6, atol=1e-6)
    assert set(found.tensors) == {"w", "n.b"}


def test_each_snapshot_is_a_checkpoint_with_its_profile(run: Run) -> None:
    from safetensors.numpy import load_file

    found = posthoc.find_snapshots(run.folder)
    assert len(found) == 2 * STEPS // EVERY
    assert sorted({round(one.profile.sigma_rel, 12) for one in found}) == list(WIDTHS)
    last = max(one.step for one in found)
    (wide,) = [o for o in found if o.step == last and o.profile.sigma_rel > 0.07]
    assert wide.profile == PowerProfile(last - run.ema.schedule.start_after, wide.gamma)
    np.testing.assert_array_equal(load_file(wide.path)["w"], run.ema.shadows[1]["w"])


def test_into_weights_and_a_file(run: Run, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    target = {"w": np.full(400, 9.0), "n": {"b": np.full(30, 9.0, np.float32)}}
    out = tmp_path / "out.safetensors"
    found = posthoc.synthesize(run.folder, sigma_rel=0.12, into=target, out=out)
    np.testing.assert_array_equal(target["w"], found.tensors["w"])
    np.testing.assert_array_equal(target["n"]["b"], found.tensors["n.b"].astype(np.float32))
    np.testing.assert_array_equal(load_file(out)["w"], found.tensors["w"])


def test_files_may_be_chosen_in_any_order(run: Run) -> None:
    paths = [one.path for one in posthoc.find_snapshots(run.folder)]
    chosen = posthoc.synthesize(reversed(paths), sigma_rel=0.12, dtype="float64")
    np.testing.assert_array_equal(
        chosen.tensors["w"], posthoc.synthesize(run.folder, sigma_rel=0.12).tensors["w"]
    )


def test_progress_reaches_the_end(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    posthoc.synthesize(run.folder, sigma_rel=0.12, progress=True)
    assert "synthesising" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [None, "bfloat16", "bf16+16"])
def test_a_module_with_buffers_and_frozen_parts(dtype: str | None, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 1)
    ).to(memory_format=torch.channels_last)
    ema = fastema.PowerEMA(model, WIDTHS, shadow_dtype=dtype, frozen="copy")
    tracked = fastema.PowerEMA(model, 0.08)
    for step in range(1, 101):
        model(torch.randn(2, 3, 5, 5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
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
    if dtype == "bf16+16":  # the whole float32 average, not its first half
        (path, *_) = posthoc.save_snapshot(ema, tmp_path / "more")
        from safetensors.torch import load_file

        saved = load_file(path)["0.weight"]
        assert saved.dtype == torch.float32
        assert torch.equal(saved.bfloat16(), ema.shadows[0]["0.weight"].contiguous())
        assert not torch.equal(saved, saved.bfloat16().float())


def test_memory_is_the_result_and_some_buffers(tmp_path: Path) -> None:
    size = 4_000_000
    weights = np.random.default_rng(0).standard_normal(size, np.float32)
    ema = fastema.PowerEMA([weights], WIDTHS)
    for _ in range(10):
        weights += 0.1
        ema.update()
        posthoc.save_snapshot(ema, tmp_path)
    posthoc.synthesize(tmp_path, sigma_rel=0.2)
    tracemalloc.start()
    posthoc.synthesize(tmp_path, sigma_rel=0.2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * size + (48 << 20)  # 20 files hold 320 MB


# -- what is refused ------------------------------------------------------------------------------


def test_without_a_power_average() -> None:
    weights = [np.ones(3)]
    ema = fastema.EMA(weights, 0.9)
    ema.update()
    with pytest.raises(errors.ArgumentError, match="PowerEMA"):
        posthoc.save_snapshot(ema, "nowhere")


def test_before_the_first_update(tmp_path: Path) -> None:
    ema = fastema.PowerEMA([np.ones(3)], start_after=5)
    for _ in range(5):
        with pytest.raises(errors.StateError, match="after the first update"):
            posthoc.save_snapshot(ema, tmp_path)
        ema.update()
    with pytest.raises(errors.StateError, match="after the first update"):
        posthoc.save_snapshot(ema, tmp_path)
    ema.update()
    assert len(posthoc.save_snapshot(ema, tmp_path)) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "give one of the two"),
        ({"sigma_rel": 0.1, "half_life": 3.0}, "give one of the two"),
        ({"sigma_rel": 0.5}, "sigma_rel"),
        ({"half_life": -1.0}, "half_life"),
        ({"sigma_rel": 0.1, "step": EVERY - 1}, "first snapshot"),
    ],
)
def test_impossible_wishes(run: Run, arguments: dict[str, float], text: str) -> None:
    if "step" in arguments:
        arguments = {
            **arguments,
            "step": min(o.step for o in posthoc.find_snapshots(run.folder)) - 1,
        }
    with pytest.raises(errors.ArgumentError, match=text):
        posthoc.synthesize(run.folder, **arguments)


def test_folders_without_snapshots(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(errors.CheckpointError, match="no snapshots"):
        posthoc.synthesize(tmp_path, sigma_rel=0.1)
    save_file({"w": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(errors.CheckpointError, match=r"other\.safetensors is no snapshot"):
        posthoc.synthesize(tmp_path, sigma_rel=0.1)


def test_snapshots_of_different_models(tmp_path: Path) -> None:
    for step, size in enumerate((3, 4), 1):
        ema = fastema.PowerEMA({"w": np.ones(size)}, 0.1)
        for _ in range(step):
            ema.update()
        posthoc.save_snapshot(ema, tmp_path)
    with pytest.raises(errors.CheckpointError, match="'w' in step"):
        posthoc.synthesize(tmp_path, sigma_rel=0.12)


def test_snapshots_of_different_rhythms(tmp_path: Path) -> None:
    for every in (1, 2):
        ema = fastema.PowerEMA({"w": np.ones(3)}, 0.05 * every, update_every=every)
        ema.update()
        ema.update()
        posthoc.save_snapshot(ema, tmp_path)
    with pytest.raises(errors.CheckpointError, match="update_every"):
        posthoc.synthesize(tmp_path, sigma_rel=0.1)
