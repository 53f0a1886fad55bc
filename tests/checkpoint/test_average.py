"""Averages of checkpoint files: any layout in, a float64 sum out, complete or not written."""

import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastema.checkpoint import average, best, dcp, files, merge, open_checkpoint, weights
from fastema.checkpoint.files import StoredTensor
from fastema.checkpoint.select import select
from fastema.errors import ArgumentError, CheckpointError
from fastema.layout.dtypes import dtype

NEEDS = ("safetensors", "torch")

pytestmark = [
    pytest.mark.usefixtures("inside"),
    pytest.mark.filterwarnings("ignore:quantized or packed weights are copied:UserWarning"),
]

WEIGHTS = [0.1, 0.2, 0.3, 0.15, 0.25]
State = dict[str, torch.Tensor]


def state(seed: int) -> State:
    """Draw tensors of many dtypes and sizes, one larger than a piece."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "emb.weight": random(700, 131),
        "out.weight": random(40, 30).bfloat16(),
        "bn.running_mean": random(5).double(),
        "bn.num_batches_tracked": torch.tensor(seed),
        "half": random(7).half(),
        "ids": torch.arange(9),
        "scaled": torch.tensor([1, 2, 3]).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 3),
        "scalar": random(),
        "complex": torch.complex(random(3), random(3)),
    }


STATES = [state(seed) for seed in range(5)]


def save_safetensors(path: Path, one: State) -> Path:
    save_file(one, file := path.with_name(f"{path.name}.safetensors"))
    return file


def save_torch(path: Path, one: State) -> Path:
    torch.save({"model": one, "lr": 0.1, "names": ["a", None]}, file := path.with_suffix(".pt"))
    return file


def save_lightning(path: Path, one: State) -> Path:
    torch.save({"state_dict": one, "global_step": 7}, file := path.with_suffix(".ckpt"))
    return file


def save_in_two(path: Path, one: State, file: str, save: Callable[[Any, Any], Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "optimizer.pt").write_bytes(b"")
    names, where = list(one), {}
    for number, some in enumerate((names[: len(one) // 2], names[len(one) // 2 :]), 1):
        save({name: one[name] for name in some}, path / file.format(f"-0000{number}-of-00002"))
        where |= dict.fromkeys(some, file.format(f"-0000{number}-of-00002"))
    (path / f"{file.format('')}.index.json").write_text(json.dumps({"weight_map": where}))
    return path


save_sharded = partial(save_in_two, file="model{}.safetensors", save=save_file)
save_sharded_torch = partial(save_in_two, file="pytorch_model{}.bin", save=torch.save)


def save_folder(path: Path, one: State) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("[]")
    save_file(one, path / "model.safetensors")
    return path


def save_dcp(path: Path, one: State, flat: bool = False) -> Path:
    from torch.distributed import checkpoint

    content = one if flat else {"model": one, "step": torch.tensor(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(content, checkpoint_id=str(path))
    return path


SAVED: dict[str, tuple[Callable[[Path, State], Path], str]] = {
    "safetensors": (save_safetensors, "safetensors"),
    "torch.save": (save_torch, "torch"),
    "Lightning": (save_lightning, "torch"),
    "sharded safetensors": (save_sharded, "sharded safetensors"),
    "sharded torch": (save_sharded_torch, "sharded torch"),
    "Hugging Face folder": (save_folder, "safetensors"),
    "torch.distributed": (save_dcp, "torch.distributed"),
}


def assert_average(out: Path, coefficients: list[float], states: list[State] = STATES) -> None:
    """Assert that floats are the float64 sum, rounded once, and others are the newest's."""
    got: State = {}
    for file in out.glob("*.safetensors") if out.is_dir() else [out]:
        got |= load_file(file)
    assert got.keys() == states[-1].keys()
    for name, tensor in states[-1].items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        if tensor.dtype in (torch.int64, torch.float8_e4m3fn):
            assert torch.equal(got[name].float(), tensor.float()), name
            continue
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        want = sum(c * one[name].to(wide) for c, one in zip(coefficients, states, strict=True))
        half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(tensor.dtype, 2.0**-24)
        error = (got[name].to(wide) - want).abs()
        assert (error <= want.abs() * 1.01 * half_ulp + 1e-12).all(), name


