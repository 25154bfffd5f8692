// minilora/losses.py in JavaScript: two losses, each with its gradient.

import { Matrix } from "./matrix.js";

export function mse(prediction, target) { // (N, out), (N, out) -> (), (N, out)
  const count = prediction.data.length;
  const error = prediction.minus(target);
  const loss = error.data.reduce((sum, e) => sum + e * e, 0) / count; // eq. (15)
  const d_prediction = error.scaled(2 / count); // eq. (16)
  return [loss, d_prediction];
}

export function crossEntropy(logits, targets) { // (N, V), N ids -> (), (N, V)
  const [N, V, z] = [logits.rows, logits.columns, logits.data], q = Matrix.zeros(N, V, z.constructor);
  let loss = 0;
  for (let n = 0; n < N; n += 1) {
    const row = n * V;
    let most = -Infinity, total = 0; // the largest score is subtracted, which leaves q as it is, and exp finite
    for (let v = 0; v < V; v += 1) most = Math.max(most, z[row + v]);
    for (let v = 0; v < V; v += 1) total += q.data[row + v] = Math.exp(z[row + v] - most);
    for (let v = 0; v < V; v += 1) q.data[row + v] /= total; // eq. (ce.1)
    loss -= (z[row + targets[n]] - most - Math.log(total)) / N; // eq. (ce.2)
    q.data[row + targets[n]] -= 1;
  }
  const d_logits = q.scaled(1 / N); // eq. (ce.3)
  return [loss, d_logits];
}
