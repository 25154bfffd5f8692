"""microlora: LoRA in one file of plain Python, with every gradient by hand.

A small language model learns first names, letter by letter. Then its matrices W are frozen, and
each gets a second path through two thin matrices A and B, which adds nothing at first:

    y = x W^T + s x A^T B^T         W (out, in)   A (r, in)   B (out, r)   s = alpha / r

Now only A and B train, on the names of dinosaurs. At the end W + s B A replaces W: the model is as
small and as fast as before. A matrix is a list of rows. In comments, (n, m) is n rows of m
numbers, W^T is W transposed, and eq. refers to an equation that minilora derives. dW says how
much the loss grows with each number of W; backward computes it from dy, the same for y.
"""

import math
import random
from pathlib import Path

LETTERS = ".abcdefghijklmnopqrstuvwxyz"  # each name begins and ends with a full stop
PLACES, WIDTH = 16, 24  # a full stop and at most 15 letters; 24 numbers for each
RANK, ALPHA = 2, 4
PEOPLE = (Path(__file__).parent / "names" / "people.txt").read_text().split()
DINOSAURS = (Path(__file__).parent / "names" / "dinosaurs.txt").read_text().split()


def matmul(X, Y):  # (n, k), (k, m) -> (n, m)   entry i, j: row i of X times column j of Y
    assert len(X[0]) == len(Y)
    columns = transpose(Y)
    return [[sum(x * y for x, y in zip(row, column)) for column in columns] for row in X]


def transpose(X):  # (n, m) -> (m, n)   columns become rows
    return [list(column) for column in zip(*X)]


def add(X, Y):  # (n, m), (n, m) -> (n, m)
    return [[x + y for x, y in zip(*rows)] for rows in zip(X, Y)]


def scale(s, X):  # (n, m) -> (n, m)
    return [[s * x for x in row] for row in X]


def at_random(n, m):  # -> (n, m)
    return [[random.uniform(-1, 1) / math.sqrt(m) for _ in range(m)] for _ in range(n)]


class Linear:  # y = x W^T
    def __init__(self, W):
        self.W = W  # (out, in)

    def forward(self, x):  # (T, in) -> y (T, out): one row for each of T letters
        self.x = x
        return matmul(x, transpose(self.W))  # eq. (7)

    def backward(self, dy):  # (T, out) -> dx (T, in)
        dW = matmul(transpose(dy), self.x)  # eq. (8)   (out, in)
        self.trained = [(self.W, dW)]
        return matmul(dy, self.W)  # eq. (10)


class LoRA:  # y = x W^T + s x A^T B^T
    def __init__(self, linear, r, alpha):
        self.W = linear.W  # (out, in), frozen: nothing here changes it
        self.A = at_random(r, len(self.W[0]))  # (r, in)
        self.B = [[0.0] * r for _ in self.W]  # (out, r)
        self.s = alpha / r

    def forward(self, x):  # (T, in) -> y (T, out)
        self.x = x
        self.h = matmul(x, transpose(self.A))  # eq. (1)   (T, r)
        y = scale(self.s, matmul(self.h, transpose(self.B)))  # eq. (2)   (T, out)
        return add(matmul(x, transpose(self.W)), y)  # eq. (11)

    def backward(self, dy):  # (T, out) -> dx (T, in)
        dB = scale(self.s, matmul(transpose(dy), self.h))  # eq. (3)   (out, r)
        dh = scale(self.s, matmul(dy, self.B))  # eq. (4)   (T, r)
        dA = matmul(transpose(dh), self.x)  # eq. (5)   (r, in)
        self.trained = [(self.A, dA), (self.B, dB)]
        return add(matmul(dy, self.W), matmul(dh, self.A))  # eq. (6), (12)

    def merged(self):
        return Linear(add(self.W, scale(self.s, matmul(self.B, self.A))))  # eq. (13), (14)


class Norm:  # divides each row by r, its root mean square; it has nothing to train
    def forward(self, x):  # (T, WIDTH) -> (T, WIDTH)
        self.r = [math.sqrt(sum(v * v for v in row) / WIDTH + 1e-6) for row in x]  # eq. (norm.1)
        self.y = [[v / r for v in row] for row, r in zip(x, self.r)]  # eq. (norm.2)
        return self.y

    def backward(self, dy):
        dx = []
        for d, y, r in zip(dy, self.y, self.r):
            mean = sum(d_j * y_j for d_j, y_j in zip(d, y)) / WIDTH
            dx.append([(d_j - y_j * mean) / r for d_j, y_j in zip(d, y)])  # eq. (norm.4)
        return dx