def save_two(tmp_path: Path, *changes: dict[str, Any]) -> list[Path]:
    made = []
    for i, change in enumerate(changes):
        one = {name: t for name, t in {**STATES[i], **change}.items() if t is not None}
        made.append(save_safetensors(tmp_path / f"{i}", one))
    return made


@pytest.mark.parametrize("layout", SAVED)
def test_average_of_any_layout_is_the_float64_sum(layout: str, tmp_path: Path) -> None:
    save, kind = SAVED[layout]
    paths = [save(tmp_path / f"step-{100 * i}", one) for i, one in enumerate(STATES)]
    found = open_checkpoint(paths[2])
    assert (found.format, found.step) == (kind, 7 if layout == "Lightning" else 200)
    folder = paths[0].is_dir()
    out = tmp_path / ("out" if folder else "out.safetensors")
    read: list[int] = []
    assert average(paths, WEIGHTS, out, advance=read.append) == out
    assert_average(out, WEIGHTS)
    assert sum(read) == merge.prepare([open_checkpoint(path) for path in paths]).nbytes
    if folder:
        expected = {file.name for file in paths[-1].glob("*.json")}
        if layout == "sharded safetensors":
            expected |= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
        else:
            expected = (expected - {"pytorch_model.bin.index.json"}) | {"model.safetensors"}
        assert {file.name for file in out.iterdir()} == expected


def test_mixed_layouts_and_dtypes_take_those_of_the_newest(tmp_path: Path) -> None:
    wide = {name: t.double() if t.dtype == torch.float32 else t for name, t in STATES[1].items()}
    first = save_dcp(tmp_path / "a", STATES[0])
    paths = [first, save_torch(tmp_path / "b", wide), save_safetensors(tmp_path / "c", STATES[2])]
    out = average(paths, [0.5, 0.25, 0.25], tmp_path / "out.safetensors")
    assert_average(out, [0.5, 0.25, 0.25], [STATES[0], wide, STATES[2]])


def test_one_pass_makes_several_averages(tmp_path: Path) -> None:
    paths = [save_folder(tmp_path / f"{i}", one) for i, one in enumerate(STATES)]
    read: list[int] = []
    made = merge.prepare([open_checkpoint(path) for path in paths])
    merge.merge(made, {tmp_path / "one": WEIGHTS, tmp_path / "other": [0.2] * 5}, read.append)
    assert_average(tmp_path / "one", WEIGHTS)
    assert_average(tmp_path / "other", [0.2] * 5)
    assert sum(read) == made.nbytes


def test_tied_names_are_averaged_once_and_recorded_in_metadata(tmp_path: Path) -> None:
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    for i, path in enumerate(paths):
        one = torch.full((3,), float(i))
        torch.save({"emb": one, "head": one, "rest": torch.ones(2)}, path)
    out = average(paths, [0.5, 0.5], tmp_path / "out.safetensors")
    found = {name: t.tolist() for name, t in load_file(out).items()}
    assert found == {"emb": [0.5] * 3, "rest": [1.0] * 2}
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["head"] == "emb"  # as safetensors.torch.load_model reads it
        assert opened.metadata()["fastema.average"] == "0.5 * 0.pt; 0.5 * 1.pt"


def test_checkpoints_of_a_folder_are_selected_by_step(tmp_path: Path) -> None:
    steps = (900, 100, 500, 450, 1000)
    for step in steps:
        save_file({"w": torch.ones(1)}, tmp_path / f"model-v2-step_{step:06d}.safetensors")
    (tmp_path / "notes.txt").write_text("")

    def chosen(**options: Any) -> list[int | None]:
        return [one.step for one in select(tmp_path, **options)]

    assert chosen() == sorted(steps)
    assert chosen(last=2) == [900, 1000]
    assert chosen(window=500) == [900, 1000]
    assert chosen(window=501) == [500, 900, 1000]
    assert chosen(min_spacing=200) == [100, 500, 1000]
    assert chosen(min_spacing=100, last=3) == [500, 900, 1000]
    average([one.path for one in select(tmp_path)], None, tmp_path / "mean.safetensors")
    assert chosen() == sorted(steps)  # the average is not selected
    save_file({"w": torch.ones(1)}, tmp_path / "final.safetensors")
    with pytest.raises(CheckpointError, match=r"step is not known.*\n.*final\.safetensors"):
        chosen()


