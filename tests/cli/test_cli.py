"""The commands version, doctor, plan, bench, average, inspect and convert, as typed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastema import EMA, PowerEMA, __version__, cli, get_num_threads, posthoc
from fastema.checkpoint import average, save
from fastema.cli.bench import race, shapes
from fastema.cli.bench.picture import title_of

from ..support.process import run_python

NEEDS = ("safetensors", "torch")


def test_version_interrupts_and_unknown_commands(
    fastema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_python("-m", "fastema", "--version")
    assert (done.returncode, done.stdout) == (0, f"fastema {__version__}\n")
    assert "demo" in fastema("", code=2).err
    assert "polish" in fastema("polish", code=2).err

    def interrupted(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.COMMANDS["plan"], "run", interrupted)
    assert fastema("plan --params 7B", code=130).err == "fastema plan: interrupted\n"


def test_missing_packages_are_named_with_the_pip_command(
    fastema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing, named in (("rich", "rich is"), ("sklearn", "scikit-learn and rich are")):
        monkeypatch.setitem(sys.modules, missing, None)
        out, err = fastema("demo", code=2)
        assert (out, err[-30:]) == ("", ': pip install "fastema[demo]"\n')
        assert err.startswith(f"fastema demo: {named} not installed; ")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_80_columns(command: str, fastema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, fastema(f"{command} --help").out.splitlines())) < 80


def test_plan_counts_the_bytes_and_seconds_of_each_way(fastema: Any) -> None:
    line = "plan --params 64B --world 64 --hbm 2000 --link 50 --host 80 --step 0.5"
    out = fastema(line).out
    assert max(map(len, out.splitlines())) < 80
    assert "\naverage        " in out
    assert (
        "\non the host, float32          -  6 GB " in out
    )  # names to the left, numbers to the right
    table = [" ".join(one.split()) for one in out.splitlines()]
    assert table[0].startswith("64,000,000,000 weights in bfloat16 on 64 ranks. For each rank:")
    table = table[table.index("average GPU host moved link time share") + 1 :]
    assert table[3].endswith(" 2 GB - 6 GB - 3 ms 0.60%")
    assert "; ".join(table[:3] + table[4:6]) == (
        "on each GPU, float32 256 GB - 640 GB - 320 ms 64.00%; sharded, float32 4 GB - 10 GB - "
        "5 ms 1.00%; sharded, bf16+16 4 GB - 10 GB - 5 ms 1.00%; sharded, every 10 steps 4 GB - "
        "10 GB - 0.5 ms 0.10%; on the host, float32 - 6 GB 12 GB 2 GB 1.2 s 240.00%"
    )
    *_, host = json.loads(fastema(f"{line} --json").out)
    assert list(host.values())[2:] == [0.0, 6e9, 12e9, 2e9, 1.2]
    out = " ".join(fastema("plan --params 1e8 --every 5").out.split())
    assert "GPU, every 5 steps 400 MB - 1 GB - 0.0597 ms on the host" in out
    assert 'GPU, every 5 steps: fastema.EMA(model, shadow_dtype="float32", update_every=5)' in out
    for dtype, name in (("fp16", "float16"), ("torch.half", "float16"), ("float", "float32")):
        assert f"weights in {name}." in fastema(f"plan --params 1e8 --dtype {dtype}").out
    said = "expected float32 (f32, fp32, float), bfloat16 (bf16) or float16 (f16, fp16, half), got"
    assert said in " ".join(fastema("plan --params 1e8 --dtype fp8", code=2).err.split())
    assert "argument --params: expected a number above" in fastema("plan --params 0", code=2).err


def test_doctor_reports_the_setup_and_detects_wrong_kernels(
    fastema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.doctor, "_BYTES", 48_000)
    shipped = {"cpu": ["x86-64-v3", "x86-64-v4"], "gpu": []}
    monkeypatch.setattr("fastema.engine.diagnosis.shipped_targets", lambda: shipped)
    out, err = fastema("doctor")
    assert "compiled kernels for CPUs: x86-64-v3, x86-64-v4; for GPUs: none" in out
    assert err == ""
    lines = [one for one in out.splitlines() if not one.startswith(("cache", "missing"))]
    assert max(map(len, lines)) < 80
    threads = f"{get_num_threads()} thread"
    for said in (f"numpy {np.__version__}", "8 of 8 match their references", threads, "GB/s, read"):
        assert said in out
    found = json.loads(fastema("doctor --json").out)
    assert set(found["checks"].values()) == {"right"}
    assert found["packages"]["fastema"] == __version__
    assert found["GB/s"] > 0
    assert not set(found["missing"]) & set(found["packages"])
    restore = EMA._restore

    def update(self: Any) -> None:
        for one in self.shadow.values():
            one += 1

    def spoilt(self: Any, model: Any) -> Any:
        found = restore(self, model)
        self._weights.container.weight.data[0, 0] += 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(EMA, "update", update)
        err = fastema("doctor", code=1).err
    assert "update of float32 is wrong: off by" in err
    assert "swap" not in err
    monkeypatch.setattr(EMA, "_restore", spoilt)
    said = "swap and back of float32 is wrong: the weights were not restored"
    assert said in fastema("doctor", code=1).err


@pytest.fixture
def bench(fastema: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return ``bench(options)``, run beside a file of three small shapes; it returns the output."""
    monkeypatch.chdir(tmp_path)
    Path("shapes.json").write_text('{"a": [3, 5], "b": [7], "c": []}')
    return lambda line, **how: fastema(f"bench --seconds 0.001 {line}", **how)


