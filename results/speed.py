#!/usr/bin/env python3
"""What a training step costs: part by part, as one graph, and at best. Beside it, torchvision's transforms.

    python results/speed.py --preset mini                                        a table
    python results/speed.py --preset mini --json > results/profile/mini.json     for the report

Takes the settings of ctl.py. It trains nothing that is kept, and writes no file.
"""
import contextlib
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import ctl


def now(device: torch.device) -> float:
    """The time in milliseconds. A GPU runs behind the program: it is waited for."""
    if device.type != "cpu":
        torch.cuda.synchronize(device) if device.type == "cuda" else getattr(torch, device.type).synchronize()
    return 1000 * time.perf_counter()


def milliseconds(device: torch.device, work: Callable) -> float:
    began = now(device)
    work()
    return now(device) - began


def watch(mark: Callable, model: ctl.ResNet18, optimiser: torch.optim.Optimizer, bank: ctl.MemoryBank) -> None:
    """Mark the end of each part of `train_step`, whose own text says nothing of it."""
    zero_grad, update = optimiser.zero_grad, bank.update
    model.register_forward_pre_hook(lambda *_: mark("augmentation"))
    model.register_forward_hook(lambda *_: mark("forward"))
    # The gradients are cleared between the loss and its backward.
    optimiser.zero_grad = lambda: (mark("similarities and loss"), zero_grad())
    optimiser.register_step_pre_hook(lambda *_: mark("backward"))
    optimiser.register_step_post_hook(lambda *_: mark("optimiser"))
    bank.update = lambda index, z: (update(index, z), mark("bank update"))


def network_alone(model: ctl.ResNet18, views: torch.Tensor) -> None:
    """The least that a step costs: forward and backward of the network, and nothing else."""
    model.zero_grad()
    z = model(views)
    z.backward(torch.ones_like(z))


class Traffic(TorchDispatchMode):
    """Counts the bytes that move if each operation reads its arguments once and writes its results once."""
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # A view moves nothing, an index only a few rows.
        if not function.is_view and not re.search("index|gather", function.name()):
            self.bytes += sum(x.nbytes for x in tree_leaves((args, result)) if torch.is_tensor(x))
        return result


def begin(config: ctl.Config, images: torch.Tensor) -> tuple:
    """Model, bank, optimiser and the first batch's indices, and a function that takes a step with them."""
    N, device = len(images), images.device
    model, optimiser = ctl.make_model(config, device)
    bank = ctl.MemoryBank(N, config.dim, config.bank_momentum, "random", ctl.generator(config.seed, "bank"), device)
    index = torch.randperm(N, generator=ctl.generator(config.seed, "order", 0))[:config.batch_size].to(device)

    def step(take=ctl.train_step) -> None:
        draws = ctl.generator(config.seed, "views", 0, 0)
        drawn = ctl.draw_augmentation(len(index), draws, config.size, config.flip)
        take(model, bank, optimiser, images, index, drawn, config)
    return model, bank, optimiser, index, step


def measure_graph(config: ctl.Config, images: torch.Tensor, seconds: float) -> dict:
    """The step launched as one graph, and the host's part of it; None where steps are not launched so."""
    if not ctl.in_graph(config, images.device):
        return {"graph_ms": None, "host_ms": None}
    _, _, optimiser, _, step = begin(config, images)
    graphed, rounds, end = ctl.GraphedStep(images.device), [], time.perf_counter() + seconds
    for group in optimiser.param_groups:
        group["lr"] = graphed.rate
    launch = lambda: (graphed.rate.fill_(config.lr), step(graphed))
    for _ in range(graphed.WARM_UP + 1):  # the last of them captures the graph
        launch()
    while len(rounds) < 5 or time.perf_counter() < end:
        # As in training, the host launches steps while the GPU is at work.
        together = milliseconds(images.device, lambda: [launch() for _ in range(50)]) / 50
        # Now the GPU is idle, and the host waits for nothing.
        rounds.append((together, milliseconds(torch.device("cpu"), launch)))
    return dict(zip(("graph_ms", "host_ms"), map(statistics.median, zip(*rounds))))


