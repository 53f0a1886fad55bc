"""Every option of the averages: values, counters, reports, hooks, threads."""

import threading
from typing import Any

import torch

import fastema
from fastema import rules

from ..cases import Cases, case
from ..record import attempt
from ..weights import Net, fill, net, read, train, values, versions

CASES: Cases = {}

OPTIONS: dict[str, dict[str, Any]] = {
    "update_every": {"update_every": 4},
    "start_after": {"start_after": 11},
    "both": {"update_every": 3, "start_after": 10},
    "frozen copy": {"frozen": "copy"},
    "frozen average": {"frozen": "average"},
    "buffers average": {"buffers": "average"},
    "buffers skip": {"buffers": "skip"},
    "policy": {"policy": {"cube": "skip", "*ea*": "average", "frozen": "copy", "off*": "copy"}},
    "capturable": {"capturable": True},
    "seed": {"seed": 2**63 - 1, "shadow_dtype": "bfloat16"},
    "nearest": {"rounding": "nearest", "shadow_dtype": "float16"},
    "raise": {"on_nonfinite": "raise"},
    "skip": {"on_nonfinite": "skip"},
}
AVERAGES = {
    "EMA": lambda model, **options: fastema.EMA(model, 0.9, **options),
    "SWA": fastema.SWA,
    "SMA": lambda model, **options: fastema.SMA(model, 6, **options),
    "two": lambda model, **options: fastema.EMA(model, (0.5, 0.9), **options),
}


@case(CASES, average=AVERAGES, option=OPTIONS)
def options_after_50_steps(average: Any, option: dict[str, Any]) -> Any:
    model = net()
    ema = attempt(lambda: average(model, **option))
    if isinstance(ema, Exception):
        return {"refused": ema}
    train(model, ema)
    found = read(ema) | {"names": sorted(ema.averaged_names), "aliases": dict(ema.aliases)}
    found["skipped"] = sorted(ema.skipped_names)
    found["drift"] = attempt(lambda: [f"{x:.9g}" for x in ema.drift(which=0)])
    return found


SCHEDULES = {
    "constant": (rules.constant(0.95), 0.0),
    "half_life": (rules.half_life(7), 1e-11),
    "half_life_fraction": (rules.half_life_fraction(0.1), 1e-11),
    "inverse_gamma": (rules.inverse_gamma(0.99, 2.0, 0.75, 0.1), 1e-11),
    "power": (rules.power(0.1), 1e-11),
    "warmup": (rules.warmup(0.99), 0.0),
    "cumulative_mean": (rules.cumulative_mean(), 0.0),
    "debiased": (rules.debiased(rules.constant(0.9)), 1e-11),
    "debiased warmup": (rules.debiased(rules.warmup(0.9)), 1e-11),
}


@case(CASES, rtol=lambda rule, every: 1e-11, rule=SCHEDULES, every=(1, 3))
def schedules_after_50_steps(rule: Any, every: int) -> Any:
    model = net()
    ema = fastema.EMA(model, rule[0], update_every=every, start_after=2)
    found = {}
    for step in (1, 2, 3, 4, 6, 12, 50):
        train(model, ema, steps=range(ema.num_updates + 1, step + 1))
        found[f"step {step}"] = {"decay": ema.decay, "number": ema.shadow["number"].clone()}
    return found | read(ema) | {"schedule": repr(ema.schedule), "plain": ema.schedule.to_dict()}


@case(CASES, action=("propagate", "skip", "raise"), bad=("nan", "inf", "-inf"))
def nonfinite(action: str, bad: str) -> Any:
    found = {}
    for place in ("cube", "mean"):
        model = net()
        ema = fastema.EMA(model, 0.9, on_nonfinite=action)
        train(model, ema, steps=range(1, 6))
        fill(model, 6)
        with torch.no_grad():
            getattr(model, place).view(-1)[1] = float(bad)
        found[place] = {"outcome": attempt(ema.update)}
        train(model, ema, steps=range(7, 10))
        found[place] |= read(ema)
    return found


@case(CASES, average=AVERAGES)
def several_steps_in_one_call(average: Any) -> Any:
    model = net()
    ema = average(model)
    for step, steps in enumerate((1, 3, 2, 7, 1)):
        fill(model, step + 1)
        outcome = attempt(lambda steps=steps: ema.update(steps=steps))
    return {"last": outcome} | read(ema)


@case(CASES, offload=(True, "skip"))
def offloaded(offload: Any) -> Any:
    model = net("bf16")
    ema = fastema.EMA(model, 0.9, shadow_dtype="float32", offload=offload)
    for step in range(1, 13):
        fill(model, step)
        ema.update()
        found = read(ema)  # waits for the thread, so that no update is skipped
    with ema.swapped():
        inside = values(model)
    return found | {"inside": inside, "after": values(model)}


@case(CASES, average=AVERAGES)
def reports(average: Any) -> Any:
    model = net()
    ema = average(model)
    train(model, ema, steps=range(1, 11))
    return {"report": ema.report().splitlines(), "repr": repr(ema).splitlines()}


