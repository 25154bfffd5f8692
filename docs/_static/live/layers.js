// What a language model has beside linear layers: minilora/layers/norm.py, rotary.py and gated.py in JavaScript.
// A matrix has a row for each position of each text. Backward returns dx, for layers that train nothing themselves.

import { Matrix } from "./matrix.js";

const like = (x) => Matrix.zeros(x.rows, x.columns, x.data.constructor);

// Divide each row by its root mean square, then scale each entry.
export class RMSNorm {
  constructor(weight, eps) {
    [this.weight, this.eps] = [weight, eps];
  }

  forward(x) { // (N, d) -> (N, d)
    const y = like(x), d = x.columns, g = this.weight, r = new Float64Array(x.rows);
    for (let n = 0; n < x.rows; n += 1) {
      let sum = 0;
      for (let j = 0; j < d; j += 1) sum += x.data[n * d + j] ** 2;
      r[n] = Math.sqrt(sum / d + this.eps); // eq. (norm.1)
      for (let j = 0; j < d; j += 1) y.data[n * d + j] = x.data[n * d + j] / r[n] * g[j]; // eq. (norm.2)
    }
    return [y, { x, r }];
  }

  backward(dy, { x, r }) {
    const dx = like(x), d = x.columns, g = this.weight;
    for (let n = 0; n < x.rows; n += 1) {
      let mean = 0; // of dx^ x^, over the row: dx^ = dy g, x^ = x / r
      for (let j = 0; j < d; j += 1) mean += dy.data[n * d + j] * g[j] * x.data[n * d + j] / (d * r[n]);
      for (let j = 0; j < d; j += 1) {
        const i = n * d + j;
        dx.data[i] = (dy.data[i] * g[j] - x.data[i] * (mean / r[n])) / r[n]; // eq. (norm.4)
      }
    }
    return dx;
  }
}

// Turn each pair of a head's entries, first half with second half, by an angle in proportion to the row's position.
// Rows are T positions of one text after another, the first at `start`; `turn` is 1, or -1 for the way back.
export function rotate(x, frequencies, T, start, turn = 1) { // (N, heads D) -> (N, heads D)
  const y = like(x), half = frequencies.length, D = 2 * half;
  for (let n = 0; n < x.rows; n += 1) {
    for (let j = 0; j < half; j += 1) {
      const a = turn * (start + (n % T)) * frequencies[j], cos = Math.cos(a), sin = Math.sin(a);
      for (let i = n * x.columns + j; i < (n + 1) * x.columns; i += D) {
        y.data[i] = x.data[i] * cos - x.data[i + half] * sin; // eq. (rope.2)
        y.data[i + half] = x.data[i + half] * cos + x.data[i] * sin; // eq. (rope.3)
      }
    }
  }
  return y;
}

export const rotateBack = (dy, frequencies, T, start) => rotate(dy, frequencies, T, start, -1); // eq. (rope.4)

const sigmoid = (a) => 1 / (1 + Math.exp(-a));
const silu = (a) => a * sigmoid(a); // eq. (act.5)
const siluSlope = (a) => sigmoid(a) * (1 + a * (1 - sigmoid(a))); // eq. (act.6)

// One linear layer decides how much of another passes.
export class GatedMLP {
  constructor(gate_proj, up_proj, down_proj) {
    Object.assign(this, { gate_proj, up_proj, down_proj });
  }

  forward(x) { // (N, d) -> (N, d)
    const [a, a_cache] = this.gate_proj.forward(x), [b, b_cache] = this.up_proj.forward(x);
    const z = a.map(silu).with(b, (u, b_nj) => u * b_nj); // eq. (gate.1)
    const [y, y_cache] = this.down_proj.forward(z);
    return [y, { a, b, a_cache, b_cache, y_cache }];
  }

  backward(dy, { a, b, a_cache, b_cache, y_cache }) { // and the gradients of the three layers
    const [dz, down_proj] = this.down_proj.backward(dy, y_cache);
    const p = b.with(a, (b_nj, a_nj) => b_nj * siluSlope(a_nj));
    const da = dz.with(p, (dz_nj, p_nj) => dz_nj * p_nj); // eq. (gate.2)
    const db = dz.with(a, (dz_nj, a_nj) => dz_nj * silu(a_nj)); // eq. (gate.3)
    const [dx_a, gate_proj] = this.gate_proj.backward(da, a_cache);
    const [dx_b, up_proj] = this.up_proj.backward(db, b_cache);
    const dx = dx_a.plus(dx_b); // eq. (gate.4)
    return [dx, { gate_proj, up_proj, down_proj }];
  }
}