def test_checkpoints_are_selected_by_the_tokens_that_the_trainer_counted(tmp_path: Path) -> None:
    for step, tokens in ((1, 10), (2, 40), (3, 50)):
        folder = save_folder(tmp_path / f"checkpoint-{step}", STATES[0])
        state = {"global_step": step, "num_input_tokens_seen": tokens}
        (folder / "trainer_state.json").write_text(json.dumps(state))

    def chosen(**options: Any) -> list[int | None]:
        return [one.step for one in select(tmp_path, unit="tokens", **options)]

    assert chosen(window=40) == [2, 3]
    assert chosen(window=41) == [1, 2, 3]
    assert chosen(min_spacing=20) == [1, 3]
    assert chosen(window=40, tokens_per_step=30) == [2, 3]
    (folder / "trainer_state.json").write_text('{"num_input_tokens_seen": 0}')  # not counted
    with pytest.raises(CheckpointError, match=r"tokens are not known.*\n.*checkpoint-3\n"):
        chosen(window=40)
    for options, words in (
        ({"unit": "batches"}, "expected 'steps' or 'tokens'"),
        ({"tokens_per_step": 4}, "needs unit='tokens'"),
    ):
        with pytest.raises(ArgumentError, match=words):
            select(tmp_path, **options)


def test_best_checkpoints_keep_their_order_and_earlier_ones_win_ties(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a-100", "a-200", "a-300", "b-400")]
    scores = {100: 2.0, "a-200": np.float32(1), str(paths[2]): 2, "0400": 0.5, "c": 9, 7: 9}
    assert best(paths, scores, 2, mode="min") == [paths[1], paths[3]]
    assert best(paths, scores, 3, mode="min") == [paths[0], paths[1], paths[3]]
    assert best(paths, scores, 1, mode="max") == [paths[0]]
    file = save_lightning(tmp_path / "x-300", STATES[0])  # its step is 7
    assert best([file], {300: 1.0}, 1, mode="max") == [file]
    (chosen,) = best([open_checkpoint(file)], {7: 1.0}, 1, mode="max")
    assert chosen.path == file


@pytest.mark.parametrize(
    ("scores", "options", "words"),
    [
        ({1: 0.5}, {}, "run/b-2 has no score\nGive one number for each checkpoint"),
        ({1: 0.5, 2: math.nan}, {}, "run/b-2 has the score nan"),
        ({1: 0.5, 2: "0.4"}, {}, "run/b-2 has the score '0.4'"),
        ({1: 0.5, 2: True}, {}, "run/b-2 has the score True"),
        ({1: 0.5, 2: 0.4, "b-2": 0.4}, {}, "run/b-2 has the scores 2, 'b-2'"),
        ({1: 0.5, 2: 0.4}, {"n": 3}, "there are 2 checkpoints to choose the best 3 from"),
        ({1: 0.5, 2: 0.4}, {"n": 0}, "n=0: expected a whole number of at least 1"),
        ({1: 0.5, 2: 0.4}, {"mode": "low"}, "mode='low': expected 'min'"),
        ({1: 1, 2: 1}, {"more": "b/b-2"}, "the score 2 fits run/b-2 and b/b-2: name their paths"),
    ],
)
def test_scores_that_do_not_decide_are_refused(
    scores: dict[Any, Any], options: dict[str, Any], words: str
) -> None:
    paths = ["run/a-1", "run/b-2", *filter(None, [options.pop("more", None)])]
    with pytest.raises(ArgumentError) as caught:
        best(paths, scores, **{"n": 1, "mode": "min", **options})
    assert words in str(caught.value)


def test_weights_follow_steps_of_uneven_checkpoints() -> None:
    steps = [100, 200, 450, 500, 900]
    for found, want in (
        (weights.swa(5), [0.2] * 5),
        (weights.sma(5, 2), [0, 0, 0, 0.5, 0.5]),
        (weights.wma(5), [1 / 15, 2 / 15, 3 / 15, 4 / 15, 5 / 15]),
        (weights.wsm(5, "linear"), [0.2] * 5),
        (weights.wsm(5, "1-sqrt"), np.diff(np.sqrt([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))),
        # Each counts for the steps since the previous one, as in an EMA over all steps.
        (weights.ema(steps, 0.99), np.diff([0.0, *0.99 ** (900 - np.array(steps))])),
    ):
        np.testing.assert_allclose(found, want, rtol=1e-12)


def test_invalid_weights_are_refused(inside: Path) -> None:
    one = save_safetensors(inside / "1", STATES[0])
    for call, words in (
        (lambda: average([], [], "out"), "no checkpoints to average"),
        (lambda: average([one], [1, 1], "out"), "2 weights for 1 checkpoints"),
        (lambda: average([one], [float("nan")], "out"), "expected finite numbers"),
        (lambda: weights.sma(3, 4), "sma=4: there are 3"),
        (lambda: weights.ema([1, 1], 0.9), "rising steps"),
        (lambda: weights.ema([1, 2], 1.0), r"ema=1\.0: expected a decay"),
        (lambda: weights.wsm(3, "cubic"), "expected one of linear, cosine, 1-sqrt"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()


@pytest.mark.slow
def test_memory_of_averaging_is_bounded(tmp_path: Path, python: Callable[..., str]) -> None:
    for i in range(40):
        save_file({"w": torch.randn(4_000_000)}, tmp_path / f"{i}.safetensors")
    grown = python(
        """
        import resource, sys
        from pathlib import Path
        from fastema.checkpoint import average
        paths = sorted(Path(sys.argv[1]).iterdir())
        average(paths[:2], [0.5, 0.5], sys.argv[2])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        average(paths, [1 / 40] * 40, sys.argv[2])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """,
        str(tmp_path),
        str(tmp_path.with_suffix(".safetensors")),
    )
    assert int(grown) < 150 << 10  # of 640 MB


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"half": None}, "'half' is in 0.safetensors, not in 1.safetensors"),
        ({"more": torch.ones(2)}, "'more' is in 1.safetensors, not in 0.safetensors"),
        ({"half": torch.ones(8)}, r"'half' is \[7\] in 0.safetensors, \[8\] in 1.safetensors"),
        ({"half": torch.ones(7).int()}, "'half' is f16 in 0.safetensors, i32 in 1.safetensors"),
        ({"ids": torch.arange(9) + 1}, r"'ids', i64\[9\]: whole numbers that differ"),
        ({"scaled": torch.ones(3).to(torch.float8_e4m3fn)}, "scaled or packed numbers that differ"),
        ({"complex": torch.ones(3)}, "'complex' is complex in only some"),
    ],
)
def test_mismatched_tensors_are_named_and_nothing_is_written(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    paths = save_two(tmp_path, {}, change)
    with pytest.raises(CheckpointError, match=words):
        average(paths, [0.5, 0.5], tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == paths


def test_lazy_tensors_and_conflicting_ties_and_names_are_refused() -> None:
    w, v = torch.ones(2), torch.zeros(2)
    x = torch.tensor([1 + 2j])
    for name, content in {
        "conj.pt": {"w": x.conj()},
        "neg.pt": {"w": x.conj().imag},
        "1.pt": {"a": w, "b": v, "c": w},
        "2.pt": {"a": w, "b": v, "c": v},
        "twice.pt": {"a": {"b": w}, "a.b": v},
    }.items():
        torch.save(content, name)
    for paths, words in (
        (["conj.pt"], "lazy conjugate or negative"),
        (["neg.pt"], "lazy conjugate or negative"),
        (["1.pt", "2.pt"], "other names are tied in 1.pt"),
        (["twice.pt"], r"two tensors are called 'a\.b'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            average(paths, [1 / len(paths)] * len(paths), "out.safetensors")


def test_invalid_outputs_are_refused(tmp_path: Path) -> None:
    paths = save_two(tmp_path, {}, {})
    folders = [save_folder(tmp_path / f"f{i}", STATES[i]) for i in range(2)]
    (tmp_path / "link.safetensors").symlink_to(paths[0])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    before = paths[0].read_bytes()
    for given, out, words in (
        (paths, paths[0], "one of the checkpoints"),
        (paths, tmp_path / "link.safetensors", "one of the checkpoints"),
        (paths, tmp_path / "folder", "is a folder"),
        (paths, tmp_path / "out.pt", "a name that ends in .safetensors"),
        (paths, tmp_path / "none" / "out.safetensors", "there is no folder"),
        (folders, tmp_path / "folder", "not empty"),
        (folders, folders[0], "one of the checkpoints"),
    ):
        with pytest.raises(CheckpointError, match=words):
            average(given, [0.5, 0.5], out)
    assert paths[0].read_bytes() == before
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["notes.txt"]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_pickle_that_runs_code_or_nests_deeply_is_refused(inside: Path) -> None:
    for args, words in (
        (Evil(), r"asks for posix\.system|asks for nt\.system"),
        (reduce(lambda one, _: (one, one), range(40), ()), "nests tuples"),
    ):
        torch.save({"w": torch.ones(2), "args": args}, "1.pt")
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint("1.pt")
    (inside / "1.pt").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CheckpointError):
        open_checkpoint("1.pt")
    assert not (inside / "pwned").exists()


@pytest.mark.parametrize(
    ("entry", "content", "words"),
    [
        ("data.pkl", None, "no data.pkl"),
        ("data/0", None, "the data of w"),
        ("data/0", b"12", "longer than its storage"),
        ("byteorder", b"big", "big-endian"),
        ("deflated", None, "compressed"),
        ("half of it", None, r"1\.pt"),
    ],
)
def test_unreadable_torch_files_are_refused(entry: str, content: bytes | None, words: str) -> None:
    w = torch.randn(5, 10)
    torch.save({"w": w}, "1.pt")
    with zipfile.ZipFile("1.pt") as archive:
        entries = {one.filename: archive.read(one) for one in archive.infolist()}
    how = zipfile.ZIP_DEFLATED if entry == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile("1.pt", "w", how) as archive:
        for name, old in entries.items():
            new = content if name.endswith(entry) else old
            if new is not None:
                archive.writestr(name, new)
    if entry == "half of it":
        whole = Path("1.pt").read_bytes()
        Path("1.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint("1.pt")


def test_damaged_index_gives_a_one_line_error(inside: Path) -> None:
    index = inside / "model.safetensors.index.json"
    contents = ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 5000, "\xff"]
    names = dict.fromkeys(
        ["../a", "/etc/passwd", "..", "", "a\0b"], "the name of a file next to it"
    )
    names |= {"gone": "which is missing", "here": "'w' is not in the file"}
    save_file({"v": torch.ones(1)}, "here")
    cases = {json.dumps({"weight_map": {"w": name}}): said for name, said in names.items()}
    cases |= dict.fromkeys(contents, "not a checkpoint index|no tensors")
    for content, said in cases.items():
        index.write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match=said) as caught:
            open_checkpoint(inside)
        assert "\n" not in str(caught.value)


def test_paths_without_a_checkpoint_are_refused(inside: Path) -> None:
    (inside / "empty").mkdir()
    os.mkfifo("pipe.safetensors")
    save_file({"a": torch.ones(1)}, "a.safetensors")
    save_file({"a": torch.ones(1)}, "b.safetensors")
    for path, words in (
        ("nothing", "No such file"),
        ("empty", "holds no checkpoint"),
        ("pipe.safetensors", "not a file or a folder"),
        (".", "files that may be the checkpoint"),
        ("a\0b", "cannot read"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)


def test_blocks_cut_along_the_last_axis_are_read_in_order(inside: Path) -> None:
    whole, chunks = torch.randn(4, 3, 5), []
    for first, last in ((2, 5), (0, 2)):
        torch.save(whole[..., first:last].clone(), path := inside / f"{first}.distcp")
        file = files.OpenFile(path)
        chunks.append(dcp._Chunk((0, 0, first), (4, 3, last - first), file, 0, file.size))
    place = dcp.stretches_of("w", dcp.ChunkedTensor(StoredTensor(dtype("f32"), (4, 3, 5)), chunks))
    found = bytearray(240)
    place.read(0, memoryview(found))
    assert found == whole.numpy().tobytes()
