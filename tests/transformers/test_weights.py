"""Real Hugging Face Trainer runs with a moving average of the weights."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import fastema
from fastema.errors import ArgumentError, BridgeError, StateError
from fastema.transformers import EMACallback

from ..support.torch_states import State, assert_near, assert_same, differ, snapshot
from ..support.zero3 import partition
from .averaged import prepare_run, train_run, trainer
from .network import DECAY, EVERY_FOUR, FILE, SAVED, STEPS, CallAt, Network, Recorder
from .runs import MARKS, data

NEEDS = ("accelerate",)

pytestmark = MARKS


@pytest.mark.parametrize("at_end", ["average", "raw"])
def test_each_evaluation_and_the_end_use_the_defined_average(tmp_path: Path, at_end: Any) -> None:
    run, model, recorder, ema = train_run(
        tmp_path, EMACallback(DECAY, at_end=at_end), eval_on_start=True, **EVERY_FOUR
    )
    assert len(recorder.steps) == ema.ema.num_updates == STEPS
    assert_same(recorder.start, snapshot(Network()))
    assert_same(model.evaluated[0], recorder.start)
    for evaluated, step in zip(model.evaluated[1:], (4, 8, 12), strict=True):
        assert_near(evaluated, recorder.average(step))
    # Events after an evaluation see the weights; events within it see the average.
    steps = iter([recorder.start, *recorder.steps[3::4]])
    within = iter(model.evaluated)
    for event, seen in recorder.seen:
        assert_same(seen, next(within if event == "prediction_step" else steps))
    average = model.evaluated[-1]
    at_the_end = average if at_end == "average" else recorder.steps[-1]
    assert_same(snapshot(model), at_the_end)

    other = Recorder()
    trainer(tmp_path, other).train()
    for one, same in zip(recorder.steps, other.steps, strict=True):
        assert_same(one, same)  # training is unaffected
    metrics = run.evaluate()
    assert metrics["eval_loss"] == run.state.log_history[-1]["eval_loss"]
    run.predict(data(8))
    assert_same(model.evaluated[-2], average)
    assert_same(model.evaluated[-1], average)
    with ema.swapped():
        assert_same(snapshot(model), average)
    run.save_model()
    assert_same(load_file(tmp_path / "model.safetensors"), at_the_end)
    ema.save_model(str(tmp_path / "average"))
    assert_same(load_file(tmp_path / "average" / "model.safetensors"), average)


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    run = train_run(tmp_path, gradient_accumulation_steps=4, num_train_epochs=3)
    steps = run.trainer.state.global_step
    assert run.ema.ema.num_updates == len(run.recorder.steps) == steps == 6
    assert_near(snapshot(run.model), run.recorder.average())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "metric"])
def test_failed_evaluation_restores_the_weights(
    tmp_path: Path, where: str, error: type[BaseException]
) -> None:
    class Failing(Network):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            found = super().forward(x, labels)
            if where == "model" and len(self.evaluated) == 2:
                raise error("in the middle")
            return found

    def metrics(found: Any) -> dict[str, float]:
        if len(model.evaluated) == 2:
            raise error("in the middle")
        return {}

    run, model, recorder, ema = prepare_run(tmp_path, model=Failing(), **EVERY_FOUR)
    run.compute_metrics = metrics
    with pytest.raises(error, match="in the middle"):
        run.train()
    assert len(recorder.steps) == 8
    assert_same(snapshot(model), recorder.steps[-1])
    assert_near(model.evaluated[-1], recorder.average())
    assert not ema.ema.applied
    with ema.swapped():
        assert_same(snapshot(model), model.evaluated[-1])


@pytest.mark.parametrize("event", ["on_step_begin", "on_save"])
def test_average_left_in_the_model_is_never_trained(tmp_path: Path, event: str) -> None:
    def forget(state: Any, control: Any) -> None:
        if state.global_step == 4:
            ema.ema.apply_shadow()

    ema, recorder = EMACallback(DECAY), Recorder()
    run = trainer(tmp_path, recorder, CallAt(event, forget), ema, **SAVED)
    with pytest.raises(StateError, match="while the average is in the model"):
        run.train()
    assert len(recorder.steps) == 4
    ema.ema.restore()
    assert_same(snapshot(run.model), recorder.steps[-1])


def sequences(samples: int = 16, length: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 20, (samples, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def test_generation_uses_the_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
        max_position_embeddings=16, dropout=0.0,
    )  # fmt: skip
    noted: list[State] = []
    run, model, recorder, ema = prepare_run(
        tmp_path, EMACallback(DECAY, at_end="raw"), model=BartForConditionalGeneration(config),
        kind=Seq2SeqTrainer, arguments=Seq2SeqTrainingArguments, train_dataset=sequences(),
        eval_dataset=sequences(4), max_steps=4, eval_strategy="steps", eval_steps=2,
        predict_with_generate=True, generation_max_length=8,
    )  # fmt: skip
    # ``generate`` calls the encoder before ``forward``.
    model.get_encoder().register_forward_pre_hook(
        lambda module, args: None if module.training else noted.append(snapshot(model))
    )
    run.train()
    run.predict(sequences(4))
    assert len(noted) >= 3
    with ema.swapped():
        average = snapshot(model)
    assert_same(noted[-1], average)
    assert differ(noted[0], recorder.steps[1])
    assert_same(snapshot(model), recorder.steps[-1])
    for event, seen in recorder.seen:
        assert event == "prediction_step" or any(
            not differ(seen, step) for step in (recorder.steps[1], recorder.steps[3])
        )


PROCESSES = """
    import os, sys, warnings
    rank = os.fork() and 1
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=sys.argv[1],
    )
    warnings.simplefilter("ignore")
    import torch
    from transformers import Trainer, TrainingArguments
    from fastema.transformers import EMACallback

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)
        def forward(self, x, labels):
            if not self.training:
                seen.append(self.layer.weight.tolist())
            return {"loss": (self.layer(x) - labels).square().mean()}

    def run(folder, resumed=None):
        data = [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(16)]
        arguments = TrainingArguments(
            folder, use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=2, max_steps=6,
            eval_strategy="steps", eval_steps=3, save_steps=3, report_to="none",
            disable_tqdm=True, learning_rate=0.1, dataloader_pin_memory=False,
        )
        trainer = Trainer(Network(), arguments, train_dataset=data, eval_dataset=data)
        EMACallback(decay=0.5).attach(trainer)
        trainer.train(resumed)
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        return trainer.model.layer.weight.tolist()

    torch.manual_seed(1)
    seen = []
    whole = run(sys.argv[2])
    assert seen[-1] == whole
    torch.manual_seed(1)
    rest = run(sys.argv[2] + "/rest", sys.argv[2] + "/checkpoint-3")
    assert rest == whole, (rest, whole)
    both = [None, None]
    torch.distributed.all_gather_object(both, whole)
    assert both[0] == both[1]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank:
        assert os.wait()[1] == 0
        print("equal")
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_keep_one_average(python: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = python(PROCESSES, str(port), str(tmp_path), quiet=False)
    assert "equal" in printed
    assert (tmp_path / "checkpoint-6" / FILE).exists()


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"decay": 1.5}, "decay"),
        ({"checkpoints": "both"}, "checkpoints='both': expected one of average, raw"),
        ({"at_end": "both"}, "at_end='both': expected one of average, raw"),
        ({"on_missing": "skip"}, "on_missing='skip': expected one of raise, begin"),
        ({"decay": (0.9, 0.99)}, "which=None: expected a number from 0 to 1"),
        ({"which": 1}, "which=1"),
        ({"frozen": "melt"}, "frozen"),
    ):
        with pytest.raises(ArgumentError, match=message):
            EMACallback(**options)
    with pytest.raises(ArgumentError, match=r"attach\(Linear\): expected a transformers.Trainer"):
        EMACallback().attach(torch.nn.Linear(1, 1))
    with pytest.raises(StateError, match="no average yet"):
        EMACallback().ema  # noqa: B018
    run = trainer(tmp_path, EMACallback())
    with pytest.raises(StateError, match=r"has an EMACallback already.*decay=\(0.99, 0.999\)"):
        EMACallback().attach(run)
    with pytest.raises(StateError, match="has an EMACallback already"):
        trainer(tmp_path, EMACallback(), EMACallback())


