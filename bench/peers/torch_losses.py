"""The work of tasks.json in PyTorch, eager and compiled, and in Liger and TRL where they can be imported.

    python3 torch_losses.py            prints a table
    python3 torch_losses.py --json T   does the tasks T (JSON) and prints a line of JSON, for peers.ts

Float32 with TF32 off, forward and gradient, times from CUDA events. --device cpu shows that it runs, not how fast.
"""

import argparse
import json
import os
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
    import numpy as np
except ImportError as error:
    sys.exit(f"error: {error}")

STEPS, ROUNDS = 5, 5
MLP = [(784, 256), (256, 256), (256, 10)]
ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def numbers(size, scale, seed):
    """The numbers of work.ts: a hash of the index."""
    with np.errstate(over="ignore"):
        h = np.arange(size, dtype=np.uint32) + np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
        h = h * np.uint32(0x9E3779B1)
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        h = h ^ (h >> np.uint32(16))
    return ((h / 2.0**31 - 1) * scale).astype(np.float32)


def class_indices(size, classes):
    return (np.arange(size, dtype=np.int64) * 7919) % classes


def rows_of(x):
    return [x[0].tolist(), x[-1].tolist()]


# Losses of logits [rows, classes], means over the rows.


def cross_entropy(student, _, labels):
    return F.cross_entropy(student, labels)


def forward_kl(student, teacher, _):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


def jsd(student, teacher, _):
    x, y = student.log_softmax(-1), teacher.log_softmax(-1)
    m = torch.logsumexp(torch.stack([x, y]), 0) - float(np.log(2))
    both = [F.kl_div(m, z, log_target=True, reduction="batchmean") for z in (x, y)]
    return (both[0] + both[1]) / 2


EAGER = {"crossEntropy": cross_entropy, "forwardKl": forward_kl, "jsd": jsd}


def liger_losses():
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerJSD, LigerKLDIVLoss

    entropy, kl, half = LigerCrossEntropyLoss(), LigerKLDIVLoss(log_target=True, reduction="batchmean"), LigerJSD(beta=0.5)
    return {
        # writes the gradient over the logits
        "crossEntropy": lambda student, _, labels: entropy(student, labels),
        "forwardKl": lambda student, teacher, _: kl(student.log_softmax(-1), teacher.log_softmax(-1)),
        "jsd": lambda student, teacher, _: half(student.log_softmax(-1), teacher.log_softmax(-1)),
    }


def trl_losses():
    try:
        from trl.trainer.gkd_trainer import GKDTrainer
    except ImportError:
        from trl.experimental.gkd import GKDTrainer

    def jsd(student, teacher, _):  # what its "batchmean" divides by differs between versions
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.5, reduction="sum") / len(student)

    return {"jsd": jsd}


class Gpt(nn.Module):
    """The GPT of this project, with the same parameter names."""

    def __init__(self, classes, context, layers, width, heads):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(classes, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes, bias=False)
        self.register_buffer("places", torch.arange(context))
        self.register_buffer("later", nn.Transformer.generate_square_subsequent_mask(context))  # no copy to the GPU in a step

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(self.places)
        for block in self.blocks:
            x = block(x, src_mask=self.later, **CAUSAL)
        return self.head(self.norm(x))


CAUSAL = {"is_causal": True} if int(torch.__version__.split(".")[0]) >= 2 else {}


