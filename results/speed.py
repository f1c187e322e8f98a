#!/usr/bin/env python3
"""What a training step costs, part by part, beside its network alone and beside torchvision's transforms.

    python results/speed.py --preset mini                                        a table
    python results/speed.py --preset mini --json > results/profile/mini.json     for the report

Takes the settings of ctl.py. It trains nothing that is kept, and writes no file.
"""
import contextlib
import json
import math
import os
import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import ctl


class Clock:
    """Milliseconds from mark to mark. A GPU runs behind the program: there events stand in for the clock."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self, part: str) -> None:
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            if self.device.type == "mps":
                torch.mps.synchronize()
            now = 1000 * time.perf_counter()
        self.marks.append((part, now))

    def read(self) -> dict[str, float]:
        """What passed since the last reading, part by part."""
        parts, times = zip(*self.marks)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            times = [times[0].elapsed_time(now) for now in times]
        self.marks = []
        return {part: now - before for part, before, now in zip(parts[1:], times, times[1:])}


def milliseconds(device: torch.device, work) -> float:
    clock = Clock(device)
    clock.mark("start")
    work()
    clock.mark("work")
    return clock.read()["work"]


def watch(clock: Clock, model: ctl.ResNet18, optimiser: torch.optim.Optimizer, bank: ctl.MemoryBank) -> None:
    """Let the clock mark the end of each part of `train_step`, whose own text says nothing of it."""
    zero_grad, update = optimiser.zero_grad, bank.update
    model.register_forward_pre_hook(lambda *_: clock.mark("augmentation"))
    model.register_forward_hook(lambda *_: clock.mark("forward"))
    # The gradients are cleared between the loss and its backward.
    optimiser.zero_grad = lambda: (clock.mark("similarities and loss"), zero_grad())
    optimiser.register_step_pre_hook(lambda *_: clock.mark("backward"))
    optimiser.register_step_post_hook(lambda *_: clock.mark("optimiser"))
    bank.update = lambda index, z: (update(index, z), clock.mark("bank update"))


def network_alone(model: ctl.ResNet18, views: torch.Tensor) -> None:
    """The least that a step costs: forward and backward of the network, and nothing else."""
    model.zero_grad()
    z = model(views)
    z.backward(torch.ones_like(z))


def measure_step(config: ctl.Config, images: torch.Tensor, seconds: float) -> dict:
    """Medians over the steps that fit into `seconds`, at least five. Step and network alone take turns."""
    N, device = len(images), images.device
    model, optimiser = ctl.make_model(config, device)
    bank = ctl.MemoryBank(N, config.dim, config.bank_momentum, "random", ctl.generator(config.seed, "bank"), device)
    index = torch.randperm(N, generator=ctl.generator(config.seed, "order", 0))[:config.batch_size].to(device)
    views = ctl.normalise(images[index].float() / 255)
    clock, rounds, alone, warm_up, end = Clock(device), [], [], 2, time.perf_counter() + seconds
    watch(clock, model, optimiser, bank)
    while len(rounds) < warm_up + 5 or time.perf_counter() < end:
        alone.append(milliseconds(device, lambda: network_alone(model, views)))
        clock.marks.clear()  # those of the network alone
        clock.mark("start")
        draws = ctl.generator(config.seed, "views", 0, len(rounds))
        drawn = ctl.draw_augmentation(len(index), draws, config.size, config.flip)
        ctl.train_step(model, bank, optimiser, images, index, drawn, config)
        rounds.append(clock.read())
    memory = peak_memory(device)
    rounds, network = rounds[warm_up:], statistics.median(alone[warm_up:])
    step = statistics.median(sum(parts.values()) for parts in rounds)
    with FlopCounterMode(display=False) as counter:
        network_alone(model, views)
    flop, steps = counter.get_total_flops(), math.ceil(N / config.batch_size) * config.epochs
    return {"rounds": len(rounds),
            "parts_ms": {part: statistics.median(parts[part] for parts in rounds) for part in rounds[0]},
            "step_ms": step, "network_ms": network, "step_over_network": step / network,
            "images_per_second": 1000 * len(index) / step, "training_hours": step * steps / 3.6e6,
            "network_gflop": flop / 1e9, "network_gflops": flop / network / 1e6, "peak_memory_mib": memory}


def peak_memory(device: torch.device) -> float | None:
    """The most MiB so far: on a CUDA GPU of tensors, elsewhere of the process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def measure_augmentation(config: ctl.Config, host: torch.Tensor, device: torch.device) -> dict:
    """Images a second: batched, and one by one as PIL images by torchvision's transforms, with one thread each."""
    one_by_one = transforms.Compose([
        transforms.RandomResizedCrop(config.size, scale=(0.2, 1)), transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
        transforms.RandomHorizontalFlip(0.5 * config.flip), transforms.RandomGrayscale(0.2), transforms.ToTensor(),
        transforms.Normalize(ctl.MEAN, ctl.STD)])
    images, pictures = host.to(device), [transforms.functional.to_pil_image(image) for image in host]
    draws, threads = ctl.generator("augmentation"), torch.get_num_threads()
    draw = lambda: ctl.draw_augmentation(len(images), draws, config.size, config.flip).to(device)
    batched = lambda: ctl.normalise(ctl.augment(images, draw()))
    pil = lambda: torch.stack([one_by_one(picture) for picture in pictures])
    torch.set_num_threads(1)
    rounds = [(milliseconds(device, batched), milliseconds(device, pil)) for _ in range(6)]
    torch.set_num_threads(threads)
    fast, slow = (1000 * len(images) / statistics.median(took[1:]) for took in zip(*rounds))  # the first is the warm-up
    return {"batched_images_per_second": fast, "pil_images_per_second": slow, "pil_over_batched": fast / slow}