class Model:  # letters become rows, attention mixes them, scores say which letter comes next
    def __init__(self):
        self.layers = {name: Linear(at_random(WIDTH, WIDTH)) for name in ["q", "k", "v", "o"]}
        self.layers["embed"] = Linear(at_random(WIDTH, len(LETTERS) + PLACES))
        self.layers["head"] = Linear(at_random(len(LETTERS), WIDTH))
        self.norm, self.last_norm = Norm(), Norm()

    def forward(self, name):  # T letters -> z (T, 27): after each letter, scores for the next
        L, T, c = self.layers, len(name), 1 / math.sqrt(WIDTH)
        rows = []  # (T, 27 + PLACES): one 1 marks the letter, another its place
        for t, a in enumerate(name):
            rows.append([float(b == a) for b in LETTERS] + [float(p == t) for p in range(PLACES)])
        x = L["embed"].forward(rows)  # (T, WIDTH)
        n = self.norm.forward(x)
        self.q, self.k, self.v = L["q"].forward(n), L["k"].forward(n), L["v"].forward(n)
        S = scale(c, matmul(self.q, transpose(self.k)))  # eq. (att.1)   (T, T)
        # Letter t attends only to letters up to itself: the rest of its row is 0.
        self.P = [softmax(S[t][: t + 1]) + [0.0] * (T - t - 1) for t in range(T)]  # eq. (att.2)
        x = add(x, L["o"].forward(matmul(self.P, self.v)))  # eq. (att.3)
        return L["head"].forward(self.last_norm.forward(x))

    def backward(self, dz):
        L, c = self.layers, 1 / math.sqrt(WIDTH)
        dx = self.last_norm.backward(L["head"].backward(dz))
        do = L["o"].backward(dx)
        dv = matmul(transpose(self.P), do)  # eq. (att.4)
        dP = matmul(do, transpose(self.v))  # eq. (att.5)
        dS = []
        for d, p in zip(dP, self.P):
            total = sum(d_u * p_u for d_u, p_u in zip(d, p))
            dS.append([p_u * (d_u - total) for d_u, p_u in zip(d, p)])  # eq. (att.6)
        dq = scale(c, matmul(dS, self.k))  # eq. (att.7)
        dk = scale(c, matmul(transpose(dS), self.q))  # eq. (att.8)
        dn = add(add(L["q"].backward(dq), L["k"].backward(dk)), L["v"].backward(dv))  # eq. (att.9)
        L["embed"].backward(add(dx, self.norm.backward(dn)))


def softmax(row):  # numbers -> positive numbers that sum to 1
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def cross_entropy(z, name):  # -> the loss, which is the mean surprise at a letter, and dz
    q = [softmax(row) for row in z]  # eq. (ce.1)
    loss = -sum(math.log(row[LETTERS.index(a)]) for row, a in zip(q, name)) / len(z)  # eq. (ce.2)
    dz = [[(p - (b == a)) / len(z) for p, b in zip(row, LETTERS)] for row, a in zip(q, name)]
    return loss, dz  # eq. (ce.3)


def adam(W, dW, M, V, t, lr):  # step t = 1, 2, ...; M and V: running means of dW and dW squared
    for w, g, m, v in zip(W, dW, M, V):
        for i in range(len(w)):
            m[i] = 0.9 * m[i] + 0.1 * g[i]  # eq. (20)
            v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2  # eq. (21)
            m_hat, v_hat = m[i] / (1 - 0.9**t), v[i] / (1 - 0.999**t)  # eq. (22), (23)
            w[i] -= lr * m_hat / (math.sqrt(v_hat) + 1e-8)  # eq. (24)


def learn(model, names, lr):
    losses = []
    for t, name in enumerate(names, 1):
        loss, dz = cross_entropy(model.forward("." + name), name + ".")
        model.backward(dz)
        pairs = [pair for layer in model.layers.values() for pair in layer.trained]
        if t == 1:
            means = [(scale(0, W), scale(0, W)) for W, _ in pairs]
        for (W, dW), (M, V) in zip(pairs, means):
            adam(W, dW, M, V, t, lr * (1 - (t - 1) / len(names)))
        losses.append(loss)
        if t % 500 == 0:
            print(f"step {t:5}   loss {sum(losses[-500:]) / 500:.2f}")
    print("numbers trained:", sum(len(W) * len(W[0]) for W, _ in pairs))
    return losses


def invent(model):  # draws one letter after another from q squared, to favour likely letters
    name = "."
    while len(name) < PLACES and not name[1:].endswith("."):
        q = softmax(model.forward(name)[-1])
        name += random.choices(LETTERS, [p * p for p in q])[0]
    return name.strip(".")


def report(model):
    for kind, names in [("people", PEOPLE[:100]), ("dinosaurs", DINOSAURS[:100])]:
        losses = [cross_entropy(model.forward("." + name), name + ".")[0] for name in names]
        print(f"loss on 100 unseen {kind}: {sum(losses) / 100:.2f}")
    print("invented:", *[invent(model) for _ in range(8)])


if __name__ == "__main__":
    random.seed(0)
    model = Model()
    learn(model, 2 * PEOPLE[100:], lr=0.005)
    report(model)
    model.layers = {name: LoRA(linear, RANK, ALPHA) for name, linear in model.layers.items()}
    learn(model, 2 * DINOSAURS[100:], lr=0.01)
    report(model)
    before = model.forward(".tyrannosaurus")
    model.layers = {name: lora.merged() for name, lora in model.layers.items()}
    change = add(model.forward(".tyrannosaurus"), scale(-1, before))
    print(f"merged, no output moves by more than {max(abs(v) for row in change for v in row):.0e}")
