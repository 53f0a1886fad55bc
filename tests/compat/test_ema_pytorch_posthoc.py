"""KarrasEMA and PostHocEMA of ema_pytorch: requested widths, snapshots, resumed runs."""

import copy
import math
from pathlib import Path
from typing import Any

import ema_pytorch as theirs
import pytest

from fastema.compat import ema_pytorch as ours

from .ema_pytorch_case import Network, assert_close, nn, pair, run, torch

NEEDS = ("torch",)

pytestmark = pytest.mark.torch


class Clock(nn.Module):
    """Hold the current step and its square as weights."""

    def __init__(self) -> None:
        super().__init__()
        self.moments = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def tick(self, step: int) -> None:
        self.moments.data.copy_(torch.tensor([step, step**2], dtype=torch.float64))


WIDTHS = (0.05, 0.10)


def build_posthoc(folder: Path, model: Any = None, module: Any = ours, **settings: Any) -> Any:
    """Build a PostHocEMA that updates at each step; by default of a clock, with two widths."""
    if "gammas" not in settings:
        settings = {"sigma_rels": WIDTHS, **settings}
    settings = {"update_every": 1, "checkpoint_folder": str(folder), **settings}
    return module.PostHocEMA(Clock() if model is None else model, **settings)


def profile(moments: Any, steps: int) -> tuple[float, float]:
    """Return the mean and standard deviation of an average's weights over steps / ``steps``."""
    mean, square = (float(x) for x in moments)
    return mean / steps, math.sqrt(square - mean**2) / steps


@pytest.mark.parametrize("own", [{}, {"peer_exact": True}], ids=str)
@pytest.mark.parametrize("settings", [{"gamma": 2.5}, {"sigma_rel": 0.1}, {"gamma": 0.0}], ids=str)
def test_karras_ema_matches_the_peer_at_every_step(settings: Any, own: Any) -> None:
    mine, yours = pair("KarrasEMA", **settings, **own, update_every=1)
    assert mine.gamma == pytest.approx(yours.gamma, rel=1e-9)
    for step in range(50):
        run([mine, yours], [step])
        assert mine.beta == pytest.approx(yours.beta, abs=1e-9)
        assert_close(mine.ema_model, yours.ema_model, atol=1e-8)
    assert not torch.equal(mine.ema_model.scale, mine.model.scale)


@pytest.mark.parametrize(("every", "steps"), [(1, 3000), (10, 6000), (100, 30_000)])
def test_average_has_the_requested_width_or_that_of_the_peer(every: int, steps: int) -> None:
    found = []
    for module in (ours, theirs):
        clock = Clock()
        ema = module.KarrasEMA(clock, sigma_rel=0.05, update_every=every)
        for step in range(1, steps + 1):
            if step % every == 1 or every == 1:
                clock.tick(step)
            ema.update()
        found.append(profile(ema.ema_model.moments, steps))
    gamma = ours.KarrasEMA(Clock(), sigma_rel=0.05).gamma
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    if every == 1:
        assert found[0][1] == pytest.approx(0.05, rel=0.01)
        assert found[0][0] == pytest.approx((gamma + 1) / (gamma + 2), rel=0.005)


def run_clock(
    module: Any, folder: Path, every: int = 1, steps: int = 600
) -> tuple[Any, dict[tuple[float, int], tuple[float, float]]]:
    """Run a clock with snapshots; also return true profiles of averages that are not stored."""
    clock, exact = Clock(), {"checkpoint_every_num_steps": 20, "checkpoint_dtype": torch.float64}
    made = build_posthoc(folder, clock, module, **exact, update_every=every)
    watched = {
        width: ours.KarrasEMA(clock, sigma_rel=width, update_every=every)
        for width in (0.07, 0.15, 0.2)
    }
    truth = {}
    for step in range(1, steps + 1):
        clock.tick(step)
        made.update()
        for width, ema in watched.items():
            ema.update()
            if step % 20 == 0:
                truth[width, step] = profile(ema.ema_model.moments, step)
    return made, truth


def test_synthesized_averages_match_the_true_profiles(tmp_path: Path) -> None:
    made, truth = run_clock(ours, tmp_path)
    for width in (0.07, 0.15, 0.2):
        for step in (300, 600, None):
            got = made.synthesize_ema_model(sigma_rel=width, step=step)
            at = step or 600
            assert profile(got.ema_model.moments, at) == pytest.approx(truth[width, at], rel=0.02)
            assert isinstance(got, ours.KarrasEMA)
        assert made.synthesize_ema_model(gamma=got.gamma).gamma == got.gamma


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_snapshot_files_match_the_peers_layout(dtype: Any, tmp_path: Path) -> None:
    folders = tmp_path / "mine", tmp_path / "yours"
    settings = {"checkpoint_every_num_steps": 10, "checkpoint_dtype": dtype}
    emas = [
        build_posthoc(folder, Network(), module, **settings)
        for module, folder in zip((ours, theirs), folders, strict=True)
    ]
    run(emas, range(25))
    emas[0].model.norm.num_batches_tracked.fill_(100_001)
    emas[0].update()
    emas[0].checkpoint()
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    assert names[1] == {"0.10.pt", "0.20.pt", "1.10.pt", "1.20.pt"}
    assert names[0] == names[1] | {"0.26.pt", "1.26.pt"}
    for name in names[1]:
        mine, yours = (torch.load(folder / name, weights_only=True) for folder in folders)
        assert list(mine) == list(yours)
        for key, tensor in mine.items():
            assert tensor.shape == yours[key].shape
            if yours[key].dtype == dtype and tensor.is_floating_point():
                torch.testing.assert_close(tensor, yours[key], atol=0.01, rtol=0.01)
    exact = torch.load(folders[0] / "0.26.pt", weights_only=True)
    assert exact["ema_model.norm.num_batches_tracked"].item() == 100_001
    assert exact["step"].item() == 26


def test_posthoc_run_resumes_in_the_other_library(tmp_path: Path) -> None:
    settings = {"gammas": (3.0, 8.0), "checkpoint_folder": tmp_path, "update_every": 1}
    mine, yours = pair("PostHocEMA", **settings)
    whole = pair("PostHocEMA", **settings)[1]
    run([mine, yours], range(10))
    run([whole], range(25))
    for first, second in ((mine, 1), (yours, 0)):
        other = pair("PostHocEMA", **settings, seed=4)[second]
        other.load_state_dict(copy.deepcopy(first.state_dict()))
        other._model[0] = copy.deepcopy(first.model)
        for one, same in zip(other.ema_models, first.ema_models, strict=True):
            one.online_model[0] = other.model
            one.ema_model.hidden.copy_(same.ema_model.hidden)
        run([other], range(10, 25))
        assert (int(other.step), other.device) == (25, torch.device("cpu"))
        for one, same in zip(other.ema_models, whole.ema_models, strict=True):
            assert_close(one.ema_model, same.ema_model, atol=1e-12)