def test_training_without_trainer_checkpoint_or_whole_weights_is_refused(tmp_path: Path) -> None:
    run, alone = trainer(tmp_path), EMACallback(evaluate_with_average=False)
    for ema, error, sequences in (
        (EMACallback(), StateError, r"not attached to the trainer.*attach\(trainer\)"),
        (alone, StateError, "resumes at step 8.*resume_from_checkpoint"),
        (EMACallback().attach(run), ArgumentError, "sharded"),
    ):
        with pytest.raises(error, match=sequences):
            ema.on_train_begin(run.args, run.state, run.control, model=run.model)
        run.state.global_step, run.is_fsdp_enabled = 8, ema is alone


def test_callback_in_the_list_of_another_trainer_than_its_own_is_refused(tmp_path: Path) -> None:
    run, own, ema = trainer(tmp_path), trainer(tmp_path), EMACallback(DECAY)
    ema.attach(own)
    run.add_callback(ema)
    with pytest.raises(StateError, match="not attached to the trainer"):
        run.train()
    assert ema._trainer() is own  # a refused call of another trainer changes nothing
    ema.attach(run)
    run.train()
    assert ema.ema.num_updates == STEPS
    assert_same(snapshot(run.model), dict(ema.ema.shadow))


def test_save_model_of_a_callback_without_a_trainer_is_refused(tmp_path: Path) -> None:
    run, ema = trainer(tmp_path), EMACallback(DECAY, evaluate_with_average=False, checkpoints="raw")
    run.add_callback(ema)
    run.train()
    with pytest.raises(StateError, match=r"save_model\(\).*attach\(trainer\)"):
        ema.save_model(str(tmp_path / "averaged"))