@case(CASES, target=("float64", "float32", "float16", "bfloat16", "bf16+16"), start=("f32", "bf16"))
def moved_to_a_dtype(target: str, start: str) -> Any:
    model = net(start)
    ema = fastema.EMA(model, 0.9)
    train(model, ema, steps=range(1, 6))
    ema.to(dtype=target)
    early = {name: one.clone() for name, one in ema.shadow.items()}
    train(model, ema, steps=range(6, 11))
    return read(ema) | {"early": early}


@case(CASES)
def follow_and_hooks() -> Any:
    model, events = net(), []
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    ema = fastema.EMA(model, 0.9)
    optimizer.register_step_pre_hook(lambda *rest: events.append(f"pre {ema.num_updates}"))
    optimizer.register_step_post_hook(lambda *rest: events.append(f"post {ema.num_updates}"))
    ema.follow(optimizer)
    optimizer.register_step_post_hook(lambda *rest: events.append(f"late {ema.num_updates}"))
    for step in range(1, 6):
        for name, one in model.named_parameters():
            if one.requires_grad:
                one.grad = fill([torch.zeros_like(one)], step)[0] * (1 + len(name))
        optimizer.step()
    found = {"events": events, "followed": read(ema)}
    ema.unfollow()
    optimizer.step()
    return found | {"unfollowed": ema.num_updates, "events after": list(events)}


@case(CASES)
def follow_two_optimizers_on_a_condition() -> Any:
    model = net()
    first, second = (torch.optim.SGD([one], lr=0.25) for one in (model.cube, model.offset))
    ema, asked = fastema.EMA(model, 0.9), []
    ema.follow(first, second, update_if=lambda: bool(asked.append(len(asked)) or len(asked) % 2))
    for step in range(1, 7):
        for one in (model.cube, model.offset):
            one.grad = fill([torch.zeros_like(one)], step)[0]
        first.step()
        second.step()
    return read(ema) | {"asked": len(asked)}


@case(CASES)
def forward_and_state_dict_hooks() -> Any:
    model, events = net(), []
    model.register_forward_hook(lambda *rest: events.append("forward"))
    model.register_state_dict_post_hook(lambda *rest: events.append("state dict"))
    model.register_load_state_dict_post_hook(lambda *rest: events.append("load state dict"))
    ema = fastema.EMA(model, 0.9)
    for name, call in {
        "update": ema.update,
        "model_state_dict": ema.model_state_dict,
        "state_dict": ema.state_dict,
        "apply": ema.apply_shadow,
        "restore": ema.restore,
        "copy_to": lambda: ema.copy_to(model),
    }.items():
        events.append(name)
        call()
    return events


@case(CASES, average=AVERAGES)
def threads_update_and_read(average: Any) -> Any:
    model = net()
    ema, gate = average(model), threading.Barrier(5)
    fill(model, 1)

    def work(calls: int) -> None:
        gate.wait()
        for _ in range(calls):
            ema.update()
            with ema.lock:
                ema.state_dict()

    threads = [threading.Thread(target=work, args=(calls,)) for calls in (20, 20, 20, 0)]
    for one in threads:
        one.start()
    gate.wait()
    for one in threads:
        one.join()
    return read(ema)


@case(CASES, average=AVERAGES)
def counters_of_writes(average: Any) -> Any:
    model = net()
    ema = average(model)
    found = {"built": versions(model)}
    ema.update()
    found["updated"] = versions(model)
    found["shadow"] = {name: one._version for name, one in ema.shadows[0].items()}
    last = {"which": len(ema.shadows) - 1}
    with ema.swapped(**last):
        found["inside"] = versions(model)
    return found | {"after": versions(model)}


@case(CASES, threads=(1, 2, 3))
def numbers_of_threads(threads: int) -> Any:
    before = fastema.get_num_threads()
    try:
        fastema.set_num_threads(threads)
        model = fill({"large": torch.zeros(70_001), "small": torch.zeros(3)}, 0)
        ema = fastema.EMA(model, 0.9, shadow_dtype="bfloat16")
        train(model, ema, steps=range(1, 4))
        return read(ema) | {"threads": fastema.get_num_threads()}
    finally:
        fastema.set_num_threads(before)


@case(CASES)
def moved_and_retied_weights() -> Any:
    model = net()
    ema = fastema.EMA(model, 0.9)
    train(model, ema, steps=range(1, 4))
    model.cube.data = model.cube.data.clone()
    train(model, ema, steps=range(4, 6))
    other = fill(Net(), 30)
    ema.update(other)
    found = {"moved": read(ema), "version": versions(other)}
    model.load_state_dict(values_of_state(40), assign=True)
    return found | {"assigned": attempt(lambda: train(model, ema, steps=range(6, 8))), **read(ema)}


def values_of_state(step: int) -> dict[str, Any]:
    return {name: one.clone() for name, one in fill(Net(), step).state_dict().items()}
