"""Makes classifier.onnx and classifier.examples.json: a small classifier to try the prover with.

    python3 classifier.py

Sixteen numbers go in, the scores of four classes come out; 3,300 parameters in three layers with rectifiers between them, trained
here on points around four centres. Needs nothing but Python, and makes the same files every time.
"""

import json
import math
import os
import random
import struct

INPUT, FIRST, SECOND, CLASSES = 16, 64, 32, 4
HERE = os.path.dirname(os.path.abspath(__file__))
chance = random.Random(20)
centres = [[chance.choice((-1.0, 1.0)) for _ in range(INPUT)] for _ in range(CLASSES)]


def point(label):
    return [value + chance.gauss(0, 0.7) for value in centres[label]]


def layer(rows, columns):
    return [[chance.gauss(0, math.sqrt(2 / rows)) for _ in range(columns)] for _ in range(rows)]


weights = [layer(INPUT, FIRST), layer(FIRST, SECOND), layer(SECOND, CLASSES)]
biases = [[0.0] * FIRST, [0.0] * SECOND, [0.0] * CLASSES]


def forward(x):
    values = [x]
    for depth, (weight, bias) in enumerate(zip(weights, biases)):
        last = values[-1]
        y = list(bias)
        for value, row in zip(last, weight):
            if value:
                for j, factor in enumerate(row):
                    y[j] += value * factor
        values.append([max(v, 0.0) for v in y] if depth < 2 else y)
    return values


def train(steps, rate):
    for step in range(steps):
        label = step % CLASSES
        values = forward(point(label))
        top = max(values[3])
        scores = [math.exp(v - top) for v in values[3]]
        slope = [s / sum(scores) - (j == label) for j, s in enumerate(scores)]
        for depth in (2, 1, 0):
            last, weight = values[depth], weights[depth]
            below = [sum(d * w for d, w in zip(slope, row)) if value > 0 else 0.0 for value, row in zip(last, weight)]
            for value, row in zip(last, weight):
                if value:
                    for j, d in enumerate(slope):
                        row[j] -= rate * d * value
            for j, d in enumerate(slope):
                biases[depth][j] -= rate * d
            slope = below


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def constant(name, dims, values):
    raw = struct.pack(f"<{len(values)}f", *values)
    return b"".join(field(1, d) for d in dims) + field(2, 1) + field(8, name) + field(9, raw)


def node(kind, inputs, output):
    return b"".join(field(1, name) for name in inputs) + field(2, output) + field(3, output) + field(4, kind)


def tensor(name, size):
    dims = field(1, field(2, "batch_size")) + field(1, field(1, size))
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def onnx():
    graph, last = b"", "x"
    for depth, (weight, bias) in enumerate(zip(weights, biases)):
        graph += field(5, constant(f"w{depth}", [len(weight), len(bias)], [v for row in weight for v in row]))
        graph += field(5, constant(f"b{depth}", [len(bias)], bias))
        graph += field(1, node("MatMul", [last, f"w{depth}"], f"m{depth}"))
        last = f"a{depth}" if depth < 2 else "scores"
        graph += field(1, node("Add", [f"m{depth}", f"b{depth}"], last))
        if depth < 2:
            graph += field(1, node("Relu", [last], f"r{depth}"))
            last = f"r{depth}"
    graph += field(2, "classifier") + field(11, tensor("x", INPUT)) + field(12, tensor("scores", CLASSES))
    return field(1, 8) + field(2, "fabstir-node") + field(7, graph) + field(8, field(2, 13))


train(4000, 0.01)
tries = [(label, point(label)) for label in range(CLASSES) for _ in range(50)]
right = sum(max(range(CLASSES), key=forward(x)[3].__getitem__) == label for label, x in tries)
with open(os.path.join(HERE, "classifier.onnx"), "wb") as file:
    file.write(onnx())
with open(os.path.join(HERE, "classifier.examples.json"), "w") as file:
    rows = [[round(v, 3) for v in x] for _, x in tries[:: len(tries) // 8]]
    file.write("[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n")
print(f"{right} of {len(tries)} right; scores of the first example: {[round(v, 4) for v in forward(rows[0])[3]]}")