def test_weights_that_zero3_has_partitioned_are_refused_by_name(tmp_path: Path) -> None:
    ema = EMACallback()
    run = trainer(tmp_path, ema)
    partition(run.model)
    name = next(iter(run.model.state_dict()))
    with pytest.raises(BridgeError, match=rf"^{name}: .* under DeepSpeed's ZeRO-3"):
        ema.on_train_begin(run.args, run.state, run.control, model=run.model)


def test_average_follows_the_optimizer_inside_of_accelerates(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, inner)
    assert optimizer is not inner
    ema, other = fastema.EMA(model, decay=0.5), fastema.EMA(model, decay=0.5)
    ema.follow(optimizer)
    for n in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 3)).square().sum())
            optimizer.step()  # a step at every second call
            optimizer.zero_grad()
        if n % 2:
            other.update()
        assert ema.num_updates == (n + 1) // 2
        assert_same(dict(ema.shadow), dict(other.shadow))


def test_evaluation_in_bfloat16_or_without_the_average(tmp_path: Path) -> None:
    run = train_run(tmp_path, EMACallback(DECAY, at_end="raw"), bf16_full_eval=True)
    run.trainer.evaluate()
    for name, average in run.recorder.average().items():
        dtype = torch.bfloat16 if average.is_floating_point() else average.dtype
        torch.testing.assert_close(run.model.evaluated[-1][name], average.to(dtype))
        assert torch.equal(run.model.state_dict()[name], run.recorder.steps[-1][name].to(dtype))
    run.ema.evaluate_with_average = False
    run.trainer.evaluate()
    assert_same(run.model.evaluated[-1], snapshot(run.model))