def test_bench_reports_every_competitor_as_text_json_and_picture(bench: Any) -> None:
    out, err = bench("--shapes shapes.json --dtype float32")
    assert err == ""
    assert "shapes.json: 23 weights in 3 tensors, float32, average float32, on cpu" in out
    lines = {line.split("  ")[0] for line in out.splitlines()}
    assert {"fastema.EMA", *race.WAYS} <= lines
    out, err = bench("--shapes shapes.json --json -o bench.png")
    found = json.loads(out)
    assert "bench.png" in err
    assert Path("bench.png").stat().st_size > 5_000
    assert (found["elements"], found["weights"], found["average"]) == (23, "bfloat16", "float32")
    ways = {one["name"]: one for one in found["ways"]}
    assert ways["fastema.EMA"]["ratio"] == 1.0
    timed = [one for one in ways.values() if one["ms"]]
    assert {"fastema.EMA", "torch mul_/add_ loop"} <= {one["name"] for one in timed}
    for one in timed:  # megabytes: reads of weights and average, and a write of the average
        assert one["ms"] * one["gbps"] == pytest.approx(23 * (2 + 4 + 4) / 1e6)
    assert "raises RuntimeError" in ways["torch AveragedModel"]["why"]  # it cannot mix dtypes


def test_picture_of_bench_says_what_it_shows() -> None:
    head = {"model": "GPT-2 small", "elements": 124_439_808, "tensors": 148}
    head |= {"weights": "bfloat16", "average": "float32", "device": "cpu"}
    assert title_of(head).splitlines() == [
        "Time of one update of a moving average of weights",
        "GPT-2 small: 124 million weights in bfloat16, average in float32, on cpu",
    ]


def test_bench_takes_shapes_from_a_checkpoint_or_config(bench: Any) -> None:
    tensors = {"w": torch.ones(4, 2), "n": torch.ones(3, dtype=torch.int64)}
    torch.save({"model": tensors}, "model.pt")
    assert "model.pt: 8 weights in 1 tensor" in bench("--checkpoint model.pt").out
    assert sum(one.numel() for one in shapes._gpt2()) == 124_439_808
    assert "expected one of timm:NAME, torchvision:NAME" in bench("--model Net", code=2).err
    pytest.importorskip("transformers")
    assert len(shapes._of_model("transformers:GPT2Config")) == 148


