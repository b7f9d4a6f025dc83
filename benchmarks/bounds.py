"""How far ahead of torchvision our convolutions alone are: ``python -m benchmarks.bounds``.

Both sides call the same convolutions of oneDNN, so what our code can gain is everything else. Here our side is the
convolutions of a step or of inference, one after the other on the maps and slopes they see there, and nothing else at
all. The last column is thus the most that a row of ``benchmarks.torchvision`` can show on this machine.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.cases import CASES, Case
from benchmarks.synthetic import pictures
from benchmarks.timing import ROOT, Row, Timing, keep_memory, measure, table, write
from benchmarks.torchvision import QUICK, Setting, inference_row, running, step_row

OUTPUT = ROOT / "results" / "benchmarks" / "bounds.json"


@dataclass
class Call:
    """One convolution of a pass.

    Args:
        module: that does it.
        seen: its input.
        made: its output.
        slope: of the loss with respect to the output; ``None`` where there is no way back.
    """

    module: nn.Conv2d
    seen: Tensor
    made: Tensor
    slope: Tensor | None = None

    def forward(self) -> Tensor:
        """The convolution again."""
        return torch.convolution(self.seen, self.module.weight, self.module.bias, *self._shape())

    def backward(self) -> tuple[Tensor | None, ...]:
        """Slopes of its input, weights and bias; the pictures themselves want none."""
        weight, bias = self.module.weight, self.module.bias
        sizes = None if bias is None else list(bias.shape)
        wanted = [self.seen.shape[1] > 3, True, bias is not None]
        return torch.ops.aten.convolution_backward(self.slope, self.seen, weight, sizes, *self._shape(), wanted)

    def _shape(self) -> tuple:
        conv = self.module
        return conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups


def calls_of(network: nn.Module, run: Callable[[], object]) -> list[Call]:
    """Every convolution of the network that ``run`` calls, with what it saw and made."""
    calls: list[Call] = []

    def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen = inputs[0].detach().to(output.dtype)  # autocast's own casts are not the convolution's
        calls.append(Call(module, seen, output.detach().clone()))  # a ReLU in place comes next

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def check_calls(calls: list[Call], answers: Callable[[Call], Tensor]) -> None:
    """Each call makes what it made in the network."""
    assert calls, "the network called no convolution"
    for call in calls:
        torch.testing.assert_close(answers(call), call.made, msg=lambda text, call=call: f"{call.module}: {text}")


def step_bound(case: Case, setting: Setting, precision: str) -> Row:
    """Torchvision's training step over our convolutions, forwards and back."""
    compared = step_row(case, setting, precision)
    size = case.side(setting.size)
    _, ours = case.both(size, setting.num_classes, setting.backbone)
    ours = ours.to(memory_format=torch.channels_last).train()
    images = torch.stack(pictures(setting.batch, size))

    def run() -> None:
        with running(precision), torch.no_grad():
            ours.predict(images)

    calls = calls_of(ours, run)
    if precision == "bf16":
        ours.to(torch.bfloat16)  # so that no call casts its weights
    for call in calls:
        call.slope = 1e-6 * torch.randn_like(call.made)

    @torch.no_grad()
    def convolutions() -> None:
        for call in calls:
            call.forward()
        for call in reversed(calls):
            call.backward()

    name = f"{case.title}: training step over our convolutions alone, {precision}, B={setting.batch}"
    check = torch.no_grad()(functools.partial(check_calls, calls, Call.forward))
    return Row(name, check, compared.theirs, convolutions)


def inference_bound(case: Case, setting: Setting, precision: str) -> Row:
    """Torchvision's pictures to detections over the convolutions of our detector made ready for it, one picture."""
    compared = inference_row(case, setting, 1, precision)
    size = case.side(setting.size)
    _, ours = case.both(size, setting.num_classes, setting.backbone)
    ready = ours.optimize_for_inference(precision=precision)

    @torch.no_grad()
    def answer(call: Call) -> Tensor:
        return call.module(call.seen)  # with its packed weights

    calls = calls_of(ready, torch.no_grad()(functools.partial(ready.predict, torch.stack(pictures(1, size)))))

    def convolutions() -> None:
        for call in calls:
            answer(call)

    name = f"{case.title}: inference over our convolutions alone, {precision}, B=1"
    return Row(name, functools.partial(check_calls, calls, answer), compared.theirs, convolutions)


def rows(setting: Setting) -> dict[str, Callable[[], Row]]:
    """Every detector in both precisions."""
    return {
        f"{key}-{kind}-{precision}": functools.partial(build, case, setting, precision)
        for key, case in CASES.items()
        for kind, build in (("step", step_bound), ("inference", inference_bound))
        for precision in ("fp32", "bf16")
    }


def main(arguments: list[str] | None = None) -> list[Timing]:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bounds", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small pictures and 3 repeats: does it run? not a result")
    parser.add_argument("--budget", type=float, default=60.0, help="processor seconds a row, once it has three repeats")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT; not written")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    options = parser.parse_args(arguments)
    setting = replace(QUICK if options.quick else Setting(), budget=options.budget)
    torch.set_num_threads(1)
    keeps = keep_memory()
    record = {
        "command": " ".join(["python -m benchmarks.bounds", *(sys.argv[1:] if arguments is None else arguments)]),
        "allocator": "keeps freed memory" if keeps else "system's default",
        "setting": asdict(setting),
    }
    timings = []
    for name, build in rows(setting).items():
        if options.only not in name:
            continue
        row = build()
        row.check()
        timings.append(measure(row, repeats=setting.repeats, budget=setting.budget))
        print(f"{name}: {timings[-1].ratio:.3f}", file=sys.stderr, flush=True)
        if not (options.quick or options.only):
            write(options.output, timings, **record)
    print(table(timings, "torchvision"))
    return timings


if __name__ == "__main__":
    main()