def measure_step(config: ctl.Config, images: torch.Tensor, seconds: float) -> dict:
    """Medians over the steps that fit into `seconds`, at least five. Step and network alone take turns."""
    N, device = len(images), images.device
    graph = measure_graph(config, images, seconds)
    model, bank, optimiser, index, step = begin(config, images)
    views = ctl.normalise(images[index].float() / 255)
    marks, rounds, alone, warm_up, end = [], [], [], 2, time.perf_counter() + seconds
    watch(lambda part: marks.append((part, now(device))), model, optimiser, bank)
    while len(rounds) < warm_up + 5 or time.perf_counter() < end:
        alone.append(milliseconds(device, lambda: network_alone(model, views)))
        marks[:] = [("start", now(device))]  # without those of the network alone
        step()
        rounds.append({part: after - before for (_, before), (part, after) in zip(marks, marks[1:])})
    memory = peak_memory(device)
    rounds, network = rounds[warm_up:], statistics.median(alone[warm_up:])
    one_by_one = statistics.median(sum(parts.values()) for parts in rounds)
    with FlopCounterMode(display=False) as counter:
        network_alone(model, views)
    with Traffic() as traffic:
        step()
    flop, steps = counter.get_total_flops(), math.ceil(N / config.batch_size) * config.epochs
    took = graph["graph_ms"] or one_by_one  # of a step in training
    return {"rounds": len(rounds),
            "parts_ms": {part: statistics.median(parts[part] for parts in rounds) for part in rounds[0]},
            "step_ms": one_by_one, **graph, "network_ms": network, "step_over_network": one_by_one / network,
            "images_per_second": 1000 * len(index) / took, "training_hours": took * steps / 3.6e6,
            "network_gflop": flop / 1e9, "network_gflops": flop / network / 1e6,
            "step_gbyte": traffic.bytes / 1e9, "peak_memory_mib": memory}


def measure_limit(step: dict, device: torch.device, bfloat16: bool) -> dict:
    """The least that a step can take: its arithmetic at a large product's rate, its traffic at a large copy's."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    large, copy = a.repeat(2, 8, 1, 1)  # no cache holds them
    gflops = 2 * n ** 3 / 1e6 / min(milliseconds(device, lambda: a @ a) for _ in range(5))
    # A copy reads and writes.
    gbytes = 2 * large.nbytes / 1e6 / min(milliseconds(device, lambda: copy.copy_(large)) for _ in range(5))
    return {"matrix_product_gflops": gflops, "copy_gbyte_per_second": gbytes,
            "limit_arithmetic_ms": 1000 * step["network_gflop"] / gflops,
            "limit_memory_ms": 1000 * step["step_gbyte"] / gbytes}


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
    metrics_ms, epoch_ms = (min(milliseconds(place, work) for _ in range(2)) for work in (metrics, epoch))
    return {"uniformity_and_tolerance_of_10000_ms": metrics_ms, "probe_seconds": 100 * epoch_ms / 1000}  # 100 epochs


def measure(config: ctl.Config, seconds: float = 20.0) -> dict:
    """All figures, as --json prints them."""
    device = ctl.pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = ctl.take_subset(ctl.load_dataset(config.dataset, config.data, config.size), config)
    images, bfloat16 = data.train_images, ctl.in_bfloat16(config, device)
    step = measure_step(config, images.to(device), seconds)  # first: its peak of memory is its own
    limit = measure_limit(step, device, bfloat16)
    if device.type != "cuda":  # a CPU's caches hold much of what a GPU has to move
        limit.update(limit_arithmetic_ms=None, limit_memory_ms=None)
    return {"config": ctl.as_json({**config.recorded(), "dataset": data.name}),
            "environment": ctl.environment(device, bfloat16, ctl.in_graph(config, device)),
            "train_images": len(images), **step, **limit,
            **measure_augmentation(config, images[:config.batch_size], device),
            **measure_evaluation(config, len(images), device)}


def show(p: dict) -> None:
    config = p["config"]
    cell = ctl.loss_name(config["loss"], config["tau"])
    ctl.say(f"{cell}, {config['dataset']}, preset {config['preset']}, on {p['environment']['device']}")
    for part, took in p["parts_ms"].items():
        ctl.say(f"  {part:40}{took:10.2f} ms{100 * took / p['step_ms']:8.1f} %")
    for name, value in p.items():
        if isinstance(value, (int, float)):
            ctl.say(f"{name.replace('_', ' '):42}{value:10.2f}")


def main(argv: list[str] | None = None) -> None:
    parser = ctl.make_parser("speed.py", __doc__)
    parser.add_argument("--json", action="store_true", help="JSON on standard output, all else on standard error")
    given = vars(parser.parse_args(argv))
    as_json = given.pop("json")
    if ignored := sorted(given.keys() & {"force", "eval_every", "out"}):
        raise ctl.BadInput(f"a step does not depend on --{ignored[0].replace('_', '-')}: leave it out")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        figures = measure(ctl.make_config(**given))
    print(json.dumps(figures, indent=1)) if as_json else show(figures)


if __name__ == "__main__":
    sys.exit(ctl.exit_status("speed.py", main))
