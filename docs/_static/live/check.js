// Is a gradient right? Each entry against its measured slope. And the layer's output and start against what they should
// be.

import { Matrix } from "./matrix.js";
import { mse } from "./losses.js";
import { gaussian, randomFrom } from "./random.js";

// The slope of f along each entry of an array, by central differences. The array is as before when it returns.
export function slopes(f, { rows, columns, data }, step = 1e-5) {
  const found = Matrix.zeros(rows, columns);
  data.forEach((value, i) => {
    data[i] = value + step;
    const above = f();
    data[i] = value - step;
    found.data[i] = (above - f()) / (2 * step);
    data[i] = value;
  });
  return found;
}

// How far two matrices are apart at most, as a part of the larger's largest entry.
export function apart(found, right) {
  const most = (m) => m.data.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
  return most(found.minus(right)) / Math.max(most(found), most(right), 1e-300);
}

const TOLERANCE = 1e-6;

// Check a layer, which `make(weight, lora_A, lora_B, alpha)` builds and `start(n_in, n_out, rank, alpha)` begins.
// No entry is zero: at B = 0, dA is zero whatever its factor. Neither rank nor scaling is 1, which hide a wrong factor.
// Return for each array { right, error, says }: `error` is a part of its largest entry.
export function checkLayer(make, start) {
  const draw = gaussian(randomFrom(1)), drawn = (rows, columns) => Matrix.filled(rows, columns, draw);
  const [N, n_in, n_out, rank, alpha] = [5, 4, 3, 2, 6];
  const x = drawn(N, n_in), target = drawn(N, n_out);
  const W = drawn(n_out, n_in), A = drawn(rank, n_in), B = drawn(n_out, rank);
  const layer = make(W, A, B, alpha);
  const [y, cache] = layer.forward(x);
  const [dx, { lora_A: dA, lora_B: dB }] = layer.backward(mse(y, target)[1], cache);
  const loss = () => mse(layer.forward(x)[0], target)[0];
  const verdict = (error, says) => ({ right: error <= TOLERANCE, error, says });
  return {
    dA: verdict(apart(dA, slopes(loss, A)), "against the slope of the loss, (5)"),
    dB: verdict(apart(dB, slopes(loss, B)), "against the slope of the loss, (3)"),
    dx: verdict(apart(dx, slopes(loss, x)), "for the layer below, against the slope, (12)"),
    y: verdict(apart(y, defined(x, W, A, B, alpha)), "against its definition, s = alpha / r"),
    ...checkStart(start(n_in, n_out, rank, alpha), x, target, W, make, verdict),
  };
}

// y_no = sum_i x_ni W_oi + alpha / r sum_k sum_i x_ni A_ki B_ok, as it is written
function defined(x, W, A, B, alpha) {
  const y = Matrix.zeros(x.rows, W.rows), r = A.rows, n_in = x.columns, s = alpha / r;
  for (let n = 0; n < y.rows; n += 1) {
    for (let o = 0; o < y.columns; o += 1) {
      for (let i = 0; i < n_in; i += 1) {
        let weight = W.data[o * n_in + i];
        for (let k = 0; k < r; k += 1) weight += s * A.data[k * n_in + i] * B.data[o * r + k];
        y.data[n * y.columns + o] += x.data[n * n_in + i] * weight;
      }
    }
  }
  return y;
}

// At the start the layer should give what its base gives, and something should be able to move.
function checkStart({ lora_A, lora_B, alpha }, x, target, W, make, verdict) {
  const layer = make(W, lora_A, lora_B, alpha);
  const [y, cache] = layer.forward(x);
  const [, grads] = layer.backward(mse(y, target)[1], cache);
  const moves = grads.lora_A.norm() + grads.lora_B.norm() > 0;
  return {
    A: verdict(moves ? 0 : 1, "at the start A or B has a gradient"),
    B: verdict(apart(y, x.times(W.T)), "at the start y is the base's"),
  };
}