def measure_evaluation(config: ctl.Config, N: int, device: torch.device) -> dict:
    """The time of the metrics of 10,000 embeddings, and of the probe."""
    place = torch.device("cpu") if device.type == "mps" else device  # where `embed` leaves its embeddings
    z = torch.nn.functional.normalize(torch.randn(10_000, config.dim, generator=ctl.generator("z")), dim=1).to(place)
    h = torch.randn(2, N, 8 * config.width, generator=ctl.generator("h")).to(place)
    y, y_train = (torch.arange(n, device=place) % 10 for n in (len(z), N))
    metrics = lambda: (ctl.uniformity(z), ctl.tolerance(z, y))
    epoch = lambda: ctl.linear_probe(h, y_train, h[0, :10], y_train[:10], epochs=1, lr=config.probe_lr)
    return {"uniformity_and_tolerance_of_10000_ms": milliseconds(place, metrics),
            "probe_seconds": 100 * milliseconds(place, epoch) / 1000}  # it has 100 epochs


def measure(config: ctl.Config, seconds: float = 20.0) -> dict:
    """All figures, as --json prints them."""
    device = ctl.pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = ctl.take_subset(ctl.load_dataset(config.dataset, config.data, config.size), config)
    images, bfloat16 = data.train_images, ctl.in_bfloat16(config, device)
    step = measure_step(config, images.to(device), seconds)  # first: its peak of memory is its own
    n = 8192 if device.type == "cuda" else 2048
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    product = min(milliseconds(device, lambda: a @ a) for _ in range(5))
    return {"config": ctl.plain({**config.study(), "dataset": data.name}),
            "environment": ctl.environment(device, bfloat16), "train_images": len(images), **step,
            "matrix_product_gflops": 2 * n ** 3 / product / 1e6,
            **measure_augmentation(config, images[:config.batch_size], device),
            **measure_evaluation(config, len(images), device)}


def show(p: dict) -> None:
    config = p["config"]
    cell = ctl.cell_prefix(config["loss"], config["tau"])
    ctl.say(f"{cell}, {config['dataset']}, preset {config['preset']}, on {p['environment']['device']}")
    for part, took in p["parts_ms"].items():
        ctl.say(f"  {part:40}{took:10.2f} ms{100 * took / p['step_ms']:8.1f} %")
    for name, value in p.items():
        if isinstance(value, (int, float)):
            ctl.say(f"{name.replace('_', ' '):42}{value:10.2f}")


def main(argv: list[str] | None = None) -> None:
    parser = ctl.Parser("speed.py", __doc__)
    parser.add_settings()
    parser.add_argument("--json", action="store_true", help="JSON on standard output, all else on standard error")
    given = vars(parser.parse_args(argv))
    as_json = given.pop("json")
    if ignored := sorted(given.keys() & {"force", "eval_every", "results", "runs"}):
        raise ctl.BadInput(f"a step does not depend on --{ignored[0].replace('_', '-')}: leave it out")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        figures = measure(ctl.settle(given))
    print(json.dumps(figures, indent=1)) if as_json else show(figures)


if __name__ == "__main__":
    sys.exit(ctl.one_line("speed.py", main))