class Bench:
    def __init__(self, device):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"

    def put(self, values, *shape):
        return torch.from_numpy(values).reshape(shape).to(self.device)

    def clock(self, step, times):
        """Milliseconds of so many steps behind each other."""
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        start = time.perf_counter()
        for _ in range(times):
            step()
        return 1000 * (time.perf_counter() - start)

    def time(self, step):
        for _ in range(3):
            step()
        times = 1
        while self.clock(step, times) < 100:
            times *= 2
        return statistics.median(self.clock(step, times) / times for _ in range(ROUNDS))

    def loss(self, task, function):
        rows, classes = task["rows"], task["classes"]
        student = self.put(numbers(rows * classes, 3, 1), rows, classes).requires_grad_()
        teacher = self.put(numbers(rows * classes, 3, 2), rows, classes)
        labels = self.put(class_indices(rows, classes), rows)
        copy = student.detach().clone().requires_grad_()  # for those that write over it
        value = function(copy, teacher, labels)
        value.backward()
        result = [[value.item()]] + rows_of(copy.grad)
        del copy, value

        def step():
            student.grad = None
            function(student, teacher, labels).backward()

        return {"milliseconds": self.time(step), "result": result}

    def matmul(self, task):
        rows, depth, columns = task["rows"], task["depth"], task["columns"]
        a, b = self.put(numbers(rows * depth, 1, 1), rows, depth), self.put(numbers(depth * columns, 1, 2), depth, columns)
        return {"milliseconds": self.time(lambda: torch.matmul(a, b)), "result": rows_of(torch.matmul(a, b))}

    def training(self, model, inputs, labels, compiled):
        model = model.to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), **ADAM)
        classes = lambda logits: F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        loss = lambda: classes(model(inputs))
        if compiled:
            loss = torch.compile(loss, dynamic=False)

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()

        for _ in range(STEPS):
            step()
        with torch.no_grad():
            result = [[classes(model(inputs)).item()]]
        return {"milliseconds": self.time(step), "result": result}

    def mlp(self, task, compiled):
        layers = []
        for i, (ins, outs) in enumerate(MLP):
            layer = nn.Linear(ins, outs)
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(numbers(outs * ins, ins**-0.5, 10 + 2 * i)).reshape(outs, ins))
                layer.bias.copy_(torch.from_numpy(numbers(outs, ins**-0.5, 11 + 2 * i)))
            layers += [layer, nn.ReLU()]
        batch = task["batch"]
        images = self.put(numbers(batch * 784, 1, 3), batch, 784)
        return self.training(nn.Sequential(*layers[:-1]), images, self.put(class_indices(batch, 10), batch), compiled)

    def gpt(self, task, compiled):
        model = Gpt(task["classes"], task["context"], task["layers"], task["width"], task["heads"])
        with torch.no_grad():
            for i, (name, p) in enumerate(sorted(model.named_parameters())):
                if p.dim() > 1:
                    p.copy_(torch.from_numpy(numbers(p.numel(), 0.03, 100 + i)).reshape(p.shape))
                else:
                    p.fill_(1.0 if name.endswith("weight") else 0.0)
        batch, context = task["batch"], task["context"]
        tokens = self.put(class_indices(batch * context, task["classes"]), batch, context)
        return self.training(model, tokens, tokens, compiled)


def measure(tasks, device):
    """All ways at all tasks: {way: {task: answer}}, and what is missing."""
    bench, notes = Bench(device), []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    columns = {"PyTorch eager": {}}
    losses = {"PyTorch eager": EAGER}
    if hasattr(torch, "compile"):
        columns["torch.compile"] = {}
        # a kernel for each shape: the second one would else be compiled for any shape
        losses["torch.compile"] = {kind: torch.compile(function, dynamic=False) for kind, function in EAGER.items()}
    else:
        notes.append(f"torch.compile is not in PyTorch {torch.__version__}")
    for name, load in (("Liger", liger_losses), ("TRL", trl_losses)):
        try:
            losses[name] = load()
            columns[name] = {}
        except Exception as error:  # whatever hinders an import
            notes.append(f"{name} is not here: {error}")
    for task in tasks:
        for way, answers in columns.items():
            compiled = way == "torch.compile"
            try:
                if task["kind"] in losses[way]:
                    answers[task["name"]] = bench.loss(task, losses[way][task["kind"]])
                elif task["kind"] == "matmul" and way == "PyTorch eager":
                    answers[task["name"]] = bench.matmul(task)
                elif task["kind"] in ("mlp", "gpt") and way in ("PyTorch eager", "torch.compile"):
                    answers[task["name"]] = getattr(bench, task["kind"])(task, compiled)
            except Exception as error:
                notes.append(f"{way}, {task['name']}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            print(f"{way}: {task['name']}", file=sys.stderr)
            if bench.cuda:
                torch.cuda.empty_cache()
    return columns, notes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="tasks as JSON; prints JSON")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"error: PyTorch {torch.__version__} finds no CUDA device")
    here = os.path.dirname(os.path.abspath(__file__))
    if options.json:
        tasks = json.loads(options.json)
    else:
        with open(os.path.join(here, "tasks.json"), encoding="utf-8") as file:
            tasks = json.load(file)["gpu" if options.device == "cuda" else "software"]
    columns, notes = measure(tasks, options.device)
    version = torch.__version__ + (f" on {torch.cuda.get_device_name()}" if options.device == "cuda" else " on the CPU")
    if options.json:
        print(json.dumps({"version": version, "columns": columns, "notes": notes}))
        return
    print(f"PyTorch {version}, float32 without TF32, milliseconds\n")
    print("| task | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for task in tasks:
        cells = [columns[way].get(task["name"]) for way in columns]
        print(f"| {task['name']} | " + " | ".join(f"{c['milliseconds']:.3g}" if c else "–" for c in cells) + " |")
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
