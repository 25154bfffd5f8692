// One layer that learns a change of its weight: all that layer.js shows, without a page.
//
//     y = x W^T + s x A^T B^T, and the targets are x (W + D)^T: D (out, in) is the true change
//
// The columns of X stand at right angles, X^T X = N I. Then the loss (15) is |D - s B A|^2 / out, and no adapter of
// rank r can do better than the r largest singular values of D (Eckart and Young): `least` says what that leaves. And
// dy^T x is 2 (s B A - D) / out: what is still missing, with its sign turned.

import { Matrix } from "./matrix.js";
import { mse } from "./losses.js";
import { layerWith } from "./mistakes.js";
import { Adam, GradientDescent } from "./optim.js";
import { gaussian, randomFrom, uniform } from "./random.js";
import { singularValues } from "./svd.js";

export const [N, N_IN, N_OUT] = [64, 14, 10];
export const OPTIMIZERS = { adam: Adam, descent: GradientDescent };

export class Experiment {
  constructor({ rank, alpha, rate, optimizer = "adam", start = "peft", mistakes = [], truth, seed = 0 }) {
    const random = randomFrom(seed), [n_out, n_in] = [truth.rows, truth.columns];
    this.X = orthogonal(Matrix.filled(N, n_in, gaussian(random)));
    this.W = Matrix.filled(n_out, n_in, uniform(random, 1 / Math.sqrt(n_in)));
    const parts = layerWith(mistakes, start), adapter = parts.start(n_in, n_out, rank, alpha, random);
    this.layer = parts.make(this.W, adapter.lora_A, adapter.lora_B, alpha);
    this.A0 = adapter.lora_A.copy();
    this.optimizer = new OPTIMIZERS[optimizer](this.layer.adapter.trainable(), rate);
    this.history = [null];
    this.aim(truth);
  }

  // Set the true change. Training goes on from where it is, with the loss that this step has now.
  aim(truth) {
    this.truth = truth;
    this.Y = this.X.times(this.W.plus(truth).T);
    this.values = singularValues(truth);
    this.history[this.steps] = this.measured();
  }

  step() {
    const [y, cache] = this.layer.forward(this.X);
    const [, d_prediction] = mse(y, this.Y);
    const [, grads] = this.layer.backward(d_prediction, cache);
    this.optimizer.step(grads);
    this.history.push(this.measured());
  }

  // What flows back now: dy^T x, the gradient of the whole weight, and what the layer makes of dy for A and B.
  flow() {
    const [y, cache] = this.layer.forward(this.X);
    const [, dy] = mse(y, this.Y);
    const [, { lora_A, lora_B }] = this.layer.backward(dy, cache);
    return { whole: dy.T.times(this.X), dA: lora_A, dB: lora_B };
  }

  measured() {
    const { lora_A, lora_B } = this.layer.adapter;
    return { loss: mse(this.layer.forward(this.X)[0], this.Y)[0], A: lora_A.minus(this.A0).norm(), B: lora_B.norm() };
  }

  get steps() { return this.history.length - 1; }

  get loss() { return this.history.at(-1).loss; }

  // The least loss of any adapter of this rank.
  get least() {
    return this.values.slice(this.layer.adapter.rank).reduce((sum, value) => sum + value * value, 0) / this.truth.rows;
  }
}

// Gram and Schmidt, columns to lengths of sqrt(N): each column loses its part along those before it.
function orthogonal(X) {
  const columns = [];
  for (let j = 0; j < X.columns; j += 1) {
    let column = X.T.data.slice(j * X.rows, (j + 1) * X.rows);
    const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
    for (const before of columns) {
      const along = dot(column, before) / X.rows;
      column = column.map((value, i) => value - along * before[i]);
    }
    const length = Math.sqrt(dot(column, column) / X.rows);
    columns.push(column.map((value) => value / length));
  }
  return new Matrix(X.columns, X.rows, Float64Array.from(columns.flatMap((column) => [...column]))).T;
}

function picture(...lines) {
  return Matrix.filled(N_OUT, N_IN, (_, i) => (lines[Math.floor(i / N_IN)]?.[i % N_IN] === "#" ? 1 : 0));
}

// A drawing as a short text, four cells a letter, and back: so that an address can hold it.
export function spelled({ data }) {
  const bits = [...data].map((value) => (value ? 1 : 0));
  const quads = Array.from({ length: bits.length / 4 }, (_, i) => bits.slice(4 * i, 4 * i + 4));
  return quads.map((quad) => parseInt(quad.join(""), 2).toString(16)).join("");
}

export function drawnFrom(text) {
  const wanted = (N_OUT * N_IN) / 4;
  if (!new RegExp(`^[0-9a-f]{${wanted}}$`).test(text)) return null;
  const bits = [...text].flatMap((letter) => [...parseInt(letter, 16).toString(2).padStart(4, "0")].map(Number));
  return new Matrix(N_OUT, N_IN, Float64Array.from(bits));
}

// Changes to begin with; a reader can draw others.
export const TRUTHS = {
  L: {
    label: "the letter L",
    draw: () => picture("", "...##", "...##", "...##", "...##", "...##", "...##", "...########", "...########"),
  },
  outer: {
    label: "a product of two vectors, rank 1",
    draw: () => {
      const random = gaussian(randomFrom(3));
      return Matrix.filled(N_OUT, 1, random).times(Matrix.filled(1, N_IN, random));
    },
  },
  face: {
    label: "a face",
    draw: () => picture(
      "....######",
      "..##......##",
      "..#..#..#..#",
      "..#..#..#..#",
      "..#........#",
      "..#.#....#.#",
      "..#..####..#",
      "..##......##",
      "....######",
    ),
  },
  diagonal: {
    label: "a diagonal, full rank",
    draw: () => Matrix.filled(N_OUT, N_IN, (_, i) => (Math.floor(i / N_IN) === i % N_IN ? 1 : 0)),
  },
  noise: { label: "noise, full rank", draw: () => Matrix.filled(N_OUT, N_IN, gaussian(randomFrom(5))).scaled(0.5) },
  nothing: { label: "nothing yet: draw", draw: () => Matrix.zeros(N_OUT, N_IN) },
};
