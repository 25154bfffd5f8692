// Causal attention with grouped queries: minilora/layers/attention.py in JavaScript, entry by entry.
//
// H heads ask, K heads answer, g = H / K ask the same one. Rows are T positions of one text after another.

import { Matrix } from "./matrix.js";
import { rotate, rotateBack } from "./layers.js";

export class Attention {
  constructor({ q_proj, k_proj, v_proj, o_proj }, frequencies) {
    Object.assign(this, { q_proj, k_proj, v_proj, o_proj, frequencies });
  }

  // With a past, which is an earlier call's cache, x follows the positions there. It is of one text then, and has no
  // backward.
  forward(x, T, past = null) { // (N, d) -> (N, d)
    const start = past ? past.k.rows : 0;
    const [q_flat, q_cache] = this.q_proj.forward(x), [k_flat, k_cache] = this.k_proj.forward(x);
    let [v, v_cache] = this.v_proj.forward(x);
    const q = rotate(q_flat, this.frequencies, T, start);
    let k = rotate(k_flat, this.frequencies, T, start);
    if (past) [k, v] = [below(past.k, k), below(past.v, v)];
    const [o, P] = attend(q, k, v, T, 2 * this.frequencies.length);
    const [y, o_cache] = this.o_proj.forward(o);
    return [y, { T, q, k, v, P, q_cache, k_cache, v_cache, o_cache }];
  }

  backward(dy, { T, q, k, v, P, q_cache, k_cache, v_cache, o_cache }) { // and the gradients of the four layers
    const [d_o, o_proj] = this.o_proj.backward(dy, o_cache);
    const [dq, dk, dv] = attendBackward(d_o, q, k, v, P, T, 2 * this.frequencies.length);
    const [dx_q, q_proj] = this.q_proj.backward(rotateBack(dq, this.frequencies, T, 0), q_cache);
    const [dx_k, k_proj] = this.k_proj.backward(rotateBack(dk, this.frequencies, T, 0), k_cache);
    const [dx_v, v_proj] = this.v_proj.backward(dv, v_cache);
    const dx = dx_q.plus(dx_k).plus(dx_v); // eq. (att.9)
    return [dx, { q_proj, k_proj, v_proj, o_proj }];
  }
}

// Call visit(row, q_t, k_0, last) for each text b, head h and position t: where P's row begins, where q's does, where k
// and v have position 0, and the last position that t reads.
function eachRow(q, k, T, D, visit) {
  const [H, K, texts] = [q.columns / D, k.columns / D, q.rows / T], U = k.rows / texts;
  for (let b = 0; b < texts; b += 1) {
    for (let h = 0; h < H; h += 1) {
      const k_0 = b * U * k.columns + Math.floor(h / (H / K)) * D;
      for (let t = 0; t < T; t += 1) {
        const row = ((b * H + h) * T + t) * U; // of P (texts, H, T, U)
        const q_t = (b * T + t) * q.columns + h * D;
        visit(row, q_t, k_0, U - T + t);
      }
    }
  }
}

function attend(q, k, v, T, D) { // -> o like q, and P
  const o = Matrix.zeros(q.rows, q.columns, q.data.constructor), c = 1 / Math.sqrt(D), wide = k.columns;
  const P = new q.data.constructor((q.columns / D) * k.rows * T);
  eachRow(q, k, T, D, (row, q_t, k_0, last) => {
    let most = -Infinity, total = 0;
    for (let u = 0; u <= last; u += 1) { // later positions are masked: their P stays 0
      let S = 0;
      for (let j = 0; j < D; j += 1) S += c * q.data[q_t + j] * k.data[k_0 + u * wide + j]; // eq. (att.1)
      P[row + u] = S;
      most = Math.max(most, S);
    }
    for (let u = 0; u <= last; u += 1) total += P[row + u] = Math.exp(P[row + u] - most);
    for (let u = 0; u <= last; u += 1) P[row + u] /= total; // eq. (att.2)
    for (let u = 0; u <= last; u += 1) {
      for (let j = 0; j < D; j += 1) o.data[q_t + j] += P[row + u] * v.data[k_0 + u * wide + j]; // eq. (att.3)
    }
  });
  return [o, P];
}

function attendBackward(d_o, q, k, v, P, T, D) { // -> dq, dk, dv like q, k, v
  const [dq, dk, dv] = [q, k, v].map(({ rows, columns, data }) => Matrix.zeros(rows, columns, data.constructor));
  const c = 1 / Math.sqrt(D), wide = k.columns, dP = new Float64Array(T);
  eachRow(q, k, T, D, (row, q_t, k_0, last) => {
    let inner = 0; // sum_w P_tw dP_tw
    for (let u = 0; u <= last; u += 1) {
      const v_u = k_0 + u * wide;
      dP[u] = 0;
      for (let j = 0; j < D; j += 1) {
        dv.data[v_u + j] += P[row + u] * d_o.data[q_t + j]; // eq. (att.4)
        dP[u] += d_o.data[q_t + j] * v.data[v_u + j]; // eq. (att.5)
      }
      inner += P[row + u] * dP[u];
    }
    for (let u = 0; u <= last; u += 1) {
      const dS = P[row + u] * (dP[u] - inner), k_u = k_0 + u * wide; // eq. (att.6)
      for (let j = 0; j < D; j += 1) {
        dq.data[q_t + j] += c * dS * k.data[k_u + j]; // eq. (att.7)
        dk.data[k_u + j] += c * dS * q.data[q_t + j]; // eq. (att.8)
      }
    }
  });
  return [dq, dk, dv];
}

function below(first, second) {
  const data = new first.data.constructor(first.data.length + second.data.length);
  data.set(first.data);
  data.set(second.data, first.data.length);
  return new Matrix(first.rows + second.rows, first.columns, data);
}