STEPS = (100, 200, 450, 500, 900)
LORA = {"lora_A": torch.ones(2), "lora_B": torch.ones(1)}


@pytest.fixture
def run(tmp_path: Path, fastema: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return ``run("--swa ...")``, run in a folder of checkpoints; it returns the output."""
    monkeypatch.chdir(tmp_path)
    for step in STEPS:
        tensors = {"w": torch.full((5,), step / 100), **LORA}
        save_file(tensors, tmp_path / f"step-{step}.safetensors")
    return lambda line, **options: fastema(f"average {line}", **options)


def test_average_of_named_checkpoints_is_their_mean(run: Any, tmp_path: Path) -> None:
    out, err = run("step-100.safetensors step-200.safetensors -o mean.safetensors")
    assert err == ""
    assert load_file(tmp_path / "mean.safetensors")["w"].tolist() == [1.5] * 5
    lines = out.splitlines()
    assert lines[0].split() == ["checkpoint", "step", "size", "swa"]
    assert lines[1].split() == ["step-100.safetensors", "100", "32", "B", "0.5"]
    assert "note: LoRA factors" in out
    assert lines[-1].startswith("mean.safetensors: 64 B read in ")


def test_several_averages_of_a_folder_get_distinct_names(run: Any, tmp_path: Path) -> None:
    out, _ = run("--dir . --last 3 --swa --ema 0.999 --ema 0.9 --wsm 1-sqrt -o merged.safetensors")
    found = {p.name[7:-12]: load_file(p)["w"][0].item() for p in tmp_path.glob("merged-*")}
    assert found == {
        "swa": pytest.approx((4.5 + 5 + 9) / 3),
        "ema0.999": pytest.approx(np.diff([0, 0.999**450, 0.999**400, 1]) @ (4.5, 5, 9)),
        "ema0.9": pytest.approx(9),  # the previous one is 400 steps older
        "wsm-1-sqrt": pytest.approx(np.diff(np.sqrt([0, 1 / 3, 2 / 3, 1])) @ (4.5, 5, 9)),
    }
    assert "step-900.safetensors   900" in out


SCORES = {"step-100.safetensors": 0.4, "./step-200.safetensors": 0.3, "450": 0.2, "500": 0.3}
SCORES |= {"900": 0.1, "1000": 0.0}  # the last is of no checkpoint
LOG = [{"step": step, "loss": 9.0} for step in STEPS]
LOG += [{"step": step, "eval_loss": step / 7, "eval_f1": step / 7} for step in STEPS]


def test_average_of_the_best_checkpoints_by_a_file_of_scores(run: Any, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    out, _ = run("--dir . --best 3 --metric scores.json --mode min -o best.safetensors")
    # Of the two scores of 0.3 the earlier step's is better.
    assert load_file("best.safetensors")["w"][0].item() == pytest.approx((2 + 4.5 + 9) / 3)
    assert "note: the 3 of 5 checkpoints with the lowest score" in out.splitlines()
    names = "step-100.safetensors step-500.safetensors"
    run(f"{names} --best 1 --metric scores.json --mode max -o best.safetensors --force")
    assert load_file("best.safetensors")["w"][0].item() == 1.0


def test_average_of_the_best_checkpoints_by_a_metric_in_a_log(run: Any, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": 1.0, "log_history": LOG}))
    (tmp_path / "metrics.csv").write_text("step,val\n100,1\n200,5\n450,\n450,4\n500,2\n900,3\n")

    def steps(metric: str) -> list[int]:
        line = f"--dir . --best 2 --metric {metric} --dry-run --json"
        return [one["step"] for one in json.loads(run(line).out)["checkpoints"]]

    assert steps("trainer_state.json:eval_loss") == [100, 200]
    assert steps("trainer_state.json:eval_loss --mode max") == [500, 900]
    assert steps("trainer_state.json:eval_f1 --mode max") == [500, 900]
    assert steps("trainer_state.json:eval_f1 --mode max --window 401 --last 2") == [500, 900]
    assert steps("metrics.csv:val --mode max") == [200, 450]


NOT_BEST = {
    "--best 2": "--best needs the scores: --metric FILE[:NAME]",
    "--metric scores.json": "--metric and --mode need --best",
    "--best 2 --metric scores.json": "is a low or a high score better? Add --mode min or --mode",
    "--best 2 --metric log.json:eval_f1": "is a low or a high eval_f1 better? Add --mode min",
    "--best 2 --metric scores.json --mode min --ema 0.9": "--best averages equally: leave out",
    "--best 9 --metric log.json:loss": "there are 5 checkpoints to choose the best 9 from",
    "--best 2 --metric log.json --mode min": "of a log, name the metric, as in log.json:eval_loss",
    "--best 2 --metric log.json:acc --mode max": "log.json: no column 'acc'; those with numbers",
    "--best 2 --metric twice.json:loss": "loss is 1.0 and 2.0 at step 100; leave one of them",
    "--best 2 --metric stepless.json:loss": "no column of steps; expected one of global_step, step",
    "--best 2 --metric gone.json:loss": "gone.json: No such file or directory",
    "--best 2 --metric nan.json --mode min": "step-500.safetensors has the score nan",
    "--best 2 --metric some.json --mode min": "step-450.safetensors has no score",
    "--best 2 --metric both.json --mode min": "the scores '100', 'step-100.safetensors'",
}


@pytest.mark.parametrize("line", NOT_BEST)
def test_scores_that_do_not_choose_are_refused(run: Any, tmp_path: Path, line: str) -> None:
    nan = {str(step): float("nan") if step == 500 else 1.0 for step in STEPS}
    for name, content in {
        "scores.json": SCORES,
        "log.json": LOG,
        "twice.json": [{"step": 100, "loss": 1}, {"step": 100, "loss": 2}],
        "stepless.json": [{"row": 100, "loss": 1}],
        "nan.json": nan,
        "some.json": {"100": 1, "200": 2},
        "both.json": dict.fromkeys(map(str, STEPS), 1) | {"step-100.safetensors": 1},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    err = run(f"--dir . {line} -o best.safetensors", code=2).err
    assert err.startswith("fastema average: ")
    assert NOT_BEST[line] in err
    assert not (tmp_path / "best.safetensors").exists()


def test_average_of_a_window_of_tokens(run: Any) -> None:
    def steps(line: str) -> list[int]:
        found = json.loads(run(f"--dir . {line} --dry-run --json").out)
        return [one["step"] for one in found["checkpoints"]]

    assert steps("--window 0.401k") == [500, 900]
    tokens = "--unit tokens --tokens-per-step 4M"
    assert steps(f"--window 1.6B {tokens}") == [900]
    assert steps(f"--window 1.601B {tokens}") == [500, 900]
    assert steps(f"--min-spacing 1.5B {tokens}") == [100, 500, 900]
    assert steps(f"--min-spacing 1B --window 3.2B {tokens} --ema 0.9") == [200, 500, 900]


def test_average_dry_run_writes_nothing_and_json_reports_the_average(run: Any) -> None:
    out, err = run("--dir . --window 401 --weights=-1,1.5 --dry-run -o mean.safetensors")
    assert out.endswith("would read 64 B and write mean.safetensors\n")
    warning = "warning: some weights are negative: the result is not an average"
    assert err.splitlines() == ["warning: the weights sum to 0.5, not to 1", warning]
    assert not Path("mean.safetensors").exists()
    found = json.loads(run("--dir . --last 2 --json -o mean.safetensors").out)
    assert [one["step"] for one in found["checkpoints"]] == [500, 900]
    made = {"path": "mean.safetensors", "average": "swa", "weights": [0.5, 0.5], "written": True}
    assert (found["outputs"], found["bytes_read"]) == ([made], 64)


NO_AVERAGE = {
    "-o x.safetensors": "name checkpoints, or a folder of them: --dir DIR",
    "--dir . step-100.safetensors -o x.safetensors": "not both",
    "step-100.safetensors --last 2 -o x.safetensors": "--last, --window and --min-spacing",
    "--dir .": "name the output: -o OUT",
    "--dir nothing -o x.safetensors": "cannot read nothing: No such file or directory",
    "--dir . --window 1B --unit tokens -o x.safetensors": "took the same number of tokens, pass "
    "--tokens-per-step",
    "--dir . --window 9 --tokens-per-step 1K -o x.safetensors": "--tokens-per-step 1000: needs "
    "--unit tokens",
    "--dir . --unit tokens -o x.safetensors": "need --window or --min-spacing",
    "--dir . --last 9 -o x.safetensors": "average: --last 9: 5 checkpoints of . qualify",
    "--dir . --sma 9 -o x.safetensors": "average: --sma 9: there are 5 checkpoints",
    "--dir . --weights 1,2 -o x.safetensors": "--weights has 2 numbers for 5 checkpoints",
    "--dir . -o step-100.safetensors": "is one of the checkpoints; name another output",
    "--dir . --sigma-rel 0.1 -o x.safetensors": "is no snapshot of a power-function average",
    "--dir . --key a.b -o x.safetensors --dry-run": "has nothing at 'a.b'",
}
USAGE = (
    "--window 1.5",
    "--window 7Q",
    "--window inf",
    "--ema 1.5",
    "--sma 0",
    "--wsm cubic",
    "--weights a",
    "--sigma-rel 3",
)


@pytest.mark.parametrize("line", [*NO_AVERAGE, *USAGE])
def test_invalid_average_is_refused_and_writes_nothing(run: Any, tmp_path: Path, line: str) -> None:
    err = run(line if line in NO_AVERAGE else f"--dir . {line} -o x.safetensors", code=2).err
    assert err.startswith("fastema average: " if line in NO_AVERAGE else "usage: fastema average ")
    assert NO_AVERAGE.get(line, "") in err
    assert len(list(tmp_path.iterdir())) == len(STEPS)


def test_existing_average_is_replaced_only_with_force(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "mean.safetensors"
    run("--dir . --last 2 -o mean.safetensors")
    before = out.read_bytes()
    err = run("--dir . --last 3 -o mean.safetensors", code=2).err
    assert err == "fastema average: mean.safetensors exists; add --force to replace it\n"
    assert out.read_bytes() == before
    run("--dir . --last 3 -o mean.safetensors --force")
    assert load_file(out)["w"][0].item() == pytest.approx((4.5 + 5 + 9) / 3)


def test_quantized_weights_are_said_to_be_left_out(run: Any, tmp_path: Path) -> None:
    packed = torch.arange(8, dtype=torch.uint8)
    for step in (1, 2):
        tensors = {"a.weight": packed, "a.qweight": packed.int(), "norm": torch.full((2,), step)}
        tensors["norm"] = tensors["norm"].float()
        save_file(tensors, tmp_path / f"quantized-{step}.safetensors")
    names = "quantized-1.safetensors quantized-2.safetensors"
    said = "quantized or packed weights are copied, not averaged: 2 (i32, u8), such as 'a.qweight'"
    assert f"note: {said}" in run(f"{names} -o mean.safetensors").out
    with pytest.warns(UserWarning, match="packed weights are copied, not averaged: 2"):
        average(names.split(), [0.5, 0.5], tmp_path / "again.safetensors")


def test_snapshots_are_combined_to_another_width(run: Any, tmp_path: Path) -> None:
    weights = [torch.zeros(4)]
    ema = PowerEMA(weights, (0.05, 0.1))
    for step in range(1, 201):
        weights[0].fill_(step)
        ema.update()
        if not step % 20:
            posthoc.save_snapshot(ema, tmp_path / "snapshots")
    assert run("--dir snapshots --sigma-rel 0.07 -o width.safetensors").err == ""
    want = posthoc.synthesize(tmp_path / "snapshots", sigma_rel=0.07).tensors
    (got,) = load_file(tmp_path / "width.safetensors").values()
    torch.testing.assert_close(got, torch.from_numpy(next(iter(want.values()))), rtol=1e-5, atol=0)


@pytest.fixture
def beside(tmp_path: Path, fastema: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return ``beside("inspect ema.safetensors")``, run beside an average and its model."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, decay=0.99)
    for _ in range(1000):
        ema.update()
    save(ema, tmp_path / "ema.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save({"ema_state": model.state_dict()}, tmp_path / "swa.pt")
    return fastema


def test_inspect_describes_an_average(beside: Any) -> None:
    out, err = beside("inspect ema.safetensors --check --tensors")
    assert err == ""
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line[0] != " ")
    assert lines["updates"] == "1,000"
    assert lines["schedule"] == "decay 0.99"
    assert lines["lag"].startswith("99 +/- 99.46 ")
    assert lines["lag"].endswith("behind the model")
    assert lines["tensors"] == "2 tensors (2 f32), 8 elements"
    assert lines["whole"] == "yes, by its checksums"
    assert "  'weight': f32[2, 3]" in out.splitlines()
    found = json.loads(beside("inspect ema.safetensors --json").out)
    assert (found["library"], found["num_updates"]) == ("fastema", 1000)
    shapes = {"bias": [2], "weight": [2, 3]}
    assert found["tensors"] == {n: {"dtype": "f32", "shape": s} for n, s in shapes.items()}


def test_convert_writes_the_average_and_reports_what_is_lost(beside: Any, tmp_path: Path) -> None:
    out, err = beside("convert ema.safetensors swa.pt --to swa_utils --force")
    assert err == ""
    assert out.splitlines() == [
        "swa.pt: swa_utils, 2 tensors of ema.safetensors (fastema)",
        "not carried: the schedule, decay 0.99",
    ]
    model = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(3, 2))
    model.load_state_dict(torch.load(tmp_path / "swa.pt", weights_only=True))
    assert model.n_averaged == 1000
    out, _ = beside("convert ema.safetensors ema.pt --to torch_ema")
    assert len(out.splitlines()) == 1


NOT_CONVERTED = {
    "inspect nowhere.pt": "fastema inspect: cannot read",
    "inspect model.pt --key a.b": "fastema inspect: model.pt has nothing at 'a.b'",
    "inspect ema.safetensors --index 3": "fastema inspect: --index 3: ema.safetensors holds 1",
    "convert ema.safetensors out.pt --to keras": "fastema convert: --to keras: expected one of",
    "convert swa.pt out.safetensors --to fastema": "fastema convert: swa.pt (d2go) does not record "
    "a schedule: pass --decay, or",
    "convert swa.pt out.pt --to torch_ema": "fastema convert: torch_ema stores the parameters "
    "alone, as a list in their order, and swa.pt does not tell them from buffers; pass --names: a",
    "convert swa.pt out.pt --to d2go --names swa.safetensors": "fastema convert: cannot read swa.s",
    "convert ema.safetensors swa.pt --to d2go": "fastema convert: swa.pt exists; add --force to",
    "convert ema.safetensors model.pt --to d2go --names model.pt": "fastema convert: model.pt is "
    "the file that names are taken from",
    "convert ema.safetensors nowhere/out.pt --to d2go": "fastema convert: cannot write",
}


@pytest.mark.parametrize("line", NOT_CONVERTED)
def test_invalid_command_gives_a_one_line_error(line: str, beside: Any, tmp_path: Path) -> None:
    before = {one.name for one in tmp_path.iterdir()}
    out, err = beside(line, code=2)
    assert out == ""
    assert err.startswith(NOT_CONVERTED[line])
    assert err.count("\n") == 1
    assert {one.name for one in tmp_path.iterdir()} == before
