"""The examples run, and what they print is true."""

import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from fastema.tracking import logs

from .support.process import run_python

NEEDS = ("jax", "keras", "lightning", "matplotlib", "sklearn", "tensorboard", "transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
if not EXAMPLES.exists():
    pytest.skip("examples/ belongs to a checkout, not to an install", allow_module_level=True)
IMAGES = 1797


@pytest.fixture
def run_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs an example in this process and returns what it prints.

    Processes of their own would spend most of their time on imports.
    """
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        with mock.patch.dict(os.environ):  # trainers set variables
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.full
def test_staircase_table_agrees_with_its_logs(tmp_path: Path) -> None:
    folder, out = tmp_path / "logs", tmp_path / "staircase.png"
    epochs, size = 3, 32
    given = ["--epochs", epochs, "--batch-size", size, "--logs", folder, "--out", out]
    done = run_python(EXAMPLES / "staircase.py", *given)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")

    found = {name.rpartition("/")[2]: curve.values for name, curve in logs.read(folder).items()}
    shown, raw = found["batch_loss"], found["batch_loss_raw"]
    sizes = np.array([*[size] * (IMAGES // size), IMAGES % size])
    assert len(shown) == epochs * len(sizes)
    ends = np.arange(1, epochs + 1) * len(sizes) - 1
    # At the end of an epoch Keras reports the mean of its batches.
    for end in ends:
        mean = np.average(raw[end + 1 - len(sizes) : end + 1], weights=sizes)
        np.testing.assert_allclose(shown[end], mean, rtol=1e-5)
    # The table: losses at the end of each epoch, and jumps over its boundary.
    rows = re.findall(r"^ +\d+  (\S+) +(\S+) +(\S+)%(.*)$", done.stdout, re.MULTILINE)
    assert len(rows) == epochs
    for (now, last, excess, jumps), end in zip(rows[:-1], ends[:-1], strict=True):
        assert float(last) == pytest.approx(shown[end], abs=5.1e-4)
        assert float(excess) / 100 == pytest.approx(shown[end] / float(now) - 1, abs=0.02)
        curves = (shown, found["batch_loss_sma"], found["batch_loss_ema"])
        jumped = [curve[end + 1] - curve[end] for curve in curves]
        assert list(map(float, jumps.split())) == pytest.approx(jumped, abs=5.1e-4)
    # The first epoch's mean ends far above the loss and then drops; the EMA does neither.
    *_, excess, jumps = rows[0]
    keras_jump, sma_jump, ema_jump = map(float, jumps.split())
    assert float(excess) > 20
    assert keras_jump < -0.1
    assert max(abs(sma_jump), abs(ema_jump)) < 0.1


# By how many percent, at least, each example's average is better than its weights.
LOOPS = ("pytorch_loop", "lightning_callback", "keras_callback", "jax_loop", "trainer_callback")
EVERY = dict.fromkeys(LOOPS, 5) | {"average_checkpoints": 3}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trainers
@pytest.mark.usefixtures("no_tensorflow")
@pytest.mark.parametrize("name", EVERY)
def test_average_is_better_by_the_stated_percentage(
    name: str, run_example: Callable[..., str]
) -> None:
    printed = run_example(name)
    ((weights, average),) = re.findall(r"weights ([\d.]+)%   average ([\d.]+)%", printed)
    assert float(average) >= float(weights) + EVERY[name]


@pytest.mark.slow
def test_sharded_example_runs_on_two_ranks() -> None:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = run_python(*start, EXAMPLES / "fsdp2.py")
    assert done.returncode == 0, done.stderr
    ((weights, average),) = re.findall(r"weights ([\d.]+)%   average ([\d.]+)%", done.stdout)
    assert float(average) > float(weights) + 1
    assert "one folder: 6 tensors, safetensors" in done.stdout


@pytest.mark.slow
def test_examples_of_several_averages_show_their_gains(run_example: Callable[..., str]) -> None:
    weights, *averages = map(float, re.findall(r"loss ([\d.]+)", run_example("diffusion_posthoc")))
    assert len(averages) == 5
    assert min(averages) < 0.98 * weights
    lines = run_example("self_distillation", "--steps", "500").splitlines()
    found = [re.findall(r"([\d.]+)%(?:   |$)", line) for line in lines]
    (alone, _), (_, taught) = [[float(one) for one in line] for line in found]
    assert taught > alone + 10
    lines = run_example("mixed_precision").splitlines()
    exact, _, still = (float(line.rpartition(" ")[2][:-1]) for line in lines[1:])
    assert exact > still + 10
